"""How weights move: learning rates, the optimizer, and what is added to the loss."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agp_jax.training.config import Config, GroupLasso
from agp_jax.trees import PyTree, flatten_with_paths


def make_learning_rate(config: Config) -> optax.Schedule:
    """The learning rate by step, before any plateau."""
    restarts = list(config.optimizer.restart_at)
    lengths = np.diff([0, *restarts, config.steps]).tolist()
    return optax.join_schedules([_warmed_up(config, x) for x in lengths], restarts)


def _warmed_up(config: Config, steps: int) -> optax.Schedule:
    """The learning rate from a start until `steps` later."""
    optimizer = config.optimizer
    rest = steps - optimizer.warmup_steps
    match optimizer.decay:
        case "cosine":
            decay = optax.cosine_decay_schedule(optimizer.learning_rate, rest)
        case "steps":
            decay = optax.piecewise_constant_schedule(
                optimizer.learning_rate,
                {
                    step - optimizer.warmup_steps: optimizer.decay_factor
                    for step in optimizer.decay_at
                },
            )
        case "exponential":
            decay = _exponential_decay(config)
        case _:
            decay = optax.constant_schedule(optimizer.learning_rate)
    if not optimizer.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, optimizer.learning_rate, optimizer.warmup_steps)
    return optax.join_schedules([warmup, decay], [optimizer.warmup_steps])


def _exponential_decay(config: Config) -> optax.Schedule:
    optimizer = config.optimizer
    last = optimizer.decay_end or config.steps

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step) + optimizer.warmup_steps  # of the whole run
        since = jnp.minimum(step, last) - optimizer.decay_origin
        power = jnp.where(
            step < optimizer.decay_begin, 0, since // optimizer.decay_every
        )
        return optimizer.learning_rate * jnp.float32(optimizer.decay_factor) ** power

    return rate


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer, not yet wrapped for pruning."""
    optimizer = config.optimizer
    learning_rate = make_learning_rate(config)
    if optimizer.name == "adamw":
        tx = optax.adamw(learning_rate, weight_decay=optimizer.weight_decay)
    else:
        tx = optax.chain(
            optax.add_decayed_weights(optimizer.weight_decay),
            optax.sgd(learning_rate, optimizer.momentum, optimizer.nesterov),
        )
    if optimizer.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), tx)
    if optimizer.decay != "plateau":
        return tx
    plateau = _make_plateau(config)

    def scale(updates: PyTree, state: Any, params: PyTree = None):
        del params
        return optax.tree.scale(state.scale, updates), state

    return optax.chain(tx, optax.GradientTransformation(plateau.init, scale))


def rate_of_step(config: Config, opt_state: optax.OptState, step: int) -> float:
    """The learning rate of the update that completes `step`, plateaus included."""
    rate = make_learning_rate(config)(step - 1) * plateau_scale(opt_state)
    return float(np.asarray(rate))


def note_loss(
    config: Config, opt_state: optax.OptState, loss: float, step: int
) -> optax.OptState:
    """The optimizer's state once it knows the loss of an evaluation after `step`.

    With decay "plateau" this is what lowers the rate: after more than `patience`
    evaluations in a row without a loss 0.01 % below the lowest, as PyTorch's
    ReduceLROnPlateau does it, from `decay_begin` on. With others nothing changes.
    """
    if config.optimizer.decay != "plateau" or step <= config.optimizer.decay_begin:
        return opt_state
    plateau = _make_plateau(config)

    def note(state: Any) -> Any:
        if not _is_plateau(state):
            return state
        shardings = jax.tree.map(lambda x: x.sharding, state)
        _, state = plateau.update({}, state, value=loss)
        return jax.device_put(state, shardings)

    return jax.tree.map(note, opt_state, is_leaf=_is_plateau)


def plateau_scale(opt_state: optax.OptState) -> float:
    """What plateaus so far have multiplied the learning rate by."""
    states = jax.tree.leaves(opt_state, is_leaf=_is_plateau)
    return next((float(x.scale) for x in states if _is_plateau(x)), 1.0)


def _make_plateau(config: Config) -> optax.GradientTransformationExtraArgs:
    optimizer = config.optimizer
    return optax.contrib.reduce_on_plateau(
        factor=optimizer.decay_factor,
        patience=optimizer.patience + 1,  # optax counts the one that is too many
        rtol=1e-4,
        cooldown=optimizer.cooldown,
    )


def _is_plateau(x: Any) -> bool:
    return isinstance(x, optax.contrib.ReduceLROnPlateauState)


def penalty(lasso: GroupLasso, params: PyTree, step: jax.Array) -> jax.Array:
    """What the group lasso adds to the loss: a scalar, zero after its end."""
    if not lasso.strength:
        return jnp.zeros(())
    paths, leaves, _ = flatten_with_paths(params)
    norms = [
        jnp.sum(optax.safe_norm(leaf, 0.0, axis=(0, 1)))
        for path, leaf in zip(paths, leaves, strict=True)
        if leaf.ndim == 4 and re.fullmatch(lasso.pattern, path)
    ]
    return jnp.where(step < lasso.end_step, lasso.strength * sum(norms), 0.0)
