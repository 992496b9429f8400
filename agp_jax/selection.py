"""Exact choice of the largest scores: no sort, no gather, no flattening.

For floats the order of the values is the order of their bits, read as integers in the
right way. The k-th largest score is therefore found by an integer search whose every
pass asks how many scores reach each of a few thresholds. A pass reads the scores once
and returns a handful of counts, so a score array that is spread over many devices
stays where it is. Equal scores at the threshold are settled by the same search over
their positions.

Many tensors, and many slices of one tensor, are searched together: each runs in a
contest of its own or shares one with others, and one loop advances all contests.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from agp_jax.shardings import replicate

LOWEST = np.int32(np.iinfo(np.int32).min)

# Three thresholds a pass: more would save passes and cost compile time.
_BITS_PER_PASS = 2


class Entrant(NamedTuple):
    """A tensor of cells that takes part in one or several contests.

    Attributes:
      arrays: what its keys are made of.
      keys: a function of `arrays` that gives int32 keys, larger is better, of shape
        (*rows, *cells).
      shape: the shape of the keys.
      contests: int32 of shape (*rows,): the contest of each row.
      first_position: where this tensor's cells begin among the cells of its contest,
        which decides ties: of equal keys the one at the lower position wins.
    """

    arrays: tuple[jax.Array, ...]
    keys: Callable[..., jax.Array]
    shape: tuple[int, ...]
    contests: np.ndarray
    first_position: int = 0


def ordered_bits(scores: jax.Array) -> jax.Array:
    """int32 keys that order as the float32 `scores` do; both zeros are equal.

    Every finite score has a key above `LOWEST`.
    """
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    bits = jnp.where(bits == LOWEST, 0, bits)  # -0.0; a float comparison would
    # take the smallest scores for zero where denormals are flushed
    return jnp.where(bits < 0, bits ^ np.int32(2**31 - 1), bits)


def keep_largest(
    entrants: Sequence[Entrant], num_kept: jax.Array, num_cells: np.ndarray
) -> list[jax.Array]:
    """Marks the `num_kept[c]` largest keys of every contest c.

    Args:
      entrants: the tensors.
      num_kept: int32 (contests,), at least 1 each.
      num_cells: int32 (contests,): all cells of each contest.

    Returns:
      For each entrant bools of its shape: exactly `num_kept` True in every contest,
      those with the largest keys, and among equal keys those that come first.
    """

    def keys_of(entrant: Entrant, arrays: Sequence[jax.Array], _) -> jax.Array:
        return entrant.keys(*arrays)

    least, reached, above = _search(
        lambda thresholds: _count(entrants, thresholds, keys_of),
        num_kept,
        jnp.asarray(num_cells, jnp.int32),
        lowest=LOWEST,
        num_bits=32,
    )

    # The keys above `least` win. Those equal to it, `reached - above` in number, take
    # the places left by position: a search over their negated positions.
    def positions_of(
        entrant: Entrant, arrays: Sequence[jax.Array], zero: jax.Array
    ) -> jax.Array:
        ties = entrant.keys(*arrays) == _by_row(least, entrant)
        return jnp.where(ties, _rank_by_position(entrant, zero), LOWEST)

    bits = int(np.max(num_cells)).bit_length()
    last_place, _, _ = _search(
        lambda thresholds: _count(entrants, thresholds, positions_of),
        num_kept - above,
        reached - above,
        lowest=np.int32(-(2**bits)),
        num_bits=bits,
    )

    kept = []
    for entrant in entrants:
        keys = entrant.keys(*entrant.arrays)
        threshold = _by_row(least, entrant)
        rank = _rank_by_position(entrant, jnp.int32(0))
        in_place = rank >= _by_row(last_place, entrant)
        kept.append((keys > threshold) | ((keys == threshold) & in_place))
    return kept


def _search(
    count: Callable[[jax.Array], jax.Array],
    wanted: jax.Array,
    total: jax.Array,
    lowest: np.int32,
    num_bits: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest threshold per contest that at least `wanted` keys reach.

    All keys lie in [lowest, lowest + 2**num_bits), and `count` gives for thresholds
    (contests, T) how many keys reach each. Every pass settles two bits of all
    contests; the search ends early when all counts are met exactly.

    Returns:
      The threshold, the number of keys that reach it, and the number of keys that are
      certain winners above it: (contests,) each. Where the second is not `wanted`
      the threshold is the `wanted`-th largest key.
    """
    num_passes = -(-num_bits // _BITS_PER_PASS)
    steps = np.arange(1, 2**_BITS_PER_PASS, dtype=np.int32)

    def unfinished(state):
        _, reached, _, done = state
        return (done < num_passes) & jnp.any(reached != wanted)

    def narrow(state):
        threshold, reached, above, done = state
        shift = jnp.maximum(num_bits - _BITS_PER_PASS * (done + 1), 0)
        tried = threshold[:, None] + (steps << shift)[None]  # (contests, T), rising
        counts = count(tried)
        passed = jnp.sum(counts >= wanted[:, None], axis=1, dtype=jnp.int32)[:, None]
        tried = jnp.concatenate([threshold[:, None], tried], axis=1)
        counts = jnp.concatenate([reached[:, None], counts, above[:, None]], axis=1)
        pick = lambda table, column: jnp.take_along_axis(table, column, 1)[:, 0]  # noqa: E731
        settled = reached == wanted
        return (
            jnp.where(settled, threshold, pick(tried, passed)),
            jnp.where(settled, reached, pick(counts, passed)),
            jnp.where(settled, above, pick(counts, passed + 1)),
            done + 1,
        )

    start = jnp.full_like(wanted, lowest), total, jnp.zeros_like(wanted), jnp.int32(0)
    threshold, reached, above, _ = lax.while_loop(unfinished, narrow, start)
    return threshold, reached, above


def _count(
    entrants: Sequence[Entrant],
    thresholds: jax.Array,
    values_of: Callable[[Entrant, Sequence[jax.Array], jax.Array], jax.Array],
) -> jax.Array:
    """How many values of each contest reach its thresholds: both (contests, T).

    The values of an entrant are `values_of(entrant, its arrays, zero)`.
    """
    num_thresholds = thresholds.shape[1]
    per_row = []
    for entrant in entrants:
        # Without the barrier XLA would compute the values before the search and store
        # them. It must hold the thresholds too, which differ in every pass.
        *arrays, zero, tried = lax.optimization_barrier(
            (*entrant.arrays, jnp.int32(0), thresholds)
        )
        values = values_of(entrant, arrays, zero)
        reaches = [
            (values >= _by_row(tried[:, j], entrant)).astype(jnp.int32)
            for j in range(num_thresholds)
        ]
        # One reduction for all thresholds: the keys are read once, and XLA makes a
        # plain loop of it, where it would store the operand of a single large sum.
        counts = lax.reduce(
            reaches,
            [np.int32(0)] * num_thresholds,
            lambda left, right: [x + y for x, y in zip(left, right, strict=True)],
            tuple(range(entrant.contests.ndim, values.ndim)),
        )
        rows = replicate(jnp.stack(counts, axis=-1))
        per_row.append(rows.reshape(-1, num_thresholds))
    contests = np.concatenate([entrant.contests.ravel() for entrant in entrants])
    return jnp.zeros_like(thresholds).at[contests].add(jnp.concatenate(per_row))


def _by_row(per_contest: jax.Array, entrant: Entrant) -> jax.Array:
    """A value per contest as one per row, shaped to broadcast against the keys."""
    num_cell_axes = len(entrant.shape) - entrant.contests.ndim
    return jnp.expand_dims(
        per_contest[entrant.contests], tuple(range(-num_cell_axes, 0))
    )


def _rank_by_position(entrant: Entrant, zero: jax.Array) -> jax.Array:
    """int32 of the keys' shape, the higher the earlier: -1 for a contest's first."""
    num_rows = entrant.contests.ndim
    rank = zero - np.int32(entrant.first_position + 1)
    stride = 1
    for axis in reversed(range(num_rows, len(entrant.shape))):
        along = lax.broadcasted_iota(jnp.int32, entrant.shape, axis)
        rank = rank - along * np.int32(stride)
        stride *= entrant.shape[axis]
    return jnp.broadcast_to(rank, entrant.shape)
