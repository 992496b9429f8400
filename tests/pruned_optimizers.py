"""A table of optimizers, each with pruning and without, and runs with them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib
from pruning_cases import (
    HEAD_RULE,
    KERNEL_RULE,
    NUM_STEPS,
    RULES,
    draw,
    jit_step,
    start,
)

import agp_jax as agp


def average_params(decay):
    """A user's own transformation: an average of the parameters it is shown."""

    def update(updates, state, params=None):
        blend = lambda old, new: decay * old + (1 - decay) * new  # noqa: E731
        return updates, jax.tree.map(blend, state, params)

    return optax.GradientTransformation(lambda params: params, update)


class Setup(NamedTuple):
    """Ways to build an optimizer.

    Attributes:
      pruned: the optimizer with `prune` in it.
      bare: the same without.
      reach: what the gradient of one weight changes: its "element", "leaf" or "tree".
      every: how many calls of its `update` make one update of the weights.
      residue: bounds what the state holds where weights are masked.
    """

    pruned: optax.GradientTransformation
    bare: optax.GradientTransformation
    reach: str = "element"
    every: int = 1
    residue: float = 0.0


def around(bare, **options):
    return Setup(agp.prune(bare, RULES), bare, **options)


def inside(wrap, bare, **options):
    return Setup(wrap(agp.prune(bare, RULES)), wrap(bare), **options)


def multi_steps(tx):
    return optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()


def split(first, second):
    """The pruned kernels' optimizers and sgd for the rest."""
    labels = {
        "dense": {"kernel": "first", "bias": "rest"},
        "head": {"kernel": "second", "scale": "rest"},
    }
    parts = {"first": first, "second": second, "rest": optax.sgd(0.1)}
    if second is None:
        labels["head"]["kernel"] = "first"
        del parts["second"]
    return optax.partition(parts, labels)


KERNELS = {
    "dense": {"kernel": True, "bias": False},
    "head": {"kernel": True, "scale": False},
}
MOMENTUM = optax.sgd(0.1, momentum=0.9)
DECAYED_MOMENTUM = optax.chain(optax.add_decayed_weights(0.01), MOMENTUM)
SETUPS = {
    "sgd": around(optax.sgd(0.1)),
    "momentum": around(MOMENTUM),
    "nesterov": around(optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "decayed momentum": around(DECAYED_MOMENTUM),
    "adam": around(optax.adam(0.01)),
    "adamw": around(optax.adamw(0.01)),
    "adamax": around(optax.adamax(0.01), residue=1e-8),  # its eps is in nu
    "lamb": around(optax.lamb(0.01), reach="leaf"),
    "lion": around(optax.lion(0.01)),
    "adafactor": around(optax.adafactor(0.01, min_dim_size_to_factor=2), reach="leaf"),
    "adafactor unfactored": around(  # its epsilon of 1e-30 is in v
        optax.adafactor(0.01), reach="leaf", residue=1e-12
    ),
    "rmsprop": around(optax.rmsprop(0.01, momentum=0.9)),
    "clipping inside": around(
        optax.chain(optax.clip_by_global_norm(1.0), DECAYED_MOMENTUM), reach="tree"
    ),
    "clipping before": inside(
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        optax.sgd(0.1),
        reach="tree",
    ),
    "MultiSteps inside": around(multi_steps(MOMENTUM)),
    "MultiSteps around": inside(multi_steps, MOMENTUM, every=2),
    "masked": inside(lambda tx: optax.masked(tx, KERNELS), MOMENTUM),
    "partition": inside(lambda tx: split(tx, None), MOMENTUM),
    "two in a partition": Setup(
        split(
            agp.prune(MOMENTUM, [KERNEL_RULE]),
            agp.prune(optax.sgd(0.1), [HEAD_RULE]),
        ),
        split(MOMENTUM, optax.sgd(0.1)),
    ),
    "inject_hyperparams inside": around(
        optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 8))
    ),
    "inject_hyperparams around": Setup(
        optax.inject_hyperparams(lambda rate: agp.prune(optax.adam(rate), RULES))(0.1),
        optax.inject_hyperparams(lambda rate: optax.adam(rate))(0.1),
    ),
    "apply_if_finite inside": around(optax.apply_if_finite(MOMENTUM, 3)),
    "apply_if_finite around": inside(lambda tx: optax.apply_if_finite(tx, 3), MOMENTUM),
    "learning rate schedule": around(
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 8))
    ),
    "reduce_on_plateau": around(
        optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1, factor=0.5))
    ),
    "average of parameters": around(optax.chain(optax.sgd(0.1), average_params(0.9))),
    "schedule_free_adamw": around(contrib.schedule_free_adamw(0.1, weight_decay=0.01)),
}


@functools.cache
def train(name):
    """All moments of a run with a set-up, and its step."""
    step = jit_step(SETUPS[name].pruned)
    moments = [start(SETUPS[name].pruned, draw(0))]
    for t in range(1, NUM_STEPS + 1):
        moments.append(step(draw(t), moments[-1], value=jnp.float32(1.0)))
    return moments, step
