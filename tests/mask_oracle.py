"""Masks as a stable sort of scores has them, one contest at a time, in NumPy."""

import math
from fractions import Fraction

import jax
import numpy as np
import optax

import agp_jax as agp

MASKED = optax.MaskedNode()
TENSOR = (7, 13)
LINE = agp.polynomial_schedule(0.75, begin_step=0, end_step=12, power=1.0)
CURVE = agp.polynomial_schedule(
    0.8, begin_step=3, end_step=24, frequency=4, initial_sparsity=0.1
)


def level_at(schedule, step):
    """The sparsity at `step` by the paper's formula, exact."""
    n = (schedule.end_step - schedule.begin_step) // schedule.frequency
    j = min((step - schedule.begin_step) // schedule.frequency, n)
    if j < 0:
        return Fraction(0)
    rest = (1 - Fraction(j, n)) ** int(schedule.power) if n else 0
    s_i = Fraction(str(schedule.initial_sparsity))
    s_f = Fraction(str(schedule.final_sparsity))
    return s_f + (s_i - s_f) * rest


def rank(tensors, num_removed):
    """What stays of tensors ranked together: [(scores, box, mask)] -> [mask].

    Cells are the boxes in row-major order, tensor after tensor. Removed ones go first,
    then the lowest scores, and of equals those that come last.
    """
    where, scores, alive = [], [], []
    for i, (values, box, mask) in enumerate(tensors):
        values = np.where(mask, values, 0)
        grid = [size // part for size, part in zip(values.shape, box, strict=True)]
        for cell in np.ndindex(*grid):
            spot = tuple(
                slice(x * part, (x + 1) * part)
                for x, part in zip(cell, box, strict=True)
            )
            where.append((i, spot))
            scores.append(float(values[spot].sum()))
            alive.append(mask[spot].any())
    order = np.lexsort((np.arange(len(where)), -np.array(scores), ~np.array(alive)))
    kept = [np.zeros(mask.shape, bool) for _, _, mask in tensors]
    for k in order[: len(where) - num_removed]:
        i, spot = where[k]
        kept[i][spot] = True
    return [x & mask for x, (_, _, mask) in zip(kept, tensors, strict=True)]


def rank_elements(scores, num_removed, mask=None):
    """`rank` for one tensor of elements, with less Python."""
    scores = np.asarray(scores, np.float64)
    mask = np.ones(scores.shape, bool) if mask is None else np.asarray(mask)
    order = np.lexsort((np.arange(scores.size), -scores.ravel(), ~mask.ravel()))
    kept = np.zeros(scores.size, bool)
    kept[order[: scores.size - num_removed]] = True
    return kept.reshape(scores.shape) & mask


def removed(schedule, step, count):
    return min(math.floor(level_at(schedule, step) * count), count - 1)


def rule(pattern=".*", structure=None, schedule=LINE, **options):
    return agp.Rule(pattern, structure or agp.element(), schedule, **options)


def masker(*rules):
    """A jitted make_masks(params, step, masks, gradients, scores)."""

    @jax.jit
    def make(params, step, masks=None, gradients=None, scores=None):
        return agp.make_masks(
            params, rules, step, masks, gradients=gradients, scores=scores
        )

    return make


elements = masker(rule(".*"))  # compiled once for each shape it meets


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole_numbers(seed, shape, low=-4, high=5):
    """Weights whose sums are exact in float32 in any order, many of them equal."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.float32)


together = masker(rule("[abc]", scope="rule"))
