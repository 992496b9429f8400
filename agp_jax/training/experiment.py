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
from agp_jax.costs import Cost, measure_cost
from agp_jax.couplings import Couplings
from agp_jax.data.augmentations import check_augment
from agp_jax.data.sources import AnySource
from agp_jax.masks import apply_masks
from agp_jax.models import make_model
from agp_jax.models.folding import fold_norms
from agp_jax.models.torch_weights import (
    WeightsError,
    from_state_dict,
    read_state_dict,
)
from agp_jax.programs.grouping import find_couplings
from agp_jax.pruning import get_masks, prune
from agp_jax.rules import Rule, match_rules
from agp_jax.thinning.cuts import Cut, plan_cut
from agp_jax.thinning.replay import thin_function
from agp_jax.thinning.states import thin_opt_state
from agp_jax.thinning.trees import thin
from agp_jax.training.config import Config, ConfigError, make_rules, validate
from agp_jax.training.meshes import make_mesh, place
from agp_jax.training.optimizers import make_optimizer, penalty
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


class Sources(NamedTuple):
    """The images of an experiment; `validation` is what was held out, or None."""

    train: AnySource
    validation: AnySource | None
    test: AnySource


class Experiment(NamedTuple):
    """A config made concrete: what a run needs and what stays the same in it.

    Attributes:
      dataset: what is known of the images, at the size that is trained on.
      predict: gives logits from `variables` (params and batch_stats) and images.
      forward: the same in training, with a key for dropout, and the next batch_stats.
      tx: the optimizer, wrapped for pruning.
      rules: the rules in force.
      matched: the rule of each parameter, or None; after a cut the one in force, else
        the one that the cut has fulfilled.
      couplings: of the variables; None where they are not needed.
      ranking: those of the parameters where rules prune whole units, else None.
      shapes: of the state, with shardings.
      original: the shapes of the variables before any cut.
      cut: what has been taken out; None before.
    """

    config: Config
    dataset: data.Dataset
    model: nn.Module
    predict: Callable[[PyTree, jax.Array], jax.Array]
    forward: Callable[[PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree]]
    tx: optax.GradientTransformation
    rules: tuple[Rule, ...]
    matched: PyTree
    couplings: Couplings | None
    ranking: Couplings | None
    shapes: State
    original: dict[str, PyTree]
    mesh: Mesh
    cut: Cut | None = None


def set_up(config: Config) -> Experiment:
    """Makes a config concrete without training; needs no data and allocates nothing.

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
    if size := config.data.image_size:
        shape = (size, size, dataset.image_shape[2])
        dataset = dataclasses.replace(dataset, image_shape=shape)
    model = make_model(config.model.name, dataset.num_classes, config.model.width)
    predict, forward = _functions(model)
    rules = make_rules(config)
    mesh = make_mesh(config.devices.fsdp)
    init = functools.partial(_init_variables, model, dataset)
    variables = jax.eval_shape(init, jax.random.key(0))
    couplings = ranking = None
    try:
        if rules and (config.prune.coupled or config.prune.cut_step):
            couplings = find_couplings(predict, variables, _image(dataset))
        if couplings and config.prune.coupled:
            ranking = couplings.subtree("params")
        tx = make_optimizer(config)
        if rules:
            tx = prune(tx, rules, couplings=ranking)
        matched = match_rules(rules, variables["params"])
        shapes = jax.eval_shape(functools.partial(_init_state, config, tx), variables)
    except ValueError as error:
        raise ConfigError(f"config.prune: {error}") from error
    return Experiment(
        config=config,
        dataset=dataset,
        model=model,
        predict=predict,
        forward=forward,
        tx=tx,
        rules=rules,
        matched=matched,
        couplings=couplings,
        ranking=ranking,
        shapes=place(shapes, mesh),
        original=variables,
        mesh=mesh,
    )


def load_sources(experiment: Experiment) -> Sources:
    """The images that an experiment trains on and is judged by.

    Raises:
      ConfigError: if they cannot be augmented as it says.
      DataError: if they are missing or damaged.
    """
    options = experiment.config.data
    load = functools.partial(
        data.load, options.name, data_dir=options.dir, image_size=options.image_size
    )
    train, validation = load("train"), None
    try:
        check_augment(options.augment, train)
        if options.hold_out:
            seed = experiment.config.seed
            train, validation = data.hold_out(train, options.hold_out, seed)
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error
    return Sources(train, validation, load("test"))


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
    whole = NamedSharding(experiment.mesh, PartitionSpec())
    masks = jax.jit(lambda masks: masks, out_shardings=whole)(
        get_masks(state.opt_state)
    )
    return cut_of_masks(experiment, masks)


def cut_of_masks(experiment: Experiment, masks: PyTree) -> Cut:
    """The cut of all units that masks of the parameters remove."""
    assert experiment.couplings is not None
    options = experiment.config.prune
    return plan_cut(
        {"params": masks},
        experiment.couplings,
        close=not options.coupled,
        round_to=options.round_to,
    )


def cut_experiment(experiment: Experiment, cut: Cut) -> Experiment:
    """The experiment that goes on with what the cut leaves.

    Rules whose units are cut have nothing left to do and give way to the next ones.
    """
    variables = as_variables(experiment.shapes)
    thinned = jax.eval_shape(functools.partial(cut_state, cut=cut), experiment.shapes)
    rules = tuple(rule for rule in experiment.rules if not rule.prunes_units)
    return experiment._replace(
        predict=thin_function(experiment.predict, variables, cut),
        forward=thin_function(experiment.forward, variables, cut),
        tx=prune(make_optimizer(experiment.config), rules),
        rules=rules,
        matched=_update(experiment.matched, match_rules(rules, thinned.params)),
        ranking=None,
        shapes=place(thinned, experiment.mesh),
        cut=cut,
    )


def _update(matched: PyTree, later: PyTree) -> PyTree:
    """`matched` with what `later` has instead, where it has a rule."""
    is_entry = lambda x: x is None or isinstance(x, Rule)  # noqa: E731
    return jax.tree.map(lambda rule, new: new or rule, matched, later, is_leaf=is_entry)


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


def read_weights(experiment: Experiment) -> dict[str, PyTree] | None:
    """The variables that an experiment starts from, as NumPy arrays; None for random.

    Raises:
      WeightsError: if the weights are missing, damaged or of another model.
    """
    options = experiment.config.model
    if not options.weights:
        return None
    try:
        state_dict = read_state_dict(options.weights)
        return from_state_dict(options.name, state_dict, experiment.original)
    except WeightsError as error:
        raise WeightsError(
            f"config.model.weights: {error}. Give the file that the experiment starts "
            f"from as --config.model.weights=FILE, or --config.model.weights= to start "
            f"from random weights"
        ) from error


def init_state(
    experiment: Experiment, variables: dict[str, PyTree] | None = None
) -> State:
    """The state before the first step, pruned already where schedules begin with it.

    Args:
      experiment: what will run.
      variables: to start from; by default they are drawn by the experiment's seed.
    """
    make = functools.partial(_init_state, experiment.config, experiment.tx)
    if variables is not None:
        return place_state(experiment, make, variables)

    def init(key: jax.Array) -> State:
        return make(_init_variables(experiment.model, experiment.dataset, key))

    return place_state(experiment, init, jax.random.key(experiment.config.seed))


def _init_state(
    config: Config, tx: optax.GradientTransformation, variables: dict[str, PyTree]
) -> State:
    params, batch_stats = variables["params"], variables["batch_stats"]
    if config.prune.fold_norms:  # `init` takes no scores; it ranks what it is given
        opt_state = tx.init(fold_norms(params, batch_stats))
    else:
        opt_state = tx.init(params)
    if config.prune.enabled:
        params = apply_masks(params, get_masks(opt_state))
    step = jnp.zeros((), jnp.int32)
    return State(step, params, batch_stats, opt_state)


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
    config, dataset = experiment.config, experiment.dataset
    forward, tx = experiment.forward, experiment.tx

    def train_step(state: State, batch: PyTree) -> tuple[State, PyTree]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

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
            extra = penalty(config.lasso, params, state.step)
            return metrics["loss"] + extra, (batch_stats, metrics)

        gradients, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(
            state.params
        )
        scores = {}
        if config.prune.fold_norms:
            folded = fold_norms(state.params, state.batch_stats)
            scores = {"scores": jax.tree.map(jnp.abs, folded)}
        updates, opt_state = tx.update(
            gradients, state.opt_state, state.params, **scores
        )
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, batch_stats, opt_state), metrics

    replicated = NamedSharding(experiment.mesh, PartitionSpec())
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(_shardings(experiment), replicated)
    )


def make_eval_step(experiment: Experiment) -> Callable[..., PyTree]:
    """A jitted function of params, batch statistics and a batch.

    It gives sums over the batch's examples: their losses, and how many are classified
    correctly.
    """
    predict, dataset = experiment.predict, experiment.dataset

    @jax.jit
    def eval_step(params: PyTree, batch_stats: PyTree, batch: PyTree) -> PyTree:
        variables = {"params": params, "batch_stats": batch_stats}
        logits = predict(variables, _normalised(batch["image"], dataset))
        labels, weight = batch["label"], batch["weight"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = jnp.argmax(logits, -1) == labels
        return {
            "loss": jnp.sum(losses * weight),
            "accuracy": jnp.sum(correct * weight),
        }

    return eval_step


def _shardings(experiment: Experiment) -> State:
    return jax.tree.map(lambda x: x.sharding, experiment.shapes)


def _normalised(images: jax.Array, dataset: data.Dataset) -> jax.Array:
    """float32 images of about zero mean and unit variance, from uint8."""
    mean = np.array(dataset.mean, np.float32).reshape(1, 1, 1, -1)
    std = np.array(dataset.std, np.float32).reshape(1, 1, 1, -1)
    return (images.astype(jnp.float32) / 255 - mean) / std
