"""A thinned optimizer state is the one that training the thinned model has."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from thinning_cases import (
    COUPLINGS,
    VARIABLES,
    assert_trees_equal,
    cut_of,
    draw,
    kept_units,
    masked,
    masks_without,
)

import agp_jax as agp
from agp_jax.trees import flatten_with_paths

SHAPES = jax.tree.map(jnp.shape, VARIABLES["params"])
GONE = masks_without(1, 4)["params"]
CUT = cut_of(1, 4).subtree("params")


def after_updates(tx, params, prepare):
    """Parameters and state after updates with the same gradients, prepared."""
    step = jax.jit(tx.update)
    state = tx.init(params)
    for seed in range(3):
        updates, state = step(prepare(draw(SHAPES, seed + 10)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lamb, clipped": optax.chain(
        optax.clip_by_global_norm(1.0), optax.lamb(1e-2, weight_decay=0.1)
    ),
    "adam, averaged": optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "several steps": optax.MultiSteps(optax.adam(1e-2), 2),
    "masked": optax.masked(
        optax.adam(1e-2), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "partition": optax.partition(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(0.1, momentum=0.9)},
        lambda p: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", p),
    ),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "history": optax.scale_by_lbfgs(memory_size=2),
    "factored": optax.scale_by_factored_rms(min_dim_size_to_factor=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_thinned_state_is_the_one_that_thinned_training_has(name):
    """Masked parameters and gradients on one side, small ones on the other."""
    tx = OPTIMIZERS[name]
    start = masked(VARIABLES["params"], GONE)
    params, state = after_updates(tx, start, lambda g: masked(g, GONE))
    found = agp.thin_opt_state(state, params, CUT)
    small = agp.thin(start, CUT)
    expected = after_updates(tx, small, lambda g: agp.thin(g, CUT))
    assert_trees_equal((agp.thin(params, CUT), found), expected, rtol=2e-5, atol=1e-6)
    shapes = jax.eval_shape(tx.init, params)
    abstract = agp.thin_opt_state(shapes, jax.eval_shape(lambda: params), CUT)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, found)
    under_jit = jax.jit(lambda s: agp.thin_opt_state(s, params, CUT))(state)
    assert_trees_equal(under_jit, found, rtol=1e-6)


@pytest.mark.parametrize("shape, kept", [((6, 8), 4), ((8, 6), 4), ((2, 5, 7), 3)])
def test_factored_moments_are_the_means_over_what_stays(shape, kept):
    """Also where the larger of the two axes becomes the smaller one."""
    axis = len(shape) - 1 if shape[-1] > shape[-2] else len(shape) - 2
    stays = np.sort(np.random.default_rng(0).permutation(shape[axis])[:kept])
    cut = agp.Cut({"kernel": {axis: stays}}, {"kernel": shape})
    params = draw({"kernel": shape})
    params["kernel"] *= np.isin(np.arange(shape[axis]), stays).reshape(
        [-1 if i == axis else 1 for i in range(len(shape))]
    )
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    _, state = tx.update(params, tx.init(params), params)
    small = agp.thin(params, cut)
    _, expected = tx.update(small, tx.init(small), small)
    found = agp.thin_opt_state(state, params, cut)
    assert_trees_equal(found, expected, rtol=1e-5)


def test_factored_moments_over_other_axes_raise():
    cut = agp.Cut({"kernel": {2: np.arange(2)}}, {"kernel": (4, 5, 6)})
    params = draw({"kernel": (4, 5, 6)})
    state = optax.scale_by_factored_rms(min_dim_size_to_factor=2).init(params)
    with pytest.raises(ValueError, match="largest axes are others; make a new state"):
        agp.thin_opt_state(state, params, cut)


@pytest.mark.parametrize("packed", [False, True])
def test_masks_of_prune_are_cut_with_its_moments(packed):
    rules = [agp.Rule("up", agp.filters(), agp.one_shot(0.5, step=1))]
    rules += [agp.Rule("norm/.*", None), agp.Rule("down", agp.element())]
    rules[2] = agp.Rule("down", agp.element(), agp.one_shot(0.2, step=2))
    tx = agp.prune(
        optax.sgd(0.1, momentum=0.9),
        rules,
        couplings=COUPLINGS.subtree("params"),
        packed=packed,
    )
    params, state = after_updates(tx, VARIABLES["params"], lambda g: g)
    masks = agp.get_masks(state)
    cut = agp.plan_cut({"params": masks}, COUPLINGS)
    stays = kept_units(cut)
    assert len(stays) == 3
    small = agp.thin_opt_state(state, params, cut.subtree("params"))
    assert isinstance(small, agp.PruneState) and small.step == 3
    assert_trees_equal(agp.get_masks(small)["down"], masks["down"][np.array(stays)])
    assert bool(agp.get_masks(small)["up"].all())
    (trace,) = (x.trace for x in state.inner_state if hasattr(x, "trace"))
    (found,) = (x.trace for x in small.inner_state if hasattr(x, "trace"))
    assert_trees_equal(found, agp.thin(trace, cut.subtree("params")))


def by_path(tree):
    paths, leaves, _ = flatten_with_paths(tree)
    return dict(zip(paths, leaves, strict=True))


def test_paths_that_end_alike_are_not_confused():
    shape = (3, 4, 4)
    params = draw({"Conv_0": {"kernel": shape}, "Block": {"Conv_0": {"kernel": shape}}})
    shapes = {"Conv_0/kernel": shape, "Block/Conv_0/kernel": shape}
    tx = optax.adam(1e-2)
    _, state = tx.update(params, tx.init(params), params)
    for path, other in (tuple(shapes), tuple(shapes)[::-1]):
        cut = agp.Cut({path: {2: np.array([0, 3])}}, shapes)
        found = agp.thin_opt_state(state, params, cut)
        for name in ("mu", "nu"):
            before, after = (by_path(getattr(x[0], name)) for x in (state, found))
            np.testing.assert_array_equal(after[path], before[path][..., [0, 3]])
            np.testing.assert_array_equal(after[other], before[other])


def as_list(tx):
    """Moments as a user's own code may keep them: a list of arrays."""
    return optax.GradientTransformation(
        lambda params: jax.tree.leaves(tx.init(params)), tx.update
    )


NOT_UNDERSTOOD = {
    "rows and columns": optax.sm3(0.1),
    "of a part": optax.masked(
        optax.sm3(0.1), {"up": True, "down": True, "norm": False}
    ),
    "one long vector": optax.flatten(optax.adam(0.1)),
    "inside of prune": agp.prune(
        optax.sm3(0.1), [agp.Rule("up", agp.filters(), agp.one_shot(0.5, step=1))]
    ),
    "a list": as_list(optax.sgd(0.1, momentum=0.9)),
}


@pytest.mark.parametrize("tx", NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD)
def test_what_is_not_understood_is_refused_and_not_left_whole(tx):
    params = VARIABLES["params"]
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(
        ValueError, match="not known how that divides; make a new state"
    ):
        agp.thin_opt_state(state, params, CUT)
    nothing = agp.Cut({}, CUT.shapes)
    assert agp.thin_opt_state(state, params, nothing) == state


def test_moments_by_joined_paths_are_thinned_by_these():
    params = VARIABLES["params"]
    paths, leaves, _ = flatten_with_paths(params)
    state = {"count": jnp.int32(3), "mu": dict(zip(paths, leaves, strict=True))}
    found = agp.thin_opt_state(state, params, CUT)
    assert_trees_equal(found["mu"], by_path(agp.thin(params, CUT)))
    assert found["count"] == 3


def test_a_value_that_mirrors_nothing_keeps_its_name():
    params = {"attn": Attention(jnp.ones((3, 4)), jnp.ones((3, 5)))}
    cut = agp.Cut(
        {"attn/value": {1: np.arange(2)}}, {"attn/key": (3, 4), "attn/value": (3, 5)}
    )
    state = {"rows": {"attn": Attention(jnp.ones(2), jnp.ones(3))}}
    with pytest.raises(ValueError, match="shape .3,. for attn/value.*make a new state"):
        agp.thin_opt_state(state, params, cut)
    state["rows"]["attn"] = Attention([jnp.ones(3)], [jnp.ones(3)])
    with pytest.raises(ValueError, match="shape .3,. for attn/value.*make a new state"):
        agp.thin_opt_state(state, params, cut)


class Attention(NamedTuple):
    key: jax.Array
    value: jax.Array


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(3, 6, rngs=rngs)
        self.down = nnx.Linear(6, 2, rngs=rngs)


@pytest.mark.parametrize("of", [lambda x: x.opt_state, lambda x: nnx.state(x)])
def test_the_state_of_an_nnx_optimizer_is_thinned(of):
    model = Perceptron(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    rules = [agp.Rule(".*kernel", agp.element(), agp.one_shot(0.5, step=1))]
    optimizer = nnx.Optimizer(model, agp.prune(optax.adam(0.1), rules), wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, params)
    stays = np.array([0, 3, 4])
    axes = {"up/kernel": {1: stays}, "up/bias": {0: stays}, "down/kernel": {0: stays}}
    cut = agp.Cut(axes, {k: x.shape for k, x in by_path(params).items()})
    before = of(optimizer)
    small = agp.thin_opt_state(before, params, cut)
    assert jax.tree.structure(small) == jax.tree.structure(before)
    for path, old in by_path(before).items():
        owner = next((p for p in axes if path.endswith(p)), None)
        for axis in axes.get(owner, {}):
            old = jnp.take(old, stays, axis)
        np.testing.assert_array_equal(by_path(small)[path], old)
    assert [x.shape for x in jax.tree.leaves(small)].count((3, 6)) == 0


def test_states_and_parameters_that_do_not_fit_raise():
    params = VARIABLES["params"]
    sums = jax.tree.map(lambda x: x.sum(-1), params)
    with pytest.raises(ValueError, match="shape .* for .*make a new state with opti"):
        agp.thin_opt_state({"sums": sums}, params, CUT)
    with pytest.raises(ValueError, match="cut.subtree"):
        agp.thin_opt_state(optax.adam(1e-2).init(params), params, cut_of(1, 4))
