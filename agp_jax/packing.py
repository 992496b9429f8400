"""Masks at one bit per weight."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from agp_jax.shardings import num_shards, split_axis


class PackedMask(NamedTuple):
    """A bool array with eight neighbours along one axis in a byte.

    In a JAX tree `bits` alone is a leaf, and the numbers are part of the structure. To
    others, such as `flax.serialization`, it is a NamedTuple with three fields.

    Attributes:
      bits: uint8, shaped like the mask but for `axis`, which is an eighth as long.
      axis: the packed axis.
      size: the length of that axis in the mask, where the last byte may be part full.
    """

    bits: jax.Array
    axis: int
    size: int


def _unflatten(numbers: tuple[int, int], children: Iterable[jax.Array]) -> PackedMask:
    (bits,) = children
    return PackedMask(bits, *numbers)


jax.tree_util.register_pytree_with_keys(
    PackedMask,
    lambda x: (((GetAttrKey("bits"), x.bits),), (x.axis, x.size)),
    _unflatten,
    lambda x: ((x.bits,), (x.axis, x.size)),
)


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
    # Not jnp.packbits and unpackbits: their transposes would give the bits another
    # layout in memory, and keep XLA from unpacking them where the mask is used.
    filled = [(0, -mask.shape[a] % 8 if a == axis else 0) for a in axes]
    split = split_axis(jnp.pad(mask, filled), axis, 8)
    bits = jnp.sum(
        split.astype(jnp.uint8) << _shifts(split.shape, axis), axis + 1, dtype=jnp.uint8
    )
    return PackedMask(bits, axis, mask.shape[axis])


def unpack(mask: PackedMask | jax.Array) -> jax.Array:
    """The bool array that was packed; any other mask as it is."""
    if not isinstance(mask, PackedMask):
        return mask
    repeated = jnp.expand_dims(mask.bits, mask.axis + 1)
    split = (*mask.bits.shape[: mask.axis + 1], 8, *mask.bits.shape[mask.axis + 1 :])
    shape = list(mask.bits.shape)
    shape[mask.axis] *= 8
    bits = (repeated >> _shifts(split, mask.axis)) & np.uint8(1)
    return jax.lax.slice_in_dim(bits.reshape(shape) != 0, 0, mask.size, axis=mask.axis)


def _shifts(split: tuple[int, ...], axis: int) -> jax.Array:
    """The place of each bit in its byte, which the axis after `axis` goes through."""
    return np.uint8(7) - jax.lax.broadcasted_iota(jnp.uint8, split, axis + 1)
