"""Reductions: primitives that reduce axes, put them in order or multiply along them.

One small function per primitive, in a table, as in `moves`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from agp_jax.programs.jaxprs import Equation
from agp_jax.programs.labels import (
    Axis,
    Flow,
    LabelRule,
    Value,
    all_zeros,
    any_zeros,
    continued,
    merge,
    split,
)
from agp_jax.programs.numbers import along_of

# The number of which any amount makes no difference to a reduction.
_NEUTRAL = {
    "reduce_sum": 0,
    "reduce_prod": 1,
    "reduce_max": -np.inf,
    "reduce_min": np.inf,
    "reduce_and": True,
    "reduce_or": False,
    "reduce_xor": False,
}


def _reduce(flow, equation, ins):
    """What is not known to be neutral counts, masked zeros in a maximum too."""
    name, reduced = equation.name, equation.params["axes"]
    for i in reduced:
        flow.sums_over(ins[0].axes[i], ins[0].axes[i].holding(_NEUTRAL[name]))
    rest = [axis for i, axis in enumerate(ins[0].axes) if i not in reduced]
    if 0 in (ins[0].axes[i].size for i in reduced):
        return [[axis.relabel(axis.leaves) for axis in rest]]
    if name in ("reduce_sum", "reduce_prod", "reduce_xor"):  # ones do not stay ones
        rest = [dataclasses.replace(axis, other=None) for axis in rest]
    return [rest]


def _argmax(flow, equation, ins):
    """The place of the largest, of which nothing less than all others takes notice."""
    along = along_of(equation)
    flow.chooses(ins[0].axes[along], 1)
    return [[a.relabel() for i, a in enumerate(ins[0].axes) if i != along]]


def _arg_reduce(flow, equation, ins):
    reduced = equation.params["axes"]
    flow.freeze(*(ins[0].axes[i] for i in reduced))
    rest = [axis for i, axis in enumerate(ins[0].axes) if i not in reduced]
    return [[axis.relabel() for axis in rest]]


def _cumulative(flow, equation, ins):
    along = equation.params["axis"]
    zeros = ins[0].axes[along].zeros
    if equation.name == "cumsum" and zeros is not None:
        flow.sums_over(ins[0].axes[along], zeros)
    else:
        flow.freeze(ins[0].axes[along])
    keeps_zero = equation.name in ("cumsum", "cumprod", "cummax", "cummin")
    return [[a.relabel(a.leaves, a.zeros if keeps_zero else None) for a in ins[0].axes]]


def _fft(flow, equation, ins):
    """A transform along the last axes, of each index of the others."""
    num_fixed = len(equation.params["fft_lengths"])
    rest = ins[0].axes[: len(ins[0].axes) - num_fixed]
    flow.freeze(*ins[0].axes[len(rest) :])
    return [[*rest, *map(flow.fixed, equation.outputs[0].shape[len(rest) :])]]


def _top_k(flow, equation, ins):
    """The largest, of which nothing less than all others takes notice."""
    along, count = along_of(equation), equation.params["k"]
    flow.chooses(ins[0].axes[along], count)
    values = [
        flow.fixed(count) if i == along else axis.relabel(zeros=axis.zeros)
        for i, axis in enumerate(ins[0].axes)
    ]
    return [values, [axis.relabel() for axis in values]]


def _sort(flow, equation, ins):
    """Of zeros along other axes, the values that come out are zeros in any order."""
    p, rank = equation.params, len(ins[0].axes)
    names = ("dimension", "axis", "reduction_dimension")
    along = next((p[name] for name in names if name in p), -1) % rank
    columns = list(zip(*(value.axes for value in ins), strict=True))
    flow.freeze(*columns[along])
    for i, column in enumerate(columns):
        if i != along:
            flow.unify(*column)

    def passed(place: int, column: Sequence[Axis]) -> Axis:
        # The second output of approx_top_k, where these are, is made of no input.
        zeros = column[place].zeros if place < len(column) else None
        return column[0].relabel(zeros=zeros)

    return [
        [
            flow.fixed(size) if i == along else passed(place, columns[i])
            for i, size in enumerate(output.shape)
        ]
        for place, output in enumerate(equation.outputs)
    ]


def _reduce_window(flow, equation, ins):
    """Axes with a window of 1 pass, as channels do in pooling."""
    p = equation.params
    rank = len(equation.outputs[0].shape)
    ones, none = (1,) * rank, ((0, 0),) * rank
    trivial = [
        window == stride == inner == outer == 1 and tuple(padding) == (0, 0)
        for window, stride, inner, outer, padding in zip(
            p["window_dimensions"],
            p.get("window_strides") or ones,
            p.get("base_dilation") or ones,
            p.get("window_dilation") or ones,
            p.get("padding") or none,
            strict=True,
        )
    ]
    flow.freeze(
        *(
            axis
            for value in ins
            if value.axes
            for axis, passes in zip(value.axes, trivial, strict=True)
            if not passes
        )
    )
    columns = list(zip(*(value.axes for value in ins if value.axes), strict=True))
    keeps_zero = equation.name in ("reduce_window_sum", "select_and_scatter_add")
    result = []
    for size, column, passes in zip(
        equation.outputs[0].shape, columns, trivial, strict=True
    ):
        if passes:
            flow.unify(*column)
        zeros = all_zeros(column) if keeps_zero else None
        axis = column[0].relabel(zeros=zeros)
        result.append(axis if passes else flow.fixed(size))
    return [result for _ in equation.outputs]


def _dot_general(flow, equation, ins):
    return [_product(flow, ins, *equation.params["dimension_numbers"])]


def _ragged_dot_general(flow, equation, ins):
    """Each run of rows has a matrix of its own; which run a row is in is data.

    Where a run has no rows nothing is multiplied by its matrix.
    """
    numbers = equation.params["ragged_dot_dimension_numbers"]
    summed, batch = numbers.dot_dimension_numbers
    left, right, *sizes = ins
    ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    has_groups = len(sizes) == 1 and (groups or set(ragged) & set(summed[0]))
    lengths = sizes[0].axes[-1]
    if has_groups:
        for i in groups:
            flow.unify(right.axes[i], lengths)
        flow.sums_over(lengths, lengths.zeros)
        flow.freeze(*sizes[0].axes[:-1])
    else:
        flow.freeze(*(axis for value in sizes for axis in value.axes))
        flow.freeze(*(right.axes[i] for i in groups))
    flow.freeze(*(left.axes[i] for i in ragged))
    if len(sizes[0].axes) > 1:  # of each index of some axes before the ragged one
        flow.freeze(*(a for i, a in enumerate(left.axes) if i not in summed[0]))
    result = _product(flow, (left, right), summed, batch, groups)
    if set(ragged) & set(summed[0]):
        runs = lengths.relabel(zeros=lengths.zeros)
        made = equation.outputs[0].shape[0]
        result = [runs if has_groups else flow.fixed(made), *result]
    return [result]


def _product(
    flow: Flow,
    ins: Sequence[Value],
    summed: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    groups: Sequence[int] = (),
) -> list[Axis]:
    """The axes of a product of two values: of the batch, then what each has alone.

    Args:
      flow: the labels so far.
      ins: the factors.
      summed, batch: axes of both, in pairs.
      groups: axes of the second that the product has not.
    """
    left, right = (value.axes for value in ins)
    pairs_in = [(left[i], right[j]) for i, j in zip(*summed, strict=True)]
    pairs = [(left[i], right[j]) for i, j in zip(*batch, strict=True)]
    for one, other in pairs_in + pairs:
        flow.unify(one, other)
    for one, other in pairs_in:
        flow.sums_over(one, any_zeros((one, other)))
        # Of two weights, as in low-rank updates, the first makes what the second reads.
        flow.give_role(one, "out" if ins[0].is_weight and ins[1].is_weight else "in")
        flow.give_role(other, "in")
    free = []
    for value, *gone in zip(ins, summed, batch, ((), groups), strict=True):
        without = {int(i) for axes in gone for i in axes}
        rest = [axis for i, axis in enumerate(value.axes) if i not in without]
        free.extend(rest)
        if not all(other.is_weight for other in ins):
            for axis in rest:
                flow.give_role(axis, "out")
    shared = [a.relabel(continued((a, b)), any_zeros((a, b))) for a, b in pairs]
    return shared + free


def _conv(flow, equation, ins):
    """A grouped convolution sees its channels as (group, channel of the group)."""
    p = equation.params
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    image, kernel = ins[0].axes, ins[1].axes
    flow.freeze(*(image[i] for i in numbers.lhs_spec[2:]))
    flow.freeze(*(kernel[i] for i in numbers.rhs_spec[2:]))
    if p["batch_group_count"] != 1:
        flow.freeze(*image, *kernel)
    read, made = kernel[numbers.rhs_spec[1]], kernel[numbers.rhs_spec[0]]
    channels = image[numbers.lhs_spec[1]]
    made_zeros = made.zeros
    if groups == 1:
        member = channels
    else:
        group, member = _split_pair(flow, channels, groups)
        filters = flow.fresh(made.size // groups)
        flow.unify(made, _merge_pair(flow, group, filters))
        made_zeros = any_zeros((made, group)) if filters.size == 1 else made.zeros
    flow.unify(member, read)
    if member.size > 1:
        flow.sums_over(member, any_zeros((member, read)))
    flow.give_role(read, "in")
    flow.give_role(made, "out")
    shape = equation.outputs[0].shape
    result = [flow.fixed(size) for size in shape]
    batch = image[numbers.lhs_spec[0]]
    result[numbers.out_spec[0]] = (
        batch if p["batch_group_count"] == 1 else flow.fixed(shape[numbers.out_spec[0]])
    )
    result[numbers.out_spec[1]] = made.relabel(zeros=made_zeros)
    return [result]


def group_axis(flow: Flow, equation: Equation) -> Axis:
    """The groups of a grouped convolution, as an axis."""
    spec = equation.params["dimension_numbers"].lhs_spec
    channels = flow.values[equation.inputs[0]].axes[spec[1]]
    return _split_pair(flow, channels, equation.params["feature_group_count"])[0]


def _split_pair(flow: Flow, axis: Axis, first: int) -> tuple[Axis, Axis]:
    if first == axis.size:
        return axis, flow.fixed(1)
    one, other = split(flow, axis, (first, axis.size // first))
    return one, other


def _merge_pair(flow: Flow, first: Axis, second: Axis) -> Axis:
    return first if second.size == 1 else merge(flow, [first, second])


REDUCTIONS: dict[str, LabelRule] = {
    **dict.fromkeys(_NEUTRAL, _reduce),
    "argmax": _argmax,
    "argmin": _arg_reduce,
    "cumsum": _cumulative,
    "cumprod": _cumulative,
    "cummax": _cumulative,
    "cummin": _cumulative,
    "cumlogsumexp": _cumulative,
    "fft": _fft,
    "sort": _sort,
    "top_k": _top_k,
    "approx_top_k": _sort,
    "reduce_window": _reduce_window,
    "reduce_window_sum": _reduce_window,
    "reduce_window_max": _reduce_window,
    "reduce_window_min": _reduce_window,
    "select_and_scatter_add": _reduce_window,
    "select_and_gather_add": _reduce_window,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _conv,
}
