"""An experiment: a config made concrete, with its jitted steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agp_jax import data
from agp_jax.batches import Source
from agp_jax.config import Config, ConfigError, make_optimizer, make_rules, validate
from agp_jax.meshes import make_mesh, place
from agp_jax.models import make_model
from agp_jax.optimizer import prune
from agp_jax.rules import match_rules
from agp_jax.trees import PyTree


class State(NamedTuple):
    """All that training changes.

    Attributes:
      step: int32 scalar, updates done.
      params: the model's parameters.
      batch_stats: running statistics of its normalisation layers.
      opt_state: the optimizer's state, with the masks.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState


class Experiment(NamedTuple):
    """A config made concrete: what a run needs and what stays the same in it."""

    config: Config
    dataset: data.Dataset
    train_source: Source
    test_source: Source
    model: nn.Module
    tx: optax.GradientTransformation
    matched: PyTree  # the rule of each parameter, or None
    shapes: State  # of `jax.ShapeDtypeStruct`, with shardings
    mesh: Mesh


def set_up(config: Config) -> Experiment:
    """Makes a config concrete without training; everything unfit is found here.

    Raises:
      ConfigError, DataError: saying what is wrong and what to do.
    """
    validate(config)
    num_devices = jax.device_count()
    if config.batch_size % num_devices:
        raise ConfigError(
            f"config.batch_size must be a multiple of the {num_devices} devices, got "
            f"{config.batch_size}"
        )
    dataset = data.DATASETS[config.data.name]
    model = make_model(config.model.name, dataset.num_classes, config.model.width)
    rules = make_rules(config)
    tx = make_optimizer(config)
    if rules:
        tx = prune(tx, rules)
    mesh = make_mesh(config.devices.fsdp)
    try:
        shapes = jax.eval_shape(
            functools.partial(_init_state, model, tx, dataset), jax.random.key(0)
        )
        matched = match_rules(rules, shapes.params)
    except ValueError as error:
        raise ConfigError(f"config.prune: {error}") from error
    load = functools.partial(data.load, dataset.name, data_dir=config.data.dir)
    return Experiment(
        config=config,
        dataset=dataset,
        train_source=load("train"),
        test_source=load("test"),
        model=model,
        tx=tx,
        matched=matched,
        shapes=place(shapes, mesh),
        mesh=mesh,
    )


def init_state(experiment: Experiment) -> State:
    """The state before the first step, made where it will live."""
    init = functools.partial(
        _init_state, experiment.model, experiment.tx, experiment.dataset
    )
    key = jax.random.key(experiment.config.seed)
    return jax.jit(init, out_shardings=_shardings(experiment))(key)


def _init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    dataset: data.Dataset,
    key: jax.Array,
) -> State:
    images = jnp.zeros((1, *dataset.image_shape))
    variables = model.init(key, images, train=False)
    params = variables["params"]
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(params),
    )


def make_train_step(
    experiment: Experiment,
) -> Callable[[State, PyTree], tuple[State, PyTree]]:
    """A jitted function of a state, which it consumes, and a batch.

    It gives the next state and the batch's mean loss and accuracy.
    """
    model, tx, dataset = experiment.model, experiment.tx, experiment.dataset

    def train_step(state: State, batch: PyTree) -> tuple[State, PyTree]:
        def loss_fn(params: PyTree):
            logits, changed = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                _normalised(batch["image"], dataset),
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["label"]
            )
            metrics = {
                "loss": losses.mean(),
                "accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"]),
            }
            return metrics["loss"], (changed.get("batch_stats", {}), metrics)

        gradients, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(
            state.params
        )
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, batch_stats, opt_state), metrics

    replicated = NamedSharding(experiment.mesh, PartitionSpec())
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(_shardings(experiment), replicated)
    )


def make_eval_step(experiment: Experiment) -> Callable[..., jax.Array]:
    """A jitted function of params, batch statistics and a batch.

    It gives how many of the batch's examples are classified correctly.
    """
    model, dataset = experiment.model, experiment.dataset

    @jax.jit
    def eval_step(params: PyTree, batch_stats: PyTree, batch: PyTree) -> jax.Array:
        logits: Any = model.apply(
            {"params": params, "batch_stats": batch_stats},
            _normalised(batch["image"], dataset),
            train=False,
        )
        correct = jnp.argmax(logits, -1) == batch["label"]
        return jnp.sum(correct * batch["weight"])

    return eval_step


def _shardings(experiment: Experiment) -> State:
    return jax.tree.map(lambda x: x.sharding, experiment.shapes)


def _normalised(images: jax.Array, dataset: data.Dataset) -> jax.Array:
    """float32 images of about zero mean and unit variance, from uint8."""
    mean = np.array(dataset.mean, np.float32).reshape(1, 1, 1, -1)
    std = np.array(dataset.std, np.float32).reshape(1, 1, 1, -1)
    return (images.astype(jnp.float32) / 255 - mean) / std
