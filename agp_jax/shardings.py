"""What an explicit mesh wants to be told.

On such a mesh the sharding is part of an array's type, and an operation that would have
to move data is an error. On other meshes the compiler decides, nothing is known when
tracing, and the functions here do nothing.
"""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike


def num_shards(values: jax.Array, axis: int) -> int:
    """Over how many devices `axis` is known to be divided."""
    mesh = jax.typeof(values).sharding.mesh
    names = _spec(values)[axis]
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(mesh.shape[name] for name in names if name)


def replicate(values: jax.Array) -> jax.Array:
    """A whole copy on every device; for a few values only."""
    if all(name is None for name in _spec(values)):
        return values
    mesh = jax.typeof(values).sharding.mesh
    return jax.sharding.reshard(values, NamedSharding(mesh, PartitionSpec()))


def bring_together(values: jax.Array, axis: int) -> jax.Array:
    """The same, with `axis` whole on every device; other axes stay divided."""
    spec = _spec(values)
    if spec[axis] is None:
        return values
    mesh = jax.typeof(values).sharding.mesh
    together = PartitionSpec(*spec[:axis], None, *spec[axis + 1 :])
    return jax.sharding.reshard(values, NamedSharding(mesh, together))


def split_axis(values: jax.Array, axis: int, parts: int) -> jax.Array:
    """Splits `axis` into (groups, parts), the second right after the first.

    Where a group lies on several devices, the axis is brought together.
    """
    shape, spec = values.shape, _spec(values)
    groups = shape[axis] // parts
    split = (*shape[:axis], groups, parts, *shape[axis + 1 :])
    if groups % num_shards(values, axis) == 0:
        return values.reshape(split)
    together = PartitionSpec(*spec[:axis], None, None, *spec[axis + 1 :])
    mesh = jax.typeof(values).sharding.mesh
    return jax.lax.reshape(values, split, out_sharding=NamedSharding(mesh, together))


def indices_along(values: jax.Array, axis: int, dtype: DTypeLike) -> jax.Array:
    """The index along `axis` of every entry, in the shape and layout of `values`."""
    known = any(name is not None for name in _spec(values))
    return jax.lax.broadcasted_iota(
        dtype,
        values.shape,
        axis,
        out_sharding=jax.typeof(values).sharding if known else None,
    )


def divides_locally(values: jax.Array, axis: int, parts: int) -> bool:
    """Whether runs of `parts` neighbours along `axis` lie on one device each.

    Where the sharding is not known: whether they do on 2, 4, ... 64 devices.
    """
    size = values.shape[axis]
    groups = size // parts
    return groups % num_shards(values, axis) == 0 and groups % math.gcd(size, 64) == 0


def neighbours(values: jax.Array, axis: int, count: int) -> list[jax.Array]:
    """Takes every `count` neighbours along `axis` apart, into as many arrays."""
    split = split_axis(values, axis, count)
    return [
        jax.lax.index_in_dim(split, i, axis + 1, keepdims=False) for i in range(count)
    ]


def varying_axes(values: jax.Array) -> frozenset[str]:
    """The axes of a `shard_map` along which devices hold different `values`.

    Nothing is known where it does not check that (`check_vma=False`), as in `pmap`.
    """
    kind = getattr(jax.typeof(values), "manual_axis_type", None)  # of jax 0.10.2
    return kind.varying if kind else frozenset()


def _spec(values: jax.Array) -> list:
    spec = jax.typeof(values).sharding.spec
    return [*spec, *[None] * (values.ndim - len(spec))]
