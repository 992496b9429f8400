"""Masks of sharded weights are those of whole ones, bit for bit, and lie as they do."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mask_oracle import masker, normal, rule, whole_numbers

import agp_jax as agp
from agp_jax.packing import pack, unpack

P = PartitionSpec

SPECS = [P("x", "y"), P(None, "x"), P(("x", "y"), None)]
MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
each_mesh = pytest.mark.parametrize("kind", MESHES)
each_sharding = pytest.mark.parametrize(
    "kind, spec", [("auto", SPECS[0]), *(("explicit", spec) for spec in SPECS)], ids=str
)


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(MESHES[kind],) * 2)


EVERY_STRUCTURE = {
    "element": agp.element(),
    "n_of_m": agp.n_of_m(1, 4),
    "filters": agp.filters(),
    "channels": agp.channels(),
    "heads": agp.heads(4),
}
prune_every_way = masker(
    *(rule(name, structure) for name, structure in EVERY_STRUCTURE.items()),
    rule("together_.", scope="rule"),
)
EVERY_TENSOR = [*EVERY_STRUCTURE, "together_x", "together_y"]


def tied_tensors():
    """Tensors whose filters, channels and heads hold the same numbers, reordered.

    Their exact sums are equal: adding in another order must not tell them apart.
    """
    rng = np.random.default_rng(0)
    base = rng.normal(size=64).astype(np.float32)
    columns = np.stack([rng.permutation(base) for _ in range(32)], axis=1)
    tensors = {name: normal(i, (64, 32)) for i, name in enumerate(EVERY_TENSOR)}
    tensors |= {"filters": columns, "heads": columns}
    tensors["channels"] = np.ascontiguousarray(
        np.stack([rng.permutation(base[:32]) for _ in range(64)])
    )
    return tensors


SECOND = "explicit", SPECS[0]  # where an event with masks so far is tried as well


@functools.cache
def sharded_masks(kind, spec):
    """Parameters and their first and second masks on the mesh."""
    with jax.set_mesh(mesh_of(kind)) as _:
        sharding = NamedSharding(mesh_of(kind), spec)
        params = {k: jax.device_put(x, sharding) for k, x in tied_tensors().items()}
        first = prune_every_way(params, jnp.int32(6))
        if (kind, spec) != SECOND:
            return params, first, first
        before = {k: jax.device_put(np.asarray(x), sharding) for k, x in first.items()}
        return params, first, prune_every_way(params, jnp.int32(9), before)


@functools.cache
def plain_masks():
    first = prune_every_way(tied_tensors(), 6)
    return first, prune_every_way(tied_tensors(), 9, first)


@pytest.mark.parametrize("name", EVERY_TENSOR)
@each_sharding
def test_sharded_weights_give_the_same_masks_bit_for_bit(kind, spec, name):
    _, first, second = sharded_masks(kind, spec)
    np.testing.assert_array_equal(first[name], plain_masks()[0][name])
    if (kind, spec) == SECOND:
        np.testing.assert_array_equal(second[name], plain_masks()[1][name])


@pytest.mark.parametrize("name", EVERY_TENSOR)
@each_sharding
def test_masks_have_the_sharding_of_their_parameter(kind, spec, name):
    params, *both = sharded_masks(kind, spec)
    for masks in both:
        assert masks[name].sharding.is_equivalent_to(params[name].sharding, 2)


SPANNING = {  # structure, shape and sharding: cells or groups cross the devices' edges
    "block": (agp.block((32, 1)), (64, 8), P("x", None)),
    "square": (agp.block((8, 8)), (16, 16), P("x", "y")),
    "heads": (agp.heads(2), (6, 16), P(None, "x")),
    "n_m_last": (agp.n_of_m(1, 4, axis=-1), (6, 8), P(None, "x")),
    "n_m_first": (agp.n_of_m(1, 4), (12, 8), P("x", "y")),
}


@functools.cache
def spanning_masks(kind=None):
    make = masker(*(rule(name, x) for name, (x, _, _) in SPANNING.items()))
    params = {k: normal(i, x) for i, (k, (_, x, _)) in enumerate(SPANNING.items())}
    if kind is None:
        return make(params, 9)
    with jax.set_mesh(mesh_of(kind)) as _:
        for name, (_, _, spec) in SPANNING.items():
            sharding = NamedSharding(mesh_of(kind), spec)
            params[name] = jax.device_put(params[name], sharding)
        return make(params, jnp.int32(9))


@pytest.mark.parametrize("name", SPANNING)
@each_mesh
def test_cells_may_lie_on_several_devices(kind, name):
    np.testing.assert_array_equal(spanning_masks(kind)[name], spanning_masks()[name])


STACKS = {"a": agp.element(), "b": agp.filters(), "c": agp.n_of_m(1, 4)}
STACK_RULES = [
    *(rule(name, structure, stacked_axes=1) for name, structure in STACKS.items()),
    rule("flat"),
]


@functools.cache
def stacked_masks(kind=None, spec=None):
    make = masker(*STACK_RULES)
    weights = whole_numbers(0, (8, 16, 16))
    if kind is None:
        return make(dict.fromkeys(STACKS, weights) | {"flat": weights[0]}, 9)
    with jax.set_mesh(mesh_of(kind)) as _:
        on_mesh = jax.device_put(weights, NamedSharding(mesh_of(kind), spec))
        params = dict.fromkeys(STACKS, on_mesh) | {"flat": jnp.asarray(weights[0])}
        return make(params, jnp.int32(9))


@pytest.mark.parametrize("spec", [P("x", None, "y"), P(None, "x", "y")])
@pytest.mark.parametrize("name", [*STACKS, "flat"])
@each_mesh
def test_stacked_axes_may_be_sharded(kind, name, spec):
    masks = stacked_masks(kind, spec)
    np.testing.assert_array_equal(masks[name], stacked_masks()[name])


@pytest.mark.parametrize("structure", [agp.element(), agp.block((4, 1))], ids=str)
def test_a_sharded_selection_moves_a_few_numbers_only(structure):
    with jax.set_mesh(mesh_of("auto")) as _:
        sharding = NamedSharding(mesh_of("auto"), P("x", "y"))
        weights = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=sharding)
        make = masker(rule(structure=structure))
        text = make.lower({"w": weights}, jnp.int32(0)).compile().as_text()
    moved = 0
    for line in text.splitlines():
        if re.search(r" (all-|reduce-scatter|collective-)[\w-]*\(", line):
            result = line.split("=", 1)[1]
            sizes = re.findall(r"\w+\[([\d,]*)\]", result.split("(%")[0])
            moved += 1
            for size in sizes:
                assert math.prod(int(x) for x in size.split(",") if x) <= 64, line
    assert moved


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (16, 24)], ids=str)
@each_mesh
def test_packing_works_on_many_devices_and_keeps_the_sharding(kind, shape, spec):
    mask = np.random.default_rng(0).random(shape) < 0.5
    with jax.set_mesh(mesh_of(kind)) as _:
        sharding = NamedSharding(mesh_of(kind), spec)
        packed = jax.jit(pack)(jax.device_put(mask, sharding))
        again = jax.jit(unpack)(packed)
    np.testing.assert_array_equal(again, mask)
    if shape == (64, 64):  # else the bytes do not divide among the devices
        assert packed.bits.sharding.is_equivalent_to(sharding, 2)


def test_a_fingerprint_is_of_the_masks_and_not_of_their_sharding():
    rng = np.random.default_rng(0)
    kept = {"a": rng.random((16, 24)) < 0.5, "b": rng.random(8) < 0.5}
    expected = int(agp.fingerprint(jax.tree.map(jnp.asarray, kept)))
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    specs = {"a": PartitionSpec("x", "y"), "b": PartitionSpec("y")}
    masks = {k: jax.device_put(kept[k], NamedSharding(mesh, specs[k])) for k in kept}
    assert int(jax.jit(agp.fingerprint)(masks)) == expected
    for path, place in (("a", (0, 0)), ("a", (15, 23)), ("b", (7,))):
        changed = {k: x.copy() for k, x in kept.items()}
        changed[path][place] ^= True
        assert int(agp.fingerprint(jax.tree.map(jnp.asarray, changed))) != expected
    swapped = {"a": kept["a"][::-1], "b": kept["b"]}
    assert int(agp.fingerprint(jax.tree.map(jnp.asarray, swapped))) != expected
