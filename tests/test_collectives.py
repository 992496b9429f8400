"""What pruning adds to the traffic between devices, read from the compiled program."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import agp_jax as agp

STRUCTURES = {
    "element": dict(structure=agp.element()),
    "block": dict(structure=agp.block((8, 1))),
    "filters": dict(structure=agp.filters()),
    "n_m": dict(structure=agp.n_m(2, 4)),
    "global": dict(structure=agp.element(), scope="rule"),
    "stacked": dict(structure=agp.element(), stacked_axes=1),
}
SPECS = {
    "rows": PartitionSpec("x", None),
    "columns": PartitionSpec(None, "y"),
    "both": PartitionSpec("x", "y"),
    "replicated": PartitionSpec(),
}
SHAPE = 256, 384
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1, "s64": 8}
MOVES = "all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"


def compiled_step(kind, spec, axis_type, num_leaves=2, packed=False):
    """A compiled optimizer step on a mesh of 2 x 4 devices."""
    options = STRUCTURES[kind]
    stacked = options.get("stacked_axes", 0)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    end = 0.5 if kind == "n_m" else 0.9
    schedule = agp.polynomial_schedule(end, begin_step=0, end_step=100, frequency=10)
    tx = agp.prune(
        optax.sgd(0.1, momentum=0.9),
        [agp.Rule("w.*", schedule=schedule, **options)],
        packed=packed,
    )

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    sharding = NamedSharding(mesh, PartitionSpec(*[None] * stacked, *spec))
    weight = jax.ShapeDtypeStruct(
        (3,) * stacked + SHAPE, jnp.float32, sharding=sharding
    )
    params = {f"w{i}": weight for i in range(num_leaves)}
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        whole = NamedSharding(mesh, PartitionSpec())
        # On an automatic mesh a mask lies as its parameter does, as a jitted init says.
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=x.sharding
                if axis_type == AxisType.Explicit
                else (sharding if x.shape == weight.shape else whole),
            ),
            state,
        )
        return (
            jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
        )


def collectives(compiled):
    """(kind, bytes) of each in the text; the kinds that move data, and all-reduce."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(rf" = (.*?) ({MOVES}|all-reduce)(-start)?\(", line)
        if match:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(
                BYTES[dtype] * math.prod(map(int, filter(None, dims.split(","))))
                for dtype, dims in shapes
            )
            found.append((match[2], size))
    return found


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", STRUCTURES)
def test_no_weights_scores_or_masks_are_moved(kind, spec, axis_type):
    compiled = compiled_step(kind, SPECS[spec], axis_type)
    moved = [x for x in collectives(compiled) if x[0] != "all-reduce"]
    assert all(size <= 4096 for _, size in moved), moved
    if spec == "replicated":
        assert not collectives(compiled)


def test_a_packed_mask_is_not_moved_where_the_sharding_is_known():
    compiled = compiled_step("element", SPECS["both"], AxisType.Explicit, packed=True)
    assert all(size <= 4096 for _, size in collectives(compiled))


@pytest.mark.parametrize("kind", ["element", "global", "n_m"])
def test_the_number_of_all_reduces_does_not_grow_with_the_leaves(kind):
    counts = []
    for num_leaves in (2, 8):
        compiled = compiled_step(kind, SPECS["both"], AxisType.Auto, num_leaves)
        kinds = collections.Counter(kind for kind, _ in collectives(compiled))
        counts.append(kinds["all-reduce"])
    assert counts[0] == counts[1]
