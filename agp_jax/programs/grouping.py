"""Grouping: the couplings of a function, read off its traced program index by index.

No layer is known by name. Slices that carry one atom are one unit, and units that live
in the same slices of the same leaves form a group.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from agp_jax.couplings import Couplings, Group, Member, unique_name
from agp_jax.programs.analyses import Analysis, analyse, even_parts, stacked_atoms
from agp_jax.programs.atoms import FROZEN
from agp_jax.programs.branching import find_branches
from agp_jax.programs.labels import Axis
from agp_jax.trees import PyTree, Shape, abstract_arrays, expect_function


def find_couplings(
    fn: Callable[..., PyTree], variables: PyTree, *inputs: PyTree
) -> Couplings:
    """The groups of slices of `variables` that `fn(variables, *inputs)` couples.

    Nothing is computed, so arrays and `jax.ShapeDtypeStruct` do equally. The shapes of
    `inputs` and of what `fn` returns stay as they are: pass the function that predicts,
    not one that returns updated statistics, whose shapes would stay, too. What `fn`
    does not read for these inputs, such as later positions than they have, is fixed.

    >>> import jax.numpy as jnp
    >>> def mlp(params, x):
    ...     return jnp.maximum(x @ params["up"], 0) @ params["down"]
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    >>> print(find_couplings(mlp, params, jnp.ones((1, 4))).groups[0])
    up[1]: 8 units, exact
        in   down[0]
        out  up[1]
    """
    expect_function(fn, "a function first, as in find_couplings(predict, variables, x)")
    analysis = analyse(fn, variables, *inputs, freeze_outputs=True)
    _freeze_unread(analysis)
    _freeze_mixed_choices(analysis)
    slices = leaf_slices(analysis)
    stacks, num_layers = stacked_atoms(analysis)
    stacks, parts = even_parts(analysis, stacks)
    clusters = _cluster(slices, parts)
    return Couplings(
        groups=_make_groups(analysis, slices, clusters, stacks, num_layers),
        variables=abstract_arrays(variables),
        frozen=_frozen_slices(analysis),
        axes=_axes_to_keep(analysis, slices, clusters),
        branches=find_branches(analysis),
    )


def _freeze_unread(analysis: Analysis) -> None:
    """Keeps what no output depends on, such as positions beyond the length traced.

    It could go without a trace, but another call of the function may read it. What is
    read is summed over sooner or later, or fixed: by the shape of an output, if nothing
    else does it.
    """
    flow = analysis.flow
    is_read = np.zeros(flow.atoms.size, bool)
    for atoms, _ in (*flow.inexact, *flow.relied):
        is_read[flow.atoms.factors(atoms)] = True
    with flow.at("not read"):
        for axis in (axis for axes in analysis.leaves for axis in axes):
            factors = flow.atoms.factors(axis.atoms)
            flow.freeze(Axis(factors[~is_read[factors]]))


def _freeze_mixed_choices(analysis: Analysis) -> None:
    """Keeps axes of two kinds of units from which indices are chosen.

    As many units of each do not settle how many indices there are to choose from.
    """
    flow = analysis.flow
    for atoms, _, reason in flow.choices:
        factors = flow.atoms.factors(atoms)
        if factors.shape[1] > 1:
            flow.atoms.freeze(factors, reason)


class Slices(NamedTuple):
    """Every removable slice of every leaf: one entry per factor of its atom.

    Attributes:
      atom, leaf, axis, index: of the slice; arrays of one length.
      column: which of the atom's factors it is; two kinds of units that share an axis,
        such as heads and their features, differ in it.
    """

    atom: np.ndarray
    leaf: np.ndarray
    axis: np.ndarray
    column: np.ndarray
    index: np.ndarray


def leaf_slices(analysis: Analysis) -> Slices:
    """The removable slices, sorted by atom, leaf, axis and index."""
    rows = [np.zeros((5, 0), np.int64)]
    for i, axes in enumerate(analysis.leaves):
        for k, axis in enumerate(axes):
            factors = analysis.flow.atoms.factors(axis.atoms)
            for column, atoms in enumerate(factors.T):
                (index,) = np.nonzero(atoms)
                same = [np.full(len(index), x) for x in (i, k, column)]
                rows.append(np.stack([atoms[index], *same, index]))
    atom, leaf, axis, column, index = np.concatenate(rows, axis=1)
    order = np.lexsort((index, axis, leaf, atom))
    slices = Slices(*(x[order] for x in (atom, leaf, axis, column, index)))
    place = np.stack([slices.atom, slices.leaf, slices.axis, slices.index])
    new = np.ones(place.shape[1], bool)
    new[1:] = (place[:, 1:] != place[:, :-1]).any(axis=0)
    return Slices(*(x[new] for x in slices))


def _cluster(slices: Slices, parts: np.ndarray) -> list[np.ndarray]:
    """Groups of units as int arrays (units, slices) of places in `slices`.

    Atoms are of one group if they live in the same axes of the same leaves, as often,
    and are of one part if their layers are stacked.
    """
    if not len(slices.atom):
        return []
    starts = np.flatnonzero(np.diff(slices.atom, prepend=-1))
    lengths = np.diff(np.append(starts, len(slices.atom)))
    axes, columns = slices.axis.max() + 1, slices.column.max() + 1
    home = (slices.leaf * axes + slices.axis) * columns + slices.column
    # Atoms have lists of homes of all lengths. A sum of random numbers, one per home,
    # compares these lists as single integers. Two different ones agree with a chance of
    # about 2**-63, and the fixed seed makes every run the same.
    draws = np.random.default_rng(0).integers(2**63, size=home.max() + 1)
    signature = np.add.reduceat(draws[home], starts)
    signature += parts[slices.atom[starts]]  # of stacks; those of others are others
    _, kind, counts = np.unique(signature, return_inverse=True, return_counts=True)
    by_kind = np.split(np.argsort(kind, kind="stable"), np.cumsum(counts)[:-1])
    groups = []
    for atoms in by_kind:
        places = starts[atoms][:, None] + np.arange(lengths[atoms[0]])
        first = slices.index[places[:, 0]]
        if len(atoms) > 1:  # of one unit none can go
            groups.append(places[np.argsort(first, kind="stable")])

    def first_home(places: np.ndarray) -> tuple[int, ...]:
        columns = (slices.leaf, slices.axis, slices.index, slices.column)
        return tuple(int(column[places[0, 0]]) for column in columns)

    return sorted(groups, key=first_home)


def _make_groups(
    analysis: Analysis,
    slices: Slices,
    clusters: list[np.ndarray],
    stacks: np.ndarray,
    num_layers: np.ndarray,
) -> tuple[Group, ...]:
    flow = analysis.flow
    group_of = np.full(flow.atoms.size, -1)
    for number, places in enumerate(clusters):
        group_of[slices.atom[places[:, 0]]] = number
    inexact = _reasons_of_groups(analysis, group_of, len(clusters))
    needed = _needed_leaves(analysis, group_of, len(clusters))
    chosen = _numbers_chosen(analysis, group_of, [len(places) for places in clusters])
    groups = []
    names: set[str] = set()
    for number, places in enumerate(clusters):
        members = tuple(_members(analysis, slices, places, needed[number]))
        stack = stacks[slices.atom[places[0, 0]]]
        groups.append(
            Group(
                name=_name_group(members, names),
                num_units=len(places),
                members=members,
                inexact=inexact[number],
                num_layers=int(num_layers[stack]) or None,
                num_chosen=chosen[number],
            )
        )
        names.add(groups[-1].name)
    return tuple(groups)


def _members(
    analysis: Analysis, slices: Slices, places: np.ndarray, needed: set[int]
) -> Iterator[Member]:
    homes = np.stack([slices.leaf[places[0]], slices.axis[places[0]]], axis=1)
    for leaf, axis in np.unique(homes, axis=0).tolist():
        here = (homes == (leaf, axis)).all(axis=1)
        roles = analysis.flow.roles.get((leaf, axis), set())
        yield Member(
            path=analysis.paths[leaf],
            axis=axis,
            indices=slices.index[places[:, here]],
            role=next((r for r in ("layer", "out", "in") if r in roles), "each"),
            is_needed=leaf in needed,
        )


def _name_group(members: Sequence[Member], taken: set[str]) -> str:
    first = min(members, key=lambda m: ("out", "layer", "each", "in").index(m.role))
    return unique_name(f"{first.path}[{first.axis}]", taken)


def _reasons_of_groups(
    analysis: Analysis, group_of: np.ndarray, count: int
) -> list[str | None]:
    """Why each group is not exact; None if it is."""
    flow = analysis.flow
    reasons: list[str | None] = [None] * count
    for atoms, reason in flow.inexact:
        for group in np.unique(group_of[flow.atoms.factors(atoms)]).tolist():
            if group >= 0 and reasons[group] is None:
                reasons[group] = flow.reason(reason)
    return reasons


def _numbers_chosen(
    analysis: Analysis, group_of: np.ndarray, sizes: list[int]
) -> list[int]:
    """How many units of each group must stay to be chosen from; 0 if none is."""
    atoms, chosen = analysis.flow.atoms, [0] * len(sizes)
    for axis, count, _ in analysis.flow.choices:
        present = np.unique(atoms.find(axis))
        of_groups = group_of[present[present != FROZEN]]
        for group in np.unique(of_groups[of_groups >= 0]).tolist():
            elsewhere = sizes[group] - int((of_groups == group).sum())
            most = min(elsewhere + count, sizes[group])
            chosen[group] = max(chosen[group], most)
    return chosen


def _needed_leaves(
    analysis: Analysis, group_of: np.ndarray, count: int
) -> list[set[int]]:
    """The leaves on whose zeros the exactness of each group rests."""
    flow = analysis.flow
    needed: list[set[int]] = [set() for _ in range(count)]
    for atoms, leaves in flow.relied:
        for group in np.unique(group_of[flow.atoms.factors(atoms)]).tolist():
            if group >= 0:
                needed[group] |= leaves
    return needed


def _frozen_slices(
    analysis: Analysis,
) -> dict[tuple[str, int], tuple[tuple[int, int, str], ...]]:
    atoms = analysis.flow.atoms
    frozen = {}
    for path, axes in zip(analysis.paths, analysis.leaves, strict=True):
        for k, axis in enumerate(axes):
            fixed = ~atoms.factors(axis.atoms).any(axis=1)
            reasons = np.where(fixed, atoms.reasons(axis.atoms), -1)
            edges = np.flatnonzero(np.diff(reasons, prepend=-2, append=-2))
            runs = tuple(
                (start, stop, analysis.flow.reason(int(reasons[start])))
                for start, stop in itertools.pairwise(edges.tolist())
                if reasons[start] >= 0
            )
            if runs:
                frozen[path, k] = runs
    return frozen


def _axes_to_keep(
    analysis: Analysis, slices: Slices, clusters: list[np.ndarray]
) -> tuple[np.ndarray, ...]:
    """The axes that could become empty though every group keeps a unit.

    An index (head, feature) of a flattened axis goes with its head or its feature. If
    an axis has only some of these pairs, or only some units of a group, the units that
    stay may be none of its own. A cut has to look after such axes one by one.
    """
    flow = analysis.flow
    sizes = np.array([len(places) for places in clusters], int)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    units = np.concatenate([np.arange(size) for size in [0, *sizes]])
    # All units of all groups are counted through, so those of a group lie together.
    numbers = np.full(flow.atoms.size, -1)
    atoms = [slices.atom[places[:, 0]] for places in clusters]
    numbers[np.concatenate([np.zeros(0, int), *atoms])] = np.arange(len(groups))
    seen: set[int | tuple[Shape, bytes]] = set()
    found = []
    for axis in (axis for value in flow.values.values() for axis in value.axes):
        if id(axis.atoms) in seen:
            continue
        seen.add(id(axis.atoms))
        factors = numbers[flow.atoms.factors(axis.atoms)]
        factors = factors[:, (factors >= 0).any(axis=0)]
        key = factors.shape, factors.tobytes()
        if key not in seen and _may_become_empty(factors, groups, sizes):
            found.append(
                np.stack(
                    [np.where(factors < 0, -1, x[factors]) for x in (groups, units)],
                    axis=-1,
                )
            )
        seen.add(key)
    return tuple(found)


def _may_become_empty(
    factors: np.ndarray, groups: np.ndarray, sizes: np.ndarray
) -> bool:
    """Whether an axis could lose all indices while every group keeps a unit.

    Args:
      factors: numbers of the units whose removal removes each index: (indices,
        factors), -1 for none.
      groups: the group of each number.
      sizes: how many units each group has.
    """
    if not (factors >= 0).any(axis=1).all() or not factors.size:
        return False  # some index always stays
    rows, count = np.zeros(len(factors), np.int64), 1
    for column in factors.T:
        present, inverse = np.unique(column, return_inverse=True)
        # A column that lacks units of its group, or mixes groups, can lose all that it
        # has. Numbers are sorted: first and last show whether all are of one group.
        group = groups[present[0]]
        is_whole = present[0] >= 0 and groups[present[-1]] == group
        if not is_whole or len(present) != sizes[group]:
            return True
        rows = rows * len(present) + inverse.reshape(-1)
        count *= len(present)
    # With every combination of units on it, one stays as long as each group keeps one.
    return len(factors) < count or len(np.unique(rows)) != count
