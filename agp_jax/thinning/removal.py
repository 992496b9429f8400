"""Removal: functions without the leaves of which a cut leaves nothing.

The function is traced and run again, equation by equation. What is zero without these
leaves is not computed, and a sum with it is its other operand; so branches that add
nothing disappear, with all that is of use for them alone.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from agp_jax.programs.jaxprs import (
    REMAT,
    Equation,
    Program,
    Variable,
    bind,
    source_line,
    trace,
)
from agp_jax.programs.vanishing import Zeros, summands
from agp_jax.thinning.cuts import Cut
from agp_jax.trees import PyTree, abstract_array, flatten_with_paths, unflatten_around


def without_leaves(
    fn: Callable[..., PyTree], variables: PyTree, cut: Cut
) -> tuple[Callable[..., PyTree], PyTree, Cut]:
    """`fn` without the leaves that are gone, its variables, and the rest of a cut.

    In the variables None stands where a leaf is gone. The function raises a ValueError
    when it is called, if it reads what is gone and was not zero.
    """
    paths, leaves, treedef = flatten_with_paths(variables)
    stays = [None if p in cut.gone else x for p, x in zip(paths, leaves, strict=True)]
    rest = unflatten_around(treedef, stays, None)

    def call(variables: PyTree, args: tuple[Any, ...], kwargs: Any) -> PyTree:
        return fn(variables, *args, **kwargs)

    def without(variables: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        arrays = iter(jax.tree.leaves(variables))
        given = [None if path in cut.gone else next(arrays) for path in paths]
        whole = [
            abstract_array(leaf if array is None else array)
            for leaf, array in zip(leaves, given, strict=True)
        ]
        rest, _ = jax.tree.flatten((args, kwargs))
        inputs = jax.tree.map(abstract_array, (args, kwargs))
        program, out = trace(call, treedef.unflatten(whole), *inputs)
        names = zip(program.inputs, paths, strict=False)
        run = _Run(
            _zeros(program, paths, cut), {v: p for v, p in names if p in cut.gone}
        )
        out_paths, places, out_tree = flatten_with_paths(out)
        wanted = [
            None if _owner(path, place, paths, cut) in cut.gone else variable
            for path, place, variable in zip(
                out_paths, places, program.outputs, strict=True
            )
        ]
        arrays = dict(zip(program.inputs, [*given, *rest], strict=True))
        return unflatten_around(out_tree, run.run(program, arrays, wanted), None)

    shapes = {path: x for path, x in cut.shapes.items() if path not in cut.gone}
    return without, rest, Cut(cut.kept, shapes)


def _zeros(program: Program, paths: Sequence[str], cut: Cut) -> Zeros:
    """Which values are zero without the leaves that are gone."""
    zeros = Zeros()
    others = [None] * (len(program.inputs) - len(paths))
    zeros.follow(
        program,
        [frozenset({i}) if cut.gone.get(p) else None for i, p in enumerate(paths)]
        + others,
    )
    return zeros


def _owner(
    path: str, output: jax.ShapeDtypeStruct, paths: Sequence[str], cut: Cut
) -> str | None:
    """The leaf that an output stands for, such as an updated statistic: None if none.

    It has the leaf's shape, and of all leaves the path that ends most like it.
    """
    names = path.split("/")[::-1]

    def length(other: str) -> int:
        pairs = zip(names, other.split("/")[::-1], strict=False)
        return len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])

    best = max(paths, key=length)
    is_like = bool(path) and length(best) > 0 and cut.shapes[best] == output.shape
    return best if is_like else None


@dataclasses.dataclass(frozen=True)
class _Run:
    """Runs programs without what vanishes.

    Attributes:
      zeros: which values vanish.
      gone: the paths of inputs that are gone.
    """

    zeros: Zeros
    gone: dict[Variable, str]

    def run(
        self,
        program: Program,
        arrays: dict[Variable, Any],
        wanted: Sequence[Variable | None],
    ) -> list[Any]:
        """The wanted values of a program, None where none is wanted."""
        live = self.live(program, wanted)
        known = dict(arrays)

        def read(variable: Variable, reader: str) -> Any:
            if self.vanishes(variable):
                return jnp.zeros(variable.shape, variable.aval.dtype)
            if variable in self.gone:
                raise ValueError(
                    f"the function still reads {self.gone[variable]}, which the cut "
                    f"has removed and which was not zero: {reader}"
                )
            if variable.constant is not None and variable not in known:
                if not variable.is_uniform:
                    return variable.constant
                return jnp.full(variable.shape, variable.constant, variable.aval.dtype)
            return known[variable]

        for equation in program.equations:
            outputs = equation.outputs
            if not any(v in live for v in outputs):
                continue
            reader = f"{equation.name} at {source_line(equation)}"
            if (operand := self.alone(equation)) is not None:
                known[outputs[0]] = read(operand, reader)
            elif equation.name in REMAT:
                known.update(self._remember(equation, live, read))
            else:
                made = bind(equation, [read(v, reader) for v in equation.inputs])
                known.update(zip(outputs, made, strict=True))
        return [None if v is None else read(v, "it is an output") for v in wanted]

    def vanishes(self, variable: Variable) -> bool:
        return variable.constant is None and self.zeros.of(variable) is not None

    def alone(self, equation: Equation) -> Variable | None:
        """The operand of a sum that is left of it, where the other one vanishes."""
        (made, *_), ins = equation.outputs, equation.inputs
        for place in summands(equation):
            stays, goes = ins[place], ins[1 - place]
            if self.vanishes(goes) and not self.vanishes(stays):
                alike = (
                    stays.shape == made.shape and stays.aval.dtype == made.aval.dtype
                )
                return stays if alike else None
        return None

    def live(
        self, program: Program, wanted: Sequence[Variable | None]
    ) -> set[Variable]:
        """All values that the wanted ones are made of, but for those that vanish."""
        live = {v for v in wanted if v is not None and not self.vanishes(v)}
        for equation in reversed(program.equations):
            if not any(v in live for v in equation.outputs):
                continue
            if (operand := self.alone(equation)) is not None:
                live.add(operand)
            elif equation.name in REMAT:
                live.update(self._read_by(equation, live))
            else:
                live.update(v for v in equation.inputs if not self.vanishes(v))
        return live

    def _read_by(self, equation: Equation, live: set[Variable]) -> list[Variable]:
        """What a body that is remembered in part needs to know for what is live."""
        (body,) = equation.bodies
        inside = self.live(body, self._wanted_inside(equation, live))
        pairs = zip(equation.inputs, body.inputs, strict=True)
        return [outer for outer, inner in pairs if inner in inside]

    def _wanted_inside(
        self, equation: Equation, live: set[Variable]
    ) -> list[Variable | None]:
        (body,) = equation.bodies
        pairs = zip(equation.outputs, body.outputs, strict=True)
        return [inner if outer in live else None for outer, inner in pairs]

    def _remember(
        self,
        equation: Equation,
        live: set[Variable],
        read: Callable[[Variable, str], Any],
    ) -> dict[Variable, Any]:
        (body,) = equation.bodies
        wanted = self._wanted_inside(equation, live)
        inside = self.live(body, wanted)
        pairs = zip(equation.inputs, body.inputs, strict=True)
        needed = {inner: outer for outer, inner in pairs if inner in inside}
        names = {i: self.gone[o] for i, o in needed.items() if o in self.gone}
        inner = dataclasses.replace(self, gone=names)
        present = [v for v in needed if v not in names]

        def run(*arrays: Any) -> list[Any]:
            known = dict(zip(present, arrays, strict=True))
            return inner.run(body, known, wanted)

        computes = any(
            self.alone(e) is None for e in body.equations if inside & {*e.outputs}
        )
        if computes:
            run = jax.checkpoint(
                run,
                policy=equation.params.get("policy"),
                prevent_cse=equation.params.get("prevent_cse", True),
            )
        made = run(*(read(needed[v], equation.name) for v in present))
        return {
            v: array
            for v, array in zip(equation.outputs, made, strict=True)
            if array is not None
        }
