"""Labels: reshapes keep which entries are removed, and what is noted is for a reason.

The oracle of reshapes is NumPy: an entry is removed if its index along any axis is, so
bools of all entries, reshaped, must be those that the new axes give.
"""

import numpy as np
import pytest

from agp_jax.programs.jaxprs import trace
from agp_jax.programs.labels import (
    Axis,
    Flow,
    Held,
    Value,
    all_zeros,
    any_zeros,
    merge,
    reshape,
    same_held,
    split,
)


def removed_entries(flow, axes, gone):
    """Bools of the axes' shape, where the atoms in `gone` are removed."""
    result = np.zeros([axis.size for axis in axes], bool)
    for i, axis in enumerate(axes):
        factors = flow.atoms.factors(axis.atoms)
        along = np.isin(factors, gone).any(axis=1) if factors.size else [False]
        shape = [-1 if i == j else 1 for j in range(len(axes))]
        result |= np.broadcast_to(along, axis.size).reshape(shape)
    return result


def random_shape(rng, total):
    """Sizes of this product, some of them 1."""
    sizes = [1] * int(rng.integers(0, 2))
    while total > 1:
        divisors = [d for d in range(2, total + 1) if total % d == 0]
        sizes.append(int(rng.choice(divisors)))
        total //= sizes[-1]
    return tuple(rng.permutation(sizes).tolist())


def random_reshapes(rng):
    """The axes of a value before and after two reshapes, and the removable atoms."""
    flow = Flow()
    total = int(rng.choice([12, 24, 30]))
    shapes = [random_shape(rng, total) for _ in range(3)]
    values = [[flow.fresh(size) for size in shapes[0]]]
    if rng.random() < 0.3:
        first = values[0][0]  # an axis whose halves are one, in reverse
        flow.unify(first, Axis(first.atoms[::-1].copy()))
    for shape in shapes[1:]:
        values.append(reshape(flow, values[-1], shape))
        assert tuple(axis.size for axis in values[-1]) == shape
    # The second reshape ties what the first left apart, so all is looked at in the end.
    factors = [flow.atoms.factors(axis.atoms) for axes in values for axis in axes]
    known = np.unique(np.concatenate([x.ravel() for x in factors]))
    return flow, values, known[known > 0]


@pytest.mark.parametrize("seed", range(200))
def test_reshapes_keep_which_entries_are_removed(seed):
    rng = np.random.default_rng(seed)
    flow, values, known = random_reshapes(rng)
    for _ in range(5):
        gone = rng.choice(known, size=min(2, len(known)), replace=False)
        first = removed_entries(flow, values[0], gone)
        for axes in values[1:]:
            found = removed_entries(flow, axes, gone)
            np.testing.assert_array_equal(found, first.reshape(found.shape))


def test_most_reshapes_leave_something_to_remove():
    """Labels that fix everything would pass the other test."""
    found = [random_reshapes(np.random.default_rng(seed))[2] for seed in range(100)]
    assert np.mean([len(known) > 0 for known in found]) > 0.5


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2, 4), (4, 1, 2), (5,)])
def test_a_merged_axis_is_taken_apart_as_it_was_made(sizes):
    flow = Flow()
    axes = [flow.fresh(size) for size in sizes]
    size = flow.atoms.size
    parts = split(flow, merge(flow, axes), sizes)
    for part, axis in zip(parts, axes, strict=True):
        np.testing.assert_array_equal(
            flow.atoms.find(part.atoms), flow.atoms.find(axis.atoms)
        )
    # Nothing was tied: the only new atoms are those of the products.
    plain = np.arange(1, size)
    np.testing.assert_array_equal(flow.atoms.factors(plain)[:, 0], plain)


def test_an_outer_axis_is_split_off_from_a_merge_of_three():
    flow = Flow()
    axes = [flow.fresh(size) for size in (2, 3, 4)]
    outer, inner = split(flow, merge(flow, axes), (6, 4))
    assert flow.atoms.factors(inner.atoms).tolist() == axes[2].atoms[:, None].tolist()
    rows = [[a, b] for a in axes[0].atoms for b in axes[1].atoms]
    assert flow.atoms.factors(outer.atoms).tolist() == rows


def test_an_axis_split_for_the_first_time_goes_by_rows_and_columns():
    flow = Flow()
    axis = flow.fresh(6)
    rows, columns = split(flow, axis, (2, 3))
    pairs = [[a, b] for a in rows.atoms for b in columns.atoms]
    assert flow.atoms.factors(axis.atoms).tolist() == pairs


def test_an_empty_reshape_fixes_its_axes():
    flow = Flow()
    axes = [flow.fresh(3), flow.fixed(0)]
    (made,) = reshape(flow, axes, (0,))
    assert made.size == 0
    assert not flow.atoms.find(axes[0].atoms).any()


def reason_of(flow, axis):
    return flow.reason(int(flow.atoms.reasons(axis.atoms)[0]))


def test_what_is_frozen_is_so_for_the_reason_that_the_flow_is_at():
    flow = Flow()
    outer, inner, after, alone = (flow.fresh(2) for _ in range(4))
    with flow.at("the outer"):
        with flow.at("the inner"):
            flow.freeze(inner)
        flow.freeze(outer)
        flow.unify(flow.fixed(2), after)
    flow.unify(flow.fixed_because(2, "its own"), alone)
    reasons = [reason_of(flow, axis) for axis in (outer, inner, after, alone)]
    assert reasons == ["the outer", "the inner", "the outer", "its own"]


def test_the_former_reason_is_back_after_an_error():
    flow = Flow()
    axis = flow.fresh(2)
    with flow.at("the outer"):
        with pytest.raises(KeyError), flow.at("the inner"):
            raise KeyError
        flow.changes(axis)
    ((atoms, number),) = flow.inexact
    assert atoms is axis.atoms
    assert flow.reason(number) == "the outer"


def test_an_equation_is_a_reason_by_its_name_and_line():
    program, _ = trace(lambda x: x + 1, np.float32(0))
    flow = Flow()
    axis = flow.fresh(2)
    with flow.at(program.equations[0]):
        flow.freeze(axis)
    assert reason_of(flow, axis).startswith("add at ")
    assert "test_labels.py" in reason_of(flow, axis)


def test_size_one_is_fixed_without_further_reason():
    flow = Flow()
    assert reason_of(flow, flow.fresh(1)) == "a size of 1"


def zeros_of(*sets):
    flow = Flow()
    return [flow.fresh(2, None if x is None else frozenset(x)) for x in sets]


def test_a_sum_is_zero_where_all_are_and_a_product_where_one_is():
    axes = zeros_of({1, 2}, {3})
    assert all_zeros(axes) == {1, 2, 3}
    assert any_zeros(axes) == {3}  # the fewest leaves need a mask
    axes = zeros_of({1}, None)
    assert all_zeros(axes) is None
    assert any_zeros(axes) == {1}
    assert any_zeros(zeros_of(None)) is None
    assert all_zeros([]) == frozenset()


def test_a_sum_over_zeros_rests_on_them_and_one_over_others_changes():
    flow = Flow()
    axis = flow.fresh(2)
    flow.sums_over(axis, any_zeros(zeros_of({1, 2}, {3})))
    assert flow.relied == [(axis.atoms, {3})] and not flow.inexact
    flow.sums_over(axis, any_zeros(zeros_of(None, None)))
    assert len(flow.relied) == len(flow.inexact) == 1


def test_zero_times_infinity_is_no_zero():
    (zero,) = zeros_of({1})
    lowest = Axis(zero.atoms, other=Held(-np.inf, frozenset({2})))
    assert any_zeros([zero, lowest]) is None
    one = Axis(zero.atoms, other=Held(1.0, frozenset({2})))
    assert any_zeros([zero, one]) == {1}


def test_several_values_hold_one_number_if_each_does():
    one, other = Held(1.0, frozenset({1})), Held(1.0, frozenset({2}))
    assert same_held([one, other]) == Held(1.0, frozenset({1, 2}))
    assert same_held([one, None]) is same_held([one, Held(0.0, frozenset())]) is None
    assert same_held([]) is None


def test_values_are_tied_axis_by_axis():
    flow = Flow()
    one, other = (Value((flow.fresh(2), flow.fresh(3))) for _ in range(2))
    flow.unify_values(one, other)
    for a, b in zip(one.axes, other.axes, strict=True):
        np.testing.assert_array_equal(
            flow.atoms.find(a.atoms), flow.atoms.find(b.atoms)
        )


def test_a_merged_axis_is_zero_where_any_of_its_leaves_is_asked_to_be():
    """Index (i, j) goes with i or with j, so both axes must be zero where they go."""
    flow = Flow()
    rows = Axis(flow.fresh(2).atoms, frozenset({(0, 0)}), frozenset({0}))
    columns = Axis(flow.fresh(3).atoms, frozenset({(1, 0)}), frozenset({1}))
    merged = merge(flow, [rows, columns])
    assert merged.zeros == {0, 1} and merged.leaves == {(0, 0), (1, 0)}
    fixed = Axis(flow.fixed(3).atoms)  # never goes, hence needs no zeros
    assert merge(flow, [rows, fixed]).zeros == {0}
