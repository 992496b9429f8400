"""Distillation: what a model still has to learn from its teacher's logits."""

import jax
import jax.numpy as jnp

from agp_jax.training.tasks import Batch


def divergence(
    logits: jax.Array, teacher_logits: jax.Array, batch: Batch, temperature: float
) -> jax.Array:
    """`T**2 * KL(teacher || model)` at temperature T (arXiv:1503.02531, section 2).

    Args:
      logits: of the model, (..., classes).
      teacher_logits: of the same shape.
      batch: with the `"weight"` of each item, (...), where some are padding.
      temperature: what logits are divided by. The square keeps gradients as large as
        they are at 1.

    Returns:
      The sum over the items of the batch: a scalar.
    """
    log_p = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    items = temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    return jnp.sum(items * batch["weight"] if "weight" in batch else items)
