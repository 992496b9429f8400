"""Boxes summed and filled against plain loops, in any order and at any scale; counts of
what is not zero, of any size and on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from box_cases import BOXES, boxes, whole_numbers
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from agp_jax.boxes import (
    _count_nonzero,
    any_in_boxes,
    count_nonzero,
    fill_boxes,
    sum_boxes,
)
from agp_jax.structures import grid_shape


@functools.cache
def reduce_all(rows):
    """(values, sums, any above 40, sums filled in) of every tensor in `BOXES`."""

    @jax.jit
    def reduce(values):
        result = {}
        for name, (_, _, box) in BOXES.items():
            sums = sum_boxes(values[name], box)
            some = any_in_boxes(values[name] > 40, box)
            result[name] = values[name], sums, some, fill_boxes(sums, box)
        return result

    values = {
        name: whole_numbers(seed, (*rows, *shape))
        for seed, (name, (_, shape, _)) in enumerate(BOXES.items())
    }
    return jax.tree.map(np.asarray, reduce(values))


@pytest.mark.parametrize("rows", [(), (2, 3)])
@pytest.mark.parametrize("name", BOXES)
def test_boxes_are_summed_and_filled_like_loops_do(name, rows):
    _, shape, box = BOXES[name]
    values, sums, some, filled = reduce_all(rows)[name]
    assert sums.shape == some.shape == (*rows, *grid_shape(box, shape))
    flat = sums.reshape(*rows, -1), some.reshape(*rows, -1)
    for i, where in enumerate(boxes(shape, box)):
        part = values[(..., *where)]
        axes = tuple(range(len(rows), part.ndim))
        assert (flat[0][..., i] == part.sum(axes)).all()
        assert (flat[1][..., i] == (part > 40).any(axes)).all()
        assert filled[(..., *where)].shape == part.shape
        assert (filled[(..., *where)] == part.sum(axes, keepdims=True)).all()


def test_sums_have_the_same_bits_in_any_order():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(96, 5)).astype(np.float32)
    values *= np.float32(10) ** rng.integers(-6, 7, (96, 5))
    orders = [values, values[::-1], rng.permutation(values), np.sort(values, axis=0)]
    sums = [np.asarray(sum_boxes(jnp.asarray(x), (96, 1))) for x in orders]
    for other in sums[1:]:
        np.testing.assert_array_equal(other.view(np.int32), sums[0].view(np.int32))


@pytest.mark.parametrize("signs", [False, True])
def test_every_sum_is_accurate_beside_much_larger_ones(signs):
    rng = np.random.default_rng(0)
    scales = np.float32(10) ** np.arange(-30, 31, 4, dtype=np.float32)
    values = np.abs(rng.normal(size=(3, 64, 16))).astype(np.float32) * scales
    if signs:
        values[:, :16] *= -1
    sums = np.asarray(jax.jit(lambda x: sum_boxes(x, (64, 1)))(values))
    exact = values.astype(np.float64)
    error = np.abs(sums - exact.sum(1, keepdims=True))
    assert (error <= 2e-6 * np.abs(exact).sum(1, keepdims=True)).all()


def test_a_sum_that_is_not_finite_spoils_no_other():
    values = np.abs(whole_numbers(0, (3, 4, 6))) * np.float32(1000)
    expected = values.sum(1, keepdims=True)
    for bad in (np.nan, np.inf):
        values[1, 2, 3] = bad
        sums = np.asarray(sum_boxes(jnp.asarray(values), (4, 1)))
        spoiled = np.arange(3) == 1, np.arange(6) == 3
        fine = ~(spoiled[0][:, None] & spoiled[1])[:, None]
        np.testing.assert_array_equal(sums[fine], expected[fine])


# Counts

COUNTED_SHAPES = [(), (0, 3), (1,), (7,), (3, 5), (2, 3, 4, 5)]


@pytest.mark.parametrize("dtype", [bool, jnp.int8, jnp.bfloat16, jnp.float32])
def test_what_is_not_zero_is_counted(dtype):
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.integers(-1, 2, shape), dtype) for shape in COUNTED_SHAPES
    ]
    with jax.numpy_dtype_promotion("strict"):
        counts = count_nonzero(arrays)
    assert counts == [np.count_nonzero(x) for x in arrays]
    assert {type(count) for count in counts} == {int}


def test_negative_zeros_are_zeros_and_nans_are_not():
    assert count_nonzero([jnp.array([-0.0, np.nan, np.inf, 1e-30])]) == [3]


@pytest.mark.parametrize("shape", [(2**31 + 8,), (1, 2**31 + 8), (2**16, 2**16, 3)])
def test_no_partial_sum_is_in_32_bits(shape):
    """On such an array it takes a minute, so the program is read instead."""
    with jax.enable_x64(True):
        array = jax.ShapeDtypeStruct(shape, jnp.uint8)
        traced = jax.make_jaxpr(_count_nonzero)([array])
        (inner,) = [x.params["jaxpr"] for x in traced.eqns]
        made = {x.primitive.name: x.outvars[0].aval for x in inner.eqns}
    assert traced.out_avals[0].dtype == made["reduce_sum"].dtype == jnp.int64
    assert made["convert_element_type"].dtype == jnp.int64
    assert made["convert_element_type"].shape == shape


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_divided_arrays_are_counted_where_they_lie(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (kind, kind))
    whole = np.random.default_rng(0).integers(0, 2, (8, 6)).astype(np.float32)
    array = jax.device_put(whole, NamedSharding(mesh, PartitionSpec("x", "y")))
    assert count_nonzero([array]) == [np.count_nonzero(whole)]
    with jax.enable_x64(True):
        program = _count_nonzero.lower([array]).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program


def test_arrays_of_the_same_shapes_compile_once():
    arrays = [jnp.ones((4, 4)), jnp.ones(3, bool)]
    count_nonzero(arrays)
    before = _count_nonzero._cache_size()
    assert count_nonzero([2 * arrays[0], ~arrays[1]]) == [16, 0]
    assert _count_nonzero._cache_size() == before
