"""The cells of a parameter: what they are ranked by, and masks made of them."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.bits import LOWEST, magnitude_bits, ordered_bits
from agp_jax.boxes import any_in_boxes, fill_boxes, sum_boxes
from agp_jax.rules import Rule
from agp_jax.schedules import Schedule
from agp_jax.selection import Entrant
from agp_jax.structures import Structure, box_shape, grid_shape


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
        """The shape of the stacked axes, of which each entry is ranked by itself."""
        return self.rule.divide(self.weights.shape)[0]

    @property
    def cell_shape(self) -> tuple[int, ...]:
        """The shape of one separately ranked tensor."""
        return self.rule.divide(self.weights.shape)[1]

    @property
    def box(self) -> tuple[int, ...]:
        return box_shape(self.structure, self.cell_shape)

    @property
    def grid(self) -> tuple[int, ...]:
        return grid_shape(self.box, self.cell_shape)


def stack_first(leaf: Leaf) -> Leaf:
    """The leaf with its stacked axes in front, as its cells are ranked."""
    rows, tensor = leaf.rule.axes_of(leaf.weights.shape)
    if rows == tuple(range(len(rows))):
        return leaf
    move = lambda x: None if x is None else jnp.transpose(x, rows + tensor)  # noqa: E731
    return Leaf(
        leaf.path,
        dataclasses.replace(leaf.rule, stacked_axes=len(rows)),
        jnp.transpose(leaf.weights, rows + tensor),
        *map(move, (leaf.mask, leaf.gradient, leaf.score)),
    )


def stack_back(leaf: Leaf, mask: jax.Array) -> jax.Array:
    """A mask of `stack_first(leaf)` as one of `leaf`."""
    rows, tensor = leaf.rule.axes_of(leaf.weights.shape)
    return jnp.transpose(mask, np.argsort(rows + tensor).tolist())


def enter(leaf: Leaf) -> Entrant:
    """The cells of `leaf` as they enter a contest, or one for each row."""
    leaf = stack_first(leaf)
    if math.prod(leaf.box) == 1:
        # A weight is a cell: nothing is stored, each pass scores the weights anew. It
        # scores the arrays that it is given, not the leaf's own, which a compiler
        # would score before the first pass and store.
        def keys(
            weights: jax.Array,
            mask: jax.Array | None,
            gradient: jax.Array | None,
            score: jax.Array | None,
        ) -> jax.Array:
            return weight_keys(
                Leaf(leaf.path, leaf.rule, weights, mask, gradient, score)
            )

        arrays = (leaf.weights, leaf.mask, leaf.gradient, leaf.score)
    else:
        keys = cell_keys
        scores, alive = weight_scores(leaf), None
        if leaf.mask is not None:
            scores = jnp.where(leaf.mask, scores, 0.0)
            alive = any_in_boxes(leaf.mask, leaf.box)
        arrays = (sum_boxes(scores, leaf.box), alive)
    return Entrant(
        arrays,
        keys,
        shape=(*leaf.row_shape, *leaf.grid),
        num_row_axes=len(leaf.row_shape),
        idle_bits=_idle_bits(leaf),
    )


def mask_of_cells(leaf: Leaf, kept: jax.Array) -> jax.Array:
    """The mask of `leaf` that keeps the cells `kept`, of those it has not lost yet."""
    front = stack_first(leaf)
    mask = keep_sharding(fill_boxes(kept, leaf.box), front.weights, front.mask)
    return stack_back(leaf, mask)


def keep_sharding(
    kept: jax.Array, weights: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """What `kept` and `mask` both keep, in the shape and sharding of the weights."""
    kept = jnp.broadcast_to(kept, weights.shape)
    # A NaN is kept, as all of its tensor is. Saying so gives the mask the sharding.
    return kept | (weights != weights) if mask is None else kept & mask


def weight_keys(leaf: Leaf) -> jax.Array:
    """The key of each weight; that of infinity where it or its score is not finite."""
    if leaf.ranks_magnitudes:
        keys = magnitude_bits(leaf.weights)
    else:
        keys = ordered_bits(weight_scores(leaf))
    return _removed_lowest(keys, leaf.mask)


def cell_keys(scores: jax.Array, alive: jax.Array | None = None) -> jax.Array:
    return _removed_lowest(ordered_bits(scores), alive)


def _removed_lowest(keys: jax.Array, alive: jax.Array | None) -> jax.Array:
    return keys if alive is None else jnp.where(alive, keys, LOWEST)


def weight_scores(leaf: Leaf) -> jax.Array:
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
    check_scores(leaf.path, scores, weights.shape)
    scores = scores.astype(jnp.float32)
    if not leaf.ranks_magnitudes:
        scores = jnp.where(jnp.isfinite(weights), scores, jnp.inf)
    return scores


def check_scores(path: str, scores: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError if scores have not the shape of their parameter."""
    found = None if scores is None else np.shape(scores)
    if found != shape:
        raise ValueError(f"scores for {path} must have its shape {shape}, got {found}")
    dtype = jnp.result_type(scores)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(f"scores for {path} must be real numbers, got {dtype}")


def _idle_bits(leaf: Leaf) -> int:
    """How many low bits of all keys are zero: float32 digits the weights don't have."""
    if leaf.ranks_magnitudes and math.prod(leaf.box) == 1:
        return max(
            jnp.finfo(jnp.float32).nmant - jnp.finfo(leaf.weights.dtype).nmant, 0
        )
    return 0


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
