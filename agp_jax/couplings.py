"""Couplings: which slices of which leaves must be removed together, as plain values.

A unit is one thing that can be removed, such as a channel of a residual stream: a slice
of every kernel that makes it, of its bias and scale, and of every kernel that reads it.
Units that live in the same slices of the same leaves form a group.
"""

import dataclasses
import itertools
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agp_jax.trees import (
    PyTree,
    Shape,
    expect,
    flatten_with_paths,
    name_together,
    subtree_at,
    unflatten_around,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """The slices of one leaf's axis that belong to a group.

    Attributes:
      path: of the leaf.
      axis: of the leaf; never negative.
      indices: int array (units, slices): the slices of each unit along the axis.
      role: what the leaf does with the units: "out" makes them (a filter), "in" reads
        them (a consumer), "each" acts on each by itself (a bias, a scale, a statistic);
        "layer" where a scan steps through them, each of which is a layer.
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
      num_units: how many there are; in each layer if they are stacked.
      members: where they live.
      inexact: why a thinned model would differ from the masked one; None if it is the
        same to float rounding.
      num_layers: for the weights of layers that a scan steps through, how many there
        are; each may lose other units, but all as many. None if units are of one kind.
      num_chosen: how many of the units the function chooses at a time, such as experts
        for a token, of which so many must stay; 0 if it does not choose.
    """

    name: str
    num_units: int
    members: tuple[Member, ...]
    inexact: str | None = None
    num_layers: int | None = None
    num_chosen: int = 0

    @property
    def exact(self) -> bool:
        """Whether the thinned model computes what the masked one does."""
        return self.inexact is None

    @property
    def is_stack(self) -> bool:
        """Whether its units are layers, which a scan steps through."""
        return any(member.role == "layer" for member in self.members)

    @property
    def shape(self) -> Shape:
        """That of a number for each unit: (layers, units), or (units,)."""
        layers = (self.num_layers,) if self.num_layers else ()
        return (*layers, self.num_units)

    def count(self, kind: str = "units") -> str:
        """How many units there are, in words."""
        stack = f"{self.num_layers} x " if self.num_layers else ""
        chosen = f", {self.num_chosen} chosen at a time" if self.num_chosen else ""
        return f"{stack}{self.num_units} {kind}{chosen}"

    def __str__(self) -> str:
        exact = "exact" if self.exact else f"not exact: {self.inexact}"
        lines = [f"{self.name}: {self.count()}, {exact}"]
        for member in self.members:
            slices = member.indices.shape[1]
            times = f" x {slices}" if slices > 1 else ""
            lines.append(f"    {member.role:4} {member.path}[{member.axis}]{times}")
        return "\n".join(lines)


def _summary(group: Group, others: Sequence[Group]) -> str:
    """A group in a line, without its name."""
    leaves = len({member.path for member in group.members})
    exact = "exact" if group.exact else f"not exact ({group.inexact})"
    return f"{group.count(_kind(group, others))}, in {leaves} leaves, {exact}"


def _kind(group: Group, others: Sequence[Group]) -> str:
    """What its units most likely are, to go by where they live."""
    if group.is_stack:
        return "layers"
    if group.num_chosen:
        return "experts"
    made = {m.path: m for m in group.members if m.role == "out"}
    read = {m.path for m in group.members if m.role == "in"}
    for member in made.values():
        runs = np.diff(np.sort(member.indices, axis=1), axis=1)
        if runs.size:
            return "heads" if (runs == 1).all() else "features of heads"
    for other in others:  # what makes two axes that can be cut makes heads
        for member in other.members if other is not group else ():
            mine = made.get(member.path)
            if mine and member.role == "out" and member.axis != mine.axis:
                return "heads" if mine.axis < member.axis else "features of heads"
    if len(made) > 1 and len(read) > 1:
        return "channels of a stream"
    return "hidden units"


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """What is added to a stream, and adds nothing once its leaves are zero.

    Attributes:
      name: unique among the branches of a function, and the same in every run.
      leaves: the paths of all that is of use for it alone.
      needed: those of the leaves whose zeros make it zero.
      inexact: why a model without it would differ from the masked one; None if it is
        the same to float rounding.
    """

    name: str
    leaves: tuple[str, ...]
    needed: frozenset[str]
    inexact: str | None = None


def _branch_entry(branch: Branch) -> tuple[str, str]:
    return f"branch {branch.name}", f"{len(branch.leaves)} leaves"


def unique_name(name: str, taken: Container[str]) -> str:
    """`name`, or with the first number that makes it another than those taken."""
    numbered = (f"{name}#{number}" for number in itertools.count(2))
    return next(x for x in itertools.chain([name], numbered) if x not in taken)


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
      branches: what can be removed as a whole, outer branches and those inside them.

    >>> import agp_jax as agp
    >>> def mlp(params, x):
    ...     return jnp.maximum(x @ params["up"], 0) @ params["down"]
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    >>> couplings = agp.find_couplings(mlp, params, jnp.ones((1, 4)))
    >>> [(group.name, group.num_units, group.exact) for group in couplings.groups]
    [('up[1]', 8, True)]
    >>> couplings.masks({"up[1]": [0, 3]})["down"][:, 0]
    Array([False,  True,  True, False,  True,  True,  True,  True], dtype=bool)
    """

    groups: tuple[Group, ...]
    variables: PyTree
    frozen: Mapping[tuple[str, int], tuple[tuple[int, int, str], ...]]
    axes: tuple[np.ndarray, ...]
    branches: tuple[Branch, ...] = ()

    def __str__(self) -> str:
        """A line for each group, equal ones in one; `table()` has all of it."""
        entries = [(group.name, _summary(group, self.groups)) for group in self.groups]
        entries += [_branch_entry(branch) for branch in self.branches]
        lines = [f"{name}: {said}" for name, said, _ in name_together(entries)]
        leaves = len({path for path, _ in self.frozen})
        return "\n".join(
            [
                *(lines or ["nothing can be cut"]),
                f"fixed axes, in part or whole: {len(self.frozen)}, of leaves: "
                f"{leaves}; table() says why",
            ]
        )

    def table(self) -> str:
        """All groups with their members, all branches, and what is fixed and why."""
        lines = [str(group) for group in self.groups]
        lines += [": ".join(_branch_entry(branch)) for branch in self.branches]
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

        Keys of random numbers have none: `optax.MaskedNode()` stands in the place of
        the key, and of a box that holds nothing else, such as an NNX variable.

        Args:
          removed: for names of groups, the numbers of the units to remove. Where layers
            are stacked an array (layers, removed) removes other units in each layer.
            For names of branches, which are one unit each, `[0]`.
        """
        expect(removed, Mapping, "the units to remove by group, as {name: numbers}")
        paths, leaves, treedef = flatten_with_paths(self.variables)
        masks = {
            path: np.ones(x.shape, bool)
            for path, x in zip(paths, leaves, strict=True)
            if not jnp.issubdtype(x.dtype, jax.dtypes.extended)
        }
        branches = {branch.name: branch for branch in self.branches}
        for name, units in removed.items():
            if name in branches:
                whole = [path for path in branches[name].leaves if path in masks]
                masks |= {p: np.zeros_like(masks[p]) for p in whole if len(units)}
                continue
            group = self[name]
            dead = unit_flags(group, units)
            for member in group.members:
                mask = masks[member.path]
                mask &= ~along_axis(slice_flags(member, dead, mask.shape), mask, member)
        found = [jnp.asarray(masks[path]) if path in masks else None for path in paths]
        return unflatten_around(treedef, found, optax.MaskedNode())

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
        branches = tuple(
            _branch_under(start, branch)
            for branch in self.branches
            if any(path.startswith(start) for path in branch.leaves)
        )
        return Couplings(tuple(groups), variables, frozen, tuple(axes), branches)


def _branch_under(start: str, branch: Branch) -> Branch:
    """What is of a branch at the paths that start so, by its paths there."""
    inner = [
        path.removeprefix(start) for path in branch.leaves if path.startswith(start)
    ]
    lost = sorted(path for path in branch.needed if not path.startswith(start))
    return Branch(
        branch.name.removeprefix(start),
        tuple(inner),
        frozenset(path.removeprefix(start) for path in branch.needed) & {*inner},
        branch.inexact or (f"{lost[0]} must be zero" if lost else None),
    )


def unit_flags(group: Group, units: Any) -> np.ndarray:
    """Numbers of units as bools: (units,), or (layers, units) where these differ."""
    numbers = np.asarray(units)
    if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"{group.name}: expected the numbers of the units to remove, got "
            f"{numbers.dtype}"
            + ("; np.flatnonzero(flags) gives them" if numbers.dtype == bool else "")
        )
    numbers = numbers.astype(int)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < group.num_units:
        raise ValueError(
            f"{group.name} has units 0 to {group.num_units - 1}, got "
            f"{numbers.min()} to {numbers.max()}"
        )
    if numbers.ndim == 1:
        flags = np.zeros(group.num_units, bool)
        flags[numbers] = True
        return flags
    if numbers.ndim != 2 or not group.num_layers or len(numbers) != group.num_layers:
        raise ValueError(
            f"{group.name}: expected the numbers of the units to remove"
            + (f", or {group.num_layers} rows of them" if group.num_layers else "")
            + f", got an array of shape {numbers.shape}"
        )
    flags = np.zeros(group.shape, bool)
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
