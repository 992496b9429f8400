"""Which cells compete with each other, and how many of them must go.

A contest is a set of cells that are ranked together: those of a tensor, of one slice of
a tensor with stacked axes, or of all tensors of a rule.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.bits import INFINITY
from agp_jax.cells import Leaf, stack_back, stack_first, weight_keys
from agp_jax.rules import Rule
from agp_jax.schedules import Schedule, in_parts
from agp_jax.selection import Entrant, keep_largest
from agp_jax.shardings import neighbours
from agp_jax.structures import axis_of_groups


def hold_contests(
    entrants: Sequence[Entrant], rules: Sequence[Rule], step: int | jax.Array
) -> list[jax.Array]:
    """Which cells of each entrant its rule keeps at `step`: bools of its shape.

    Where a kept weight or its score is not finite, all of its contest is kept.
    """
    if not entrants:
        return []
    contests = _number_contests(entrants, rules)
    num_removed = jnp.zeros(len(contests.sizes), jnp.int32)
    for schedule in set(contests.schedules):
        own = np.array([s == schedule for s in contests.schedules])
        counts = _num_removed(schedule, contests.sizes[own], step)
        num_removed = num_removed.at[np.flatnonzero(own)].set(counts)
    num_kept = jnp.asarray(contests.sizes, jnp.int32) - num_removed
    return keep_largest(contests.entrants, num_kept, contests.sizes)


def keep_n_of_m(leaf: Leaf, step: int | jax.Array) -> jax.Array:
    """The mask of a leaf whose weights compete in groups of m along an axis."""
    assert leaf.structure.keep_n_of_m is not None
    _, m, _ = leaf.structure.keep_n_of_m  # the schedule ends at n, says `Rule`
    whole, leaf = leaf, stack_first(leaf)
    num_rows = len(leaf.row_shape)
    axis = num_rows + axis_of_groups(leaf.structure, leaf.cell_shape)
    rivals = _rival_keys(leaf, axis, m)
    finite = functools.reduce(jnp.logical_and, [keys < INFINITY for keys in rivals])
    cell_axes = tuple(range(num_rows, finite.ndim))
    sound = jnp.all(finite, axis=cell_axes, keepdims=True)
    num_kept = m - jnp.where(sound, _num_removed_of_m(leaf.schedule, m, step), 0)
    kept = []
    for i, own in enumerate(rivals):
        # How many of its group come before a weight: equal keys go by place.
        before = [x >= own if j < i else x > own for j, x in enumerate(rivals)]
        rank = sum(x.astype(jnp.int32) for x in before)
        kept.append(rank < num_kept)
    kept = jnp.stack(kept, axis=axis + 1).reshape(leaf.weights.shape)
    return stack_back(whole, kept if leaf.mask is None else kept & leaf.mask)


def _rival_keys(leaf: Leaf, axis: int, m: int) -> list[jax.Array]:
    """The keys of every m neighbours along `axis`, taken apart."""
    if not leaf.ranks_magnitudes:
        return neighbours(weight_keys(leaf), axis, m)
    # Taken apart first, or XLA would store all keys.
    weights = neighbours(leaf.weights, axis, m)
    masks = [None] * m if leaf.mask is None else neighbours(leaf.mask, axis, m)
    return [
        weight_keys(leaf._replace(weights=x, mask=mask))
        for x, mask in zip(weights, masks, strict=True)
    ]


class _Contests(NamedTuple):
    entrants: list[Entrant]  # each with its contest and its place in it
    sizes: np.ndarray  # int64, per contest: how many cells compete
    schedules: list[Schedule]  # per contest


def _number_contests(entrants: Sequence[Entrant], rules: Sequence[Rule]) -> _Contests:
    placed, sizes, schedules = [], [], []
    contest_of_rule: dict[Rule, int] = {}
    for entrant, rule in zip(entrants, rules, strict=True):
        assert rule.schedule is not None  # or it would not prune
        if rule.ranks_together:
            contest = contest_of_rule.setdefault(rule, len(sizes))
            if contest == len(sizes):
                sizes.append(0)
                schedules.append(rule.schedule)
            entrant = entrant._replace(num_row_axes=0, first_position=sizes[contest])
            sizes[contest] += math.prod(entrant.shape)
        else:
            contest = len(sizes)
            num_rows = math.prod(entrant.shape[: entrant.num_row_axes])
            sizes += [math.prod(entrant.shape[entrant.num_row_axes :])] * num_rows
            schedules += [rule.schedule] * num_rows
        placed.append(entrant._replace(contest=contest))
    return _Contests(placed, np.array(sizes, np.int64), schedules)


def count_removed(rule: Rule, num_cells: int, step: int) -> int:
    """How many of `num_cells` cells that compete by a rule are gone at `step`."""
    assert rule.schedule is not None and rule.structure is not None  # it prunes
    schedule, passed = rule.schedule, rule.schedule.num_events_until(step)
    if rule.structure.keep_n_of_m is None:
        (count,) = _exact_floors(schedule, np.array([num_cells]))[passed].tolist()
        return min(count, max(num_cells - 1, 0))
    _, m, _ = rule.structure.keep_n_of_m
    lost = _exact_floors(_in_parts(schedule, m), np.array([m]))[passed].item()
    return num_cells // m * lost


def _num_removed(
    schedule: Schedule, sizes: np.ndarray, step: int | jax.Array
) -> jax.Array:
    """int32: how many of `sizes` cells are to be gone at `step`.

    The counts are floor(s * n) of the exact level, but one less than all. The levels
    are known beforehand, so there is one row of integers for each.
    """
    sizes, column = np.unique(sizes, return_inverse=True)  # many slices, few sizes
    counts = np.minimum(_exact_floors(schedule, sizes), sizes - 1)
    table = jnp.asarray(counts.astype(np.int32))
    return table[schedule.num_events_until(step)][column]


def _exact_floors(schedule: Schedule, sizes: np.ndarray) -> np.ndarray:
    """int64 (levels, sizes): floor(s * n), exact for n below 2**31.

    In float64 such a product is off by less than 1e-6, so its floor is wrong only
    where it lies that close to a whole number. There integers decide.
    """
    products = schedule.levels()[:, None] * sizes[None]
    floors = np.floor(products).astype(np.int64)
    close = np.abs(products - np.rint(products)) < 1e-6
    for i in np.flatnonzero(close.any(axis=1)):
        above, below = schedule.exact_level(int(i)).as_integer_ratio()
        counts = [above * n // below for n in sizes[close[i]].tolist()]
        floors[i, close[i]] = counts
    return floors


def _num_removed_of_m(schedule: Schedule, m: int, step: int | jax.Array) -> jax.Array:
    """int32 scalar: how many of each m are to be gone at `step`."""
    return _num_removed(_in_parts(schedule, m), np.array([m]), step)[0]


def _in_parts(schedule: Schedule, m: int) -> Schedule:
    """The ends of a schedule that are meant as k / m may be no decimals, as 2 / 3."""
    return dataclasses.replace(
        schedule,
        initial_sparsity=in_parts(schedule.initial_sparsity, m),
        final_sparsity=in_parts(schedule.final_sparsity, m),
    )
