"""Contests against a NumPy oracle: how many cells go, and what ranks together."""

import functools
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mask_oracle import (
    CURVE,
    LINE,
    TENSOR,
    elements,
    level_at,
    masker,
    normal,
    rank,
    rank_elements,
    removed,
    rule,
    together,
    whole_numbers,
)

import agp_jax as agp
from agp_jax.contests import _exact_floors, _num_removed, _num_removed_of_m

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
def test_the_counts_are_exact_floors_for_any_size(final):
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
        # In binary fractions the first two products lack a last bit.
        *[(0.29, 100, 29), (0.57, 100, 57), (0.1, 330, 33), (Fraction(1, 3), 12, 4)],
    ],
)
def test_known_counts(final, count, lost):
    assert _num_removed(agp.one_shot(final), np.array([count]), 0).tolist() == [lost]


def test_the_first_event_takes_what_was_written():
    schedule = agp.polynomial_schedule(
        0.8, begin_step=0, end_step=10, initial_sparsity=0.1
    )
    assert 0.8 + (0.1 - 0.8) < 0.1  # so float64 would take 32
    assert _num_removed(schedule, np.array([330]), 0).tolist() == [33]
    params = {"a": normal(0, (10, 11)), "b": normal(1, (20, 11))}
    masks = masker(rule(schedule=schedule, scope="rule"))(params, 0)
    assert sum(int(mask.sum()) for mask in masks.values()) == 330 - 33


DECIMALS = st.integers(1, 6).flatmap(
    lambda digits: st.integers(0, 10**digits - 1).map(lambda x: x / 10**digits)
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.tuples(DECIMALS, DECIMALS).map(sorted),
    st.integers(1, 4),
    st.integers(1, 60) | st.sampled_from([100, 225, 1000]),
    st.lists(
        st.integers(1, 10**7) | st.integers(1, 10**7 // 360).map(lambda x: x * 360),
        min_size=1,
        max_size=8,
    ),
)
def test_counts_are_those_of_the_decimals_written(ends, power, span, sizes):
    schedule = agp.polynomial_schedule(
        ends[1], begin_step=0, end_step=span, initial_sparsity=ends[0], power=power
    )
    floors = _exact_floors(schedule, np.array(sizes))
    assert floors[0].tolist() == [0] * len(sizes)
    for step, counts in enumerate(floors[1:]):
        level = level_at(schedule, step)
        assert counts.tolist() == [math.floor(level * n) for n in sizes]


@pytest.mark.parametrize("power", [1, 3, 2.5])
def test_thousands_of_events_and_many_sizes_are_counted_exactly(power):
    schedule = agp.polynomial_schedule(
        0.8, begin_step=0, end_step=2000, initial_sparsity=0.05, power=power
    )
    sizes = np.random.default_rng(0).integers(1, 2**31, 100)
    table = jax.jit(jax.vmap(lambda step: _num_removed(schedule, sizes, step)))
    expected = [
        [level.numerator * n // level.denominator for n in sizes.tolist()]
        for level in map(schedule.exact_level, range(1, 2002))
    ]
    np.testing.assert_array_equal(table(jnp.arange(2001)), expected)


@pytest.mark.parametrize("m", range(1, 13))
def test_groups_lose_whole_parts_that_no_decimals_are(m):
    for n in range(1, m + 1):
        for final in (1 - n / m, (m - n) / m, Fraction(m - n, m)):
            assert _num_removed_of_m(agp.one_shot(final), m, 0) == m - n
            rising = agp.polynomial_schedule(
                final, begin_step=0, end_step=2, initial_sparsity=(m - n) // 2 / m
            )
            assert _num_removed_of_m(rising, m, 0) == (m - n) // 2
            assert _num_removed_of_m(rising, m, 2) == m - n


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


@pytest.mark.parametrize("where", [(1,), (-1,), (0, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_layers_may_be_stacked_along_any_axes(where, masked):
    """As if they were moved to the front, ranked there, and moved back."""
    front = tuple(range(len(where)))
    rows = (4, 3)[: len(where)]
    params = {k: whole_numbers(i, (*rows, 5, 6)) for i, k in enumerate(STACKED)}
    params["n_of_m"] = whole_numbers(9, (*rows, 8, 5))
    scores = {k: np.float32(3) - np.abs(x) for k, x in params.items()}
    made = {"n_of_m": (agp.n_of_m(1, 4), None), **STACKED}
    schedule = agp.one_shot(0.75)
    results = {}
    for stacked in front, where:
        move = lambda x, to=stacked: np.moveaxis(x, front, to)  # noqa: E731
        rules = [rule(k, made[k][0], schedule, stacked_axes=stacked) for k in params]
        before = {k: move(x.cumsum(-1) % 5 != 0) for k, x in params.items()}
        after = masker(*rules)(
            jax.tree.map(move, params),
            3,
            before if masked else None,
            scores=jax.tree.map(move, scores) if masked else None,
        )
        results[stacked] = {k: np.moveaxis(x, stacked, front) for k, x in after.items()}
    jax.tree.map(np.testing.assert_array_equal, results[where], results[front])
    by_number = [rule(k, made[k][0], schedule, stacked_axes=len(where)) for k in params]
    if not masked:
        expected = masker(*by_number)(params, 3)
        jax.tree.map(np.testing.assert_array_equal, results[where], expected)


def test_n_of_m_in_a_stack_counts_its_axis_within_the_slice():
    weights = normal(0, (2, 3, 8, 5))
    half = agp.one_shot(0.5)
    kept = {}
    for axis in (0, -2):
        made = rule(
            structure=agp.n_of_m(2, 4, axis=axis), schedule=half, stacked_axes=2
        )
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


@pytest.mark.parametrize(
    "structure", [agp.filters(), agp.n_of_m(2, 4, axis=1)], ids=str
)
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
