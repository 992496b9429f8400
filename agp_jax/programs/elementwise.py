"""Primitives that work element by element: what they tie, and where zeros stay zeros.

Masked weights are zero, so it matters what a zero becomes. Where it stays zero all the
way to a sum, removing it changes nothing.
"""

from collections.abc import Sequence

from agp_jax.programs.jaxprs import Equation, Variable
from agp_jax.programs.labels import (
    Axis,
    Flow,
    Value,
    all_proofs,
    any_proof,
    continued,
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
_ALL_ZERO = {"add", "add_any", "sub", "max", "min", "or", "xor", "select_n", "clamp"}
# Zero or not, it is not known here.
_OTHER = set(
    "acos acosh atan2 bessel_i0e bessel_i1e clz complex cos cosh "
    "digamma div eq eq_to erfc exp exp2 ge gt is_finite le le_to lgamma log log2 "
    "logistic lt lt_to ne nextafter not one_minus_square polygamma population_count "
    "pow rem rsqrt shift_left shift_right_arithmetic shift_right_logical".split()
)
# Infinite, or without a finite derivative, at zero; of div and rem the divisor.
_SINGULAR = set(
    "acosh atan2 cbrt digamma div lgamma log log2 pow rem rsqrt sqrt".split()
)

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
        zeros = _zeros(equation, ins, i, size)
        result.append(Axis(axes[0].atoms, continued(axes), zeros))
    return [result]


def _note_roles(flow: Flow, ins: Sequence[Value], i: int) -> None:
    if not all(value.is_weight for value in ins):
        for value in ins:
            if value.axes:
                flow.give_role(value.axes[i], "each")


def _zeros(
    equation: Equation, ins: Sequence[Value], i: int, size: int
) -> frozenset[int] | None:
    """The leaves whose zeros make the result zero where axis `i` is removed."""
    present = [value.axes and value.axes[i].size == size for value in ins]
    proofs = [
        v.axes[i].zeros if is_in else None
        for v, is_in in zip(ins, present, strict=True)
    ]
    return zeros_of(equation, proofs)


def zeros_of(
    equation: Equation, proofs: Sequence[frozenset[int] | None]
) -> frozenset[int] | None:
    """The leaves whose zeros make the result zero, where they make operands zero.

    Args:
      equation: of a primitive that works element by element.
      proofs: for each operand the leaves whose zeros make it zero; None if it need not
        be zero.
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
                    zip(equation.inputs, proofs, strict=True)
                )
                if k >= first and not _keeps_zero(name, k, variable)
            ]
        )
    keeps = name in _KEEP_ZERO or name == "div"
    if keeps or (name == "integer_pow" and equation.params["y"] > 0):
        return proofs[0]
    return None


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
