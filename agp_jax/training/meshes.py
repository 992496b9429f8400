"""Where the arrays of a run live: a mesh of all devices, and what each one holds.

The mesh has two axes. The examples of a batch are divided over both; the arrays of the
state are divided over "fsdp" and the same along "data".
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from agp_jax.training.config import ConfigError
from agp_jax.trees import PyTree

_MIN_DIVIDED = 1024  # entries: bringing fewer together costs more than a copy of all


def make_mesh(fsdp: int) -> Mesh:
    """All devices of all processes, (data, fsdp).

    Raises:
      ConfigError: if the devices do not divide into groups of `fsdp`.
    """
    num_devices = jax.device_count()
    if num_devices % fsdp:
        raise ConfigError(
            f"config.devices.fsdp must divide the number of devices, which is "
            f"{num_devices}, got {fsdp}"
        )
    return jax.make_mesh(
        (num_devices // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def place(shapes: PyTree, mesh: Mesh) -> PyTree:
    """`shapes`, a tree of arrays or `jax.ShapeDtypeStruct`s, with their shardings.

    An array of 1,024 or more entries is divided over "fsdp" along its largest axis that
    "fsdp" divides, the first of equals; others are whole on every device. That goes by
    the shape alone, so moments and masks lie where their parameter lies.
    """

    def place_leaf(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, _spec(x.shape, mesh.shape["fsdp"]))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place_leaf, shapes)


def keep_placed(values: PyTree, mesh: Mesh) -> PyTree:
    """Values computed under `jit`, to lie as `place` would place them."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, _spec(x.shape, fsdp))
        ),
        values,
    )


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """A batch on the devices, from the part of it that each process has."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )


def _spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < _MIN_DIVIDED or not divisible:
        return PartitionSpec()
    axis = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * axis, "fsdp")
