"""Labels: what is known about each axis of each value of a program.

An axis carries an atom per index (see `atoms`), so that two axes whose atoms are equal
are cut alike. A reshape that merges axes makes product atoms, and one that splits an
axis takes them apart again.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from agp_jax.programs.atoms import FROZEN, Atoms
from agp_jax.programs.jaxprs import Equation, Program, Variable, source_line
from agp_jax.trees import Shape


class Held(NamedTuple):
    """A number that a value holds at every removed index of an axis.

    Attributes:
      number: the same in any precision; 1 and 0 for true and false.
      leaves: those by whose zeros the value holds it.
    """

    number: float
    leaves: frozenset[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a value.

    Attributes:
      atoms: one per index.
      leaves: which axes of which leaves it continues, as (leaf, axis), while the value
        depends on the variables alone.
      zeros: the leaves whose zeros make the value zero at every removed index; None if
        the value need not be zero there.
      other: what else the value holds at every removed index, if that is known; such
        as minus infinity, of which a maximum takes no notice.
      symbol: its size, where that is a symbol of `jax.export` and no number. No index
        can be told from another then: one frozen atom stands for all.
    """

    atoms: np.ndarray
    leaves: frozenset[tuple[int, int]] = frozenset()
    zeros: frozenset[int] | None = None
    other: Held | None = None
    symbol: Any = None

    @property
    def size(self) -> int:
        return len(self.atoms) if self.symbol is None else self.symbol

    def relabel(
        self,
        leaves: frozenset[tuple[int, int]] = frozenset(),
        zeros: frozenset[int] | None = None,
        other: Held | None = None,
    ) -> "Axis":
        """The same indices, of another value."""
        return Axis(self.atoms, leaves, zeros, other, self.symbol)

    @property
    def held(self) -> Held | None:
        """The number at every removed index, zero or other."""
        return self.other if self.zeros is None else Held(0.0, self.zeros)

    def holding(self, number: float) -> frozenset[int] | None:
        """The leaves by whose zeros that number is `number`; None if it need not be."""
        held = self.held
        return held.leaves if held is not None and held.number == number else None


class Numbers(NamedTuple):
    """What the entries of an integer value count: indices of an axis, all inside it.

    Attributes:
      atoms: of that axis.
      chosen: whether they are picked out of it, as `top_k` does. Else they are of a
        ramp: where a value still has an axis of these very atoms, it counts that one.
      never: the leaves by whose zeros no removed index is among those chosen; None if
        one may be.
    """

    atoms: np.ndarray
    chosen: bool = False
    never: frozenset[int] | None = None


class Value(NamedTuple):
    """What is known about a value.

    Attributes:
      axes: one for each of its axes.
      is_weight: whether it depends on nothing but the variables and constants.
      leaf: the leaf whose axes these are, one for one, if the value is that leaf or
        made of it element by element.
      numbers: what its entries count, if it is known that they count something.
    """

    axes: tuple[Axis, ...]
    is_weight: bool = False
    leaf: int | None = None
    numbers: Numbers | None = None


class Flow:
    """The labels of one program, and what has been found out so far.

    Attributes:
      atoms: the atoms of all axes.
      values: what is known about each variable.
      makers: the equation that makes each variable.
      outside: for inputs of bodies, the variable outside that each of them is.
      derivatives: the programs of derivatives that functions bring along, where these
        have been labelled, too.
      roles: what the program does with each leaf's axis: "out", "in", "each" or
        "layer".
      inexact: axes whose removal changes results, and the number of the reason.
      relied: axes whose removal changes nothing because certain leaves are zero there.
      choices: axes from which so many indices are picked at a time, and the number of
        the equation.

    What freezes an axis or makes it inexact is remembered: the equation, or a reason in
    words, that the flow is `at`.
    """

    def __init__(self):
        self.atoms = Atoms()
        self.values: dict[Variable, Value] = {}
        self.makers: dict[Variable, Equation] = {}
        self.outside: dict[Variable, Variable] = {}
        self.derivatives: dict[Equation, tuple[Program, ...]] = {}
        self.roles: dict[tuple[int, int], set[str]] = {}
        self.inexact: list[tuple[np.ndarray, int]] = []
        self.relied: list[tuple[np.ndarray, frozenset[int]]] = []
        self.choices: list[tuple[np.ndarray, int, int]] = []
        self._reasons: list[Equation | str] = ["a size of 1"]
        self._now = 0
        self._fixed: dict[int, Axis] = {}

    @contextlib.contextmanager
    def at(self, reason: Equation | str) -> Iterator[None]:
        """Makes `reason` that of all that is found out inside, and of nothing after."""
        before, self._now = self._now, self._number(reason)
        try:
            yield
        finally:
            self._now = before

    def reason(self, number: int) -> str:
        reason = self._reasons[number]
        if isinstance(reason, Equation):
            return f"{reason.name} at {source_line(reason)}"
        return reason

    def origin(self, variable: Variable) -> Variable:
        """The variable itself or, of an input of a body, that outside of all bodies."""
        while variable in self.outside:
            variable = self.outside[variable]
        return variable

    def _number(self, reason: Equation | str) -> int:
        self._reasons.append(reason)
        return len(self._reasons) - 1

    def fresh(self, size: int, zeros: frozenset[int] | None = None) -> Axis:
        """An axis tied to nothing yet."""
        if not are_numbers(size) or size < 2:
            return self.fixed(size)
        return Axis(self.atoms.fresh(size), zeros=zeros)

    def fixed(self, size: int) -> Axis:
        """An axis that cannot shrink."""
        if size not in self._fixed:
            self._fixed[size] = _axis_of(FROZEN, size)
        return self._fixed[size]

    def fixed_because(self, size: int, reason: str) -> Axis:
        """An axis that cannot shrink, nor what it is tied to, for a reason."""
        atom = self.atoms.fresh_frozen(self._number(reason))
        return _axis_of(atom, size)

    def freeze(self, *axes: Axis) -> None:
        """Keeps axes from shrinking, for the present reason."""
        for axis in axes:
            self.atoms.freeze(axis.atoms, self._now)

    def unify(self, first: Axis, *others: Axis) -> None:
        """Cuts axes alike from now on."""
        for other in others:
            if other.atoms is not first.atoms:
                self.atoms.union(first.atoms, other.atoms, self._now)

    def unify_values(self, first: Value, second: Value) -> None:
        for one, other in zip(first.axes, second.axes, strict=True):
            self.unify(one, other)

    def give_role(self, axis: Axis, role: str) -> None:
        for leaf in axis.leaves:
            self.roles.setdefault(leaf, set()).add(role)

    def sums_over(self, axis: Axis, leaves: frozenset[int] | None) -> None:
        """Notes that `axis` is reduced, as by a sum or a maximum.

        Removed indices add nothing by the zeros of `leaves`; if None, the result
        changes.
        """
        if leaves is None:
            self.changes(axis)
        else:
            self.relied.append((axis.atoms, leaves))

    def chooses(self, axis: Axis, count: int) -> None:
        """Notes that `count` indices of `axis` are picked, which must therefore stay.

        Removed indices are never among them where they hold minus infinity.
        """
        self.sums_over(axis, axis.holding(-np.inf))
        self.choices.append((axis.atoms, count, self._now))

    def changes(self, axis: Axis) -> None:
        """Notes that removing indices of `axis` changes the result."""
        self.inexact.append((axis.atoms, self._now))


# What a primitive ties, hands on or freezes: a function of the labels so far, of the
# equation and of the values it reads, which gives the axes of each output.
LabelRule = Callable[[Flow, Equation, Sequence[Value]], list[list[Axis]]]


def are_numbers(*sizes: Any) -> bool:
    """Whether none of the sizes is a symbol, as in an export for any batch."""
    return all(isinstance(size, int | np.integer) for size in sizes)


def _axis_of(atom: int, size: int) -> Axis:
    """An axis of one atom over and over."""
    if are_numbers(size):
        return Axis(np.full(size, atom, np.int32))
    return Axis(np.full(1, atom, np.int32), symbol=size)


def all_zeros(axes: Sequence[Axis]) -> frozenset[int] | None:
    """The leaves that make every one of `axes` zero where removed."""
    return all_proofs([axis.zeros for axis in axes])


def any_zeros(axes: Sequence[Axis]) -> frozenset[int] | None:
    """The fewest leaves that make a product of `axes` zero where removed."""
    finite = all(axis.other is None or np.isfinite(axis.other.number) for axis in axes)
    return any_proof([axis.zeros for axis in axes]) if finite else None


def all_proofs(proofs: Sequence[frozenset[int] | None]) -> frozenset[int] | None:
    """The leaves that prove all zeros that `proofs` prove; None if one is None."""
    return None if None in proofs else frozenset().union(*filter(None, proofs))


def any_proof(proofs: Sequence[frozenset[int] | None]) -> frozenset[int] | None:
    """The proof of the fewest leaves; None if all are None."""
    known = [proof for proof in proofs if proof is not None]
    return min(known, key=len) if known else None


def same_held(several: Sequence[Held | None]) -> Held | None:
    """The number that all of several values hold, if it is one."""
    known = [held for held in several if held is not None]
    if len(known) < len(several) or len({held.number for held in known}) != 1:
        return None
    leaves = frozenset().union(*(held.leaves for held in known))
    return Held(known[0].number, leaves)


def continued(axes: Sequence[Axis]) -> frozenset[tuple[int, int]]:
    return frozenset().union(*(axis.leaves for axis in axes))


def reshape(flow: Flow, axes: Sequence[Axis], sizes: Shape) -> list[Axis]:
    """The axes after a reshape: merged and split in blocks of equal size."""
    old = tuple(axis.size for axis in axes)
    if 0 in old or 0 in sizes:
        return _reshape_empty(flow, axes, sizes)
    result = [flow.fixed(1)] * len(sizes)
    for before, after in _blocks(old, sizes):
        merged = merge(flow, [axes[i] for i in before])
        parts = split(flow, merged, tuple(sizes[j] for j in after))
        for j, part in zip(after, parts, strict=True):
            result[j] = part
    return result


def _reshape_empty(flow: Flow, axes: Sequence[Axis], sizes: Shape) -> list[Axis]:
    """Without entries only equal sizes at either end tell which axis is which."""
    old = tuple(axis.size for axis in axes)
    both = min(len(old), len(sizes))
    first = next((i for i in range(both) if old[i] != sizes[i]), both)
    last = next((i for i in range(both - first) if old[~i] != sizes[~i]), both - first)
    end = len(axes) - last
    flow.freeze(*axes[first:end])
    middle = [flow.fixed(size) for size in sizes[first : len(sizes) - last]]
    return [*axes[:first], *middle, *axes[end:]]


def merge(flow: Flow, axes: Sequence[Axis]) -> Axis:
    """The axis that flattens `axes` in row-major order."""
    if len(axes) == 1:
        return axes[0]
    shape = tuple(axis.size for axis in axes)
    if not are_numbers(*shape):
        flow.freeze(*axes)
        return flow.fixed(math.prod(shape))
    columns = [
        np.broadcast_to(_along(axis.atoms, i, len(axes)), shape).ravel()
        for i, axis in enumerate(axes)
    ]
    # A product goes if any of its factors does, so each of these must prove its zeros.
    shrinking = [axis for axis in axes if flow.atoms.find(axis.atoms).any()]
    atoms = flow.atoms.product(columns)
    other = same_held([axis.other for axis in shrinking])
    return Axis(atoms, continued(axes), all_zeros(shrinking), other)


def split(flow: Flow, axis: Axis, sizes: Shape) -> list[Axis]:
    """The axes that `axis` divides into.

    Where every factor of its atoms varies along one new axis only, that axis takes
    the factor: a flattened axis is taken apart as it was made. Otherwise the new axes
    get atoms of their own, and the old ones become their products.
    """
    if len(sizes) == 1:
        return [axis]
    if not are_numbers(axis.size, *sizes):
        flow.freeze(axis)
        return [flow.fixed(size) for size in sizes]
    # Factors are looked at one by one: of a flattened (head, feature) that was merged
    # with more, the head may be taken out alone.
    found: list[list[np.ndarray]] = [[] for _ in sizes]
    for factor in flow.atoms.factors(axis.atoms).T:
        grid = factor.reshape(sizes)
        for i in range(len(sizes)):
            line = grid[tuple(slice(None) if i == j else 0 for j in range(len(sizes)))]
            if (grid == _along(line, i, len(sizes))).all():
                found[i].append(line.copy())
                break
        else:
            # This factor varies along several new axes, as where 6 channels that each
            # are an atom become 2 x 3: a row or a column goes whole or not at all.
            parts = [
                dataclasses.replace(axis, atoms=flow.fresh(size).atoms)
                for size in sizes
            ]
            flow.unify(axis, merge(flow, parts))
            return parts
    return [
        dataclasses.replace(
            axis,
            atoms=flow.atoms.product(lines) if lines else flow.fixed(size).atoms,
        )
        for lines, size in zip(found, sizes, strict=True)
    ]


def _along(values: np.ndarray, place: int, rank: int) -> np.ndarray:
    """A vector as an array of `rank` axes that varies along one of them."""
    return values.reshape([-1 if i == place else 1 for i in range(rank)])


def _blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of old and new axes of equal products, without axes of 1.

    >>> _blocks((6, 5, 1), (2, 3, 5))
    [([0], [0, 1]), ([1], [2])]
    """
    before = [i for i, size in enumerate(old) if size != 1]
    after = [j for j, size in enumerate(new) if size != 1]
    blocks = []
    while before:
        left, right = [before.pop(0)], [after.pop(0)]
        while (a := math.prod(old[i] for i in left)) != (
            b := math.prod(new[j] for j in right)
        ):
            try:
                is_less = a < b
            except jax.core.InconclusiveDimensionOperation:  # of symbols: all is one
                left, right = left + before, right + after
                before, after = [], []
                break
            (left if is_less else right).append((before if is_less else after).pop(0))
        blocks.append((left, right))
    return blocks
