"""Optimizers around and inside of `prune` train on as they do without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pruned_optimizers import SETUPS, train
from pruning_cases import (
    LEVELS,
    NO_MASK,
    NOTHING_REMOVED,
    NUM_STEPS,
    Moment,
    assert_same,
    draw,
    jit_step,
    multiply,
    num_removed,
    prune_states,
    remake,
    start,
)

import agp_jax as agp

BY_ELEMENT = [name for name, setup in SETUPS.items() if setup.reach == "element"]
BY_LEAF = [name for name, setup in SETUPS.items() if setup.reach == "leaf"]
all_setups = pytest.mark.parametrize("name", SETUPS)


@functools.cache
def bare_step(name):
    return jit_step(SETUPS[name].bare)


def train_by_hand(name):
    """The parameters and masks of a loop around the bare optimizer, masks in NumPy."""
    moment, masks = start(SETUPS[name].bare, draw(0)), NOTHING_REMOVED
    for t in range(1, NUM_STEPS + 1):
        gradients = multiply(draw(t), masks)
        if t % SETUPS[name].every == 0 and t // SETUPS[name].every in LEVELS:
            masks = remake(moment.params, masks, t // SETUPS[name].every)
        moment = bare_step(name)(gradients, moment, value=jnp.float32(1.0))
        moment = Moment(multiply(moment.params, masks), moment.state)
        yield moment.params, masks


@all_setups
def test_trees_and_dtypes_are_those_of_the_bare_optimizer(name):
    pruned, bare, *_ = SETUPS[name]
    params = draw(0)
    updates = {}
    for key, tx in ("pruned", pruned), ("bare", bare):
        tx = optax.with_extra_args_support(tx)
        state = jax.eval_shape(tx.init, params)
        updates[key], after = jax.eval_shape(
            functools.partial(tx.update, value=1.0), params, state, params
        )
        assert jax.tree.structure(state) == jax.tree.structure(after)
        for old, new in zip(
            jax.tree.leaves(state), jax.tree.leaves(after), strict=True
        ):
            assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert updates["pruned"] == updates["bare"]


@all_setups
def test_one_compilation_serves_all_steps(name):
    _, step = train(name)
    assert step._cache_size() == 1


@all_setups
def test_weights_are_zero_where_masked_and_counts_exact_at_every_step(name):
    every = SETUPS[name].every
    for t, (params, state) in enumerate(train(name)[0]):
        masks = agp.get_masks(state)
        assert [int(s.step) for s in prune_states(state)] == [t // every] * len(
            prune_states(state)
        )
        assert masks["dense"]["bias"] == masks["head"]["scale"] == NO_MASK
        for key in "dense", "head":
            mask, weights = masks[key]["kernel"], params[key]["kernel"]
            assert mask.dtype == bool and mask.shape == weights.shape
            np.testing.assert_array_equal(weights != 0, mask)
        lost = num_removed(LEVELS, t // every, 48)
        assert int(jnp.sum(params["dense"]["kernel"] == 0)) == lost
        lost = 8 * num_removed({4: 0.5}, t // every, 10)
        assert int(jnp.sum(params["head"]["kernel"] == 0)) == lost


@all_setups
def test_masks_only_lose_cells(name):
    masks = [agp.get_masks(state) for _, state in train(name)[0]]
    for before, after in zip(masks, masks[1:], strict=False):
        revived = jax.tree.map(lambda old, new: jnp.any(new & ~old), before, after)
        assert not any(jax.tree.leaves(revived))


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_training_is_the_bare_optimizer_with_weights_masked_by_hand(name):
    for (params, state), (expected, masks) in zip(
        train(name)[0][1:], train_by_hand(name), strict=True
    ):
        found = agp.get_masks(state)
        for key in "dense", "head":
            np.testing.assert_array_equal(found[key]["kernel"], masks[key])
            np.testing.assert_allclose(
                params[key]["kernel"], expected[key]["kernel"], rtol=1e-5, atol=1e-7
            )
        assert_same(params["dense"]["bias"], expected["dense"]["bias"])
        assert_same(params["head"]["scale"], expected["head"]["scale"])


@pytest.mark.parametrize("name", BY_LEAF)
def test_dense_leaves_train_as_with_the_bare_optimizer(name):
    for (params, _), (expected, _) in zip(
        train(name)[0][1:], train_by_hand(name), strict=True
    ):
        assert_same(params["dense"]["bias"], expected["dense"]["bias"])
        assert_same(params["head"]["scale"], expected["head"]["scale"])


@pytest.mark.parametrize("name", ["lamb", "adafactor", "clipping inside"])
def test_between_events_the_bare_optimizer_works_on_masked_gradients(name):
    moments, _ = train(name)
    for t in 1, 3, 5, 7, 8:
        masks = agp.get_masks(moments[t - 1].state)
        masks = {key: masks[key]["kernel"] for key in ("dense", "head")}
        moment = Moment(moments[t - 1].params, moments[t - 1].state.inner_state)
        gradients = multiply(draw(t), masks)
        expected = bare_step(name)(gradients, moment, value=jnp.float32(1.0))
        for x, y in zip(
            jax.tree.leaves(moments[t].params),
            jax.tree.leaves(multiply(expected.params, masks)),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@all_setups
def test_the_optimizer_remembers_nothing_of_masked_weights(name):
    for _, state in train(name)[0]:
        masks = agp.get_masks(state)
        for key in "dense", "head":
            mask = masks[key]["kernel"]
            for inner in [s.inner_state for s in prune_states(state)]:
                for path, leaf in jax.tree_util.tree_leaves_with_path(inner):
                    if leaf.shape == mask.shape and leaf.dtype != bool:
                        left = jnp.abs(jnp.where(mask, 0, leaf)).max()
                        assert left <= SETUPS[name].residue, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "pruned, dense",
    [("mu/kernel", "kernel"), ("kernel", "mu/kernel"), ("nu/mu/kernel", "mu/kernel")],
)
def test_a_moment_is_masked_like_its_own_parameter(pruned, dense):
    shape = (3, 4)
    shapes = {"kernel": shape, "mu": {"kernel": shape}, "nu": {"mu": {"kernel": shape}}}
    bare = optax.adam(0.1)
    tx = agp.prune(bare, [agp.Rule(pruned, agp.element(), agp.one_shot(0.5, step=1))])
    moment, expected = start(tx, draw(0, shapes)), start(bare, draw(0, shapes))
    step, bare_step = jit_step(tx), jit_step(bare)
    for t in 1, 2:
        moment = step(draw(t, shapes), moment)
        expected = bare_step(draw(t, shapes), expected)
    find = lambda tree, path: functools.reduce(dict.get, path.split("/"), tree)  # noqa: E731
    for name in "mu", "nu":
        average = getattr(moment.state.inner_state[0], name)
        assert int(jnp.sum(find(average, pruned) == 0)) == 6
        assert_same(find(average, dense), find(getattr(expected.state[0], name), dense))


def test_counters_survive_a_pruned_scalar_of_their_name():
    rules = [agp.Rule(".*", agp.element(), agp.one_shot(0.5, step=2), scope="rule")]
    params = {"count": jnp.float32(0.1), "kernel": jnp.arange(1.0, 4.0)}
    tx = agp.prune(optax.adam(0.01), rules)
    step, moment = jit_step(tx), start(tx, params)
    for _ in range(3):
        moment = step(jax.tree.map(jnp.ones_like, params), moment)
    assert moment.params["count"] == 0
    assert moment.state.inner_state[0].count == 3


def test_a_transformation_after_prune_breaks_the_zeros():
    moment = start(tx := optax.chain(SETUPS["sgd"].pruned, optax.scale(0.5)), draw(0))
    step = jit_step(tx)
    for t in range(1, 5):
        moment = step(draw(t), moment)
    kernel, mask = moment.params["dense"]["kernel"], agp.get_masks(moment.state)
    assert int(jnp.sum((kernel != 0) & ~mask["dense"]["kernel"])) >= 30
