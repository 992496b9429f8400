"""Resizing: equations whose parameters hold a size, applied to smaller arrays.

One small function per primitive, in a table. It gets the equation, its arrays, and what
stays along each axis of what goes in and comes out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.programs.constants import Picks, known_picks
from agp_jax.programs.jaxprs import Equation, bind
from agp_jax.programs.moves import SCATTERS
from agp_jax.programs.numbers import along_of
from agp_jax.programs.reductions import group_axis
from agp_jax.thinning.remains import Kept, PerLayer, kept_along, of_rows, rows_of


def thin_shape(kept: Sequence[Kept], shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(
        size if k is None else len(k) for k, size in zip(kept, shape, strict=True)
    )


def take(array: Any, kept: Sequence[Kept], layer: jax.Array | None) -> Any:
    """What stays of an array that was made whole."""
    for axis, indices in enumerate(kept):
        if indices is not None:
            array = take_along(array, indices, axis, layer)
    return array


def take_along(
    array: Any, indices: np.ndarray | PerLayer, axis: int, layer: jax.Array | None
) -> jax.Array:
    if isinstance(indices, PerLayer):
        assert layer is not None, "layers differ outside of their scan"
        return jnp.take(array, jnp.asarray(indices.rows)[layer], axis, mode="clip")
    return jnp.take(array, indices, axis, mode="clip")


def _broadcast_in_dim(remains, equation, arrays, ins, outs, layer):
    shape = thin_shape(outs[0], equation.outputs[0].shape)
    return bind(equation, arrays, shape=shape)


def _reshape(remains, equation, arrays, ins, outs, layer):
    shape = thin_shape(outs[0], equation.outputs[0].shape)
    return bind(equation, arrays, new_sizes=shape)


def _tile(remains, equation, arrays, ins, outs, layer):
    shape = thin_shape(outs[0], equation.outputs[0].shape)
    old = (1,) * (len(shape) - np.ndim(arrays[0])) + np.shape(arrays[0])
    return [jnp.tile(arrays[0], [n // m for n, m in zip(shape, old, strict=True)])]


def _split(remains, equation, arrays, ins, outs, layer):
    axis = equation.params["axis"]
    sizes = tuple(
        thin_shape(kept, v.shape)[axis]
        for kept, v in zip(outs, equation.outputs, strict=True)
    )
    return bind(equation, arrays, sizes=sizes)


def _slice(remains, equation, arrays, ins, outs, layer):
    p, array = equation.params, arrays[0]
    strides = p["strides"] or (1,) * len(ins[0])
    bounds = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    for axis, bound in enumerate(bounds):
        array = _take_slice(array, bound, axis, ins[0][axis], outs[0][axis], layer)
    return [array]


def _take_slice(
    array: Any,
    bounds: tuple[int, int, int],
    axis: int,
    before: Kept,
    after: Kept,
    layer: jax.Array | None,
) -> jax.Array:
    """What stays of a slice, of an axis of which `before` stays."""
    if before is None and after is None:
        start, limit, stride = bounds
        return jax.lax.slice_in_dim(array, start, limit, stride, axis)
    places = _places(np.arange(*bounds), before, after)
    return _take_range(array, places, axis, layer)


def _places(picks: np.ndarray, before: Kept, after: Kept) -> np.ndarray | PerLayer:
    """Where what stays of `picks` lies in what stays of the axis they pick from."""
    wanted = picks[None] if after is None else picks[rows_of(after)]
    if before is not None:
        kept = rows_of(before)
        layers = max(len(kept), len(wanted))
        pairs = zip(
            np.broadcast_to(kept, (layers, kept.shape[1])),
            np.broadcast_to(wanted, (layers, wanted.shape[1])),
            strict=True,
        )
        wanted = np.stack([np.searchsorted(k, w) for k, w in pairs])
    return of_rows(wanted)


def _take_range(
    array: Any, places: np.ndarray | PerLayer, axis: int, layer: jax.Array | None
) -> Any:
    """Takes increasing places, as a slice where they are evenly spaced."""
    if isinstance(places, PerLayer):
        return take_along(array, places, axis, layer)
    if len(places) == array.shape[axis]:
        return array
    if not len(places):
        return jax.lax.slice_in_dim(array, 0, 0, axis=axis)
    steps = np.unique(np.diff(places))
    if len(steps) <= 1:
        stride = int(steps[0]) if len(steps) else 1
        first, last = int(places[0]), int(places[-1])
        return jax.lax.slice_in_dim(array, first, last + 1, stride, axis)
    return take_along(array, places, axis, layer)


def _pad(remains, equation, arrays, ins, outs, layer):
    config, uneven = [], []
    for axis, (low, high, inner) in enumerate(equation.params["padding_config"]):
        size, kept = equation.outputs[0].shape[axis], outs[0][axis]
        if kept is not None and (low or high):
            rows = rows_of(kept)
            lows, highs = (rows < low).sum(axis=1), (rows >= size - high).sum(axis=1)
            if (lows == lows[0]).all() and (highs == highs[0]).all():
                low, high = int(lows[0]), int(highs[0])
            else:
                uneven.append((axis, low, high))
        config.append((low, high, inner))
    (array,) = bind(equation, arrays, padding_config=tuple(config))
    for axis, low, high in uneven:
        # Layers keep other parts of the padding: it is made whole, and then cut.
        size, inside = equation.outputs[0].shape[axis], ins[0][axis]
        middle = np.arange(size - low - high) if inside is None else inside
        rows = low + rows_of(middle)
        ends = np.concatenate([np.arange(low), np.arange(size - high, size)])
        ends = np.broadcast_to(ends, (len(rows), len(ends)))
        present = PerLayer(np.sort(np.concatenate([rows, ends], axis=1)))
        places = _places(np.arange(size), present, outs[0][axis])
        array = take_along(array, places, axis, layer)
    return [array]


def _conv(remains, equation, arrays, ins, outs, layer):
    groups = equation.params["feature_group_count"]
    if groups > 1:
        kept = kept_along(remains, group_axis(remains.flow, equation))
        groups = groups if kept is None else len(kept)
    return bind(equation, arrays, feature_group_count=groups)


def _top_k(remains, equation, arrays, ins, outs, layer):
    """The places that are found are numbers of the whole axis, as in what is masked."""
    made, kept = bind(equation, arrays), ins[0][along_of(equation)]
    if kept is not None:
        numbers = jnp.asarray(_row_of(kept, layer), made[-1].dtype)
        made[-1] = numbers[made[-1]]
    return made


def _row_of(
    indices: np.ndarray | PerLayer, layer: jax.Array | None
) -> np.ndarray | jax.Array:
    if not isinstance(indices, PerLayer):
        return indices
    assert layer is not None, "layers differ outside of their scan"
    return jnp.asarray(indices.rows)[layer]


def _places_of(
    numbers: jax.Array, size: int, kept: Kept, layer: jax.Array | None
) -> jax.Array:
    """Where the indices of an axis of `size` now are, of which some are kept."""
    if kept is None:
        return numbers
    now = jnp.arange(len(kept), dtype=numbers.dtype)
    places = jnp.zeros(size, numbers.dtype).at[_row_of(kept, layer)].set(now)
    return places[numbers]


def _columns_of(
    equation: Equation,
    indices: jax.Array,
    axes: Sequence[int],
    picked: Sequence[int],
    kept: Sequence[Kept],
    layer: jax.Array | None,
) -> jax.Array:
    """The indices of a gather or scatter, as places in what is kept.

    Args:
      equation: the gather or scatter.
      indices: (..., columns).
      axes: the axis of the operand that each column is for.
      picked: those of which one entry is picked at a time.
      kept: what stays of the operand's axes.
      layer: of a stack.
    """
    if all(kept[axis] is None for axis in picked):
        return indices
    shape = equation.inputs[0].shape
    columns = [
        _places_of(column, shape[axis], kept[axis], layer) if axis in picked else column
        for column, axis in zip(jnp.moveaxis(indices, -1, 0), axes, strict=True)
    ]
    return jnp.stack(columns, axis=-1)


def _scatter(remains, equation, arrays, ins, outs, layer):
    operand, indices, *updates = arrays
    numbers = equation.params["dimension_numbers"]
    axes, picked = numbers.scatter_dims_to_operand_dims, numbers.inserted_window_dims
    indices = _columns_of(equation, indices, axes, picked, ins[0], layer)
    return bind(equation, [operand, indices, *updates])


def _gather(remains, equation, arrays, ins, outs, layer):
    numbers, whole = equation.params["dimension_numbers"], equation.inputs[0].shape
    picks = known_picks(remains.flow, equation)
    if picks is not None and any(k is not None for k in (*ins[0], *outs[0])):
        return [_gather_known(equation, picks, arrays[0], ins[0], outs[0], layer)]
    sizes = tuple(
        size if kept is None or size < n else len(kept)
        for size, n, kept in zip(
            equation.params["slice_sizes"], whole, ins[0], strict=True
        )
    )
    operand, indices = arrays
    axes, picked = numbers.start_index_map, numbers.collapsed_slice_dims
    indices = _columns_of(equation, indices, axes, picked, ins[0], layer)
    return bind(equation, [operand, indices], slice_sizes=sizes)


def _gather_known(
    equation: Equation,
    picks: Picks,
    array: Any,
    before: Sequence[Kept],
    after: Sequence[Kept],
    layer: jax.Array | None,
) -> jax.Array:
    """Takes known indices: where they are now, of those that stay."""
    numbers, whole = equation.params["dimension_numbers"], equation.inputs[0].shape
    axes, rank = numbers.collapsed_slice_dims, len(after)
    inner = [i for i in range(len(whole)) if i not in axes]
    for place, i in zip(numbers.offset_dims, inner, strict=True):
        size = equation.params["slice_sizes"][i]
        if size != whole[i]:
            bounds = picks.starts[i], picks.starts[i] + size, 1
            array = _take_slice(array, bounds, i, before[i], after[place], layer)
    outer = [i for i in range(rank) if i not in numbers.offset_dims]
    stays = [after[i] for i in outer]
    places = picks.places.ravel()
    if axes:
        here = _flat([before[i] for i in axes], [whole[i] for i in axes])
        stay = _flat(stays, picks.places.shape) if outer else None
        places = _places(places, here, stay)
    array = jnp.moveaxis(array, axes, range(len(axes)))
    first, rest = array.shape[: len(axes)], array.shape[len(axes) :]
    flat = array.reshape(math.prod(first), *rest)
    taken = take_along(flat, places, 0, layer)
    taken = taken.reshape(*thin_shape(stays, picks.places.shape), *rest)
    return jnp.moveaxis(taken, range(len(outer)), outer)


def _flat(kept: Sequence[Kept], shape: Sequence[int]) -> Kept:
    """What stays of an array, as places in its flattened form."""
    axes = [
        np.arange(size)[None] if k is None else rows_of(k)
        for k, size in zip(kept, shape, strict=True)
    ]
    layers = max(len(rows) for rows in axes)
    by_layer = zip(
        *(np.broadcast_to(x, (layers, x.shape[1])) for x in axes), strict=True
    )
    flat = [np.ravel_multi_index(np.ix_(*rows), shape).ravel() for rows in by_layer]
    return of_rows(np.stack(flat))


def _dynamic_slice(remains, equation, arrays, ins, outs, layer):
    sizes = thin_shape(outs[0], equation.params["slice_sizes"])
    operand, *starts = arrays
    starts = [
        _places_of(start, size, kept, layer)
        for start, size, kept in zip(
            starts, equation.inputs[0].shape, ins[0], strict=True
        )
    ]
    return bind(equation, [operand, *starts], slice_sizes=sizes)


def _made_of_keys(remains, equation, arrays, ins, outs, layer):
    """What each key that stays makes, whole, and of that what stays."""
    (made,) = bind(equation, arrays)
    rank = len(ins[0])
    return [take(made, [*[None] * rank, *outs[0][rank:]], layer)]


RESIZED: Mapping[str, Callable[..., list[Any]]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "tile": _tile,
    "split": _split,
    "slice": _slice,
    "pad": _pad,
    "conv_general_dilated": _conv,
    "top_k": _top_k,
    "argmax": _top_k,
    "gather": _gather,
    **dict.fromkeys(SCATTERS, _scatter),
    "dynamic_slice": _dynamic_slice,
    "random_bits": _made_of_keys,
    "random_split": _made_of_keys,
}
