"""An experiment: a config made concrete, with its jitted steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agp_jax import data
from agp_jax.config import Config, ConfigError, make_optimizer, make_rules, validate
from agp_jax.costs import Cost, measure_cost
from agp_jax.couplings import Couplings, find_couplings
from agp_jax.cuts import Cut, plan_cut
from agp_jax.meshes import make_mesh, place
from agp_jax.models import make_model
from agp_jax.optimizer import get_masks, prune
from agp_jax.replay import thin_function
from agp_jax.rules import match_rules
from agp_jax.sources import AnySource
from agp_jax.thinning import thin, thin_opt_state
from agp_jax.trees import PyTree
from agp_jax.units import follows_couplings


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
    """A config made concrete: what a run needs and what stays the same in it.

    Attributes:
      predict: gives logits from `variables` (params and batch_stats) and images.
      forward: the same in training, with a key for dropout, and the next batch_stats.
      tx: the optimizer, wrapped for pruning.
      matched: the rule of each parameter, or None.
      couplings: of the variables; None where units are not pruned as a whole.
      shapes: of the state, with shardings.
      original: the shapes of the variables before any cut.
      cut: what has been taken out; None before.
    """

    config: Config
    dataset: data.Dataset
    train_source: AnySource
    test_source: AnySource
    model: nn.Module
    predict: Callable[[PyTree, jax.Array], jax.Array]
    forward: Callable[[PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree]]
    tx: optax.GradientTransformation
    matched: PyTree
    couplings: Couplings | None
    shapes: State
    original: dict[str, PyTree]
    mesh: Mesh
    cut: Cut | None = None


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
    predict, forward = _functions(model)
    rules = make_rules(config)
    tx = make_optimizer(config)
    mesh = make_mesh(config.devices.fsdp)
    couplings = None
    try:
        if rules and config.prune.coupled:
            init = functools.partial(_init_variables, model, dataset)
            variables = jax.eval_shape(init, jax.random.key(0))
            couplings = find_couplings(predict, variables, _image(dataset))
            tx = prune(tx, rules, couplings=couplings.subtree("params"))
        elif rules:
            tx = prune(tx, rules)
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
        predict=predict,
        forward=forward,
        tx=tx,
        matched=matched,
        couplings=couplings,
        shapes=place(shapes, mesh),
        original=as_variables(shapes),
        mesh=mesh,
    )


def _functions(model: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The model as it predicts and as it trains."""

    def predict(variables: PyTree, images: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply(variables, images, train=False))

    def forward(
        variables: PyTree, images: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        logits, changed = model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return logits, changed.get("batch_stats", {})

    return predict, forward


def plan_experiment_cut(experiment: Experiment, state: State) -> Cut:
    """The cut of all units that the state's masks remove."""
    assert experiment.couplings is not None
    whole = NamedSharding(experiment.mesh, PartitionSpec())
    masks = jax.jit(lambda masks: masks, out_shardings=whole)(
        get_masks(state.opt_state)
    )
    return plan_cut(
        {"params": masks},
        experiment.couplings,
        round_to=experiment.config.prune.round_to,
    )


def cut_experiment(experiment: Experiment, cut: Cut) -> Experiment:
    """The experiment that goes on with what the cut leaves.

    Rules whose units are cut have nothing left to do; others go on.
    """
    variables = as_variables(experiment.shapes)
    thinned = jax.eval_shape(functools.partial(cut_state, cut=cut), experiment.shapes)
    rules = [
        dataclasses.replace(rule, structure=None, schedule=None)
        if follows_couplings(rule)
        else rule
        for rule in make_rules(experiment.config)
    ]
    return experiment._replace(
        predict=thin_function(experiment.predict, variables, cut),
        forward=thin_function(experiment.forward, variables, cut),
        tx=prune(make_optimizer(experiment.config), rules),
        shapes=place(thinned, experiment.mesh),
        cut=cut,
    )


def cut_state(state: State, cut: Cut) -> State:
    """What a cut leaves of the whole state."""
    params = cut.subtree("params")
    return State(
        step=state.step,
        params=thin(state.params, params),
        batch_stats=thin(as_variables(state), cut)["batch_stats"],
        opt_state=thin_opt_state(state.opt_state, state.params, params),
    )


def cost_before(experiment: Experiment) -> Cost:
    """What the whole model costs for one image."""
    predict, _ = _functions(experiment.model)
    return measure_cost(predict, experiment.original, _image(experiment.dataset))


def cost_now(experiment: Experiment) -> Cost:
    """What the model costs for one image, without what has been cut out."""
    variables = as_variables(experiment.shapes)
    image = _image(experiment.dataset)
    return measure_cost(experiment.predict, variables, image)


def as_variables(state: State) -> dict[str, PyTree]:
    """What a model computes with."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def place_state(experiment: Experiment, make: Callable[..., State], *inputs: Any):
    """`make(*inputs)`, a state of the experiment, made where it will live."""
    shardings = _shardings(experiment)
    return jax.jit(make, out_shardings=shardings)(*inputs)


def init_state(experiment: Experiment) -> State:
    """The state before the first step."""
    init = functools.partial(
        _init_state, experiment.model, experiment.tx, experiment.dataset
    )
    return place_state(experiment, init, jax.random.key(experiment.config.seed))


def _init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    dataset: data.Dataset,
    key: jax.Array,
) -> State:
    variables = _init_variables(model, dataset, key)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
    )


def _init_variables(
    model: nn.Module, dataset: data.Dataset, key: jax.Array
) -> dict[str, PyTree]:
    variables = model.init(key, _image(dataset), train=False)
    return {"batch_stats": {}, **variables}


def _image(dataset: data.Dataset) -> jax.Array:
    """A batch of one empty image."""
    return jnp.zeros((1, *dataset.image_shape))


def make_train_step(
    experiment: Experiment,
) -> Callable[[State, PyTree], tuple[State, PyTree]]:
    """A jitted function of a state, which it consumes, and a batch.

    It gives the next state and the batch's mean loss and accuracy.
    """
    forward, tx, dataset = experiment.forward, experiment.tx, experiment.dataset

    def train_step(state: State, batch: PyTree) -> tuple[State, PyTree]:
        seed = jax.random.key(experiment.config.seed)
        key = jax.random.fold_in(seed, state.step)

        def loss_fn(params: PyTree):
            variables = {"params": params, "batch_stats": state.batch_stats}
            images = _normalised(batch["image"], dataset)
            logits, batch_stats = forward(variables, images, key)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["label"]
            )
            metrics = {
                "loss": losses.mean(),
                "accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"]),
            }
            return metrics["loss"], (batch_stats, metrics)

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
    predict, dataset = experiment.predict, experiment.dataset

    @jax.jit
    def eval_step(params: PyTree, batch_stats: PyTree, batch: PyTree) -> jax.Array:
        variables = {"params": params, "batch_stats": batch_stats}
        logits = predict(variables, _normalised(batch["image"], dataset))
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
