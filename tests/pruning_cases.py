"""Rules, numbers, NumPy's choice of masks and training steps for tests of `prune`."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import agp_jax as agp

NUM_STEPS = 8
LEVELS = {2: 0.1, 4: 0.8 - 0.7 / 8, 6: 0.8}  # equation 1 with n = 2, by hand
GRADUAL = agp.polynomial_schedule(
    0.8, begin_step=2, end_step=6, frequency=2, initial_sparsity=0.1
)
KERNEL_RULE = agp.Rule("dense/kernel", agp.element(), GRADUAL)
HEAD_RULE = agp.Rule("head/kernel", agp.filters(), agp.one_shot(0.5, step=4))
RULES = [KERNEL_RULE, HEAD_RULE]
SHAPES = {  # all differ, so that the shape of a state's leaf tells what it mirrors
    "dense": {"kernel": (6, 8), "bias": (8,)},
    "head": {"kernel": (8, 10), "scale": (10,)},
}
NO_MASK = optax.MaskedNode()


def is_shape(x):
    return isinstance(x, tuple)


def draw(seed, shapes=SHAPES, dtype=np.float32):
    """Normal numbers for a tree of shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=is_shape,
    )


def draw_dyadic(seed, shapes):
    """Multiples of 1/64 below 2: sums and quarters of them are exact, ties abound."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.integers(-127, 128, shape) / 64, np.float32),
        shapes,
        is_leaf=is_shape,
    )


def assert_same(tree, other):
    """Equal in structure, dtypes and every bit of every number."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def level_at(levels, t):
    """The value of the last of the events `levels` until t."""
    passed = [event for event in levels if event <= t]
    return levels[max(passed)] if passed else 0.0


def num_removed(levels, t, size):
    return min(math.floor(level_at(levels, t) * size), size - 1)


def keep_best(scores, alive, num_lost):
    """NumPy's choice among the cells of one contest: which of them stay."""
    order = np.lexsort((np.arange(scores.size), -scores, ~alive))
    kept = np.zeros(scores.size, bool)
    kept[order[: scores.size - num_lost]] = True
    return kept & alive


def remake(params, masks, t):
    """The masks of RULES for the weights `params`, in NumPy."""
    scores = np.abs(np.asarray(params["dense"]["kernel"], np.float32)).ravel()
    lost = num_removed(LEVELS, t, scores.size)
    kernel = keep_best(scores, masks["dense"].ravel(), lost).reshape(6, 8)
    scores = np.abs(np.asarray(params["head"]["kernel"], np.float32)).sum(0)
    head = keep_best(scores, masks["head"].any(0), num_removed({4: 0.5}, t, 10))
    return {"dense": kernel, "head": np.broadcast_to(head, (8, 10))}


NOTHING_REMOVED = {"dense": np.ones((6, 8), bool), "head": np.ones((8, 10), bool)}


def multiply(tree, masks):
    """`tree` with zeros where its two kernels are masked."""
    return {
        name: {**leaves, "kernel": jnp.where(masks[name], leaves["kernel"], 0)}
        for name, leaves in tree.items()
    }


def prune_states(state):
    is_state = lambda x: isinstance(x, agp.PruneState)  # noqa: E731
    return [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]


class Moment(NamedTuple):
    """What there is between two steps."""

    params: Any
    state: Any


def start(tx, params):
    return Moment(params, tx.init(params))


def jit_step(tx, **options):
    """One compiled training step, gradients given."""
    tx = optax.with_extra_args_support(tx)

    def step(gradients, moment, **extra):
        updates, state = tx.update(gradients, moment.state, moment.params, **extra)
        return Moment(optax.apply_updates(moment.params, updates), state)

    return jax.jit(step, **options)
