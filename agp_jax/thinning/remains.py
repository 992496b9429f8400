"""Remains: what a cut leaves of every value of one traced function."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from agp_jax.programs.analyses import Analysis, stacked_atoms
from agp_jax.programs.grouping import leaf_slices
from agp_jax.programs.jaxprs import (
    Equation,
    Program,
    Variable,
    differentiable,
    jvp_program,
    source_line,
    vjp_programs,
)
from agp_jax.programs.labels import Axis, Flow, Value
from agp_jax.programs.numbers import along_of
from agp_jax.programs.propagation import propagate, value_of
from agp_jax.thinning.cuts import Cut


@dataclasses.dataclass(frozen=True, eq=False)
class PerLayer:
    """Indices along an axis that differ from layer to layer of a stack.

    Attributes:
      rows: int array (layers, indices).
    """

    rows: np.ndarray

    def __len__(self) -> int:
        return self.rows.shape[1]


# What is done instead of an equation: its outputs, given its inputs and a function that
# gives the array of any variable so far.
Edit = Callable[[Callable[[Variable], Any], list[Any]], list[Any]]
# What stays along an axis: all of it, the indices in a vector, or others per layer.
Kept = np.ndarray | PerLayer | None


def rows_of(indices: np.ndarray | PerLayer) -> np.ndarray:
    """(layers, indices), with one row where layers do not differ."""
    return indices.rows if isinstance(indices, PerLayer) else indices[None]


def of_rows(rows: np.ndarray) -> np.ndarray | PerLayer:
    """One vector where all rows are the same."""
    return rows[0] if (rows == rows[0]).all() else PerLayer(rows)


@dataclasses.dataclass(eq=False)
class Remains:
    """What a cut leaves of every value of one program.

    Attributes:
      analysis: of the function.
      cut: of its variables.
      gone: bool (layers, atoms): which atoms are removed. One row where no layers
        differ.
      kept: what stays along each axis, by the identity of its atoms, which stand beside
        it so that no other array takes their identity.
      edits: what is done instead of some equations.
    """

    analysis: Analysis
    cut: Cut
    gone: np.ndarray
    kept: dict[int, tuple[np.ndarray, Kept]] = dataclasses.field(default_factory=dict)
    edits: Mapping[Equation, Edit] = dataclasses.field(default_factory=dict)

    @property
    def flow(self) -> Flow:
        return self.analysis.flow


def find_remains(analysis: Analysis, cut: Cut) -> Remains:
    remains = Remains(analysis, cut, _gone_atoms(analysis, cut))
    _check_sizes(remains, analysis.program)
    return remains


def _gone_atoms(analysis: Analysis, cut: Cut) -> np.ndarray:
    """The atoms that the cut removes: bool (layers, atoms).

    An atom is removed if all slices that carry it are. That must account for every
    slice of the cut, and for no other.
    """
    flow, slices = analysis.flow, leaf_slices(analysis)
    depth = max(
        (len(x) for axes in cut.values() for x in axes.values() if x.ndim == 2),
        default=1,
    )
    removed = {
        (i, axis): _removed(cut, path, axis, depth)
        for i, path in enumerate(analysis.paths)
        for axis in cut.get(path, {})
    }
    is_removed = np.zeros((depth, len(slices.atom)), bool)
    for (leaf, axis), flags in removed.items():
        here = (slices.leaf == leaf) & (slices.axis == axis)
        is_removed[:, here] = flags[:, slices.index[here]]
    count = np.bincount(slices.atom, minlength=flow.atoms.size)
    gone = np.stack(
        [np.bincount(slices.atom[row], minlength=flow.atoms.size) for row in is_removed]
    )
    gone = (gone == count) & (count > 0)
    for (leaf, axis), flags in removed.items():
        factors = flow.atoms.factors(analysis.leaves[leaf][axis].atoms)
        explained = gone[:, factors].any(axis=-1)
        if (explained != flags).any():
            index = int(np.argwhere(explained != flags)[0, 1])
            raise ValueError(_explain_refusal(analysis, cut, leaf, axis, index))
    stacks, _ = stacked_atoms(analysis)
    differ = gone.any(axis=0) & ~gone.all(axis=0) & (stacks == 0)
    if differ.any():
        place = int(np.flatnonzero(differ[slices.atom])[0])
        path, axis = analysis.paths[slices.leaf[place]], int(slices.axis[place])
        raise ValueError(
            f"the cut removes other indices of {path}[{axis}] in each layer, but this "
            f"function uses them outside of the layers, too; remove the same in all"
        )
    return gone


def _removed(cut: Cut, path: str, axis: int, depth: int) -> np.ndarray:
    """Which indices of a leaf's axis the cut removes: (depth, size)."""
    rows = np.atleast_2d(cut[path][axis])
    flags = np.ones((len(rows), cut.shapes[path][axis]), bool)
    np.put_along_axis(flags, rows, False, axis=1)
    return np.pad(flags, [(0, depth - len(rows)), (0, 0)], mode="edge")


def _explain_refusal(
    analysis: Analysis, cut: Cut, leaf: int, axis: int, index: int
) -> str:
    """Why a slice cannot be removed."""
    flow, path = analysis.flow, analysis.paths[leaf]
    start = f"the cut removes {path}[{axis}] index {index}, but "
    atom = analysis.leaves[leaf][axis].atoms[index : index + 1]
    factors = flow.atoms.factors(atom)
    if not factors.size:
        reason = flow.reason(int(flow.atoms.reasons(atom)[0]))
        return f"{start}it cannot be removed because of {reason}"
    slices = leaf_slices(analysis)
    for place in np.flatnonzero(np.isin(slices.atom, factors)):
        home, other = analysis.paths[slices.leaf[place]], int(slices.axis[place])
        stays = cut.get(home, {}).get(other)
        if stays is None or (stays == slices.index[place]).any():
            return (
                f"{start}it goes together with {home}[{other}] index "
                f"{slices.index[place]}, which stays"
            )
    return f"{start}what it is part of stays"


def _check_sizes(remains: Remains, program: Program) -> None:
    """Raises a ValueError if some value would be left without indices."""
    for equation in program.equations:
        if equation.name == "top_k":
            axis = value_of(remains.flow, equation.inputs[0]).axes[along_of(equation)]
            kept, count = kept_along(remains, axis), equation.params["k"]
            if kept is not None and len(kept) < count:
                raise ValueError(
                    f"the cut leaves {len(kept)} of what top_k at "
                    f"{source_line(equation)} chooses {count} from; keep at least "
                    f"{count}"
                )
        for variable in equation.outputs:
            for axis in remains.flow.values[variable].axes:
                kept = kept_along(remains, axis)
                if kept is not None and not len(kept):
                    raise ValueError(
                        f"the cut leaves nothing of an axis of the output of "
                        f"{equation.name} at {source_line(equation)}"
                    )
        for body in equation.bodies:
            _check_sizes(remains, body)


def kept_along(remains: Remains, axis: Axis) -> Kept:
    """What stays along an axis."""
    key = id(axis.atoms)
    if key not in remains.kept:
        remains.kept[key] = (axis.atoms, _find_kept(remains, axis))
    return remains.kept[key][1]


def _find_kept(remains: Remains, axis: Axis) -> Kept:
    factors = remains.flow.atoms.factors(axis.atoms)
    gone = np.asarray(remains.gone[:, factors].any(axis=-1))
    if not gone.any():
        return None
    counts = (~gone).sum(axis=1)
    if (counts != counts[0]).any():
        raise ValueError(
            f"the cut leaves {counts.tolist()} indices of one axis in stacked layers; "
            f"all layers must keep equally many"
        )
    return of_rows(np.nonzero(~gone)[1].reshape(len(gone), -1))


def kept_axes(remains: Remains, variable: Variable) -> list[Kept]:
    return [kept_along(remains, axis) for axis in value_of(remains.flow, variable).axes]


def derivative_of(remains: Remains, equation: Equation) -> tuple[Program, ...]:
    """The programs of the derivative that a function brings along, labelled.

    They are read the first time that something is differentiated, all at once.
    """
    known = remains.flow.derivatives
    if equation not in known:
        programs = [remains.analysis.program, *(p for ps in known.values() for p in ps)]
        for other in {e: None for p in programs for e in _with_derivatives(p)}:
            if other not in known:
                known[other] = _label_derivative(remains.flow, other)
        remains.gone = _gone_atoms(remains.analysis, remains.cut)
        remains.kept.clear()
    return known[equation]


def _with_derivatives(program: Program) -> list[Equation]:
    found = []
    for equation in program.equations:
        if equation.name in ("custom_jvp_call", "custom_vjp_call"):
            found.append(equation)
        for body in equation.bodies:
            found += _with_derivatives(body)
    return found


def _label_derivative(flow: Flow, equation: Equation) -> tuple[Program, ...]:
    places = differentiable(equation)
    floats = [i for i, v in enumerate(equation.outputs) if is_inexact(v.aval)]
    ins = [_activation(value_of(flow, v)) for v in equation.inputs]
    outs = [_activation(flow.values[v]) for v in equation.outputs]
    with flow.at(equation):
        if equation.name == "custom_jvp_call":
            program = jvp_program(equation)
            made = propagate(flow, program, [*ins, *(ins[i] for i in places)])
            _tie(flow, made, [*outs, *(outs[i] for i in floats)])
            return (program,)
        forward, backward = vjp_programs(equation)
        made = propagate(flow, forward, ins)
        _tie(flow, made[: len(outs)], outs)
        cotangents = [outs[i] for i in floats]
        found = propagate(flow, backward, [*made[len(outs) :], *cotangents])
        _tie(flow, found, [ins[i] for i in places])
        return forward, backward


def _tie(flow: Flow, found: Sequence[Value], expected: Sequence[Value]) -> None:
    for one, other in zip(found, expected, strict=True):
        flow.unify_values(one, other)


def _activation(value: Value) -> Value:
    axes = tuple(axis.relabel() for axis in value.axes)
    return Value(axes, numbers=value.numbers)


def is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
