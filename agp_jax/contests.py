"""Which cells compete with each other, by what scores, and how many must go.

A contest is a set of cells that are ranked together: those of a tensor, of one slice of
a tensor with stacked axes, or of all tensors of a rule.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.keys import INFINITY, LOWEST, magnitude_bits, ordered_bits
from agp_jax.rules import Rule
from agp_jax.schedules import Schedule
from agp_jax.selection import Entrant, keep_largest
from agp_jax.shardings import neighbours
from agp_jax.structures import (
    Structure,
    any_in_boxes,
    box_shape,
    fill_boxes,
    grid_shape,
    sum_boxes,
)


class Leaf(NamedTuple):
    """A parameter that a rule prunes, with what its cells are ranked by."""

    path: str
    rule: Rule
    weights: jax.Array
    mask: jax.Array | None
    gradient: jax.Array | None
    score: jax.Array | None

    @property
    def structure(self) -> Structure:
        assert self.rule.structure is not None  # or it would not be pruned
        return self.rule.structure

    @property
    def schedule(self) -> Schedule:
        assert self.rule.schedule is not None
        return self.rule.schedule

    @property
    def ranks_magnitudes(self) -> bool:
        """Whether the scores are the absolute values of the weights."""
        return self.rule.score is jnp.abs and self.score is None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of the leading axes, of which each entry is ranked by itself."""
        return self.weights.shape[: self.rule.stacked_axes]

    @property
    def cell_shape(self) -> tuple[int, ...]:
        """The shape of one separately ranked tensor."""
        return self.weights.shape[self.rule.stacked_axes :]

    @property
    def box(self) -> tuple[int, ...]:
        return box_shape(self.structure, self.cell_shape)

    @property
    def grid(self) -> tuple[int, ...]:
        return grid_shape(self.box, self.cell_shape)


def hold_contests(leaves: Sequence[Leaf], step: int | jax.Array) -> list[jax.Array]:
    """The masks of `leaves` at `step`, all cells of a contest ranked together.

    Where a kept weight or its score is not finite, all of its contest is kept.
    """
    contests = _number_contests(leaves)
    num_removed = jnp.zeros(len(contests.sizes), jnp.int32)
    for schedule in set(contests.schedules):
        own = np.array([s == schedule for s in contests.schedules])
        counts = _num_removed(schedule, contests.sizes[own], step)
        num_removed = num_removed.at[np.flatnonzero(own)].set(counts)
    entrants = [
        _entrant(leaf, contest, position)
        for leaf, contest, position in zip(
            leaves, contests.first, contests.first_positions, strict=True
        )
    ]
    num_kept = jnp.asarray(contests.sizes, jnp.int32) - num_removed
    kept = keep_largest(entrants, num_kept, contests.sizes)
    masks = []
    for leaf, cells in zip(leaves, kept, strict=True):
        mask = jnp.broadcast_to(fill_boxes(cells, leaf.box), leaf.weights.shape)
        if leaf.mask is not None:
            masks.append(mask & leaf.mask)
        else:
            # A NaN is kept, as all of its tensor is. Saying so here gives the mask the
            # sharding of the weights.
            masks.append(mask | jnp.isnan(leaf.weights))
    return masks


def keep_n_of_m(leaf: Leaf, step: int | jax.Array) -> jax.Array:
    """The mask of a leaf whose weights compete in groups of m along an axis."""
    assert leaf.structure.keep_n_of_m is not None
    _, m, axis = leaf.structure.keep_n_of_m  # the schedule ends at n, says `Rule`
    axis = leaf.rule.stacked_axes + axis % len(leaf.cell_shape)
    keys = _weight_keys(leaf)
    cell_axes = tuple(range(leaf.rule.stacked_axes, keys.ndim))
    sound = jnp.all(keys < INFINITY, axis=cell_axes, keepdims=True)
    num_kept = m - sound * _num_removed_of_m(leaf.schedule, m, step)
    rivals = neighbours(keys, axis, m)
    kept = []
    for i, own in enumerate(rivals):
        # How many of its group come before a weight: equal keys go by place.
        before = [x >= own if j < i else x > own for j, x in enumerate(rivals)]
        rank = sum(x.astype(jnp.int32) for x in before)
        kept.append(rank < num_kept)
    kept = jnp.stack(kept, axis=axis + 1).reshape(leaf.weights.shape)
    return kept if leaf.mask is None else kept & leaf.mask


class _Contests(NamedTuple):
    first: list[int]  # per leaf: its contest, or that of its first row
    first_positions: list[int]  # per leaf: where it begins within its contest
    sizes: np.ndarray  # int64, per contest: how many cells compete
    schedules: list[Schedule]  # per contest


def _number_contests(leaves: Sequence[Leaf]) -> _Contests:
    first, first_positions, sizes, schedules = [], [], [], []
    contest_of_rule: dict[Rule, int] = {}
    for leaf in leaves:
        num_rows = math.prod(leaf.row_shape)
        num_cells = math.prod(leaf.grid)
        if leaf.rule.scope == "rule":
            contest = contest_of_rule.setdefault(leaf.rule, len(sizes))
            if contest == len(sizes):
                sizes.append(0)
                schedules.append(leaf.schedule)
            first.append(contest)
            first_positions.append(sizes[contest])
            sizes[contest] += num_rows * num_cells
        else:
            first.append(len(sizes))
            first_positions.append(0)
            sizes += [num_cells] * num_rows
            schedules += [leaf.schedule] * num_rows
    return _Contests(first, first_positions, np.array(sizes, np.int64), schedules)


def _num_removed(
    schedule: Schedule, sizes: np.ndarray, step: int | jax.Array
) -> jax.Array:
    """int32: how many of `sizes` cells are to be gone at `step`.

    The counts are floor(s * n) in float64, which no device needs to have: the levels
    are known beforehand, so there is one row of integers for each.
    """
    sizes, column = np.unique(sizes, return_inverse=True)  # many slices, few sizes
    exact = schedule.levels()[:, None] * sizes[None]
    counts = np.minimum(np.floor(exact), sizes - 1)
    table = jnp.asarray(counts.astype(np.int32))
    return table[schedule.num_events_until(step)][column]


def _num_removed_of_m(schedule: Schedule, m: int, step: int | jax.Array) -> jax.Array:
    """int32 scalar: how many of each m are to be gone at `step`.

    1 - n / m times m may be a rounding error below m - n, which must not cost one.
    """
    counts = np.floor(np.round(schedule.levels() * m, 9)).astype(np.int32)
    return jnp.asarray(counts)[schedule.num_events_until(step)]


def _entrant(leaf: Leaf, contest: int, first_position: int) -> Entrant:
    """How the cells of `leaf` enter their contests."""
    if math.prod(leaf.box) == 1:
        # A weight is a cell: nothing is stored, each pass scores the weights anew.
        arrays = {k: x for k, x in leaf._asdict().items() if isinstance(x, jax.Array)}

        def keys(*values: jax.Array) -> jax.Array:
            again: Any = zip(arrays, values, strict=True)
            return _weight_keys(leaf._replace(**dict(again)))

        inputs = tuple(arrays.values())
    else:
        scores = _scores(leaf)
        if leaf.mask is None:
            inputs = (sum_boxes(scores, leaf.box),)
        else:
            scores = jnp.where(leaf.mask, scores, 0.0)
            inputs = (
                sum_boxes(scores, leaf.box),
                any_in_boxes(leaf.mask, leaf.box),
            )
        keys = _cell_keys
    return Entrant(
        inputs,
        keys,
        shape=(*leaf.row_shape, *leaf.grid),
        contest=contest,
        num_row_axes=0 if leaf.rule.scope == "rule" else leaf.rule.stacked_axes,
        first_position=first_position,
        idle_bits=_idle_bits(leaf),
    )


def _idle_bits(leaf: Leaf) -> int:
    """How many low bits of all keys are zero: float32 digits the weights don't have."""
    if leaf.ranks_magnitudes and math.prod(leaf.box) == 1:
        return max(
            jnp.finfo(jnp.float32).nmant - jnp.finfo(leaf.weights.dtype).nmant, 0
        )
    return 0


def _weight_keys(leaf: Leaf) -> jax.Array:
    """The key of each weight; that of infinity where it or its score is not finite."""
    if leaf.ranks_magnitudes:
        keys = magnitude_bits(leaf.weights)
    else:
        keys = ordered_bits(_scores(leaf))
    return _removed_lowest(keys, leaf.mask)


def _cell_keys(scores: jax.Array, alive: jax.Array | None = None) -> jax.Array:
    return _removed_lowest(ordered_bits(scores), alive)


def _removed_lowest(keys: jax.Array, alive: jax.Array | None) -> jax.Array:
    return keys if alive is None else jnp.where(alive, keys, LOWEST)


def _scores(leaf: Leaf) -> jax.Array:
    """float32 scores of the weights' shape, not finite where a weight or its score is
    not."""
    weights = _as_float32(leaf.weights)
    if leaf.score is not None:
        scores = jnp.asarray(leaf.score)
    elif leaf.rule.scores_gradients:
        if leaf.gradient is None:
            raise ValueError(
                f"{leaf.rule} ranks {leaf.path} by gradients, which there are none of "
                f"here: let its schedule begin at step 1 or later, or with no initial "
                f"sparsity"
            )
        scores = leaf.rule.score(weights, _as_float32(leaf.gradient))
    else:
        scores = leaf.rule.score(weights)
    if scores.shape != weights.shape:
        raise ValueError(
            f"scores for {leaf.path} must have its shape {weights.shape}, got "
            f"{scores.shape}"
        )
    scores = scores.astype(jnp.float32)
    if not leaf.ranks_magnitudes:
        scores = jnp.where(jnp.isfinite(weights), scores, jnp.inf)
    return scores


def _as_float32(values: jax.Array) -> jax.Array:
    """`values` in float32, with no more digits than their own dtype has.

    XLA keeps the digits of a sum that bfloat16 would drop, if it can; ranking must not
    depend on that.
    """
    kind = jnp.finfo(values.dtype)
    wide = values.astype(jnp.float32)
    return (
        jax.lax.reduce_precision(wide, kind.nexp, kind.nmant)
        if kind.bits < 32
        else wide
    )
