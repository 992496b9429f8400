"""Any parameters can be pruned, their masks are found again, and mistakes are named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pruned_optimizers import SETUPS, split
from pruning_cases import (
    GRADUAL,
    LEVELS,
    NO_MASK,
    NUM_STEPS,
    RULES,
    SHAPES,
    assert_same,
    draw,
    draw_dyadic,
    jit_step,
    keep_best,
    num_removed,
    prune_states,
    start,
)

import agp_jax as agp

# Dtypes and odd trees


@pytest.mark.parametrize(
    "dtype, gradient_dtype",
    [
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float16", "bfloat16"),
        ("float64", "float32"),
        ("float64", "float64"),
    ],
)
def test_weights_of_any_dtype_become_exact_zeros(dtype, gradient_dtype):
    rules = [agp.Rule("kernel", agp.element(), GRADUAL)]
    shapes = {"kernel": (6, 8), "bias": (8,)}
    with jax.enable_x64("float64" in (dtype, gradient_dtype)):
        tx, bare = agp.prune(optax.sgd(0.1), rules), optax.sgd(0.1)
        step, step_bare = jit_step(tx), jit_step(bare)
        moment = start(tx, draw(0, shapes, dtype))
        mask = np.ones(48, bool)
        for t in range(1, NUM_STEPS + 1):
            gradients = draw(t, shapes, gradient_dtype)
            kept = jnp.asarray(mask.reshape(6, 8))
            masked = {**gradients, "kernel": jnp.where(kept, gradients["kernel"], 0)}
            expected, _ = step_bare(masked, start(bare, moment.params))
            scores = np.abs(np.asarray(moment.params["kernel"], np.float32)).ravel()
            moment = step(gradients, moment)
            mask = keep_best(scores, mask, num_removed(LEVELS, t, 48))
            assert moment.params["kernel"].dtype == dtype
            np.testing.assert_array_equal(moment.state.masks["kernel"].ravel(), mask)
            expected["kernel"] = jnp.where(mask.reshape(6, 8), expected["kernel"], 0)
            assert_same(moment.params, expected)
        assert step._cache_size() == 1


@pytest.mark.parametrize("packed", [False, True])
def test_leaves_that_cannot_be_pruned_train_as_ever(packed):
    params = {
        "layers": [
            draw_dyadic(i, {"kernel": s}) for i, s in enumerate([(3, 5), (16,)])
        ],
        "pair": (jnp.arange(4), jnp.array([True, False])),
        "none": None,
        "nothing": {},
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(2.0),
        "single": jnp.ones((1,)),
    }
    rules = [agp.Rule(".*", agp.element(), agp.one_shot(0.6, step=2))]
    bare = optax.sgd(0.25, momentum=0.5)  # exact with these numbers
    tx = agp.prune(bare, rules, packed=packed)
    pruned, dense = start(tx, params), start(bare, params)
    step, step_bare = jit_step(tx), jit_step(bare)
    gradients = jax.tree.map(jnp.ones_like, params)
    for _ in range(3):
        pruned, dense = step(gradients, pruned), step_bare(gradients, dense)
    assert step._cache_size() == step_bare._cache_size()
    masks = agp.get_masks(pruned.state)
    assert masks["pair"] == (NO_MASK, NO_MASK)
    assert masks["none"] is None and masks["nothing"] == {}
    assert [int(jnp.sum(x)) for x in jax.tree.leaves(masks)] == [0, 6, 7, 1, 1]
    layers, dense_layers = pruned.params.pop("layers"), dense.params.pop("layers")
    assert_same(pruned.params, dense.params)
    for i in range(2):
        mask = masks["layers"][i]["kernel"]
        expected = jnp.where(mask, dense_layers[i]["kernel"], 0)
        assert_same(layers[i]["kernel"], expected)


def test_a_number_among_the_parameters_is_left_alone():
    rules = [agp.Rule("kernel", agp.element(), agp.one_shot(0.5, step=1))]
    tx = agp.prune(optax.sgd(0.1, momentum=0.9), rules)
    params = {"kernel": jnp.arange(1.0, 5.0), "gain": 1.0}
    updates, _ = tx.update(
        {"kernel": jnp.ones(4), "gain": 1.0}, tx.init(params), params
    )
    trained = optax.apply_updates(params, updates)
    np.testing.assert_allclose(trained["kernel"], [0, 0, 2.9, 3.9], rtol=1e-6)
    np.testing.assert_allclose(trained["gain"], 0.9, rtol=1e-6)


# Masks found again, errors


def test_masks_of_parts_named_by_a_prefix_are_united():
    rules = [agp.Rule(".*kernel", agp.element(), agp.one_shot(0.5, step=1))]
    part = agp.prune(optax.sgd(0.25), rules)
    both = optax.chain(
        optax.masked(part, {"dense": True, "head": False}),
        optax.masked(part, {"dense": False, "head": True}),
    )
    whole = agp.prune(optax.sgd(0.25), rules)
    gradients = draw_dyadic(1, SHAPES)
    results = [
        jit_step(tx)(gradients, start(tx, draw_dyadic(0, SHAPES)))
        for tx in (both, whole)
    ]
    assert_same(results[0].params, results[1].params)
    assert_same(agp.get_masks(results[0].state), agp.get_masks(results[1].state))


def test_masks_of_a_part_apply_to_the_whole():
    rules = [agp.Rule(".*kernel", agp.element(), agp.one_shot(0.5))]
    params = draw(0)
    for part in (
        {"dense": True, "head": False},
        {"dense": {"kernel": True, "bias": False}},
    ):
        part = {"head": False, **part}
        state = optax.masked(agp.prune(optax.sgd(0.1), rules), part).init(params)
        sparse = agp.apply_masks(params, agp.get_masks(state))
        assert int(jnp.sum(sparse["dense"]["kernel"] == 0)) == 24
        assert_same(sparse["head"], params["head"])


def test_a_state_without_masks_is_refused():
    with pytest.raises(ValueError, match="no PruneState.*agp.prune"):
        agp.get_masks(optax.adam(0.1).init(draw(0)))


@pytest.mark.parametrize("place", [lambda state: state, jax.device_get])
def test_two_masks_of_one_parameter_are_refused(place):
    tx = optax.chain(SETUPS["sgd"].pruned, SETUPS["adam"].pruned)
    with pytest.raises(ValueError, match="several PruneStates"):
        agp.get_masks(place(tx.init(draw(0))))


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(tx)])
def test_optax_finds_what_is_like_the_parameters(wrap):
    """As trainers do to say where a state lies; see also `optax.masked`."""
    tx = wrap(agp.prune(optax.adam(0.1), RULES))
    specs = {"dense": {"kernel": 1, "bias": 2}, "head": {"kernel": 3, "scale": 4}}
    state = jax.eval_shape(tx.init, draw(0))
    found = optax.tree_map_params(
        tx,
        lambda _, spec: spec,
        state,
        specs,
        transform_non_params=lambda _: 0,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    (pruned,) = prune_states(found)
    (adam, _) = pruned.inner_state
    assert pruned.masks == adam.mu == adam.nu == specs
    assert pruned.step == adam.count == 0


@pytest.mark.parametrize("params", [{}, [], None])
def test_no_parameters_are_no_placeholder(params):
    with pytest.raises(ValueError, match="matches no parameter"):
        SETUPS["adam"].pruned.init(params)


def test_parameters_that_init_did_not_see_are_refused():
    rules = [agp.Rule(".*kernel", agp.element(), GRADUAL)]
    tx = agp.prune(optax.sgd(0.1), rules)
    state = tx.init({"dense": draw(0)["dense"]})
    with pytest.raises(ValueError, match="prune 2 of these.*has masks of 1: call init"):
        jax.eval_shape(tx.update, draw(1), state, draw(0))


def test_what_is_no_array_is_named_where_the_optimizer_wants_one():
    params = {"dense": {"kernel": jnp.ones((2, 2)), "activation": jax.nn.relu}}
    tx = agp.prune(optax.adam(0.1), [agp.Rule(".*kernel", agp.element(), GRADUAL)])
    with pytest.raises(ValueError, match="dense/activation is no array.*partition"):
        tx.init(params)


def test_masks_that_were_not_cut_with_their_parameters_are_refused():
    tx = agp.prune(optax.sgd(0.1), [agp.Rule("w", agp.filters(), agp.one_shot(0.5))])
    state = jax.eval_shape(tx.init, {"w": jnp.ones((3, 4))})
    smaller = {"w": jnp.ones((3, 2))}
    for rules in [], [agp.Rule("w", agp.filters(), agp.one_shot(0.5))]:
        message = (
            r"w has shape \(3, 2\), but its mask has shape \(3, 4\).*thin_opt_state"
        )
        with pytest.raises(ValueError, match=message):
            tx = agp.prune(optax.sgd(0.1), rules)
            jax.eval_shape(tx.update, smaller, state, smaller)


def test_update_without_parameters_is_refused():
    tx = SETUPS["sgd"].pruned
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
        tx.update(draw(1), tx.init(draw(0)))


def test_a_rule_without_effect_is_refused_when_training_starts():
    rules = [*RULES, agp.Rule("dense/kernal", agp.element(), GRADUAL)]
    with pytest.raises(ValueError, match="'dense/kernal' matches no.*dense/kernel"):
        agp.prune(optax.sgd(0.1), rules).init(draw(0))
    tx = split(agp.prune(optax.sgd(0.1), RULES), optax.sgd(0.1))
    with pytest.raises(ValueError, match="'head/kernel' matches no parameter"):
        jax.eval_shape(tx.init, draw(0))
