"""Masks against a NumPy oracle: what is ranked, what stays removed, trees of masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mask_oracle import (
    CURVE,
    LINE,
    MASKED,
    TENSOR,
    elements,
    masker,
    normal,
    rank,
    rank_elements,
    removed,
    rule,
    whole_numbers,
)

import agp_jax as agp
from agp_jax.packing import pack

# Ranking

VALUES = {
    "normal": normal(0, TENSOR),
    "few values": whole_numbers(1, TENSOR),
    "two values": whole_numbers(2, TENSOR, 1, 3),
    "mostly zero": whole_numbers(3, TENSOR, -9, 10) * (normal(4, TENSOR) > 1),
    "all equal": np.full(TENSOR, -2.5, np.float32),
    "all zero": np.zeros(TENSOR, np.float32),
    "zeros of both signs": np.copysign(np.float32(0), normal(5, TENSOR)),
    "signs alone": np.sign(normal(6, TENSOR)),
    "denormals": np.arange(91, dtype=np.int32).reshape(TENSOR).view(np.float32),
    "tiny": normal(7, TENSOR) * np.float32(1e-36),
    "huge": normal(8, TENSOR).clip(-3, 3) * np.float32(1e38),
    "neighbours": np.float32(1) + whole_numbers(9, TENSOR) * np.float32(2**-23),
    "falling": -np.arange(91, dtype=np.float32).reshape(TENSOR),
}


@pytest.mark.parametrize("weights", VALUES.values(), ids=VALUES)
def test_the_mask_is_the_oracles_whatever_the_values(weights):
    for step in range(13):
        mask = elements({"w": weights}, step)["w"]
        lost = removed(LINE, step, weights.size)
        np.testing.assert_array_equal(mask, rank_elements(np.abs(weights), lost))


@pytest.mark.parametrize("weights", VALUES.values(), ids=VALUES)
def test_signed_scores_are_ranked_too(weights):
    mask = signed({"w": weights}, 6)["w"]
    lost = removed(LINE, 6, weights.size)
    np.testing.assert_array_equal(mask, rank_elements(weights, lost))


signed = masker(rule(score=lambda w: w))


def test_among_equals_the_first_in_memory_stay():
    for shape in ((12,), (3, 4), (2, 3, 2)):
        mask = elements({"w": jnp.ones(shape)}, 8)["w"]  # half of them go
        assert mask.ravel().tolist() == [True] * 6 + [False] * 6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_narrow_weights_are_scored_and_ranked_in_float32(dtype):
    seen = []

    def score(weights):
        seen.append(weights.dtype)
        return weights * weights * jnp.float32(1.2345)

    make = masker(rule(score=score))
    for seed in range(3):
        weights = jnp.asarray(normal(seed, TENSOR), dtype)
        values = np.asarray(weights, np.float32)
        expected = rank_elements(values * values, removed(LINE, 9, 91))
        np.testing.assert_array_equal(make({"w": weights}, 9)["w"], expected)
    assert set(seen) == {jnp.dtype("float32")}


def test_float64_weights_are_ranked_in_float32():
    with jax.enable_x64(True):
        weights = 1.0 + np.random.default_rng(0).integers(0, 64, TENSOR) * 2.0**-26
        tree = {"w": jnp.asarray(weights), "v": jnp.asarray(weights)}
        assert tree["w"].dtype == jnp.float64
        make = masker(rule("w"), rule("v", agp.filters()))
        masks = make(tree, jnp.asarray(8))  # an int64 step
        assert masks["w"].dtype == masks["v"].dtype == bool
        expected = rank_elements(np.float32(weights), removed(LINE, 8, 91))
        np.testing.assert_array_equal(masks["w"], expected)
        assert masks["v"].sum() == 7 * (13 - removed(LINE, 8, 13))


def test_scalars_and_empty_leaves_have_masks_too():
    params = {"s": jnp.float32(2), "e": jnp.ones((0, 3)), "f": np.ones((4, 0))}
    for masks in (agp.make_masks(params, [rule()], 12), elements(params, 12)):
        assert masks["s"].shape == () and masks["s"]
        assert masks["e"].shape == (0, 3) and masks["f"].shape == (4, 0)
        assert agp.sparsity(masks) == {"e": 0, "f": 0, "s": 0, "total": 0}
        assert agp.apply_masks(params, masks)["e"].shape == (0, 3)


# What was removed stays removed


@pytest.mark.parametrize("seed", range(4))
def test_masks_only_ever_lose_cells_whatever_the_targets_do(seed):
    rng = np.random.default_rng(seed)
    mask, steps = np.ones(TENSOR, bool), rng.integers(-2, 15, 12)
    for step in steps:  # targets rise, fall and start again
        weights = whole_numbers(int(rng.integers(1000)), TENSOR)
        new = np.asarray(elements({"w": weights}, int(step), {"w": mask})["w"])
        lost = removed(LINE, int(step), 91)
        np.testing.assert_array_equal(new, rank_elements(np.abs(weights), lost, mask))
        assert not (new & ~mask).any()
        assert (~new).sum() == max((~mask).sum(), lost)
        mask = new


def test_a_lower_target_changes_nothing():
    weights = {"w": normal(0, TENSOR)}
    high = elements(weights, 12)
    low = elements({"w": normal(1, TENSOR)}, 3, high)
    np.testing.assert_array_equal(low["w"], high["w"])
    before = agp.make_masks(
        weights, [rule(schedule=agp.one_shot(0.9, step=5))], 0, high
    )
    np.testing.assert_array_equal(before["w"], high["w"])


def test_other_structures_start_from_what_is_left():
    weights = whole_numbers(0, (4, 6), 1, 9)
    first = {"w": rank_elements(weights, 9)}
    rules = [rule(structure=agp.filters(), schedule=agp.one_shot(0.5))]
    mask = np.asarray(masker(*rules)({"w": weights}, 0, first)["w"])
    (expected,) = rank([(weights, (4, 1), first["w"])], 3)
    np.testing.assert_array_equal(mask, expected)


def test_removed_cells_rank_below_negative_scores():
    mask = np.array([[True, False, True, True]])
    weights = np.float32([[-9, 5, -8, -7]])
    new = signed({"w": weights}, 8, {"w": mask})["w"]  # two of four go
    assert new.tolist() == [[False, False, True, True]]


def test_a_mask_without_a_rule_is_not_forgotten():
    params = {"a": jnp.arange(4.0), "b": jnp.ones(2)}
    masks = {"a": jnp.array([False, True, True, True]), "b": MASKED}
    new = masker(rule("b"))(params, 12, masks)
    assert not isinstance(new["a"], optax.MaskedNode)
    assert new["a"].tolist() == [False, True, True, True]


def test_a_new_rule_for_a_dense_tensor_starts_from_nothing_removed():
    params = {"a": jnp.arange(4.0), "b": jnp.ones(2)}
    new = masker(rule("a"))(params, 8, {"a": MASKED, "b": MASKED})
    assert new["a"].tolist() == [False, False, True, True] and new["b"] == MASKED


def test_masks_of_another_shape_are_an_error():
    masks = {"w": jnp.ones((1, 13), bool)}
    with pytest.raises(ValueError, match="w"):
        agp.make_masks({"w": jnp.ones(TENSOR)}, [rule()], 12, masks)


# Other scores


def test_gradients_may_score():
    params = {"w": whole_numbers(0, TENSOR), "b": jnp.ones(3)}
    gradients = {"w": whole_numbers(1, TENSOR), "b": jnp.full(3, jnp.nan)}
    make = masker(rule("w", score=lambda w, g: jnp.abs(w * g)))
    mask = make(params, 9, None, gradients)["w"]
    scores = np.abs(params["w"] * gradients["w"])
    np.testing.assert_array_equal(mask, rank_elements(scores, removed(LINE, 9, 91)))


def test_missing_gradients_are_an_error_that_names_rule_and_path():
    rules = [rule("w", score=lambda w, g: g)]
    with pytest.raises(ValueError, match="rule 'w'.* w .*gradients"):
        agp.make_masks({"w": jnp.ones(4)}, rules, 12)
    with pytest.raises(ValueError, match="gradients"):
        agp.make_masks({"w": jnp.ones(4)}, rules, 12, gradients={"w": None})
    assert agp.make_masks({"w": jnp.ones(4)}, rules, 0)["w"].all()  # nothing goes yet


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_scores_from_outside_replace_the_rules_own(dtype):
    params = {name: whole_numbers(i, TENSOR) for i, name in enumerate("uvw")}
    given = jnp.asarray(whole_numbers(5, TENSOR), dtype)
    masks = elements(params, 9, None, None, {"u": given, "v": None, "w": MASKED})
    lost = removed(LINE, 9, 91)
    for name, scores in (params | {"u": given}).items():
        expected = rank_elements(scores if name == "u" else np.abs(scores), lost)
        np.testing.assert_array_equal(masks[name], expected)


def test_scores_from_outside_are_summed_over_cells():
    weights, given = whole_numbers(0, (4, 6)), whole_numbers(1, (4, 6))
    mask = masker(rule(structure=agp.filters()))(
        {"w": weights}, 8, None, None, {"w": given}
    )["w"]
    (expected,) = rank([(given, (4, 1), np.ones((4, 6), bool))], 3)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    "options, given",
    [(dict(score=lambda w: w[0]), None), ({}, jnp.ones(4)), ({}, jnp.ones((4, 3)))],
)
def test_scores_of_another_shape_are_an_error_that_names_both(options, given):
    with pytest.raises(ValueError, match=r"w must have its shape \(3, 4\), got \("):
        agp.make_masks(
            {"w": jnp.ones((3, 4))}, [rule(**options)], 12, scores={"w": given}
        )


# The tree of masks


def test_masks_stand_where_rules_prune_and_nodes_without_leaves_elsewhere():
    params = {
        "conv": [jnp.ones((3, 4), jnp.bfloat16), jnp.ones((3, 4))],
        "step": jnp.int32(3),
        "head": {"kernel": jnp.ones((4, 2)), "bias": None},
    }
    rules = [agp.dense("head/.*"), rule("conv/0"), rule("conv/1", agp.filters())]
    for make in (masker(*rules), lambda *args: agp.make_masks(params, rules, 0)):
        masks = make(params, 12)
        assert masks["step"] == masks["head"]["kernel"] == MASKED
        assert masks["head"]["bias"] is None
        assert [(x.shape, x.dtype) for x in masks["conv"]] == [((3, 4), bool)] * 2
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(masks))
        assert len(jax.tree.leaves(masks)) == 2


def test_traced_and_int_steps_agree_at_every_step():
    params = {"w": normal(0, TENSOR), "v": normal(1, (8, 3))}
    rules = rule("w", schedule=CURVE), rule("v", agp.n_of_m(1, 4))
    static = jax.jit(agp.make_masks, static_argnums=(1, 2))
    traced = masker(*rules)
    for step in (0, 2, 3, 6, 7, 12, 23, 100):
        ours = static(params, rules, step)
        jax.tree.map(np.testing.assert_array_equal, ours, traced(params, step))


@pytest.mark.parametrize("first", [1, jnp.int32(1)])
def test_a_loop_without_jit_compiles_its_masks_once(first):
    traced = []

    def score(weights):
        traced.append(weights.shape)
        return jnp.abs(weights)

    rules = rule("w", score=score), rule("n", agp.n_of_m(1, 4), score=score)
    params = {"w": normal(0, TENSOR), "n": normal(1, (8, 3)), "other": "no array"}
    masks, calls = None, []
    for step in range(4):
        masks = agp.make_masks(params, rules, first + step, masks)
        calls.append(len(traced))
        lost = removed(LINE, int(first) + step, 91)
        np.testing.assert_array_equal(
            masks["w"], rank_elements(np.abs(params["w"]), lost)
        )
    assert calls[0] and calls[1] <= 2 * calls[0] and calls[1:] == calls[1:2] * 3


@pytest.mark.parametrize("step", [np.array(9), jnp.uint32(9), jnp.int8(9)])
def test_a_step_may_be_any_integer_type(step):
    schedule = agp.polynomial_schedule(
        0.5, begin_step=10, end_step=90, frequency=20, initial_sparsity=0.25
    )
    make = functools.partial(
        agp.make_masks, {"w": jnp.ones(4)}, [rule(schedule=schedule)]
    )
    assert make(step)["w"].all()
    assert make(step + 1)["w"].sum() == 3


def one_of_each():
    rules = rule("u"), rule("v", agp.filters())
    return rules, {name: normal(i, (8, 6)) for i, name in enumerate("uv")}


def test_jit_eager_and_abstract_evaluation_agree():
    rules, params = one_of_each()
    jitted = masker(*rules)(params, 9)
    eager = agp.make_masks(params, rules, jnp.int32(9))
    jax.tree.map(np.testing.assert_array_equal, jitted, eager)
    abstract = jax.eval_shape(lambda x: agp.make_masks(x, rules, 9), params)
    assert abstract == jax.eval_shape(lambda x: x, jitted)


def test_masks_may_be_made_under_vmap():
    rules, params = one_of_each()
    both = jax.tree.map(lambda x: np.stack([x, x[..., ::-1] - 1]), params)
    steps = jnp.int32([5, 12])
    make = masker(*rules)
    ours = jax.jit(jax.vmap(make))(both, steps)
    for i in range(2):
        one, masks = jax.tree.map(lambda x, i=i: x[i], (both, ours))
        theirs = make(one, steps[i])
        jax.tree.map(np.testing.assert_array_equal, masks, theirs)


def test_a_step_that_is_no_whole_number_is_refused():
    with pytest.raises(ValueError, match="a whole number, got float 1.5"):
        agp.make_masks({"w": jnp.ones(4)}, [rule()], 1.5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_masked_weights_become_exact_zeros(dtype):
    weights = jnp.array([1, -1, jnp.nan, jnp.inf, -jnp.inf, -0.0, 2, jnp.nan], dtype)
    mask = jnp.array([0, 0, 0, 0, 0, 0, 1, 1], bool)
    for apply in (agp.apply_masks, jax.jit(agp.apply_masks)):
        result = apply({"w": weights}, {"w": mask})["w"]
        assert result.dtype == dtype
        assert (np.asarray(result[:6]).view(np.uint8) == 0).all()  # +0.0, bit by bit
        assert result[6] == 2 and jnp.isnan(result[7])


def test_dense_leaves_pass_through_apply_masks_untouched():
    params = {"a": jnp.ones(3), "b": [jnp.arange(3), None], "c": jax.random.key(0)}
    masks = {"a": jnp.array([True, False, True]), "b": [MASKED, None], "c": MASKED}
    result = agp.apply_masks(params, masks)
    assert result["b"][0] is params["b"][0] and result["c"] is params["c"]
    assert result["a"].tolist() == [1.0, 0.0, 1.0]


def test_sparsity_counts_what_is_removed():
    masks = {
        "a": {"kernel": jnp.arange(10) >= 8, "bias": MASKED},
        "b": [jnp.ones((2, 5), bool), jnp.zeros(20, bool), jnp.ones((0, 4), bool)],
    }
    result = agp.sparsity(masks)
    assert result == {
        **{"a/kernel": 0.8, "b/0": 0.0, "b/1": 1.0, "b/2": 0.0},
        "total": pytest.approx(28 / 40),
    }
    assert all(type(x) is float for x in result.values())
    assert agp.sparsity({"a": MASKED}) == {"total": 0.0}


def test_only_bool_masks_have_a_sparsity():
    with pytest.raises(ValueError, match="uint8 at k/bits: pass get_masks"):
        agp.sparsity({"k": pack(jnp.ones(16, bool))})
