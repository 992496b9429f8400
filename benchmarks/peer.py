"""What JaxPruner 0.1 computes, written anew, to be measured beside agp_jax.

A mask comes from a sort: `argsort` of the flattened negated magnitudes, and ones
scattered to the positions of the first `round((1 - sparsity) * size)`. Two details are
not the peer's: scores of cells are plain sums, where it pools over blocks of matrices,
and a step is one function, where it has a second call for the caller to make.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Arrays = dict[str, jax.Array]


class State(NamedTuple):
    step: jax.Array
    masks: Arrays
    inner_state: Any


def make_masks(
    weights: Arrays,
    sparsity: jax.Array | float,
    box: tuple[int, ...] | None = None,
    *,
    together: bool = False,
) -> Arrays:
    """uint8 masks that keep the largest cells, shaped by `box`, or single weights.

    Each tensor is ranked by itself, or all of them `together`.
    """
    scores = {path: _sum_cells(jnp.abs(x), box) for path, x in weights.items()}
    flat = {path: x.ravel() for path, x in scores.items()}
    if together:
        kept = _keep_largest(jnp.concatenate(list(flat.values())), sparsity)
        ends = list(itertools.accumulate(x.size for x in flat.values()))
        flat = dict(zip(flat, jnp.split(kept, ends[:-1]), strict=True))
    else:
        flat = {path: _keep_largest(x, sparsity) for path, x in flat.items()}
    return {
        path: _fill_cells(flat[path].reshape(scores[path].shape), x.shape)
        for path, x in weights.items()
    }


def init(inner: optax.GradientTransformation, params: Arrays, masks: Arrays) -> State:
    return State(jnp.zeros((), jnp.int32), masks, inner.init(params))


def make_step(
    inner: optax.GradientTransformation, event: int, sparsity: float
) -> Callable[[Arrays, State, Arrays], tuple[Arrays, State]]:
    """A step of params, state and gradients that makes new masks at step `event`."""

    def step(params: Arrays, state: State, gradients: Arrays) -> tuple[Arrays, State]:
        count = state.step + 1
        masks = jax.lax.cond(
            count == event,
            lambda: make_masks({k: params[k] for k in state.masks}, sparsity),
            lambda: state.masks,
        )
        updates, inner_state = inner.update(gradients, state.inner_state, params)
        new: Any = optax.apply_updates(params, updates)
        new |= {path: new[path] * mask for path, mask in masks.items()}
        return new, State(count, masks, inner_state)

    return step


def _keep_largest(scores: jax.Array, sparsity: jax.Array | float) -> jax.Array:
    num_kept = jnp.round((1 - sparsity) * scores.size).astype(jnp.int32)
    order = jnp.argsort(-scores)
    is_kept = (jnp.arange(scores.size) < num_kept).astype(jnp.uint8)
    return jnp.zeros(scores.size, jnp.uint8).at[order].set(is_kept)


def _sum_cells(values: jax.Array, box: tuple[int, ...] | None) -> jax.Array:
    if box is None:
        return values
    pairs = zip(values.shape, box, strict=True)
    split = values.reshape([n for size, part in pairs for n in (size // part, part)])
    return jnp.sum(split, axis=tuple(range(1, split.ndim, 2)))


def _fill_cells(cells: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    for axis, size in enumerate(shape):
        cells = jnp.repeat(cells, size // cells.shape[axis], axis)
    return cells
