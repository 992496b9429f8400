"""Propagation: how each primitive ties the axes of what it reads to what it makes.

A label rule may tie axes together, hand them on, or freeze them. A primitive without
one freezes everything it touches, so not knowing it can only lose an opportunity.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from agp_jax.programs.elementwise import ELEMENTWISE, elementwise
from agp_jax.programs.jaxprs import (
    REMAT,
    Equation,
    Program,
    Variable,
    scan_counts,
    source_line,
)
from agp_jax.programs.labels import (
    Axis,
    Flow,
    LabelRule,
    Numbers,
    Value,
    all_proofs,
    all_zeros,
    are_numbers,
)
from agp_jax.programs.moves import MOVES, unified
from agp_jax.programs.numbers import numbers_of
from agp_jax.programs.reductions import REDUCTIONS
from agp_jax.programs.vanishing import Zeros, handed_on


def propagate(flow: Flow, program: Program, inputs: Sequence[Value]) -> list[Value]:
    """Labels every value of `program`; returns those of its outputs."""
    flow.values.update(zip(program.inputs, inputs, strict=True))
    for equation in program.equations:
        with flow.at(equation):
            ins = [value_of(flow, v) for v in equation.inputs]
            outputs = _apply(flow, equation, ins)
            for variable, value in zip(equation.outputs, outputs, strict=True):
                assert tuple(a.size for a in value.axes) == variable.shape, equation
                flow.freeze(*(axis for axis in value.axes if axis.size == 1))
                flow.values[variable] = value
                flow.makers[variable] = equation
    return [value_of(flow, v) for v in program.outputs]


def value_of(flow: Flow, variable: Variable) -> Value:
    """The labels of a variable; a constant may be cut along any axis."""
    if variable not in flow.values:
        assert variable.constant is not None, variable
        zeros = frozenset() if variable.is_zero else None
        axes = tuple(flow.fresh(size, zeros) for size in variable.shape)
        numbers = Numbers(axes[0].atoms) if _is_ramp(variable) else None
        flow.values[variable] = Value(axes, is_weight=True, numbers=numbers)
    return flow.values[variable]


def _is_ramp(constant: Variable) -> bool:
    is_known = len(constant.shape) == 1 and are_numbers(*constant.shape)
    is_vector = is_known and constant.shape[0] > 1
    is_count = np.dtype(constant.aval.dtype).kind in "iu" if is_vector else False
    return is_count and np.array_equal(constant.constant, range(constant.shape[0]))


def _apply(flow: Flow, equation: Equation, ins: list[Value]) -> list[Value]:
    if equation.name in _WITH_BODIES:
        return _WITH_BODIES[equation.name](flow, equation, ins)
    label = _LABEL_RULES.get(equation.name, _unknown)
    is_weight = bool(ins) and all(value.is_weight for value in ins)
    leaf = None
    if equation.name in ELEMENTWISE:
        same = [v for v in ins if v.axes]
        leaf = same[0].leaf if len(same) == 1 else None
    made = label(flow, equation, ins)
    return [
        Value(
            tuple(axes if is_weight else map(_of_activation, axes)),
            is_weight,
            leaf,
            numbers,
        )
        for axes, numbers in zip(
            made, numbers_of(flow, equation, ins, made), strict=True
        )
    ]


def _of_activation(axis: Axis) -> Axis:
    return dataclasses.replace(axis, leaves=frozenset()) if axis.leaves else axis


def _made_of_keys(flow, equation, ins):
    """Each key makes as much, bits or keys, which is made whole and then cut."""
    axes = ins[0].axes
    return [[*axes, *map(flow.fresh, v.shape[len(axes) :])] for v in equation.outputs]


def _keys_of_bits(flow, equation, ins):
    flow.freeze(*ins[0].axes[len(equation.outputs[0].shape) :])
    return [list(ins[0].axes[: len(equation.outputs[0].shape)])]


def _bits_of_keys(flow, equation, ins):
    axes = ins[0].axes
    return [[*axes, *map(flow.fixed, equation.outputs[0].shape[len(axes) :])]]


def _made_whole(flow, equation, ins):
    """What comes from nowhere, a ramp, is made whole and then cut."""
    flow.freeze(*(axis for value in ins for axis in value.axes))
    return [[flow.fresh(size) for size in v.shape] for v in equation.outputs]


def _elementwise(flow, equation, ins):
    return elementwise(flow, equation, ins)


def _same(flow, equation, ins):
    return [list(value.axes) for value in ins]


def _unknown(flow, equation, ins):
    flow.freeze(*(axis for value in ins for axis in value.axes))
    return [[flow.fixed(size) for size in v.shape] for v in equation.outputs]


def _scan(flow: Flow, equation: Equation, ins: list[Value]) -> list[Value]:
    """What is carried keeps its axes."""
    num_consts, num_carry = scan_counts(equation)
    first = num_consts + num_carry
    made = _stepped_along(flow, equation, ins)
    steps = [Value(value.axes[1:], value.is_weight) for value in ins[first:]]
    (body,) = equation.bodies
    _remember(flow, body.inputs[:num_consts], equation.inputs[:num_consts])

    def step(carry: list[Value]) -> list[Value]:
        return propagate(flow, body, [*ins[:num_consts], *carry, *steps])

    carry, outs = _loop(flow, ins[num_consts:first], step)
    stacked = [
        Value((axis, *map(_of_activation, value.axes)))
        for axis, value in zip(made, outs[num_carry:], strict=True)
    ]
    return carry + stacked


def _stepped_along(flow: Flow, equation: Equation, ins: list[Value]) -> list[Axis]:
    """The axis that a scan steps along, of each value that its steps put together.

    A step may go if it hands on what it is given once certain leaves are zero there:
    a layer that only adds to its stream. Else the axis is frozen.
    """
    num_consts, num_carry = scan_counts(equation)
    first = num_consts + num_carry
    (body,) = equation.bodies
    axes = [value.axes[0] for value in ins[first:]]
    zeros = Zeros()
    outs = zeros.follow(body, [None] * first + [axis.zeros for axis in axes])
    proof = all_proofs(handed_on(body, zeros, num_consts, num_carry))
    length = equation.params["length"]
    if not proof or zeros.singular or not are_numbers(length) or length < 2:
        why = "whose steps do more than add to what they carry"
        if proof and zeros.singular:
            first = zeros.singular[0]
            why += f": of zeros {first.name} at {source_line(first)} has no finite one"
        with flow.at(f"scan at {source_line(equation)}, {why}"):
            flow.freeze(*axes)
        return [flow.fixed(length)] * (len(outs) - num_carry)
    flow.unify(*axes)
    flow.relied.append((axes[0].atoms, proof))
    for axis in axes:
        flow.give_role(axis, "layer")
    return [axes[0].relabel(zeros=made) for made in outs[num_carry:]]


def _while(flow: Flow, equation: Equation, ins: list[Value]) -> list[Value]:
    ends = np.cumsum([equation.params["cond_nconsts"], equation.params["body_nconsts"]])
    condition, body = equation.bodies
    _remember(flow, condition.inputs[: ends[0]], equation.inputs[: ends[0]])
    _remember(
        flow, body.inputs[: ends[1] - ends[0]], equation.inputs[ends[0] : ends[1]]
    )

    def step(carry: list[Value]) -> list[Value]:
        return propagate(flow, body, [*ins[ends[0] : ends[1]], *carry])

    carry, _ = _loop(flow, ins[ends[1] :], step)
    propagate(flow, condition, [*ins[: ends[0]], *carry])
    return carry


def _cond(flow: Flow, equation: Equation, ins: list[Value]) -> list[Value]:
    for branch in equation.bodies:
        _remember(flow, branch.inputs, equation.inputs[1:])
    results = [propagate(flow, branch, ins[1:]) for branch in equation.bodies]
    outs = []
    for values in zip(*results, strict=True):
        columns = zip(*(value.axes for value in values), strict=True)
        axes = (_of_activation(unified(flow, column)) for column in columns)
        outs.append(Value(tuple(axes)))
    return outs


def _call(flow: Flow, equation: Equation, ins: list[Value]) -> list[Value]:
    (body,) = equation.bodies
    _remember(flow, body.inputs, equation.inputs)
    return propagate(flow, body, ins)


def _remember(
    flow: Flow, inside: Sequence[Variable], outside: Sequence[Variable]
) -> None:
    """Notes that inputs of a body are variables outside, whatever these are."""
    flow.outside.update(zip(inside, outside, strict=True))


def _loop(
    flow: Flow, start: Sequence[Value], step: Callable[[list[Value]], list[Value]]
) -> tuple[list[Value], list[Value]]:
    """A loop's carry as it is at every step, and all that the last step made.

    What is zero at the start, and after a step from zeros, is zero at every step. So
    steps are followed until they leave the zeros they were given; what the ones before
    have noted of sums rested on zeros that do not last.
    """
    carry = [_carried(value, value) for value in start]
    while True:
        noted = len(flow.inexact), len(flow.relied)
        outs = step(carry)
        after = [_carried(*pair) for pair in zip(carry, outs, strict=False)]
        if _zeros(after) == _zeros(carry):
            break
        del flow.inexact[noted[0] :], flow.relied[noted[1] :]
        carry = after
    for before, made in zip(carry, outs, strict=False):
        flow.unify_values(before, made)
    return carry, outs


def _carried(before: Value, after: Value) -> Value:
    """The carry, with the zeros that it has before a step and after it."""
    pairs = zip(before.axes, after.axes, strict=True)
    return Value(tuple(one.relabel(zeros=all_zeros((one, two))) for one, two in pairs))


def _zeros(values: Sequence[Value]) -> list[frozenset[int] | None]:
    return [axis.zeros for value in values for axis in value.axes]


_WITH_BODIES: dict[str, Callable[[Flow, Equation, list[Value]], list[Value]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(REMAT, _call),
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
}

_LABEL_RULES: dict[str, LabelRule] = {
    **MOVES,
    **REDUCTIONS,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "optimization_barrier": _same,
    "device_put": _same,
    "iota": _made_whole,
    "random_bits": _made_of_keys,
    "random_split": _made_of_keys,
    "random_clone": _same,
    "random_fold_in": _elementwise,
    "random_seed": _elementwise,
    "random_wrap": _keys_of_bits,
    "random_unwrap": _bits_of_keys,
}
