"""Primitives that work element by element: what they tie, and where zeros stay zeros.

Masked weights are zero, so it matters what a zero becomes. Where it stays zero all the
way to a sum, or becomes minus infinity on the way to a maximum, removing it changes
nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agp_jax.programs.jaxprs import Equation, Variable
from agp_jax.programs.labels import (
    Axis,
    Flow,
    Held,
    Value,
    all_proofs,
    any_proof,
    any_zeros,
    continued,
    same_held,
)

# A zero in gives a zero out.
_KEEP_ZERO = set(
    "abs asin asinh atan atanh cbrt ceil conj convert_element_type copy erf "
    "erf_inv expm1 floor imag integer_pow log1p name neg real reduce_precision round "
    "reshard sharding_constraint sign sin sinh sqrt square tan tanh pvary "
    "psum_invariant stop_gradient".split()
)
# Zero if any operand is, or if all are.
_ANY_ZERO = {"mul", "and"}
_ALL_ZERO = set(
    "add add_any clamp gt lt max min ne or select_n sub xor".split()  # 0 < 0 is false
)
# Zero or not, it is not known here.
_OTHER = set(
    "acos acosh atan2 bessel_i0e bessel_i1e clz complex cos cosh "
    "digamma div eq eq_to erfc exp exp2 ge is_finite le le_to lgamma log log2 "
    "logistic lt_to nextafter not one_minus_square polygamma population_count "
    "pow rem rsqrt shift_left shift_right_arithmetic shift_right_logical".split()
)
# Infinite, or without a finite derivative, at zero; of div and rem the divisor.
_SINGULAR = set(
    "acosh atan2 cbrt digamma div lgamma log log2 pow rem rsqrt sqrt".split()
)
# What known numbers become. Of these, what is the same in any precision is followed.
_FOLDS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("convert_element_type", "copy", "pvary", "reduce_precision", "reshard")
        + ("sharding_constraint", "stop_gradient"),
        lambda x: x,
    ),
    "abs": np.abs,
    "add": np.add,
    "and": np.logical_and,
    "div": np.divide,
    "eq": np.equal,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "or": np.logical_or,
    "sign": np.sign,
    "sqrt": np.sqrt,
    "sub": np.subtract,
    "tanh": np.tanh,
}
_BITWISE = {"and", "or"}  # unless their operands are true or false
_SAME_IN_ANY_PRECISION = (0.0, 1.0, -1.0, np.inf, -np.inf)

ELEMENTWISE = _KEEP_ZERO | _ANY_ZERO | _ALL_ZERO | _OTHER


def elementwise(
    flow: Flow, equation: Equation, ins: Sequence[Value]
) -> list[list[Axis]]:
    """Ties all operands' axes; those of size 1 and scalars are repeated."""
    result = []
    for i, size in enumerate(equation.outputs[0].shape):
        present = [k for k, v in enumerate(ins) if v.axes and v.axes[i].size == size]
        axes = [ins[k].axes[i] for k in present]
        if not axes:
            result.append(flow.fixed(size))
            continue
        flow.unify(*axes)
        _note_roles(flow, ins, i)
        singular = set(singular_operands(equation)) & set(present)
        if any(ins[k].axes[i].zeros is not None for k in singular):
            flow.changes(axes[0])
        zeros, other = _zeros(flow, equation, ins, i, size), None
        if zeros is None:
            other = _held(flow, equation, ins, i, size)
        if other is None:
            other = _compared(flow, equation, ins, i)
        if other is not None and other.number == 0:
            zeros, other = other.leaves, None
        result.append(axes[0].relabel(continued(axes), zeros, other))
    return [result]


def _note_roles(flow: Flow, ins: Sequence[Value], i: int) -> None:
    if not all(value.is_weight for value in ins):
        for value in ins:
            if value.axes:
                flow.give_role(value.axes[i], "each")


def _zeros(
    flow: Flow, equation: Equation, ins: Sequence[Value], i: int, size: int
) -> frozenset[int] | None:
    """The leaves whose zeros make the result zero where axis `i` is removed."""
    axes = [v.axes[i] if v.axes and v.axes[i].size == size else None for v in ins]
    if equation.name in _ANY_ZERO:
        return any_zeros([axis for axis in axes if axis is not None])
    proofs = [None if axis is None else axis.zeros for axis in axes]
    return zeros_of(equation, proofs, [flow.origin(v) for v in equation.inputs])


def zeros_of(
    equation: Equation,
    proofs: Sequence[frozenset[int] | None],
    operands: Sequence[Variable],
) -> frozenset[int] | None:
    """The leaves whose zeros make the result zero, where they make operands zero.

    Args:
      equation: of a primitive that works element by element.
      proofs: for each operand the leaves whose zeros make it zero; None if it need not
        be zero.
      operands: what is known of which may settle it, as of a constant.
    """
    name = equation.name
    if name in _ANY_ZERO:
        return any_proof(proofs)
    if name in _ALL_ZERO:
        first = 1 if name == "select_n" else 0
        return all_proofs(
            [
                proof
                for k, (variable, proof) in enumerate(
                    zip(operands, proofs, strict=True)
                )
                if k >= first and not _keeps_zero(name, k, variable)
            ]
        )
    keeps = name in _KEEP_ZERO or name == "div"
    if keeps or (name == "integer_pow" and equation.params["y"] > 0):
        return proofs[0]
    return None


def _held(
    flow: Flow, equation: Equation, ins: Sequence[Value], i: int, size: int
) -> Held | None:
    """The number that the result holds where axis `i` is removed, if that is known."""
    name = equation.name
    operands = [
        _operand(flow.origin(variable), value, i, size)
        for variable, value in zip(equation.inputs, ins, strict=True)
    ]
    if name == "select_n":
        which, *cases = operands
        if which is None:
            return same_held(cases)
        case = cases[int(which.number)]
        return case and Held(case.number, case.leaves | which.leaves)
    known = [held for held in operands if held is not None]
    leaves = frozenset().union(*(held.leaves for held in known))
    if name in ("add", "add_any", "sub") and len(known) == 1:
        # Infinity stays infinity, whatever finite number is added.
        (number,) = (held.number for held in known)
        sign = -1 if name == "sub" and operands[0] is None else 1
        return None if np.isfinite(number) else Held(sign * number, leaves)
    is_bool = equation.outputs[0].aval.dtype == bool
    if name not in _FOLDS or None in operands or (name in _BITWISE and not is_bool):
        return None
    with np.errstate(all="ignore"):
        number = float(_FOLDS[name](*(held.number for held in known)))
    return Held(number, leaves) if number in _SAME_IN_ANY_PRECISION else None


def _compared(
    flow: Flow, equation: Equation, ins: Sequence[Value], i: int
) -> Held | None:
    """Numbers of an axis differ from a ramp along it wherever that is removed."""
    if equation.name not in ("eq", "ne"):
        return None
    for one, other in (ins, ins[::-1]):
        chosen, ramp = one.numbers, other.numbers
        if chosen is None or ramp is None or not chosen.chosen or ramp.chosen:
            continue
        axis = other.axes[i]
        if axis.atoms is ramp.atoms and axis.size == len(chosen.atoms):
            flow.unify(axis, Axis(chosen.atoms))
            if chosen.never is not None:
                return Held(float(equation.name == "ne"), chosen.never)
    return None


def _operand(variable: Variable, value: Value, i: int, size: int) -> Held | None:
    """What an operand holds where axis `i` is removed."""
    if variable.is_uniform:
        return Held(float(variable.constant), frozenset())
    has_axis = value.axes and value.axes[i].size == size
    return value.axes[i].held if has_axis else None


def _keeps_zero(name: str, place: int, variable: Variable) -> bool:
    """Whether a known number lets zeros pass: the 0 of max(x, 0), the 6 of min."""
    if not variable.is_uniform:
        return False
    bound = {"max": "below", "min": "above"}.get(name)
    if name == "clamp":
        bound = "below" if place == 0 else "above"
    if bound == "below":
        return bool(variable.constant <= 0)
    if bound == "above":
        return bool(variable.constant >= 0)
    return bool(variable.constant == 0)


def singular_operands(equation: Equation) -> list[int]:
    """The operands whose zeros become infinite or have no derivative."""
    if equation.name == "integer_pow":
        return [0] if equation.params["y"] < 0 else []
    if equation.name not in _SINGULAR:
        return []
    return [1] if equation.name in ("div", "rem") else [*range(len(equation.inputs))]
