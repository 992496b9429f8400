"""Masks against a NumPy oracle: a stable sort of scores, one contest at a time."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import agp_jax as agp
from agp_jax.contests import _num_removed
from agp_jax.packing import PackedMask, pack, unpack

P = PartitionSpec
MASKED = optax.MaskedNode()
LINE = agp.polynomial_schedule(0.75, begin_step=0, end_step=12, power=1.0)
CURVE = agp.polynomial_schedule(
    0.8, begin_step=3, end_step=24, frequency=4, initial_sparsity=0.1
)


def level_at(schedule, step):
    """The sparsity at `step` by the paper's formula, in float64."""
    n = (schedule.end_step - schedule.begin_step) // schedule.frequency
    j = min((step - schedule.begin_step) // schedule.frequency, n)
    if j < 0:
        return 0.0
    rest = (1 - j / n) ** schedule.power if n else 0.0
    s_i, s_f = schedule.initial_sparsity, schedule.final_sparsity
    return s_f + (s_i - s_f) * rest


def rank(tensors, num_removed):
    """What stays of tensors ranked together: [(scores, box, mask)] -> [mask].

    Cells are the boxes in row-major order, tensor after tensor. Removed ones go first,
    then the lowest scores, and of equals those that come last.
    """
    where, scores, alive = [], [], []
    for i, (values, box, mask) in enumerate(tensors):
        values = np.where(mask, values, 0)
        grid = [size // part for size, part in zip(values.shape, box, strict=True)]
        for cell in np.ndindex(*grid):
            spot = tuple(
                slice(x * part, (x + 1) * part)
                for x, part in zip(cell, box, strict=True)
            )
            where.append((i, spot))
            scores.append(float(values[spot].sum()))
            alive.append(mask[spot].any())
    order = np.lexsort((np.arange(len(where)), -np.array(scores), ~np.array(alive)))
    kept = [np.zeros(mask.shape, bool) for _, _, mask in tensors]
    for k in order[: len(where) - num_removed]:
        i, spot = where[k]
        kept[i][spot] = True
    return [x & mask for x, (_, _, mask) in zip(kept, tensors, strict=True)]


def rank_elements(scores, num_removed, mask=None):
    """`rank` for one tensor of elements, with less Python."""
    scores = np.asarray(scores, np.float64)
    mask = np.ones(scores.shape, bool) if mask is None else np.asarray(mask)
    order = np.lexsort((np.arange(scores.size), -scores.ravel(), ~mask.ravel()))
    kept = np.zeros(scores.size, bool)
    kept[order[: scores.size - num_removed]] = True
    return kept.reshape(scores.shape) & mask


def removed(schedule, step, count):
    return min(int(level_at(schedule, step) * count), count - 1)


def rule(pattern=".*", structure=None, schedule=LINE, **options):
    return agp.Rule(pattern, structure or agp.element(), schedule, **options)


def masker(*rules):
    """A jitted make_masks(params, step, masks, gradients, scores)."""

    @jax.jit
    def make(params, step, masks=None, gradients=None, scores=None):
        return agp.make_masks(
            params, rules, step, masks, gradients=gradients, scores=scores
        )

    return make


elements = masker(rule(".*"))  # compiled once for each shape it meets


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole_numbers(seed, shape, low=-4, high=5):
    """Weights whose sums are exact in float32 in any order, many of them equal."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.float32)


# Counts


def test_counts_are_exact_at_every_step_of_a_schedule():
    shapes = [(), (1,), (2,), (3,), (7,), (10,), (3, 5), (5, 7, 2), (100,), (9, 11, 7)]
    params = {str(i): normal(i, shape) for i, shape in enumerate(shapes)}
    make = masker(rule(".*", schedule=CURVE))
    for step in range(0, 30):
        masks = make(params, step)
        for name, weights in params.items():
            count = weights.size
            lost = removed(CURVE, step, count)
            assert count - int(masks[name].sum()) == lost
            np.testing.assert_array_equal(
                masks[name], rank_elements(np.abs(weights), lost)
            )


SIZES = [
    *(1, 2, 3, 10, 49, 100, 1000, 2_359_296, 4096 * 11008, 33_278 * 1500),
    *(2**24 - 1, 2**24, 2**24 + 1, 2**24 + 3, 50_000_000, 2**27, 2**31 - 1),
]


@pytest.mark.parametrize("final", [0.7, 0.8, 0.9, 0.29, 0.995, 1 - 2**-53, 0.0])
def test_the_counts_are_pythons_floor_for_any_size(final):
    schedule = agp.polynomial_schedule(
        final, begin_step=0, end_step=20, initial_sparsity=min(0.05, final)
    )
    for step in range(21):
        counts = _num_removed(schedule, np.array(SIZES), step)
        assert counts.dtype == jnp.int32
        assert counts.tolist() == [removed(schedule, step, n) for n in SIZES]


@pytest.mark.parametrize(
    "final, count, lost",
    [
        *[(0.7, 10, 7), (0.8, 2_359_296, 1_887_436), (0.5, 2**27, 2**26)],
        *[(0.9, 4096 * 11008, 4096 * 11008 - 4_508_877), (0.999, 3, 2)],
        *[(0.9999999999999999, 2**31 - 1, 2**31 - 2), (0.99, 1, 0)],
    ],
)
def test_known_counts(final, count, lost):
    assert _num_removed(agp.one_shot(final), np.array([count]), 0).tolist() == [lost]


def test_a_long_schedule_over_many_slices_makes_no_large_program():
    schedule = agp.polynomial_schedule(0.8, begin_step=0, end_step=20_000)
    make = masker(rule(schedule=schedule, stacked_axes=1))
    weights = jax.ShapeDtypeStruct((100, 2, 2), jnp.float32)
    text = make.lower({"w": weights}, jnp.int32(0)).as_text()
    assert len(text) < 1_000_000  # a number for every event, not for every slice too


def test_more_than_two_to_the_24_weights_are_counted_exactly():
    shape = (2**12 + 1, 2**12 + 3)  # odd on both axes, 16.8 million
    weights = whole_numbers(0, shape, -9, 10)
    mask = np.asarray(masker(rule(schedule=agp.one_shot(0.9)))({"w": weights}, 0)["w"])
    count = math.prod(shape)
    kept = count - int(0.9 * count)
    assert mask.sum() == kept
    scores = np.abs(weights).ravel()
    least = next(x for x in range(9, -1, -1) if (scores >= x).sum() >= kept)
    expected = scores > least
    equal = np.flatnonzero(scores == least)
    expected[equal[: kept - expected.sum()]] = True
    assert (mask.ravel() == expected).all()


# Ranking

TENSOR = (7, 13)
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


# Shared and separate contests


@pytest.mark.parametrize("seed", range(3))
def test_a_rule_may_rank_its_tensors_together(seed):
    shapes = {"b": (4, 6), "a": (3, 2, 4), "c": (12,)}
    params = {
        k: whole_numbers(seed * 3 + i, x) for i, (k, x) in enumerate(shapes.items())
    }
    masks = {k: np.ones(x, bool) for k, x in shapes.items()}
    for step in (0, 4, 7, 12):
        new = together(params, step, masks)
        tensors = [(np.abs(params[k]), (1,) * params[k].ndim, masks[k]) for k in "abc"]
        expected = rank(tensors, removed(LINE, step, 60))
        for k, theirs in zip("abc", expected, strict=True):
            np.testing.assert_array_equal(new[k], theirs)
        masks = jax.tree.map(np.asarray, new)


together = masker(rule("[abc]", scope="rule"))


def test_ties_across_tensors_go_by_the_order_of_the_leaves():
    params = {"b": jnp.ones((2, 2)), "a": jnp.ones((2, 3)), "c": jnp.ones(2)}
    masks = together(params, 8)  # six of twelve go
    assert {k: int(x.sum()) for k, x in masks.items()} == {"a": 6, "b": 0, "c": 0}
    assert [int(x.sum()) for x in together(params, 6).values()] == [6, 2, 0]
    assert together(params, 6)["b"].ravel().tolist() == [True, True, False, False]


def test_ranked_together_one_cell_stays_in_all():
    rules = [rule("[ab]", scope="rule", schedule=agp.one_shot(0.999))]
    masks = masker(*rules)({"a": jnp.zeros(3), "b": jnp.ones(3)}, 0)
    assert not masks["a"].any() and masks["b"].tolist() == [True, False, False]


def test_two_rules_of_one_scope_rank_apart():
    params = {"a1": jnp.full(4, 9.0), "a2": jnp.full(4, 1.0), "b": jnp.arange(4.0)}
    half = agp.one_shot(0.5)
    rules = [rule(p, schedule=half, scope="rule") for p in ("a.", "b")]
    masks = masker(*rules)(params, 0)
    assert [int(x.sum()) for x in jax.tree.leaves(masks)] == [4, 0, 2]


def test_structures_are_ranked_together_by_their_sums():
    params = {"a": whole_numbers(0, (4, 6)), "b": whole_numbers(1, (4, 3))}
    masks = masker(rule(structure=agp.filters(), scope="rule"))(params, 8)
    tensors = [(np.abs(x), (4, 1), np.ones(x.shape, bool)) for x in params.values()]
    for ours, theirs in zip(masks.values(), rank(tensors, 4), strict=True):
        np.testing.assert_array_equal(ours, theirs)


STACKED = {  # structure and box, in slices of shape (5, 6)
    "element": (agp.element(), (1, 1)),
    "filters": (agp.filters(), (5, 1)),
    "block": (agp.block((5, 2)), (5, 2)),
    "heads": (agp.heads(2, axis=1), (5, 3)),
    "channels": (agp.channels(axis=0), (1, 6)),
}


@functools.cache
def prune_stacked(rows):
    """Weights, masks before and masks after of one stack for each structure."""
    params = {k: whole_numbers(i, (*rows, 5, 6)) for i, k in enumerate(STACKED)}
    before = {k: x.cumsum(-1) % 5 != 0 for k, x in params.items()}
    return params, before, stack_pruner(rows)(params, 10, before)


@functools.cache
def stack_pruner(rows):
    made = (rule(k, x, stacked_axes=len(rows)) for k, (x, _) in STACKED.items())
    return masker(*made)


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("rows", [(4,), (2, 3)])
def test_every_slice_of_stacked_axes_is_ranked_by_itself(name, rows):
    weights, before, after = (tree[name] for tree in prune_stacked(rows))
    box = STACKED[name][1]
    lost = removed(LINE, 10, 30 // math.prod(box))
    for row in np.ndindex(*rows):
        (expected,) = rank([(np.abs(weights[row]), box, before[row])], lost)
        np.testing.assert_array_equal(after[row], expected)


@pytest.mark.parametrize("rows", [(4,), (2, 3)])
def test_a_slice_is_ranked_as_it_would_be_alone_however_large_the_others(rows):
    params, before, after = prune_stacked(rows)
    scale = np.exp2(np.float32([-60, 40, 0, -30, 60, -9]))
    scale = np.resize(scale, (*rows, 1, 1))
    again = stack_pruner(rows)({k: x * scale for k, x in params.items()}, 10, before)
    jax.tree.map(np.testing.assert_array_equal, again, after)


def test_n_of_m_in_a_stack_counts_its_axis_within_the_slice():
    weights = normal(0, (2, 3, 8, 5))
    half = agp.one_shot(0.5)
    kept = {}
    for axis in (0, -2):
        made = rule(structure=agp.n_m(2, 4, axis=axis), schedule=half, stacked_axes=2)
        kept[axis] = np.asarray(masker(made)({"w": weights}, 0)["w"])
    np.testing.assert_array_equal(kept[0], kept[-2])
    assert (kept[0].reshape(2, 3, 2, 4, 5).sum(3) == 2).all()


def test_stacked_slices_of_a_rule_are_ranked_together():
    params = {"a": whole_numbers(0, (2, 3, 4)), "b": whole_numbers(1, (3, 2, 4))}
    make = masker(rule(structure=agp.channels(axis=0), scope="rule", stacked_axes=1))
    masks = make(params, 8)
    tensors = [(np.abs(x), (1, 1, 4), np.ones(x.shape, bool)) for x in params.values()]
    for ours, theirs in zip(masks.values(), rank(tensors, 6), strict=True):
        np.testing.assert_array_equal(ours, theirs)


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


# NaN and infinity

BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("bad", BAD)
def test_a_tensor_that_is_not_finite_keeps_its_mask_and_others_go_on(bad):
    params = {"a": normal(0, TENSOR), "b": normal(1, TENSOR)}
    broken = params | {"a": params["a"].copy()}
    broken["a"][3, 4] = bad
    before = elements(params, 4)
    held = elements(broken, 8, before)
    np.testing.assert_array_equal(held["a"], before["a"])
    expected = rank_elements(np.abs(params["b"]), removed(LINE, 8, 91))
    np.testing.assert_array_equal(held["b"], expected)
    assert elements(broken, 12)["a"].all()  # without a mask so far nothing goes
    after = elements(params, 9, held)["a"]  # healed: the next event catches up
    expected = rank_elements(
        np.abs(params["a"]), removed(LINE, 9, 91), np.asarray(before["a"])
    )
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("bad", BAD)
def test_what_is_masked_may_be_nan(bad):
    weights, mask = normal(0, TENSOR), np.ones(TENSOR, bool)
    weights[2, 5], mask[2, 5] = bad, False
    new = elements({"w": weights}, 10, {"w": mask})["w"]
    scores = np.abs(np.where(mask, weights, 0))
    np.testing.assert_array_equal(
        new, rank_elements(scores, removed(LINE, 10, 91), mask)
    )
    given = np.where(mask, scores, bad)
    np.testing.assert_array_equal(
        elements({"w": scores}, 10, {"w": mask}, None, {"w": given})["w"], new
    )


@pytest.mark.parametrize("structure", [agp.filters(), agp.n_m(2, 4, axis=1)], ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_structures_hold_and_stacked_slices_hold_by_themselves(structure, bad):
    weights = np.stack([normal(i, (4, 8)) * np.float32(1e4) for i in range(3)])
    make = halves(structure)
    whole = np.asarray(make({"w": weights}, 0)["w"])
    weights[1, 2, 3] = bad
    mask = np.asarray(make({"w": weights}, 0)["w"])
    assert mask[1].all()
    np.testing.assert_array_equal(mask[[0, 2]], whole[[0, 2]])
    assert (~mask[0]).any()


@functools.cache
def halves(structure):
    half = agp.one_shot(0.5)
    return masker(rule(structure=structure, schedule=half, stacked_axes=1))


def test_tensors_that_are_ranked_together_hold_together():
    params = {"a": normal(0, 6), "b": normal(1, (2, 5)), "c": normal(2, 4)}
    before = together(params, 3)
    params["b"][1, 1] = np.nan
    held = together(params, 12, before)
    for k in params:
        np.testing.assert_array_equal(held[k], before[k])
    params["b"][1, 1] = 0
    assert sum(int(x.sum()) for x in together(params, 12, held).values()) == 5


def test_scores_that_are_not_finite_hold_a_tensor_too():
    params = {"w": normal(0, TENSOR)}
    given = np.abs(params["w"])
    given[0, 0] = np.nan
    assert elements(params, 12, None, None, {"w": given})["w"].all()
    make = masker(rule(score=lambda w, g: jnp.abs(w * g)))
    assert make(params, 12, None, {"w": given})["w"].all()
    assert masker(rule(score=jnp.log))({"w": jnp.arange(91.0)}, 12)["w"].all()


# The tree of masks


def test_masks_stand_where_rules_prune_and_nodes_without_leaves_elsewhere():
    params = {
        "conv": [jnp.ones((3, 4), jnp.bfloat16), jnp.ones((3, 4))],
        "step": jnp.int32(3),
        "head": {"kernel": jnp.ones((4, 2)), "bias": None},
    }
    rules = [agp.Rule("head/.*"), rule("conv/0"), rule("conv/1", agp.filters())]
    for make in (masker(*rules), lambda *args: agp.make_masks(params, rules, 0)):
        masks = make(params, 12)
        assert masks["step"] == masks["head"]["kernel"] == MASKED
        assert masks["head"]["bias"] is None
        assert [(x.shape, x.dtype) for x in masks["conv"]] == [((3, 4), bool)] * 2
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(masks))
        assert len(jax.tree.leaves(masks)) == 2


def test_traced_and_int_steps_agree_at_every_step():
    params = {"w": normal(0, TENSOR), "v": normal(1, (8, 3))}
    rules = rule("w", schedule=CURVE), rule("v", agp.n_m(1, 4))
    static = jax.jit(agp.make_masks, static_argnums=(1, 2))
    traced = masker(*rules)
    for step in (0, 2, 3, 6, 7, 12, 23, 100):
        ours = static(params, rules, step)
        jax.tree.map(np.testing.assert_array_equal, ours, traced(params, step))


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
    with pytest.raises(TypeError):
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


# Packing


@pytest.mark.parametrize(
    "shape",
    [
        *[(), (1,), (7,), (8,), (9,), (3, 5), (16, 3), (3, 16), (8, 24), (24, 8)],
        *[(3, 3, 16, 5), (1, 1, 1), (5, 1, 8, 1), (2, 3, 5, 7), (1001, 3)],
        *[(0,), (3, 0), (0, 3), (8, 0), (0, 8)],
    ],
    ids=str,
)
def test_packing_loses_nothing_and_takes_a_bit_per_weight(shape):
    mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)
    packed, again = jax.jit(lambda x: (pack(x), unpack(pack(x))))(mask)
    assert again.dtype == bool and again.shape == shape
    np.testing.assert_array_equal(again, mask)
    if shape:
        assert packed.bits.dtype == jnp.uint8
        if any(size % 8 == 0 for size in shape):
            assert packed.bits.nbytes * 8 == mask.size
        else:
            padded = math.prod(shape[:-1]) * math.ceil(shape[-1] / 8)
            assert packed.bits.nbytes <= padded
    abstract = jax.eval_shape(pack, jax.ShapeDtypeStruct(shape, bool))
    assert jax.eval_shape(unpack, abstract) == jax.ShapeDtypeStruct(shape, bool)
    assert abstract == jax.eval_shape(lambda: packed)


def test_packed_masks_are_trees_of_bytes():
    packed = pack(jnp.arange(32).reshape(4, 8) % 3 == 0)
    assert [x.shape for x in jax.tree.leaves(packed)] == [(4, 1)]
    moved = jax.tree.map(lambda x: x, packed)
    assert isinstance(moved, PackedMask) and (moved.axis, moved.size) == (1, 8)
    both = jax.lax.cond(True, lambda: packed, lambda: moved)
    np.testing.assert_array_equal(unpack(both), unpack(packed))


def test_unpacking_leaves_other_masks_alone():
    mask = jnp.ones((3, 8), bool)
    assert unpack(mask) is mask


# Many devices

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
    "n_m": agp.n_m(1, 4),
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
    "n_m_last": (agp.n_m(1, 4, axis=-1), (6, 8), P(None, "x")),
    "n_m_first": (agp.n_m(1, 4), (12, 8), P("x", "y")),
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


STACKS = {"a": agp.element(), "b": agp.filters(), "c": agp.n_m(1, 4)}
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


def test_only_bool_masks_have_a_sparsity():
    with pytest.raises(ValueError, match="uint8 at k/bits: pass get_masks"):
        agp.sparsity({"k": pack(jnp.ones(16, bool))})


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
