"""Masks at one bit per weight."""

import dataclasses

import jax
import jax.numpy as jnp

from agp_jax.shardings import num_shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """A bool array with eight neighbours along one axis in a byte.

    Attributes:
      bits: uint8, shaped like the mask but for `axis`, which is an eighth as long.
      axis: the packed axis.
      size: the length of that axis in the mask, where the last byte may be part full.
    """

    bits: jax.Array
    axis: int = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})


def pack(mask: jax.Array) -> PackedMask | jax.Array:
    """Packs a bool array along an axis whose bytes do not cross devices.

    That is the longest axis that fills whole bytes on every device, or else the longest
    one that is not divided, padded. Where there is none the mask stays as it is. How
    an axis is divided is known on explicit meshes only; elsewhere none counts as such.
    """
    axes = range(mask.ndim)
    whole = [a for a in axes if mask.shape[a] % (8 * num_shards(mask, a)) == 0]
    padded = [a for a in axes if num_shards(mask, a) == 1]
    if not whole and not padded:
        return mask
    axis = max(whole or padded, key=lambda a: mask.shape[a])
    return PackedMask(jnp.packbits(mask, axis=axis), axis, mask.shape[axis])


def unpack(mask: PackedMask | jax.Array) -> jax.Array:
    """The bool array that was packed; any other mask as it is."""
    if not isinstance(mask, PackedMask):
        return mask
    if mask.bits.size == 0:
        shape = list(mask.bits.shape)
        shape[mask.axis] = mask.size
        return jnp.zeros(shape, bool)
    bits = jnp.unpackbits(mask.bits, axis=mask.axis, count=mask.size)
    return bits.astype(bool)
