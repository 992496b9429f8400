"""Exact choice of the largest scores: no sort, no gather, no flattening.

For floats the order of the values is the order of their bits, read as integers in the
right way. The k-th largest score is therefore found by an integer search whose every
pass asks how many scores reach each of a few thresholds. A pass reads the scores once
and returns a handful of counts, so a score array that is spread over many devices
stays where it is. Where equal scores straddle the k-th place, the search goes on over
their positions.

Many tensors, and many slices of one tensor, are searched together: each runs in a
contest of its own or shares one with others, and one loop advances all contests.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from agp_jax.bits import INFINITY, LOWEST
from agp_jax.shardings import indices_along, replicate

# Thresholds of the first pass: where trained weights tend to lie, and infinity.
_FIRST_THRESHOLDS = np.array([[2**-9, 2**-6, 2**-5, 2**-3, np.inf]], np.float32)
# Thresholds of later passes: how far they are, in deviations, from where the wanted key
# is expected. The middle one halves the bracket instead. A CPU core counts five in the
# time that it takes to read the scores, and each more costs time to compile.
_DEVIATIONS = np.array([[-1.5, -0.4, np.nan, 0.4, 1.5]], np.float32)
_NUM_THRESHOLDS = _DEVIATIONS.size


class Entrant(NamedTuple):
    """A tensor of cells that takes part in one or several contests.

    Attributes:
      arrays: what its keys are made of; None where there is no such array.
      keys: a function of `arrays` that gives int32 keys, larger is better, of shape
        (*rows, *cells).
      shape: the shape of the keys.
      contest: the contest of its first row; that of the next row is the next.
      num_row_axes: how many axes `rows` are.
      first_position: where this tensor's cells begin among the cells of its contest,
        which decides ties: of equal keys the one at the lower position wins.
      idle_bits: so many low bits are zero in all keys.
    """

    arrays: tuple[jax.Array | None, ...]
    keys: Callable[..., jax.Array]
    shape: tuple[int, ...]
    contest: int = 0
    num_row_axes: int = 0
    first_position: int = 0
    idle_bits: int = 0

    @property
    def contests(self) -> slice:
        num_rows = math.prod(self.shape[: self.num_row_axes])
        return slice(self.contest, self.contest + num_rows)


def keep_largest(
    entrants: Sequence[Entrant], num_kept: jax.Array, num_cells: np.ndarray
) -> list[jax.Array]:
    """Marks the `num_kept[c]` largest keys of every contest c.

    A contest in which some key is not finite keeps all its cells.

    Args:
      entrants: the tensors.
      num_kept: int32 (contests,), at least 1 each.
      num_cells: int32 (contests,): all cells of each contest.

    Returns:
      For each entrant bools of its shape: exactly `num_kept` True in every contest,
      those with the largest keys, and among equal keys those that come first.
    """
    _, found, rows = search(entrants, num_kept, num_cells)
    # A contest that never came to positions keeps all that reach its threshold.
    by_position = found.by_position > 0
    least = jnp.where(by_position, found.least, found.low)
    last_place = jnp.where(by_position, found.low, LOWEST)
    table = jnp.stack([least, last_place], axis=1)
    kept = []
    for entrant, row in zip(entrants, rows, strict=True):
        keys = entrant.keys(*entrant.arrays)
        least, last_place = _columns(table, entrant, row)
        in_place = _places(entrant, keys, jnp.int32(0)) >= last_place
        kept.append((keys > least) | ((keys == least) & in_place))
    return kept


class Bracket(NamedTuple):
    """Where the threshold of each contest lies: int32 arrays of shape (contests,).

    Attributes:
      low: a threshold that at least `wanted` values reach.
      high: one that fewer reach.
      reach_low: how many values reach `low`.
      reach_high: how many reach `high`.
      wanted: how many should be kept.
      even: 1 if the values between seem to be spread evenly.
      by_position: 1 if the values are the positions of the keys equal to `least`, 0 if
        they are the keys.
      least: see `by_position`.
    """

    low: jax.Array
    high: jax.Array
    reach_low: jax.Array
    reach_high: jax.Array
    wanted: jax.Array
    even: jax.Array
    by_position: jax.Array
    least: jax.Array


def search(
    entrants: Sequence[Entrant], num_kept: jax.Array, num_cells: np.ndarray
) -> tuple[jax.Array, Bracket, list[jax.Array]]:
    """Closes the brackets of all contests until `reach_low == wanted`.

    Returns:
      How many passes it took, the brackets, and for each entrant its `contest` as an
      array that the compiler takes for a variable.
    """
    idle_bits = np.full(num_cells.shape, 31, np.int32)
    for entrant in entrants:
        own = entrant.contests
        idle_bits[own] = np.minimum(idle_bits[own], entrant.idle_bits)
    total = jnp.asarray(num_cells, jnp.int32)
    # Zero, but the compiler does not know. With it the numbers of the entrants' rows
    # are data, and XLA compiles one kernel for all entrants of a shape.
    zero = jnp.minimum(num_kept[0], 0)

    def unfinished(state: tuple[jax.Array, jax.Array, list[jax.Array]]) -> jax.Array:
        bracket = _bracket(state[1])
        return jnp.any(bracket.reach_low != bracket.wanted)

    def narrow(state: tuple[jax.Array, jax.Array, list[jax.Array]]):
        num_passes, table, rows = state
        rows = [row + zero for row in rows]
        bracket = _bracket(table)
        is_first = num_passes == 0
        step = jnp.where(bracket.by_position > 0, 1, np.int32(1) << idle_bits)
        tried = jnp.where(
            is_first, _FIRST_THRESHOLDS.view(np.int32), _thresholds(bracket, step)
        )
        reached = _count(entrants, rows, tried, bracket)
        # A key that is not finite: everything stays.
        unsound = is_first & (reached[:, -1] > 0)
        bracket = bracket._replace(wanted=jnp.where(unsound, total, bracket.wanted))
        bracket = _narrowed(bracket, tried, reached)
        bracket = _turned_to_positions(bracket, step, total)
        return num_passes + 1, jnp.stack(bracket, axis=1), rows

    zeros = jnp.zeros_like(num_kept)
    start = Bracket(
        low=zeros + LOWEST,
        high=zeros + INFINITY,
        reach_low=total,
        reach_high=zeros,
        wanted=num_kept,
        even=zeros,
        by_position=zeros,
        least=zeros,
    )
    rows = [jnp.int32(entrant.contest) for entrant in entrants]
    num_passes, table, rows = lax.while_loop(
        unfinished, narrow, (jnp.int32(0), jnp.stack(start, axis=1), rows)
    )
    return num_passes, _bracket(table), rows


def _bracket(table: jax.Array) -> Bracket:
    """The columns of a table, as which a loop carries the bracket: it compiles to fewer
    kernels than arrays of their own."""
    return Bracket(*jnp.unstack(table, axis=1))


def _thresholds(bracket: Bracket, step: jax.Array) -> jax.Array:
    """Thresholds to try next, inside of each bracket: (contests, T).

    Where the values lie evenly the wanted one is near the place that its rank gives by
    proportion, off by some part of the bracket's width: the deviation of a random rank,
    and the more the wider the bracket, as densities change. Thresholds on both sides
    catch it, and one at half the bracket makes sure of progress. Elsewhere they divide
    the bracket evenly. All are multiples of `step`.
    """
    low, high, reach_low, reach_high, wanted, even, by_position, _ = (
        x[:, None] for x in bracket
    )
    step = _unsigned(step)[:, None]
    width = _unsigned(high) - _unsigned(low)
    section = width // (_NUM_THRESHOLDS + 1)
    sections = np.arange(1, _NUM_THRESHOLDS + 1, dtype=np.uint32)[None]

    inside = (reach_low - reach_high).astype(jnp.float32)
    share = ((reach_low - wanted).astype(jnp.float32) + 0.5) / inside
    extent = width.astype(jnp.float32)
    drift = jnp.where(by_position > 0, 0.0, 2.0**-26 * extent)
    error = jnp.minimum(drift + 0.5 * lax.rsqrt(inside), 0.25)
    places = jnp.where(np.isnan(_DEVIATIONS), 0.5, share + error * _DEVIATIONS)
    near = (jnp.clip(places, 0, 1) * extent).astype(jnp.uint32)

    by_proportion = (even > 0) & (width < 2**25) & (section >= step)
    offsets = jnp.where(by_proportion, near, jnp.maximum(section, step) * sections)
    offsets = jnp.clip(offsets & ~(step - 1), step, width - step)
    return lax.bitcast_convert_type(_unsigned(low) + offsets, jnp.int32)


def _narrowed(bracket: Bracket, tried: jax.Array, reached: jax.Array) -> Bracket:
    """The bracket after so many values have `reached` the thresholds `tried`."""
    low, high, reach_low, reach_high, wanted, *_ = bracket
    enough = reached >= wanted[:, None]
    lowest, highest = LOWEST, np.int32(2**31 - 1)
    best_low, best_high, best_reach_low, best_reach_high = lax.reduce(
        [
            jnp.where(enough, tried, lowest),
            jnp.where(enough, highest, tried),
            jnp.where(enough, reached, highest),
            jnp.where(enough, lowest, reached),
        ],
        [lowest, highest, highest, lowest],
        lambda x, y: [
            jnp.maximum(x[0], y[0]),
            jnp.minimum(x[1], y[1]),
            jnp.minimum(x[2], y[2]),
            jnp.maximum(x[3], y[3]),
        ],
        (1,),
    )
    narrowed = bracket._replace(
        low=jnp.maximum(low, best_low),
        high=jnp.minimum(high, best_high),
        reach_low=jnp.minimum(reach_low, best_reach_low),
        reach_high=jnp.maximum(reach_high, best_reach_high),
    )
    inside = narrowed.reach_low - narrowed.reach_high
    even = inside <= (reach_low - reach_high) // 2
    return narrowed._replace(even=even.astype(jnp.int32))


def _turned_to_positions(
    bracket: Bracket, step: jax.Array, total: jax.Array
) -> Bracket:
    """The bracket, over positions where equal keys straddle the place wanted."""
    low, high, reach_low, reach_high, wanted, even, by_position, least = bracket
    is_one_key = _unsigned(high) - _unsigned(low) <= _unsigned(step)
    turns = is_one_key & (reach_low > wanted) & (by_position == 0)
    turned = turns.astype(jnp.int32)
    return Bracket(
        low=jnp.where(turns, -total, low),
        high=jnp.where(turns, 0, high),
        reach_low=jnp.where(turns, reach_low - reach_high, reach_low),
        reach_high=jnp.where(turns, 0, reach_high),
        wanted=jnp.where(turns, wanted - reach_high, wanted),
        even=even | turned,
        by_position=by_position | turned,
        least=jnp.where(turns, low, least),
    )


def _count(
    entrants: Sequence[Entrant],
    rows: Sequence[jax.Array],
    thresholds: jax.Array,
    bracket: Bracket,
) -> jax.Array:
    """How many values of each contest reach its thresholds: both (contests, T)."""
    phase = [bracket.by_position[:, None], bracket.least[:, None]]
    table = jnp.concatenate([*phase, thresholds], axis=1)
    parts = []
    for entrant, row in zip(entrants, rows, strict=True):
        # Without the barrier XLA would compute the values before the search and store
        # them. It must hold the table too, which differs in every pass.
        *arrays, zero, own_table = lax.optimization_barrier(
            (*entrant.arrays, jnp.int32(0), table)
        )
        by_position, least, *tried = _columns(own_table, entrant, row)
        keys = entrant.keys(*arrays)
        places = jnp.where(keys == least, _places(entrant, keys, zero), LOWEST)
        values = jnp.where(by_position > 0, places, keys)
        # One reduction for all thresholds: the keys are read once, and XLA makes a
        # plain loop of it, where it would store the operand of a single large sum.
        counts = lax.reduce(
            [(values >= threshold).astype(jnp.int32) for threshold in tried],
            [np.int32(0)] * len(tried),
            lambda left, right: [x + y for x, y in zip(left, right, strict=True)],
            tuple(range(entrant.num_row_axes, values.ndim)),
        )
        parts.append([replicate(x).reshape(-1, 1) for x in counts])
    by_contest = np.concatenate([np.r_[entrant.contests] for entrant in entrants])
    counts = jnp.concatenate([jnp.concatenate(x, axis=1) for x in parts])
    if np.array_equal(by_contest, np.arange(len(thresholds))):
        return counts
    return jnp.zeros_like(thresholds).at[by_contest].add(counts)


def _columns(table: jax.Array, entrant: Entrant, row: jax.Array) -> list[jax.Array]:
    """An entrant's part of each column of `table`, to broadcast against its keys."""
    num_rows = entrant.contests.stop - entrant.contests.start
    zero = np.uint32(0)
    own = lax.dynamic_slice(table, (_unsigned(row), zero), (num_rows, table.shape[1]))
    row_shape = entrant.shape[: entrant.num_row_axes]
    cell_axes = (1,) * (len(entrant.shape) - entrant.num_row_axes)
    return [
        lax.slice_in_dim(own, column, column + 1, axis=1).reshape(
            *row_shape, *cell_axes
        )
        for column in range(table.shape[1])
    ]


def _places(entrant: Entrant, keys: jax.Array, zero: jax.Array) -> jax.Array:
    """int32 of the shape of `keys`, the higher the earlier: -1 for a contest's first.

    `zero` comes first in every sum, or XLA would compute and store it all beforehand.
    """
    place = zero
    for axis in range(entrant.num_row_axes, len(entrant.shape)):
        size = entrant.shape[axis]
        if size > 1:
            along = indices_along(keys, axis, jnp.int32)
            place = place * np.int32(size) - along
    return jnp.broadcast_to(place - np.int32(entrant.first_position + 1), entrant.shape)


def _unsigned(values: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(values, jnp.uint32)
