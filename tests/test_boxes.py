"""Boxes summed and filled against plain loops, in any order and at any scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from box_cases import BOXES, boxes, whole_numbers

from agp_jax.boxes import any_in_boxes, fill_boxes, sum_boxes
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
