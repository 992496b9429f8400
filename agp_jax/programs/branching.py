"""Branches: what is added to a stream, and adds nothing once its leaves are zero.

The kernels of a residual branch are of use for nothing else: every way from them to an
output leads through the sum. So a branch is an operand of a sum that vanishes with
leaves of its own, while the other operand stays what it is.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from agp_jax.couplings import Branch, unique_name
from agp_jax.programs.analyses import Analysis
from agp_jax.programs.jaxprs import REMAT, Equation, Program, Variable
from agp_jax.programs.propagation import value_of
from agp_jax.programs.vanishing import Proof, Zeros, summands


class _Pass(NamedTuple):
    """A value that is another one, as an input of a body is one outside."""

    source: Variable
    target: Variable


class _Operand(NamedTuple):
    """An operand of a sum, and the way of it into the sum alone."""

    equation: Equation
    place: int


def find_branches(analysis: Analysis) -> tuple[Branch, ...]:
    """The branches of a function, outer ones and those inside of them.

    Bodies that are remembered in part are looked through; those of loops are not.
    """
    steps = list(_flat(analysis.program))
    ways = _Ways(steps, analysis.program)
    private: dict[_Operand, list[int]] = defaultdict(list)
    leaves = analysis.program.inputs[: len(analysis.leaves)]
    for number, leaf in enumerate(leaves):
        for operand in ways.operands_after(leaf):
            private[operand].append(number)
    proofs = {
        operand: _proof(operand, {leaves[i]: i for i in own}, steps, ways)
        for operand, own in private.items()
    }
    found: dict[str, Branch] = {}
    for operand, proof in proofs.items():
        other = operand._replace(place=1 - operand.place)
        stays = operand.equation.inputs[other.place]
        is_weight = value_of(analysis.flow, stays).is_weight
        is_sum = other.place in summands(operand.equation)
        if not proof or not is_sum or is_weight or proofs.get(other) is not None:
            continue
        paths = tuple(analysis.paths[i] for i in private[operand])
        needed = frozenset(analysis.paths[i] for i in proof)
        name = unique_name(min(needed), found)
        found[name] = Branch(name, paths, needed)
    return tuple(found.values())


def _flat(program: Program) -> Iterator[Equation | _Pass]:
    """The equations in order, those in bodies that are remembered in part, too."""
    for equation in program.equations:
        if equation.name in REMAT:
            (body,) = equation.bodies
            yield from map(_Pass, equation.inputs, body.inputs)
            yield from _flat(body)
            yield from map(_Pass, body.outputs, equation.outputs)
        else:
            yield equation


class _Ways:
    """What every way from a value to an output leads through.

    Attributes:
      makers: the number of the step that makes each value.
    """

    def __init__(self, steps: Sequence[Equation | _Pass], program: Program):
        self.makers: dict[Variable, int] = {}
        readers: dict[Any, list[Any]] = defaultdict(list)
        order: list[Any] = [*program.inputs]
        for number, step in enumerate(steps):
            if isinstance(step, _Pass):
                made, sources = [step.target], [step.source]
            else:
                made, sources = [*step.outputs], [*step.inputs]
                if summands(step):
                    operands = [_Operand(step, k) for k in (0, 1)]
                    for source, operand in zip(sources, operands, strict=True):
                        readers[source].append(operand)
                    sources = operands
                    order += operands
            for source in sources:
                readers[source] += made
            order += made
            self.makers.update(dict.fromkeys(made, number))
        for variable in program.outputs:
            readers[variable].append(_END)
        # Where all ways from a place meet first, counted from the end; what leads to no
        # output has no such place. And which operand all of them come to next.
        self._meeting: dict[Any, Any] = {}
        self._depth: dict[Any, int] = {_END: 0}
        self._next: dict[Any, _Operand | None] = {_END: None}
        for place in reversed(order):
            alive = [x for x in readers[place] if x in self._depth]
            if alive:
                meeting = functools.reduce(self._meet, alive)
                is_operand = isinstance(meeting, _Operand)
                self._next[place] = meeting if is_operand else self._next[meeting]
                self._meeting[place] = meeting
                self._depth[place] = self._depth[meeting] + 1

    def _meet(self, one: Any, other: Any) -> Any:
        while one != other:
            if self._depth[one] >= self._depth[other]:
                one = self._meeting[one]
            else:
                other = self._meeting[other]
        return one

    def operands_after(self, place: Any) -> Iterator[_Operand]:
        """The operands of sums that all ways from a value lead through, in order."""
        while (place := self._next.get(place)) is not None:
            yield place


_END = "the outputs"


def _proof(
    operand: _Operand,
    leaves: dict[Variable, int],
    steps: Sequence[Equation | _Pass],
    ways: _Ways,
) -> Proof:
    """Which of its own leaves make an operand zero, if zeros lead to nothing else.

    Args:
      operand: of a sum.
      leaves: those that are of use for it alone, and their numbers.
      steps: of the program.
      ways: through it.
    """
    inside: set[int] = set()
    waiting = [operand.equation.inputs[operand.place]]
    while waiting:
        variable = waiting.pop()
        number = ways.makers.get(variable)
        is_own = operand in ways.operands_after(variable)
        if number is not None and number not in inside and is_own:
            inside.add(number)
            step = steps[number]
            passes = isinstance(step, _Pass)
            waiting += [step.source] if passes else step.inputs
    zeros = Zeros({leaf: frozenset({i}) for leaf, i in leaves.items()})
    for number in sorted(inside):
        step = steps[number]
        if isinstance(step, _Pass):
            zeros.proofs[step.target] = zeros.of(step.source)
        else:
            zeros.apply(step)
    return None if zeros.singular else zeros.of(operand.equation.inputs[operand.place])
