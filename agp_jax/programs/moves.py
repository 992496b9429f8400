"""Moves: primitives that hand axes on, take parts of them or put them together.

One small function per primitive, in a table. It gets the labels so far, the equation
and the values that it reads, and gives the axes of each output.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from agp_jax.programs.constants import known_picks
from agp_jax.programs.jaxprs import Equation
from agp_jax.programs.labels import (
    Axis,
    Flow,
    LabelRule,
    all_zeros,
    are_numbers,
    continued,
    merge,
    reshape,
    same_held,
    split,
)
from agp_jax.programs.numbers import picks, picks_of


def _broadcast_in_dim(flow, equation, ins):
    (shape,) = (v.shape for v in equation.outputs)
    zeros = frozenset() if equation.inputs[0].is_zero else None
    places = dict(
        zip(equation.params["broadcast_dimensions"], ins[0].axes, strict=True)
    )
    return [
        [
            places[i]
            if i in places and places[i].size == size
            else flow.fresh(size, zeros)
            for i, size in enumerate(shape)
        ]
    ]


def _tile(flow, equation, ins):
    (shape,) = (v.shape for v in equation.outputs)
    reps = equation.params["reps"]
    axes = [flow.fixed(1)] * (len(shape) - len(ins[0].axes)) + list(ins[0].axes)
    reps = [1] * (len(shape) - len(reps)) + list(reps)

    def repeated(axis: Axis, times: int) -> Axis:
        if times == 1:
            return axis
        if not are_numbers(axis.size, times):
            flow.freeze(axis)
            return flow.fixed(axis.size * times)
        if axis.size == 1:
            return flow.fresh(times)
        return dataclasses.replace(axis, atoms=np.tile(axis.atoms, times))

    return [[repeated(axis, times) for axis, times in zip(axes, reps, strict=True)]]


def _reshape(flow, equation, ins):
    return [reshape(flow, ins[0].axes, v.shape) for v in equation.outputs]


def _transpose(flow, equation, ins):
    return [[ins[0].axes[i] for i in equation.params["permutation"]]]


def _rev(flow, equation, ins):
    return [
        [
            dataclasses.replace(axis, atoms=axis.atoms[::-1])
            if i in equation.params["dimensions"]
            else axis
            for i, axis in enumerate(ins[0].axes)
        ]
    ]


def _concatenate(flow, equation, ins):
    along = equation.params["dimension"]
    columns = list(zip(*(value.axes for value in ins), strict=True))
    return [
        [
            _joined(flow, axes) if i == along else unified(flow, axes)
            for i, axes in enumerate(columns)
        ]
    ]


def _joined(flow: Flow, axes: Sequence[Axis]) -> Axis:
    if not are_numbers(*(axis.size for axis in axes)):
        flow.freeze(*axes)
        return flow.fixed(sum(axis.size for axis in axes))
    shrinking = [axis for axis in axes if flow.atoms.find(axis.atoms).any()]
    atoms = np.concatenate([axis.atoms for axis in axes])
    other = same_held([axis.other for axis in shrinking])
    return Axis(atoms, continued(axes), all_zeros(shrinking), other)


def unified(flow: Flow, axes: Sequence[Axis]) -> Axis:
    flow.unify(*axes)
    other = same_held([axis.other for axis in axes])
    return axes[0].relabel(continued(axes), all_zeros(axes), other)


def _stack(flow, equation, ins):
    columns = zip(*(value.axes for value in ins), strict=True)
    axes = [unified(flow, column) for column in columns]
    axes.insert(equation.params["axis"], flow.fixed(len(ins)))
    return [axes]


def _slice(flow, equation, ins):
    p = equation.params
    strides = p["strides"] or (1,) * len(ins[0].axes)
    bounds = zip(p["start_indices"], p["limit_indices"], strides, strict=True)

    def sliced(axis: Axis, bound: tuple[int, int, int], size: int) -> Axis:
        if are_numbers(axis.size, *bound):
            return _part(axis, slice(*bound))
        return _whole_or_fixed(flow, axis, size)

    return [
        [
            sliced(*each)
            for each in zip(ins[0].axes, bounds, equation.outputs[0].shape, strict=True)
        ]
    ]


def _whole_or_fixed(flow: Flow, axis: Axis, size: int) -> Axis:
    """What is taken of an axis: all of it, or else it is not known which indices."""
    if axis.size == size:
        return axis
    flow.freeze(axis)
    return flow.fixed(size)


def _split(flow, equation, ins):
    along, sizes = equation.params["axis"], equation.params["sizes"]
    whole, ends = ins[0].axes[along], itertools.accumulate(sizes)
    if are_numbers(whole.size, *sizes):
        parts = [
            _part(whole, slice(end - size, end))
            for size, end in zip(sizes, ends, strict=True)
        ]
    else:
        parts = [_whole_or_fixed(flow, whole, size) for size in sizes]
    return [
        [part if i == along else axis for i, axis in enumerate(ins[0].axes)]
        for part in parts
    ]


def _unstack(flow, equation, ins):
    along = equation.params["axis"]
    flow.freeze(ins[0].axes[along])
    rest = [axis for i, axis in enumerate(ins[0].axes) if i != along]
    return [rest for _ in equation.outputs]


def _part(axis: Axis, indices: slice | np.ndarray) -> Axis:
    atoms = axis.atoms[indices]
    if len(atoms) == axis.size and isinstance(indices, slice):
        return axis
    return dataclasses.replace(axis, atoms=atoms)


def _pad(flow, equation, ins):
    """Padding is something of its own that may be removed, too."""
    zero = equation.inputs[1].is_zero
    config = equation.params["padding_config"]
    padded = any(low or high or inner for low, high, inner in config)

    def grown(axis: Axis, size: int, low: int, high: int, inner: int) -> Axis:
        zeros = axis.zeros if zero or not padded else None
        if low == high == inner == 0:
            return axis.relabel(axis.leaves, zeros)
        is_known = are_numbers(axis.size, low, high)
        if not is_known or inner or low < 0 or high < 0:
            flow.freeze(axis)
            return flow.fixed(size)
        atoms = [flow.atoms.fresh(low), axis.atoms, flow.atoms.fresh(high)]
        return Axis(np.concatenate(atoms), axis.leaves, zeros)

    return [
        [
            grown(axis, size, *each)
            for axis, size, each in zip(
                ins[0].axes, equation.outputs[0].shape, config, strict=True
            )
        ]
    ]


def _gather(flow, equation, ins):
    """Axes taken whole pass; axes picked from by what is not known are frozen."""
    numbers, sizes = (
        equation.params["dimension_numbers"],
        equation.params["slice_sizes"],
    )
    shape = equation.outputs[0].shape
    operand, indices = ins[0].axes, ins[1].axes
    picked = known_picks(flow, equation)
    result = [flow.fixed(size) for size in shape]
    inner = [
        i
        for i in range(len(operand))
        if i not in numbers.collapsed_slice_dims
        and i not in numbers.operand_batching_dims
    ]
    for place, i in zip(numbers.offset_dims, inner, strict=True):
        if sizes[i] == operand[i].size:
            result[place] = operand[i]
            flow.give_role(operand[i], "out")
        elif picked is not None:
            start = picked.starts[i]
            result[place] = _part(operand[i], slice(start, start + sizes[i]))
        else:
            flow.freeze(operand[i])
    outer = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    if picked is not None:
        if numbers.collapsed_slice_dims:
            axis = merge(flow, [operand[i] for i in numbers.collapsed_slice_dims])
            part = _part(axis, picked.places.reshape(-1))
            if not outer:
                flow.freeze(part)  # one index, whose axis is gone
            elif len(outer) == 1:
                result[outer[0]] = part
            else:
                for place, one in zip(
                    outer, split(flow, part, picked.places.shape), strict=True
                ):
                    result[place] = one
        return [result]
    chosen = _pick(flow, equation, operand, numbers.start_index_map)
    rest = [i for i in numbers.collapsed_slice_dims if i not in chosen]
    flow.freeze(*(operand[i] for i in rest), indices[-1])
    for i, j in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        flow.unify(operand[i], indices[j])
    for place, axis in zip(outer, indices, strict=False):
        result[place] = axis.relabel()
    return [result]


def _pick(
    flow: Flow, equation: Equation, operand: Sequence[Axis], indexed: Sequence[int]
) -> dict[int, frozenset[int] | None]:
    """Ties the axes that are indexed by numbers chosen of an axis to that one.

    Args:
      flow: the labels so far.
      equation: a gather or scatter.
      operand: the axes of its operand.
      indexed: which of these its columns of indices are for.

    Returns:
      For each such axis the leaves by whose zeros no removed index is picked.
    """
    found = picks_of(flow, equation.inputs[1], [operand[i] for i in indexed])
    chosen = {}
    for i, numbers in zip(indexed, found, strict=True):
        if numbers is not None:
            flow.unify(operand[i], Axis(numbers.atoms))
            flow.sums_over(operand[i], numbers.never)
            chosen[i] = numbers.never
    return chosen


def _scatter(flow, equation, ins):
    """Axes written whole are tied to the updates'; others are frozen, or picked."""
    numbers = equation.params["dimension_numbers"]
    operand, indices, updates = (value.axes for value in ins)
    inner = [
        i
        for i in range(len(operand))
        if i not in numbers.inserted_window_dims
        and i not in numbers.operand_batching_dims
    ]
    whole: dict[int, Axis] = {}
    for place, i in zip(numbers.update_window_dims, inner, strict=True):
        if updates[place].size == operand[i].size:
            flow.unify(operand[i], updates[place])
            whole[i] = updates[place]
        else:
            flow.freeze(operand[i], updates[place])
    chosen = _pick(flow, equation, operand, numbers.scatter_dims_to_operand_dims)
    rest = [i for i in numbers.inserted_window_dims if i not in chosen]
    flow.freeze(*(operand[i] for i in rest), indices[-1])
    outer = [i for i in range(len(updates)) if i not in numbers.update_window_dims]
    for k, (place, axis) in enumerate(zip(outer, indices, strict=False)):
        flow.unify(updates[place], axis)
        if k in numbers.scatter_indices_batching_dims:
            continue
        if equation.name in ("scatter-add", "scatter-sub"):
            flow.sums_over(updates[place], updates[place].zeros)
        else:
            flow.changes(updates[place])
    for i, j in zip(
        numbers.operand_batching_dims,
        numbers.scatter_indices_batching_dims,
        strict=True,
    ):
        flow.unify(operand[i], indices[j])
    # Where no removed index is written the operand is as it was.
    whole |= {i: operand[i].relabel(zeros=never) for i, never in chosen.items()}
    return [
        [
            axis.relabel(zeros=all_zeros((axis, whole[i])) if i in whole else None)
            for i, axis in enumerate(operand)
        ]
    ]


def _bitcast(flow, equation, ins):
    """Between widths, the last axis of the narrower holds the parts of a number."""
    old, new = ins[0].axes, equation.outputs[0].shape
    shared = min(len(old), len(new))
    flow.freeze(*old[shared:])
    passed = [axis.relabel(axis.leaves) for axis in old[:shared]]
    return [passed + [flow.fixed(size) for size in new[shared:]]]


def _dynamic_slice(flow, equation, ins):
    sizes, operand = equation.params["slice_sizes"], ins[0].axes
    for axis, size, start in zip(operand, sizes, ins[1:], strict=True):
        if size == 1 and start.numbers is not None and picks(start.numbers, axis):
            flow.unify(axis, Axis(start.numbers.atoms))
            flow.sums_over(axis, start.numbers.never)
        elif axis.size != size:
            flow.freeze(axis)
    return [
        [
            axis if axis.size == size else flow.fixed(size)
            for axis, size in zip(ins[0].axes, sizes, strict=True)
        ]
    ]


def _dynamic_update_slice(flow, equation, ins):
    result = []
    for axis, update in zip(ins[0].axes, ins[1].axes, strict=True):
        if axis.size == update.size:
            flow.unify(axis, update)
            result.append(axis.relabel(zeros=all_zeros((axis, update))))
        else:
            flow.freeze(axis, update)
            result.append(axis.relabel())
    return [result]


SCATTERS = (
    "scatter",
    "scatter-add",
    "scatter-sub",
    "scatter-mul",
    "scatter-min",
    "scatter-max",
)

MOVES: dict[str, LabelRule] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "tile": _tile,
    "reshape": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
    "rev": _rev,
    "concatenate": _concatenate,
    "stack": _stack,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "pad": _pad,
    "gather": _gather,
    **dict.fromkeys(SCATTERS, _scatter),
    "bitcast_convert_type": _bitcast,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
