"""Resizing: equations whose parameters hold a size, applied to smaller arrays.

One small function per primitive, in a table. It gets the equation, its arrays, and what
stays along each axis of what goes in and comes out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.programs.constants import known_picks
from agp_jax.programs.jaxprs import Equation, bind, source_line
from agp_jax.programs.reductions import group_axis
from agp_jax.thinning.remains import Kept, kept_along


def thin_shape(kept: Sequence[Kept], shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(
        size if k is None else k.shape[-1] for k, size in zip(kept, shape, strict=True)
    )


def take(array: Any, kept: Sequence[Kept], layer: jax.Array | None) -> Any:
    """What stays of an array that was made whole."""
    for axis, indices in enumerate(kept):
        if indices is not None:
            array = take_along(array, indices, axis, layer)
    return array


def take_along(
    array: Any, indices: np.ndarray, axis: int, layer: jax.Array | None
) -> jax.Array:
    if indices.ndim == 2:
        if (indices == indices[0]).all():
            indices = indices[0]
        else:
            assert layer is not None, "layers differ outside of their scan"
            return jnp.take(array, jnp.asarray(indices)[layer], axis, mode="clip")
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
    for axis, (size, start, stride) in enumerate(
        zip(equation.outputs[0].shape, p["start_indices"], strides, strict=True)
    ):
        picks = start + stride * np.arange(size)
        places = _places(picks, ins[0][axis], outs[0][axis])
        array = _take_range(array, places, axis, layer)
    return [array]


def _places(picks: np.ndarray, before: Kept, after: Kept) -> np.ndarray:
    """Where what stays of `picks` lies in what stays of the axis they pick from."""
    if before is None and after is None:
        return picks
    rows = max(len(k) if k is not None and k.ndim == 2 else 1 for k in (before, after))
    wanted = picks[None] if after is None else picks[np.atleast_2d(after)]
    wanted = np.broadcast_to(wanted, (rows, wanted.shape[-1]))
    if before is None:
        places = wanted
    else:
        kept = np.broadcast_to(np.atleast_2d(before), (rows, before.shape[-1]))
        pairs = zip(kept, wanted, strict=True)
        places = np.stack([np.searchsorted(k, w) for k, w in pairs])
    return places[0] if (places == places[0]).all() else places


def _take_range(
    array: Any, places: np.ndarray, axis: int, layer: jax.Array | None
) -> Any:
    """Takes increasing places, as a slice where they are evenly spaced."""
    if places.ndim == 1:
        if len(places) == array.shape[axis]:
            return array
        steps = np.unique(np.diff(places))
        if len(steps) <= 1:
            stride = int(steps[0]) if len(steps) else 1
            first, last = int(places[0]), int(places[-1])
            return jax.lax.slice_in_dim(array, first, last + 1, stride, axis)
    return take_along(array, places, axis, layer)


def _pad(remains, equation, arrays, ins, outs, layer):
    config = []
    for (low, high, inner), kept, size in zip(
        equation.params["padding_config"],
        outs[0],
        equation.outputs[0].shape,
        strict=True,
    ):
        if kept is not None and (low or high):
            rows = np.atleast_2d(kept)
            lows, highs = (rows < low).sum(axis=1), (rows >= size - high).sum(axis=1)
            if (lows != lows[0]).any() or (highs != highs[0]).any():
                raise ValueError(
                    f"the cut pads stacked layers differently at "
                    f"{source_line(equation)}; remove the same indices in all"
                )
            low, high = int(lows[0]), int(highs[0])
        config.append((low, high, inner))
    return bind(equation, arrays, padding_config=tuple(config))


def _conv(remains, equation, arrays, ins, outs, layer):
    groups = equation.params["feature_group_count"]
    if groups > 1:
        kept = kept_along(remains, group_axis(remains.flow, equation))
        groups = groups if kept is None else kept.shape[-1]
    return bind(equation, arrays, feature_group_count=groups)


def _gather(remains, equation, arrays, ins, outs, layer):
    numbers = equation.params["dimension_numbers"]
    picks = known_picks(remains.flow, equation)
    if picks is not None and any(k is not None for k in (*ins[0], *outs[0])):
        return [_gather_known(equation, picks, arrays[0], ins[0], outs[0], layer)]
    sizes = tuple(
        size if kept is None or i in numbers.operand_batching_dims else kept.shape[-1]
        for i, (size, kept) in enumerate(
            zip(equation.params["slice_sizes"], ins[0], strict=True)
        )
    )
    return bind(equation, arrays, slice_sizes=sizes)


def _gather_known(
    equation: Equation,
    picks: np.ndarray,
    array: Any,
    before: Sequence[Kept],
    after: Sequence[Kept],
    layer: jax.Array | None,
) -> jax.Array:
    """Takes known indices along one axis: where they are now, of those that stay."""
    numbers = equation.params["dimension_numbers"]
    (axis,) = numbers.collapsed_slice_dims
    rank = len(after)
    outer = [i for i in range(rank) if i not in numbers.offset_dims]
    numbered = np.arange(picks.size).reshape(picks.shape)
    for i, place in enumerate(outer):
        kept = after[place]
        if kept is not None:
            assert kept.ndim == 1, "known indices do not differ between layers"
            numbered = np.take(numbered, kept, axis=i)
    places = _places(picks.reshape(-1)[numbered.reshape(-1)], before[axis], None)
    taken = take_along(array, places.reshape(numbered.shape), axis, layer)
    made = list(range(axis, axis + picks.ndim))
    rest = [i for i in range(rank) if i not in made]
    order = dict(zip([*outer, *numbers.offset_dims], [*made, *rest], strict=True))
    return jnp.transpose(taken, [order[i] for i in range(rank)])


def _dynamic_slice(remains, equation, arrays, ins, outs, layer):
    sizes = thin_shape(outs[0], equation.params["slice_sizes"])
    return bind(equation, arrays, slice_sizes=sizes)


RESIZED: Mapping[str, Callable[..., list[Any]]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "tile": _tile,
    "split": _split,
    "slice": _slice,
    "pad": _pad,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}
