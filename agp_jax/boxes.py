"""Boxes: reductions over cells, or all of a tensor, the same bits on any mesh."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from agp_jax.bits import INFINITY, magnitude_bits
from agp_jax.shardings import divides_locally, neighbours, split_axis
from agp_jax.trees import Shape

_MOST_PARTS = 15  # so many multiples of at most 2**27 are an int32 together


def sum_boxes(values: jax.Array, box: Shape) -> jax.Array:
    """The float32 sum of `values` over each box, in the shape of the grid.

    The sum has the same bits in whatever order it is made, so devices that hold parts
    of a box agree with one that holds it all. Each value is rounded to a multiple of
    2**-27 of its box's largest, and the multiples are added as integers.

    Where a box holds a value that is not finite, the sum is infinity.

    `values` may have leading axes beyond those of `box`; they stay.
    """
    if math.prod(box) == 1 or values.size == 0:
        return _reduce_boxes(jnp.sum, values, box)
    parts, rest = _fold_boxes(values, box)
    magnitudes = functools.reduce(jnp.maximum, map(magnitude_bits, parts))
    largest = _reduce_boxes(jnp.max, magnitudes, rest)
    exponent = (largest >> jnp.finfo(jnp.float32).nmant) - 126  # of a power above all
    scale = fill_boxes(27 - exponent, rest)
    multiples = [jnp.round(_times_power_of_two(x, scale)) for x in parts]
    sums = functools.reduce(jnp.add, [x.astype(jnp.int32) for x in multiples])
    # Without the barrier XLA would read the values again for every digit.
    total = _sum_integers(jax.lax.optimization_barrier(sums), rest)
    total = _times_power_of_two(total, exponent - 27)
    return jnp.where(largest < INFINITY, total, jnp.inf)


def any_in_boxes(values: jax.Array, box: Shape) -> jax.Array:
    """Whether any of the bools `values` is True in each box, in the grid's shape."""
    parts, rest = _fold_boxes(values, box)
    return _reduce_boxes(jnp.any, functools.reduce(jnp.logical_or, parts), rest)


def fill_boxes(cells: jax.Array, box: Shape) -> jax.Array:
    """Repeats each entry of the grid `cells` over its box: undoes `sum_boxes`."""
    for axis, part in enumerate(box, start=cells.ndim - len(box)):
        if part > 1:
            shape = cells.shape
            grown = (*shape[: axis + 1], part, *shape[axis + 1 :])
            cells = jnp.broadcast_to(jnp.expand_dims(cells, axis + 1), grown)
            cells = cells.reshape(*shape[:axis], -1, *shape[axis + 1 :])
    return cells


def count_nonzero(arrays: Sequence[jax.Array]) -> list[int]:
    """How many entries of each array are not zero, or True.

    Exact for any size: every array is summed where it lies, in int64 wherever the rest
    of the program computes in 32 bits. Arrays of the same shapes compile once.

    >>> count_nonzero([jnp.eye(3), jnp.array([True, False])])
    [3, 1]
    """
    with jax.enable_x64(True):
        return [int(count) for count in jax.device_get(_count_nonzero([*arrays]))]


@jax.jit
def _count_nonzero(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(x.astype(bool), dtype=jnp.int64) for x in arrays]


def _fold_boxes(values: jax.Array, box: Shape) -> tuple[list[jax.Array], Shape]:
    """Takes up to 15 values of each box apart, into as many arrays.

    To combine these arrays is arithmetic on whole arrays, which is fast everywhere. A
    CPU is slow at reductions over few or over leading entries.

    Returns:
      The arrays, and the box that is left to reduce in each of them.
    """
    parts, rest, limit = [values], list(box), _MOST_PARTS
    offset = values.ndim - len(box)
    for axis, part in enumerate(box):
        within = part < values.shape[axis + offset]  # must be split in any case
        count = max(
            count
            for count in range(1, limit + 1)
            if part % count == 0
            and (within or divides_locally(values, axis + offset, count))
        )
        if count > 1:
            parts = [y for x in parts for y in neighbours(x, axis + offset, count)]
            rest[axis] //= count
            limit //= count
    return parts, tuple(rest)


def _sum_integers(values: jax.Array, box: Shape) -> jax.Array:
    """The sum of int32 `values` over each box, which may exceed an int32, as float32.

    They are added in digits of so few bits that the sum of all digits of a place is an
    int32.
    """
    bits = 31 - math.prod(box).bit_length()
    num_digits = -(-31 // bits)
    digits, carry = [], 0
    for i in range(num_digits):
        digit = values >> (i * bits)
        if i < num_digits - 1:
            digit &= 2**bits - 1
        total = _reduce_boxes(jnp.sum, digit, box) + carry
        carry = total >> bits
        digits.append(total & (2**bits - 1) if i < num_digits - 1 else total)
    sums = jnp.zeros(digits[0].shape, jnp.float32)
    for i, digit in reversed(list(enumerate(digits))):
        place = _times_power_of_two(digit.astype(jnp.float32), jnp.int32(i * bits))
        sums = sums + place
    return sums


def _reduce_boxes(
    reduce: Callable[..., jax.Array], values: jax.Array, box: Shape
) -> jax.Array:
    """Reduces within boxes: whole axes first, which suits any sharding."""
    offset = values.ndim - len(box)
    sizes = values.shape[offset:]
    whole = [a for a, part in enumerate(box) if 1 < part == sizes[a]]
    if whole:
        values = reduce(values, axis=tuple(a + offset for a in whole), keepdims=True)
    for axis in reversed(range(len(box))):  # last first: earlier axes keep their place
        if 1 < box[axis] < sizes[axis]:
            split = split_axis(values, axis + offset, box[axis])
            values = reduce(split, axis=axis + offset + 1)
    return values


def _times_power_of_two(values: jax.Array, exponent: jax.Array) -> jax.Array:
    """`values * 2**exponent`, exact; in two steps, as the factor may be too large."""
    half = exponent // 2
    for part in (half, exponent - half):
        factor = jax.lax.bitcast_convert_type((part + 127) << 23, jnp.float32)
        values = values * factor
    return values
