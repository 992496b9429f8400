"""Convolutions with the normalisation that follows folded into their kernels."""

import jax
import jax.numpy as jnp

from agp_jax.models.layers import NORM_EPSILON
from agp_jax.trees import PyTree

_NORMS = {"depthwise": "norm1", "pointwise": "norm2"}


def fold_norms(params: PyTree, batch_stats: PyTree) -> PyTree:
    """`params` of a bundled model with kernels as they act in evaluation.

    A kernel that batch normalisation follows is multiplied, filter by filter, by
    scale / sqrt(var + epsilon); all else stays as it is.
    """
    folded = dict(params)
    for name, value in params.items():
        norm = _NORMS.get(name, name.replace("conv", "norm"))
        if norm != name and norm in batch_stats:
            scale = params[norm]["scale"]
            gain = scale * jax.lax.rsqrt(batch_stats[norm]["var"] + NORM_EPSILON)
            kernel = value["kernel"] * jnp.expand_dims(gain, (0, 1, 2))
            folded[name] = {**value, "kernel": kernel}
        elif name in batch_stats and "mean" not in batch_stats[name]:
            folded[name] = fold_norms(value, batch_stats[name])
    return folded
