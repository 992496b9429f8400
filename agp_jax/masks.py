"""Masks: which weights a set of rules keeps at a step, as a tree like the parameters.

A mask is a bool array shaped like its parameter, True where the weight is kept.
`optax.MaskedNode()`, a tree without leaves, stands where a parameter is not pruned.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agp_jax.rules import Rule, match_rules
from agp_jax.schedules import Schedule
from agp_jax.selection import LOWEST, Entrant, keep_largest, ordered_bits
from agp_jax.shardings import replicate, split_axis
from agp_jax.structures import (
    Structure,
    any_in_boxes,
    box_shape,
    fill_boxes,
    grid_shape,
    sum_boxes,
)
from agp_jax.trees import PyTree, flatten_with_paths, leaves_of


def make_masks(
    params: PyTree,
    rules: Sequence[Rule],
    step: int | jax.Array,
    masks: PyTree | None = None,
    *,
    gradients: PyTree | None = None,
    scores: PyTree | None = None,
) -> PyTree:
    """The masks that `rules` ask for at `step`.

    A tensor of n cells loses exactly floor(s * n) at sparsity s, and at least one cell
    stays. The lowest scores go, and of equal scores those that come last in memory
    (row-major). With `scope="rule"` n counts the cells of all the rule's tensors, and
    ties go by the order of the leaves first.

    Cells that `masks` has removed stay removed and count as removed. A tensor that
    holds a NaN or an infinity among its kept weights or their scores, and with
    `scope="rule"` all tensors ranked with it, loses nothing: its mask stays as it is.

    Args:
      params: the parameters, a tree of arrays.
      rules: see `Rule`; they are matched to the paths of `params`.
      step: how many updates are complete, an int or a traced int32 scalar.
      masks: the masks so far; None where nothing was removed yet.
      gradients: a tree like `params`, for rules whose score takes gradients.
      scores: a tree like `params` whose arrays replace the rules' own scores, each of
        its parameter's shape; None or `optax.MaskedNode()` where the rule's score
        should be used.

    Returns:
      A tree like `params` of bool arrays and `optax.MaskedNode()`.

    Raises:
      ValueError: as `match_rules` does; if gradients are needed and missing; if a score
        or mask has not its parameter's shape.
    """
    matched = match_rules(rules, params)
    return remake_masks(params, matched, step, masks, gradients, scores)


def remake_masks(
    params: PyTree,
    matched: PyTree,
    step: int | jax.Array,
    masks: PyTree | None,
    gradients: PyTree | None,
    scores: PyTree | None,
) -> PyTree:
    """`make_masks` with the rules that `match_rules` has matched to `params`."""
    if not isinstance(step, jax.Array):
        step = operator.index(step)
    paths, weights, treedef = flatten_with_paths(params)
    columns = [
        treedef.flatten_up_to(matched),
        leaves_of(masks, paths, "the masks"),
        leaves_of(gradients, paths, "the gradients"),
        leaves_of(scores, paths, "the scores"),
    ]
    results: list[Any] = [optax.MaskedNode()] * len(paths)
    contesting: dict[int, _Leaf] = {}
    for i, (rule, *inputs) in enumerate(zip(*columns, strict=True)):
        if rule is None:
            if inputs[0] is not None:  # of an earlier rule
                results[i] = inputs[0]
            continue
        leaf = _Leaf(paths[i], rule, jnp.asarray(weights[i]), *inputs)
        if leaf.mask is not None and leaf.mask.shape != leaf.weights.shape:
            raise ValueError(
                f"the mask of {leaf.path} must have its shape {leaf.weights.shape}, "
                f"got {leaf.mask.shape}"
            )
        if not _may_lose(leaf, step):
            results[i] = _unchanged(leaf)
        elif leaf.structure.keep_n_of_m:
            results[i] = _keep_n_of_m(leaf, step)
        else:
            contesting[i] = leaf
    if contesting:
        new_masks = _hold_contests(list(contesting.values()), step)
        for i, mask in zip(contesting, new_masks, strict=True):
            results[i] = mask
    return treedef.unflatten(results)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """`params` with exact zeros where a mask is False, NaN and infinity included."""
    return map_masked(
        lambda mask, x: jnp.where(mask, x, jnp.zeros((), jnp.result_type(x))),
        masks,
        params,
    )


def map_masked(
    function: Callable[..., Any], masks: PyTree, tree: PyTree, *rest: PyTree
) -> PyTree:
    """Applies `function(mask, leaf, *rest)` where there is a mask.

    Elsewhere the leaves of `tree` stay as they are.
    """
    leaves, treedef = jax.tree.flatten(tree)
    others = [treedef.flatten_up_to(other) for other in rest]
    return treedef.unflatten(
        x if mask is None else function(mask, x, *more)
        for mask, x, *more in zip(
            masks_of_leaves(masks, tree), leaves, *others, strict=True
        )
    )


def masks_of_leaves(masks: PyTree, tree: PyTree) -> list[jax.Array | None]:
    """The mask of each leaf of `tree`, matched by path; None where there is none."""
    paths, _, _ = flatten_with_paths(tree)
    return leaves_of(masks, paths, "the masks")


def sparsity(masks: PyTree) -> dict[str, float]:
    """The fraction of weights that each mask removes, by path, and their "total".

    The total is over the masked tensors alone: a dense tensor has no mask to count.
    """
    paths, leaves, _ = flatten_with_paths(masks)
    for path, mask in zip(paths, leaves, strict=True):
        if mask.dtype != bool:
            raise ValueError(
                f"expected bool masks, got {mask.dtype} at {path}: pass "
                f"get_masks(opt_state)"
            )
    # Counted along one axis on the devices and then here: a sum may exceed an int32.
    counts = [jnp.sum(jnp.atleast_1d(mask), axis=-1) for mask in leaves]
    kept = [int(np.sum(x, dtype=np.int64)) for x in jax.device_get(counts)]
    sizes = [mask.size for mask in leaves]
    result = {
        path: 1.0 - count / size if size else 0.0
        for path, count, size in zip(paths, kept, sizes, strict=True)
    }
    result["total"] = 1.0 - sum(kept) / sum(sizes) if sum(sizes) else 0.0
    return result


class _Leaf(NamedTuple):
    """A parameter that a rule prunes, with what is known about it."""

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


def _unchanged(leaf: _Leaf) -> jax.Array:
    if leaf.mask is None:
        return jnp.ones_like(leaf.weights, dtype=bool)
    return leaf.mask


def _may_lose(leaf: _Leaf, step: int | jax.Array) -> bool:
    """Whether `leaf` may have to lose cells by `step`; True where step is traced."""
    if leaf.weights.size == 0:
        return False
    return not isinstance(step, int) or leaf.schedule.sparsity_at(step) > 0


def _scores(leaf: _Leaf) -> jax.Array:
    """float32 scores of the weights' shape, zero where the weight is removed."""
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
    return scores if leaf.mask is None else jnp.where(leaf.mask, scores, 0.0)


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


def _is_sound(leaf: _Leaf) -> jax.Array:
    """Whether a row's kept weights and their scores are all finite: (*rows,) bools."""
    sound = jnp.isfinite(_scores(leaf))
    finite = jnp.isfinite(leaf.weights)
    if leaf.mask is not None:
        finite = finite | ~leaf.mask
    cell_axes = range(leaf.rule.stacked_axes, leaf.weights.ndim)
    return jnp.all(sound & finite, axis=tuple(cell_axes))


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


def _hold_contests(leaves: Sequence[_Leaf], step: int | jax.Array) -> list[jax.Array]:
    """The masks of `leaves` at `step`, all cells of a contest ranked together."""
    contests = _number_contests(leaves)
    sound = jnp.ones(len(contests.sizes), bool)
    for leaf, numbers in zip(leaves, contests.numbers, strict=True):
        is_sound = replicate(_is_sound(leaf))
        if numbers.ndim == 0:
            is_sound = jnp.all(is_sound)
        sound = sound.at[numbers].min(is_sound)
    num_removed = jnp.zeros(len(contests.sizes), jnp.int32)
    for schedule in set(contests.schedules):
        own = np.array([s == schedule for s in contests.schedules])
        counts = _num_removed(schedule, contests.sizes[own], step)
        num_removed = num_removed.at[np.flatnonzero(own)].set(counts)
    num_kept = jnp.asarray(contests.sizes, jnp.int32) - sound * num_removed
    entrants = [
        Entrant(
            *_keys(leaf),
            shape=(*leaf.row_shape, *leaf.grid),
            contests=numbers,
            first_position=first,
        )
        for leaf, numbers, first in zip(
            leaves, contests.numbers, contests.first_positions, strict=True
        )
    ]
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


class _Contests(NamedTuple):
    numbers: list[np.ndarray]  # per leaf: its contest, or one per row
    first_positions: list[int]  # per leaf: where it begins within its contest
    sizes: np.ndarray  # int64, per contest: how many cells compete
    schedules: list[Schedule]  # per contest


def _number_contests(leaves: Sequence[_Leaf]) -> _Contests:
    numbers, first_positions, sizes, schedules = [], [], [], []
    contest_of_rule: dict[Rule, int] = {}
    for leaf in leaves:
        num_rows = math.prod(leaf.row_shape)
        num_cells = math.prod(leaf.grid)
        if leaf.rule.scope == "rule":
            contest = contest_of_rule.setdefault(leaf.rule, len(sizes))
            if contest == len(sizes):
                sizes.append(0)
                schedules.append(leaf.schedule)
            numbers.append(np.int32(contest))
            first_positions.append(sizes[contest])
            sizes[contest] += num_rows * num_cells
        else:
            rows = np.arange(len(sizes), len(sizes) + num_rows, dtype=np.int32)
            numbers.append(rows.reshape(leaf.row_shape))
            first_positions.append(0)
            sizes += [num_cells] * num_rows
            schedules += [leaf.schedule] * num_rows
    return _Contests(numbers, first_positions, np.array(sizes, np.int64), schedules)


def _keys(
    leaf: _Leaf,
) -> tuple[tuple[jax.Array, ...], Callable[..., jax.Array]]:
    """Arrays, and the function of them that ranks the cells of `leaf`."""
    if math.prod(leaf.box) == 1:
        # A weight is a cell: nothing is stored, each pass scores the weights anew.
        arrays = {k: x for k, x in leaf._asdict().items() if isinstance(x, jax.Array)}

        def weight_keys(*values: jax.Array) -> jax.Array:
            fresh: Any = zip(arrays, values, strict=True)
            again = leaf._replace(**dict(fresh))
            return _rank_removed_lowest(_scores(again), again.mask)

        return tuple(arrays.values()), weight_keys
    scores = sum_boxes(_scores(leaf), leaf.box)
    if leaf.mask is None:
        return (scores,), ordered_bits
    return (scores, any_in_boxes(leaf.mask, leaf.box)), _rank_removed_lowest


def _rank_removed_lowest(scores: jax.Array, alive: jax.Array | None) -> jax.Array:
    """Keys of the scores; what is not alive ranks below all that is."""
    keys = ordered_bits(scores)
    return keys if alive is None else jnp.where(alive, keys, LOWEST)


def _keep_n_of_m(leaf: _Leaf, step: int | jax.Array) -> jax.Array:
    """The mask of a leaf whose weights compete in groups of m along an axis."""
    assert leaf.structure.keep_n_of_m is not None
    _, m, axis = leaf.structure.keep_n_of_m  # the schedule ends at n, says `Rule`
    axis = leaf.rule.stacked_axes + axis % len(leaf.cell_shape)
    sound = _is_sound(leaf)
    removed = sound * _num_removed_of_m(leaf.schedule, m, step)
    num_kept = jnp.expand_dims(m - removed, tuple(range(sound.ndim, leaf.weights.ndim)))
    keys = _rank_removed_lowest(_scores(leaf), leaf.mask)
    keys = split_axis(keys, axis, m)
    place = jax.lax.broadcasted_iota(jnp.int32, keys.shape, axis + 1)
    rank = jnp.zeros_like(keys)  # how many of its group come before each weight
    for j in range(m):
        rival = jax.lax.slice_in_dim(keys, j, j + 1, axis=axis + 1)
        before = (rival > keys) | ((rival == keys) & (j < place))
        rank = rank + before.astype(jnp.int32)
    kept = rank.reshape(leaf.weights.shape) < num_kept
    return kept if leaf.mask is None else kept & leaf.mask
