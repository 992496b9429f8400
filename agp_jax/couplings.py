"""Couplings: which slices of which leaves must be removed together.

Read off the traced program of any function, index by index; no layer is known by name.
A unit is one thing that can be removed, such as a channel of a residual stream: a slice
of every kernel that makes it, of its bias and scale, and of every kernel that reads it.
Units that live in the same slices of the same leaves form a group.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agp_jax.programs.analyses import Analysis, abstract_array, analyse, stacked_atoms
from agp_jax.trees import PyTree, flatten_with_paths, subtree_at


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """The slices of one leaf's axis that belong to a group.

    Attributes:
      path: of the leaf.
      axis: of the leaf; never negative.
      indices: int array (units, slices): the slices of each unit along the axis.
      role: what the leaf does with the units: "out" makes them (a filter), "in" reads
        them (a consumer), "each" acts on each by itself (a bias, a scale, a statistic).
      is_needed: whether the removed units change nothing because this leaf is zero
        there. Where it is not needed, it need not be masked.
    """

    path: str
    axis: int
    indices: np.ndarray
    role: str
    is_needed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units that live in the same leaves.

    Attributes:
      name: unique among the groups of a function, and the same in every run.
      units: how many there are; in each layer if they are stacked.
      members: where they live.
      inexact: why a thinned model would differ from the masked one; None if it is the
        same to float rounding.
      layers: for the weights of layers that a scan steps through, how many there are;
        each may lose other units, but all as many. None if units are of one kind.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    inexact: str | None = None
    layers: int | None = None

    @property
    def exact(self) -> bool:
        """Whether the thinned model computes what the masked one does."""
        return self.inexact is None

    def __str__(self) -> str:
        stack = f"{self.layers} x " if self.layers else ""
        kind = "exact" if self.exact else f"not exact: {self.inexact}"
        lines = [f"{self.name}: {stack}{self.units} units, {kind}"]
        for member in self.members:
            slices = member.indices.shape[1]
            times = f" x {slices}" if slices > 1 else ""
            lines.append(f"    {member.role:4} {member.path}[{member.axis}]{times}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Couplings:
    """What `find_couplings` found.

    Attributes:
      groups: the units that can be removed.
      variables: the variables they were found for, as abstract arrays.
      frozen: for (path, axis), what cannot be removed there: (first index, end, why).
      axes: axes of values inside the function that must not become empty, as int
        arrays (indices, factors, 2) of (group, unit): an index goes if one of its
        factors does. Group -1 stands for no factor.
    """

    groups: tuple[Group, ...]
    variables: PyTree
    frozen: Mapping[tuple[str, int], tuple[tuple[int, int, str], ...]]
    axes: tuple[np.ndarray, ...]

    def __str__(self) -> str:
        lines = [str(group) for group in self.groups]
        lines += [
            f"fixed {path}[{axis}] {start}:{stop}: {reason}"
            for (path, axis), runs in self.frozen.items()
            for start, stop, reason in runs
        ]
        return "\n".join(lines)

    def __getitem__(self, name: str) -> Group:
        """The group of that name."""
        for group in self.groups:
            if group.name == name:
                return group
        names = ", ".join(group.name for group in self.groups)
        raise ValueError(f"there is no group {name!r}; the groups are: {names}")

    def masks(self, removed: Mapping[str, Any]) -> PyTree:
        """Bool masks over the variables, False on every slice of the removed units.

        Args:
          removed: for names of groups, the numbers of the units to remove. Where layers
            are stacked an array (layers, removed) removes other units in each layer.
        """
        paths, leaves, treedef = flatten_with_paths(self.variables)
        masks = {
            path: np.ones(x.shape, bool)
            for path, x in zip(paths, leaves, strict=True)
            if not jnp.issubdtype(x.dtype, jax.dtypes.extended)
        }
        for name, units in removed.items():
            group = self[name]
            dead = unit_flags(group, units)
            for member in group.members:
                mask = masks[member.path]
                mask &= ~along_axis(slice_flags(member, dead, mask.shape), mask, member)
        return treedef.unflatten(
            jnp.asarray(masks[path]) if path in masks else optax.MaskedNode()
            for path in paths
        )

    def subtree(self, prefix: str) -> "Couplings":
        """The couplings of the variables under `prefix` alone, by their paths there.

        What they are coupled to elsewhere, such as batch statistics, follows.
        """
        variables = subtree_at(self.variables, prefix)
        start = prefix + "/"
        groups, number = [], np.full(len(self.groups) + 1, -1)
        for i, group in enumerate(self.groups):
            inner = tuple(
                dataclasses.replace(m, path=m.path.removeprefix(start))
                for m in group.members
                if m.path.startswith(start)
            )
            lost = [m for m in group.members if not m.path.startswith(start)]
            needed = next((f"{m.path} must be zero" for m in lost if m.is_needed), None)
            if inner:
                number[i] = len(groups)
                inexact = group.inexact or needed
                groups.append(
                    dataclasses.replace(group, members=inner, inexact=inexact)
                )
        axes = []
        for axis in self.axes:
            inner = np.stack([number[axis[..., 0]], axis[..., 1]], axis=-1)
            if (inner[..., 0] >= 0).any(axis=1).all():
                axes.append(inner)
        frozen = {
            (path.removeprefix(start), axis): runs
            for (path, axis), runs in self.frozen.items()
            if path.startswith(start)
        }
        return Couplings(tuple(groups), variables, frozen, tuple(axes))


def find_couplings(
    fn: Callable[..., PyTree], variables: PyTree, *inputs: PyTree
) -> Couplings:
    """The groups of slices of `variables` that `fn(variables, *inputs)` couples.

    Nothing is computed, so arrays and `jax.ShapeDtypeStruct` do equally. The shapes of
    `inputs` and of what `fn` returns stay as they are: pass the function that predicts,
    not one that returns updated statistics, whose shapes would stay, too.

    >>> def mlp(params, x):
    ...     return jnp.maximum(x @ params["up"], 0) @ params["down"]
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    >>> print(find_couplings(mlp, params, jnp.ones((1, 4))).groups[0])
    up[1]: 8 units, exact
        in   down[0]
        out  up[1]
    """
    analysis = analyse(fn, variables, *inputs, freeze_outputs=True)
    slices = leaf_slices(analysis)
    stacks, layers = stacked_atoms(analysis)
    clusters = _cluster(slices, stacks)
    return Couplings(
        groups=_make_groups(analysis, slices, clusters, stacks, layers),
        variables=jax.tree.map(abstract_array, variables),
        frozen=_frozen_slices(analysis),
        axes=_axes_to_keep(analysis, slices, clusters),
    )


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


def unit_flags(group: Group, units: Any) -> np.ndarray:
    """Numbers of units as bools: (units,), or (layers, units) where these differ."""
    numbers = np.asarray(units, int)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < group.units:
        raise ValueError(
            f"{group.name} has units 0 to {group.units - 1}, got {numbers.min()} to "
            f"{numbers.max()}"
        )
    if numbers.ndim == 1:
        flags = np.zeros(group.units, bool)
        flags[numbers] = True
        return flags
    if numbers.ndim != 2 or not group.layers or len(numbers) != group.layers:
        raise ValueError(
            f"{group.name}: expected the numbers of the units to remove"
            + (f", or {group.layers} rows of them" if group.layers else "")
            + f", got an array of shape {numbers.shape}"
        )
    flags = np.zeros((group.layers, group.units), bool)
    np.put_along_axis(flags, numbers, True, axis=1)
    return flags


def slice_flags(
    member: Member, unit_flags: np.ndarray, shape: Sequence[int]
) -> np.ndarray:
    """Flags of units as flags of the slices along the member's axis."""
    flags = np.zeros((*unit_flags.shape[:-1], shape[member.axis]), bool)
    flags[..., member.indices] = unit_flags[..., None]
    return flags


def along_axis(flags: np.ndarray, leaf: Any, member: Member) -> np.ndarray:
    """Flags of slices in a shape that broadcasts with the leaf."""
    shape = [1] * leaf.ndim
    shape[member.axis] = flags.shape[-1]
    if flags.ndim == 2:
        shape[0] = flags.shape[0]
    return flags.reshape(shape)


def _cluster(slices: Slices, stacks: np.ndarray) -> list[np.ndarray]:
    """Groups of units as int arrays (units, slices) of places in `slices`.

    Atoms are of one group if they live in the same axes of the same leaves, as often.
    """
    if not len(slices.atom):
        return []
    starts = np.flatnonzero(np.diff(slices.atom, prepend=-1))
    lengths = np.diff(np.append(starts, len(slices.atom)))
    axes, columns = slices.axis.max() + 1, slices.column.max() + 1
    home = (slices.leaf * axes + slices.axis) * columns + slices.column
    # A sum of random numbers, one per home, tells atoms with other homes apart.
    draws = np.random.default_rng(0).integers(2**63, size=home.max() + 1)
    signature = np.add.reduceat(draws[home], starts)
    signature += stacks[slices.atom[starts]]
    _, kind, counts = np.unique(signature, return_inverse=True, return_counts=True)
    by_kind = np.split(np.argsort(kind, kind="stable"), np.cumsum(counts)[:-1])
    groups = []
    for atoms in by_kind:
        places = starts[atoms][:, None] + np.arange(lengths[atoms[0]])
        first = slices.index[places[:, 0]]
        if len(atoms) > 1:
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
    layers: np.ndarray,
) -> tuple[Group, ...]:
    flow = analysis.flow
    group_of = np.full(flow.atoms.size, -1)
    for number, places in enumerate(clusters):
        group_of[slices.atom[places[:, 0]]] = number
    inexact = _reasons_of_groups(analysis, group_of, len(clusters))
    needed = _needed_leaves(analysis, group_of, len(clusters))
    groups = []
    names: set[str] = set()
    for number, places in enumerate(clusters):
        members = tuple(_members(analysis, slices, places, needed[number]))
        stack = stacks[slices.atom[places[0, 0]]]
        groups.append(
            Group(
                name=_unique_name(members, names),
                units=len(places),
                members=members,
                inexact=inexact[number],
                layers=int(layers[stack]) or None,
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
            role=next((r for r in ("out", "in") if r in roles), "each"),
            is_needed=leaf in needed,
        )


def _unique_name(members: Sequence[Member], taken: set[str]) -> str:
    first = min(members, key=lambda m: ("out", "each", "in").index(m.role))
    name = f"{first.path}[{first.axis}]"
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}#{number}", number + 1
    return unique


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
    """The axes that could become empty though every group keeps a unit."""
    flow = analysis.flow
    sizes = np.array([len(places) for places in clusters], int)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    units = np.concatenate([np.arange(size) for size in [0, *sizes]])
    numbers = np.full(flow.atoms.size, -1)
    atoms = [slices.atom[places[:, 0]] for places in clusters]
    numbers[np.concatenate([np.zeros(0, int), *atoms])] = np.arange(len(groups))
    seen: dict[bytes | int, None] = {}
    found = []
    for axis in (axis for value in flow.values.values() for axis in value.axes):
        if id(axis.atoms) in seen:
            continue
        seen[id(axis.atoms)] = None
        factors = numbers[flow.atoms.factors(axis.atoms)]
        factors = factors[:, (factors >= 0).any(axis=0)]
        key = factors.tobytes()
        if key not in seen and _may_become_empty(factors, groups, sizes):
            found.append(
                np.stack(
                    [np.where(factors < 0, -1, x[factors]) for x in (groups, units)],
                    axis=-1,
                )
            )
        seen[key] = None
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
        group = groups[present[0]]
        is_whole = present[0] >= 0 and groups[present[-1]] == group
        if not is_whole or len(present) != sizes[group]:
            return True
        rows = rows * len(present) + inverse.reshape(-1)
        count *= len(present)
    # All combinations of all units: as long as each group keeps one, one stays.
    return len(factors) < count or len(np.unique(rows)) != count
