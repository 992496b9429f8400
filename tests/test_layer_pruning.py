"""Whole layers, pruned and cut: of stacks that a scan steps through, and of loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import agp_jax as agp
from tests.thinning_cases import assert_trees_equal, draw, masked

X = draw((2, 3), seed=7)
STACK = draw({"norm": (4, 3), "up": (4, 3, 5), "down": (4, 5, 3)}, seed=8)
STACK_NAME = "down[0]"


def branch(x, weights):
    """What a layer adds: an MLP of the normalised stream."""
    size = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    hidden = jnp.tanh((x / size * weights["norm"][None]) @ weights["up"])
    return hidden @ weights["down"]


def step(x, weights):
    return x + branch(x, weights)


def stack(params, x):
    return lax.scan(lambda x, weights: (step(x, weights), None), x, params)[0]


def assert_equal_when_cut(fn, params, removed, *inputs, close=1e-9):
    """The thinned function against the masked one: outputs, and gradients of a loss.

    In float64, or else what cancels is noise.
    """
    with jax.enable_x64(True):
        params, inputs = jax.tree.map(in_float64, (params, inputs))
        couplings = agp.find_couplings(fn, params, *inputs)
        masks = couplings.masks(removed)
        cut = agp.plan_cut(masks, couplings)
        zeroed = masked(params, masks)
        small, thin_fn = agp.thin(zeroed, cut), agp.thin_function(fn, params, cut)

        def run(fn):
            def loss(params):
                out = fn(params, *inputs)
                return sum(jnp.square(x).sum() for x in jax.tree.leaves(out)), out

            return jax.jit(jax.grad(loss, has_aux=True))

        gradients, expected = run(fn)(zeroed)
        found, out = run(thin_fn)(small)
        assert all(jnp.abs(x).max() > 0.1 for x in jax.tree.leaves(expected))
        assert_trees_equal(out, expected, rtol=close, atol=close)
        live = agp.thin(masks, cut)
        gradients = masked(agp.thin(gradients, cut), live)
        assert_trees_equal(masked(found, live), gradients, rtol=close, atol=close)
    return cut


def in_float64(x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float64) if is_float else x


# Stacks


def test_a_stack_is_shortened():
    cut = assert_equal_when_cut(stack, STACK, {STACK_NAME: [1, 2]}, X)
    assert {cut.thin_shape(path)[0] for path in STACK} == {2}
    assert [cut[path][0].tolist() for path in STACK] == [[0, 3]] * 3


def test_layers_that_stay_lose_units_of_their_own():
    """A layer that goes sets no bound to what the others lose."""
    others = np.array([[0, 1, 2], [0, 1, 4], [1, 2, 3], [2, 3, 4]])
    couplings = agp.find_couplings(stack, STACK, X)
    masks = couplings.masks({STACK_NAME: [2], "up[2]": others})
    cut = agp.plan_cut(masks, couplings)
    rows = [[3, 4], [2, 3], [0, 1]]
    assert cut["up"][2].tolist() == cut["down"][1].tolist() == rows
    assert_equal_when_cut(stack, STACK, {STACK_NAME: [2], "up[2]": others}, X)
    assert agp.Cut.from_dict(cut.to_dict()) == cut
    # The same in two cuts, in either order.
    for first in ({STACK_NAME: [2]}, {"up[2]": others}):
        early = agp.plan_cut(couplings.masks(first), couplings)
        fn, small = agp.thin_function(stack, STACK, early), agp.thin(STACK, early)
        later = agp.plan_cut(agp.thin(masks, early), agp.find_couplings(fn, small, X))
        assert early.then(later) == cut
    report = agp.check_cut(stack, STACK, masks, cut, X)
    assert report.error < 1e-9
    every = agp.check_cut(stack, STACK, masks, cut, X, tolerance=-1)
    assert set(every.groups) == {STACK_NAME, "up[2]"}
    assert max(every.groups.values()) < 1e-9


def test_one_layer_stays_and_layers_are_not_rounded():
    couplings = agp.find_couplings(stack, STACK, X)
    cut = agp.plan_cut(couplings.masks({STACK_NAME: range(4)}), couplings, round_to=2)
    assert cut.thin_shape("up") == (1, 3, 2)
    cut = agp.plan_cut(couplings.masks({STACK_NAME: [0]}), couplings, round_to=2)
    assert cut.thin_shape("up") == (3, 3, 5)


def drop_layer(x, weights):
    """A step of more than one sum: remembered in part, and left out at random."""
    weights, key, number = weights

    @jax.checkpoint
    def add(x, weights):
        new = branch(x, weights) * (1 + number)
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        new = jnp.where(keep, new / 0.5, 0)
        return x + new, new

    new, added = add(x, weights)
    return lax.cond(number > 1, lambda: new, lambda: x), added


def test_random_keys_and_counters_go_with_their_layer():
    """So dropout has the same bits in the layers that stay."""

    def fn(params, x, key):
        keys = jax.random.split(jax.random.fold_in(key, 1), 4)
        x, added = lax.scan(drop_layer, x, (params, keys, jnp.arange(4.0)))
        return x + added.sum(0)

    cut = assert_equal_when_cut(fn, STACK, {STACK_NAME: [0, 2]}, X, jax.random.key(3))
    assert cut.thin_shape("up") == (2, 3, 5)


def rescaled(x, weights):
    return 0.5 * x + branch(x, weights)


def rectified(x, weights):
    return jax.nn.relu(x + branch(x, weights))


def without_skip(x, weights):
    return branch(x, weights)


def divided(x, weights):
    return x + branch(x, weights) / jnp.linalg.norm(
        x @ weights["up"], axis=-1, keepdims=True
    )


def rounded(x, weights):
    narrow = x.astype(jnp.bfloat16) + branch(x, weights).astype(jnp.bfloat16)
    return narrow.astype(x.dtype)


@pytest.mark.parametrize("layer", [rescaled, rectified, without_skip, divided, rounded])
def test_a_stack_whose_steps_do_more_than_add_is_fixed(layer):
    def fn(params, x):
        return lax.scan(lambda x, w: (layer(x, w), None), x, params)[0]

    couplings = agp.find_couplings(fn, STACK, X)
    assert not any(group.is_stack for group in couplings.groups)
    ((start, stop, reason),) = couplings.frozen["up", 0]
    assert (start, stop) == (0, 4)
    assert "whose steps do more than add to what they carry" in reason


def test_layers_whose_number_an_input_or_output_has_are_fixed():
    def with_input(params, x, more):
        steps = params, more
        return lax.scan(lambda h, s: (step(h, s[0]) + 0 * s[1], None), x, steps)[0]

    def with_output(params, x):
        return lax.scan(lambda h, w: (step(h, w), h), x, params)

    for fn, inputs in ((with_output, (X,)), (with_input, (X, jnp.ones((4, 2, 3))))):
        couplings = agp.find_couplings(fn, STACK, *inputs)
        assert not any(group.is_stack for group in couplings.groups)
