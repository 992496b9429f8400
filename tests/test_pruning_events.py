"""What happens at an event: at step 0, with scores of any origin, and to NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pruned_optimizers import SETUPS, train
from pruning_cases import (
    GRADUAL,
    HEAD_RULE,
    LEVELS,
    NO_MASK,
    NOTHING_REMOVED,
    NUM_STEPS,
    SHAPES,
    Moment,
    assert_same,
    draw,
    draw_dyadic,
    jit_step,
    keep_best,
    multiply,
    num_removed,
    remake,
    start,
)

import agp_jax as agp

# Events at step 0, scores, extra arguments


def test_masks_of_step_0_are_there_after_init():
    rules = [
        agp.Rule(
            "dense/kernel",
            agp.element(),
            agp.polynomial_schedule(
                0.8, begin_step=0, end_step=4, frequency=2, initial_sparsity=0.5
            ),
        )
    ]
    tx = agp.prune(optax.sgd(0.1, momentum=0.9), rules)
    params, state = jax.jit(functools.partial(start, tx))(draw(0))
    scores = np.abs(np.asarray(params["dense"]["kernel"])).ravel()
    mask = keep_best(scores, np.ones(48, bool), 24).reshape(6, 8)
    np.testing.assert_array_equal(state.masks["dense"]["kernel"], mask)
    sparse = agp.apply_masks(params, state.masks)
    np.testing.assert_array_equal(
        sparse["dense"]["kernel"], np.where(mask, params["dense"]["kernel"], 0)
    )
    step = jit_step(tx)
    for before in params, sparse:  # masked by hand or not, the first update does it
        after = step(draw(1), Moment(before, state))
        np.testing.assert_array_equal(after.params["dense"]["kernel"] != 0, mask)
        np.testing.assert_array_equal(after.state.masks["dense"]["kernel"], mask)
        trace = after.state.inner_state[0].trace["dense"]["kernel"]
        np.testing.assert_array_equal(trace != 0, mask)


def taylor(weights, gradients):
    return jnp.square(weights * gradients)


def test_gradient_scores_at_step_0_are_refused():
    curve = functools.partial(agp.one_shot, 0.5)
    tx = agp.prune(
        optax.sgd(0.1), [agp.Rule("k", agp.element(), curve(), score=taylor)]
    )
    with pytest.raises(ValueError, match="rule 'k' ranks k by gradients.*step 1"):
        tx.init({"k": jnp.ones(4)})
    agp.prune(
        optax.sgd(0.1), [agp.Rule("k", agp.element(), curve(step=1), score=taylor)]
    ).init({"k": jnp.ones(4)})


def test_gradient_scores_use_the_gradients_of_the_update():
    rules = [agp.Rule("k", agp.element(), GRADUAL, score=taylor)]
    tx = agp.prune(optax.sgd(0.25), rules)
    shapes = {"k": (6, 8)}
    step, moment = jit_step(tx), start(tx, draw_dyadic(0, shapes))
    mask = np.ones(48, bool)
    for t in range(1, NUM_STEPS + 1):
        gradients = draw_dyadic(t, shapes)
        weights, slope = (
            np.asarray(x["k"]).ravel() for x in (moment.params, gradients)
        )
        mask = keep_best(np.square(weights * slope), mask, num_removed(LEVELS, t, 48))
        moment = step(gradients, moment)
        expected = (weights - np.float32(0.25) * slope) * mask
        np.testing.assert_array_equal(moment.params["k"].ravel(), expected)


@pytest.mark.parametrize("absent", [None, NO_MASK])
def test_given_scores_replace_the_rules_own_at_events(absent):
    tx = SETUPS["sgd"].pruned
    step, moment, masks = jit_step(tx), start(tx, draw(0)), NOTHING_REMOVED
    for t in range(1, NUM_STEPS + 1):
        given = jnp.exp(draw(100 + t, (6, 8)))
        given = jnp.where(masks["dense"], given, np.nan)  # of the masked none is read
        scores = {
            "dense": {"kernel": given, "bias": absent},
            "head": {"kernel": absent, "scale": absent},
        }
        moment = step(draw(t), moment, scores=scores)
        masks = remake({**moment.params, "dense": {"kernel": given}}, masks, t)
        for key in "dense", "head":  # the head's scores are its own weights
            np.testing.assert_array_equal(moment.params[key]["kernel"] != 0, masks[key])


def test_scores_of_another_shape_are_refused():
    tx = SETUPS["sgd"].pruned
    params, state = start(tx, draw(0))
    scores = draw(1, SHAPES | {"dense": {"kernel": (8, 6), "bias": (8,)}})
    with pytest.raises(ValueError, match=r"dense/kernel must have its shape \(6, 8\)"):
        tx.update(params, state, params, scores=scores)


@pytest.mark.parametrize(
    "wrap",
    [lambda tx: tx, lambda tx: optax.masked(tx, True), optax.chain],
    ids=["alone", "masked", "chain"],
)
def test_extra_arguments_reach_the_wrapped_optimizer(wrap):
    def update(updates, state, params=None, *, value, **rest):
        assert sorted(rest) == ["gradient_scale"]
        scale = value * rest["gradient_scale"]
        return jax.tree.map(lambda g: scale * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = wrap(agp.prune(inner, [HEAD_RULE]))
    step, moment = jit_step(tx), start(tx, draw(0))
    for _ in range(2):
        moment = step(draw(1), moment, value=3.0, gradient_scale=2.0, scores=draw(2))
    expected = draw(0)["dense"]["bias"] + 12.0 * draw(1)["dense"]["bias"]
    np.testing.assert_allclose(moment.params["dense"]["bias"], expected, rtol=1e-5)


def test_reduce_on_plateau_hears_the_loss():
    (moment, *_), step = train("reduce_on_plateau")

    def run(value):
        after = moment
        for t in range(1, 5):
            after = step(draw(t), after, value=jnp.float32(value / t))
        return after.state.inner_state[1].scale

    assert run(1.0) == 1.0  # the loss falls, the rate stays
    assert run(-1.0) < 1.0


# Numbers that are not finite


def spoil(tree, key, number, row=0):
    kernel = tree[key]["kernel"].at[row, 0].set(number)
    return {**tree, key: {**tree[key], "kernel": kernel}}


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_keeps_its_mask(number):
    moments, step = train("sgd")
    for t in 4, 6:
        before = moments[t - 1]
        weight = before.state.masks["dense"]["kernel"][:, 0]
        row = int(np.flatnonzero(weight)[0])  # of a weight that is still there
        before = before._replace(params=spoil(before.params, "dense", number, row))
        moment = step(draw(t), before, value=jnp.float32(1))
        for key, same in ("dense", before), ("head", moments[t]):
            expected = same.state.masks[key]["kernel"]
            assert_same(moment.state.masks[key]["kernel"], expected)
            assert jnp.all((moment.params[key]["kernel"] == 0) == ~expected)
        assert moment.state.step == t


def test_a_bad_gradient_of_a_masked_weight_does_nothing():
    moments, step = train("momentum")
    for t in range(5, NUM_STEPS + 1):
        gone = np.argwhere(~np.asarray(moments[t - 1].state.masks["dense"]["kernel"]))
        gradients = draw(t)
        for number, (i, j) in zip([np.nan, np.inf], gone, strict=False):
            kernel = gradients["dense"]["kernel"].at[i, j].set(number)
            gradients["dense"] = {**gradients["dense"], "kernel": kernel}
        assert_same(step(gradients, moments[t - 1], value=jnp.float32(1)), moments[t])


def test_the_next_event_catches_up():
    tx = SETUPS["sgd"].pruned
    step, moment = jit_step(tx), start(tx, draw(0))
    counts = []
    for t in range(1, NUM_STEPS + 1):
        scores = {**draw(50), "head": {"kernel": None, "scale": None}}
        if t == 4:
            scores = spoil(scores, "dense", np.nan, row=slice(None))
        moment = step(draw(t), moment, scores=scores)
        counts.append(int(jnp.sum(moment.params["dense"]["kernel"] == 0)))
    assert counts == [0, 4, 4, 4, 4, 38, 38, 38]


def test_apply_if_finite_inside_skips_the_update_and_prunes_as_planned():
    moments, step = train("apply_if_finite inside")
    before = moments[3]
    moment = step(spoil(draw(4), "head", np.nan), before, value=jnp.float32(1))
    masks = {k: np.asarray(before.state.masks[k]["kernel"]) for k in NOTHING_REMOVED}
    assert_same(moment.params, multiply(before.params, remake(before.params, masks, 4)))
    assert moment.state.step == 4


def test_apply_if_finite_around_puts_the_event_off():
    moments, step = train("apply_if_finite around")
    bad = step(spoil(draw(4), "head", np.nan), moments[3], value=jnp.float32(1))
    assert_same(bad.params, moments[3].params)
    assert_same(bad.state.inner_state, moments[3].state.inner_state)
    good = step(draw(4), bad, value=jnp.float32(1))
    assert_same(good.params, moments[4].params)
