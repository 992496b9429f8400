"""What pruning adds to the traffic between devices, read from the compiled program."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import agp_jax as agp
from benchmarks import programs

STRUCTURES = {
    "element": dict(structure=agp.element()),
    "block": dict(structure=agp.block((8, 1))),
    "filters": dict(structure=agp.filters()),
    "n_of_m": dict(structure=agp.n_of_m(2, 4)),
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


@functools.cache
def compiled_step(kind, spec, axis_type, num_leaves=2, packed=False):
    """A compiled optimizer step on a mesh of 2 x 4 devices."""
    options = STRUCTURES[kind]
    stacked = options.get("stacked_axes", 0)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    end = 0.5 if kind == "n_of_m" else 0.9
    schedule = agp.polynomial_schedule(end, begin_step=0, end_step=100, frequency=10)
    tx = agp.prune(
        optax.sgd(0.1, momentum=0.9),
        [agp.Rule("w.*", schedule=schedule, **options)],
        packed=packed,
    )

    stack = (3,) * stacked
    weight = jax.ShapeDtypeStruct((*stack, *SHAPE), jnp.float32)
    along = PartitionSpec(*[None] * stacked, *SPECS[spec])
    specs = {f"w{i}": along for i in range(num_leaves)}
    params = programs.place(dict.fromkeys(specs, weight), mesh, specs)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        if axis_type == AxisType.Auto:  # there a jitted init says how masks lie
            state = programs.place(state, mesh, specs)
        return programs.build(
            programs.make_step(tx), params, state, params, donate=(0, 1)
        )


def moves(program):
    """The collectives that do more than add up."""
    return [x for x in programs.collectives(program) if x.kind != "all-reduce"]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", STRUCTURES)
def test_no_weights_scores_or_masks_are_moved(kind, spec, axis_type):
    program = compiled_step(kind, spec, axis_type)
    assert all(x.num_bytes <= 4096 for x in moves(program)), moves(program)
    if spec == "replicated":
        assert not programs.collectives(program)


def test_a_packed_mask_is_not_moved_where_the_sharding_is_known():
    program = compiled_step("element", "both", AxisType.Explicit, packed=True)
    assert all(x.num_bytes <= 4096 for x in programs.collectives(program))


@pytest.mark.parametrize("kind", STRUCTURES)
def test_the_number_of_all_reduces_does_not_grow_with_the_leaves(kind):
    counts = []
    for options in ({}, {"num_leaves": 4}):  # the first is compiled above
        program = compiled_step(kind, "both", AxisType.Auto, **options)
        found = programs.collectives(program).items()
        counts.append(sum(n for x, n in found if x.kind == "all-reduce"))
    assert counts[0] == counts[1]
