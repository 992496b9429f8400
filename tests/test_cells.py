"""Cells: keys in the order of NumPy's scores, and masks in the shape of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agp_jax as agp
from agp_jax.bits import INFINITY, LOWEST
from agp_jax.cells import Leaf, enter, mask_of_cells, weight_scores

SHAPE = (4, 6, 8)
# Each with the box of one cell; with `stacked_axes=1` of what is left of the shape.
STRUCTURES = {
    "element": (agp.element(), 0, (1, 1, 1)),
    "block": (agp.block((2, 3, 4)), 0, (2, 3, 4)),
    "filters": (agp.filters(), 0, (4, 6, 1)),
    "heads": (agp.heads(2), 0, (4, 6, 4)),
    "stacked elements": (agp.element(), 1, (1, 1, 1)),
    "stacked channels": (agp.channels(), 1, (1, 1, 8)),
}


def make_leaf(structure, stacked_axes=0, *, score=jnp.abs, dtype=jnp.float32):
    """A leaf of few different weights, whose sums are exact."""
    schedule = agp.one_shot(0.5)
    rule = agp.Rule("w", structure, schedule, score=score, stacked_axes=stacked_axes)
    weights = np.random.default_rng(0).integers(-9, 10, size=SHAPE) / 4
    return Leaf("w", rule, jnp.asarray(weights, dtype), None, None, None)


def sum_boxes(values, box):
    """Sums over boxes, as float64 (cells of axis 0, of axis 1, ...)."""
    pairs = zip(SHAPE, box, strict=True)
    split = [n for size, width in pairs for n in (size // width, width)]
    return np.asarray(values, np.float64).reshape(split).sum(axis=(1, 3, 5))


def keys_of(leaf):
    entrant = enter(leaf)
    keys = np.asarray(entrant.keys(*entrant.arrays))
    assert keys.shape == entrant.shape and keys.dtype == np.int32
    return keys


def assert_same_order(keys, scores):
    """Equal keys where scores are equal, larger ones where they are larger."""
    _, found = np.unique(keys, return_inverse=True)
    _, expected = np.unique(scores, return_inverse=True)
    np.testing.assert_array_equal(found.reshape(-1), expected.reshape(-1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("score", [jnp.abs, jnp.square])
@pytest.mark.parametrize("name", STRUCTURES)
def test_keys_have_the_order_of_sums_over_boxes(name, score, dtype):
    structure, stacked_axes, box = STRUCTURES[name]
    leaf = make_leaf(structure, stacked_axes, score=score, dtype=dtype)
    exact = np.asarray(leaf.weights, np.float64)
    scores = np.abs(exact) if score is jnp.abs else exact**2
    assert_same_order(keys_of(leaf), sum_boxes(scores, box))


@pytest.mark.parametrize("name", STRUCTURES)
def test_cells_that_are_gone_come_last_and_others_lose_what_is_masked(name):
    structure, stacked_axes, box = STRUCTURES[name]
    rng = np.random.default_rng(1)
    cells = rng.random([n // w for n, w in zip(SHAPE, box, strict=True)]) < 0.6
    mask = np.kron(cells, np.ones(box, bool)).astype(bool)
    if max(box) > 1:
        mask &= rng.random(SHAPE) < 0.7  # parts of the others are masked, too
    leaf = make_leaf(structure, stacked_axes)._replace(mask=jnp.asarray(mask))
    keys = keys_of(leaf)
    alive = sum_boxes(mask, box) > 0
    np.testing.assert_array_equal(keys == LOWEST, ~alive)
    scores = sum_boxes(np.where(mask, np.abs(leaf.weights), 0), box)
    assert_same_order(keys[alive], scores[alive])


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_mask_of_cells_covers_their_boxes(name):
    structure, stacked_axes, box = STRUCTURES[name]
    rng = np.random.default_rng(2)
    kept = rng.random([n // w for n, w in zip(SHAPE, box, strict=True)]) < 0.5
    expected = np.kron(kept, np.ones(box)).astype(bool)
    leaf = make_leaf(structure, stacked_axes)
    np.testing.assert_array_equal(mask_of_cells(leaf, jnp.asarray(kept)), expected)
    former = rng.random(SHAPE) < 0.5
    leaf = leaf._replace(mask=jnp.asarray(former))
    found = mask_of_cells(leaf, jnp.asarray(kept))
    np.testing.assert_array_equal(found, expected & former)


def test_scores_come_from_weights_gradients_or_outside():
    rng = np.random.default_rng(3)
    gradient, given = (jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in "ab")
    score = lambda weights, gradients: jnp.abs(weights * gradients)  # noqa: E731
    leaf = make_leaf(agp.element(), score=score)._replace(gradient=gradient)
    expected = np.abs(np.asarray(leaf.weights) * np.asarray(gradient))
    np.testing.assert_allclose(weight_scores(leaf), expected, rtol=1e-6)
    np.testing.assert_array_equal(weight_scores(leaf._replace(score=given)), given)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("score", [jnp.abs, jnp.square, lambda x: jnp.ones_like(x)])
def test_what_is_not_finite_has_no_smaller_key_than_infinity(score, bad):
    leaf = make_leaf(agp.element(), score=score)
    leaf = leaf._replace(weights=leaf.weights.at[1, 2, 3].set(bad))
    keys = keys_of(leaf)
    places = np.argwhere(keys >= INFINITY).tolist()
    assert places == [[1, 2, 3]]


def test_one_weight_cells_are_scored_from_what_is_stored_anyway():
    """Nothing is computed to enter: the arrays are the leaf's own."""
    leaf = make_leaf(agp.element())

    def arrays(weights, mask):
        own = leaf._replace(weights=weights, mask=mask)
        return enter(own).arrays

    traced = jax.make_jaxpr(arrays)(leaf.weights, jnp.ones(SHAPE, bool))
    assert not traced.eqns


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["element", "filters"])
def test_idle_bits_are_zero_in_all_keys(name, dtype):
    structure, stacked_axes, _ = STRUCTURES[name]
    leaf = make_leaf(structure, stacked_axes, dtype=dtype)
    noise = np.random.default_rng(4).normal(size=SHAPE)
    leaf = leaf._replace(weights=jnp.asarray(noise, dtype))
    expected = {"float32": 0, "bfloat16": 16, "float16": 13}[jnp.dtype(dtype).name]
    idle_bits = enter(leaf).idle_bits
    assert idle_bits == (expected if name == "element" else 0)
    assert not (keys_of(leaf) & ((1 << idle_bits) - 1)).any()


def test_gradients_that_are_missing_and_scores_of_another_shape_are_errors():
    score = lambda weights, gradients: weights * gradients  # noqa: E731
    with pytest.raises(ValueError, match="ranks w by gradients, which there are none"):
        weight_scores(make_leaf(agp.element(), score=score))
    leaf = make_leaf(agp.element())._replace(score=jnp.ones(3))
    with pytest.raises(ValueError, match=r"must have its shape \(4, 6, 8\), got \(3,"):
        weight_scores(leaf)
