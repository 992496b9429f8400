"""An experiment: a config made concrete, with the state that training changes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agp_jax.costs import Cost, measure_cost
from agp_jax.couplings import Couplings
from agp_jax.data.corpora import CORPORA
from agp_jax.masks import apply_masks
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
from agp_jax.training.classification import make_classification
from agp_jax.training.config import Config, ConfigError, last_event, validate
from agp_jax.training.language import make_language
from agp_jax.training.meshes import make_mesh, place
from agp_jax.training.optimizers import make_optimizer
from agp_jax.training.tasks import Batch, Task
from agp_jax.trees import PyTree

Variables = dict[str, PyTree]


class State(NamedTuple):
    """All that training changes.

    Attributes:
      step: int32 scalar, updates done.
      params: the model's parameters.
      collections: its other variables by collection, such as "batch_stats".
      opt_state: the optimizer's state, with the masks.
      teacher: the variables that `config.distill` learns from; None where there are
        none, as before the first event.
    """

    step: jax.Array
    params: PyTree
    collections: dict[str, PyTree]
    opt_state: optax.OptState
    teacher: Variables | None = None


class Experiment(NamedTuple):
    """A config made concrete: what a run needs and what stays the same in it.

    Attributes:
      task: what is learned.
      predict: gives from `variables` (params and collections) and the task's inputs
        the model's outputs and the collections that changed.
      forward: the same in training, with a key for dropout after the variables.
      predict_whole: `predict` before any cut.
      tx: the optimizer, wrapped for pruning.
      rules: the rules in force.
      target_step: the step from which on the model is as sparse and small as it will
        be.
      matched: the rule of each parameter, or None; after a cut the one in force, else
        the one that the cut has fulfilled.
      couplings: of the variables; None where they are not needed.
      ranking: those of the parameters where rules prune whole units, else None.
      shapes: of the state, with shardings.
      cost: of the model as it is, for one item.
      whole: the shapes of the variables before any cut.
      whole_cost: the cost before any cut.
      cut: what has been taken out; None before.
    """

    config: Config
    task: Task
    predict: Callable[..., tuple[Any, Variables]]
    forward: Callable[..., tuple[Any, Variables]]
    predict_whole: Callable[..., tuple[Any, Variables]]
    tx: optax.GradientTransformation
    rules: tuple[Rule, ...]
    target_step: int
    matched: PyTree
    couplings: Couplings | None
    ranking: Couplings | None
    shapes: State
    cost: Cost
    whole: Variables
    whole_cost: Cost
    mesh: Mesh
    cut: Cut | None = None

    @property
    def shardings(self) -> State:
        return jax.tree.map(lambda x: x.sharding, self.shapes)


def set_up(config: Config) -> Experiment:
    """Makes a config concrete without training; needs no data and allocates nothing.

    Raises:
      ConfigError: saying what is wrong and what to do.
    """
    rules = validate(config)
    num_devices = jax.device_count()
    if config.batch_size % num_devices:
        raise ConfigError(
            f"config.batch_size must be a multiple of the {num_devices} devices, got "
            f"{config.batch_size}"
        )
    task = _make_task(config)
    mesh = make_mesh(config.devices.fsdp)
    variables = _abstract_variables(task)
    if config.prune.fold_norms and "batch_stats" not in variables:
        raise ConfigError(
            "config.prune.fold_norms needs a model with batch normalisation, but this "
            "one has no batch_stats; set it to False"
        )
    predict, forward = _functions(task.model, list(_without_params(variables)))
    inputs = jax.eval_shape(task.inputs, task.example)
    if config.task is not None:
        _check_task(task, predict, variables)
    if config.distill.weight and task.distill is None:
        raise ConfigError(
            "config.distill needs a task that says how far outputs are from a "
            "teacher's: give its `distill`, or set config.distill.weight to 0"
        )
    couplings = ranking = None
    try:
        if rules and (config.prune.coupled or config.prune.cut_step):
            outputs = lambda variables, *inputs: predict(variables, *inputs)[0]  # noqa: E731
            couplings = find_couplings(outputs, variables, *inputs)
        if couplings and config.prune.coupled:
            ranking = couplings.subtree("params")
        tx = make_optimizer(config)
        if rules:
            tx = prune(tx, rules, couplings=ranking)
        matched = match_rules(rules, variables["params"])
        shapes = jax.eval_shape(functools.partial(_init_state, config, tx), variables)
    except ValueError as error:
        raise ConfigError(f"config.prune: {error}") from error
    cost = cost_per_item(task, predict, variables)
    return Experiment(
        config=config,
        task=task,
        predict=predict,
        forward=forward,
        predict_whole=predict,
        tx=tx,
        rules=rules,
        target_step=max(last_event(rules), config.prune.cut_step if rules else 0),
        matched=matched,
        couplings=couplings,
        ranking=ranking,
        shapes=place(shapes, mesh),
        cost=cost,
        whole=variables,
        whole_cost=cost,
        mesh=mesh,
    )


def _make_task(config: Config) -> Task:
    if config.task is None:
        is_text = config.data.name in CORPORA
        return make_language(config) if is_text else make_classification(config)
    task = config.task(config)
    if not isinstance(task, Task):
        raise ConfigError(
            f"config.task must be a function that makes an "
            f"agp_jax.training.tasks.Task of the config, but it made {task!r}"
        )
    return task


def _check_task(task: Task, predict: Callable[..., Any], variables: Variables) -> None:
    """Whether a task of one's own measures and describes what a run needs of it."""

    def measure(variables: Variables, example: Batch) -> dict[str, jax.Array]:
        outputs, _ = predict(variables, *task.inputs(example))
        return task.measure(outputs, example)

    sums = jax.eval_shape(measure, variables, task.example)
    means = dict.fromkeys((name for name in sums if name != "count"), 1.0)
    described = task.describe(means)
    for what, names, needed in (
        ("measure", sums, ("count", "loss")),
        ("describe", described, ("loss", task.quality.name)),
    ):
        missing = [name for name in needed if name not in names]
        if missing:
            raise ConfigError(
                f"config.task: {what} must give {' and '.join(needed)}, but gives "
                f"{', '.join(names) or 'nothing'}"
            )


def _init_variables(task: Task, key: jax.Array) -> Variables:
    return dict(task.model.init(key, *task.inputs(task.example), train=False))


def _abstract_variables(task: Task) -> Variables:
    return jax.eval_shape(functools.partial(_init_variables, task), jax.random.key(0))


def _without_params(variables: Variables) -> Variables:
    return {name: tree for name, tree in variables.items() if name != "params"}


def _functions(
    model: nn.Module, collections: list[str]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The model as it predicts and as it trains."""

    def predict(variables: Variables, *inputs: jax.Array) -> tuple[Any, Variables]:
        outputs, changes = model.apply(
            variables, *inputs, train=False, mutable=collections
        )
        return outputs, dict(changes)

    def forward(
        variables: Variables, key: jax.Array, *inputs: jax.Array
    ) -> tuple[Any, Variables]:
        outputs, changes = model.apply(
            variables, *inputs, train=True, mutable=collections, rngs={"dropout": key}
        )
        return outputs, dict(changes)

    return predict, forward


def cost_per_item(
    task: Task, predict: Callable[..., Any], variables: Variables
) -> Cost:
    """What a model costs for one item; non-zeros too where there are arrays."""
    inputs = jax.eval_shape(task.inputs, task.example)
    cost = measure_cost(predict, variables, *inputs)
    return dataclasses.replace(
        cost,
        leaves=tuple(
            dataclasses.replace(
                leaf, macs=None if leaf.macs is None else leaf.macs // task.num_items
            )
            for leaf in cost.leaves
        ),
        other_macs=cost.other_macs // task.num_items,
    )


def with_teacher(experiment: Experiment) -> Experiment:
    """The experiment from where on it learns from what it was."""
    return experiment._replace(shapes=appoint_teacher(experiment.shapes))


def appoint_teacher(state: State) -> State:
    """The state with itself as teacher."""
    return state._replace(teacher=as_variables(state))


def plan_experiment_cut(experiment: Experiment, state: State) -> Cut:
    """The cut of all units that the state's masks remove."""
    everywhere = NamedSharding(experiment.mesh, PartitionSpec())
    masks = jax.jit(lambda masks: masks, out_shardings=everywhere)(
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
    predict = thin_function(experiment.predict, variables, cut)
    return experiment._replace(
        predict=predict,
        forward=thin_function(experiment.forward, variables, cut),
        tx=prune(make_optimizer(experiment.config), rules),
        rules=rules,
        matched=_update(experiment.matched, match_rules(rules, thinned.params)),
        ranking=None,
        shapes=place(thinned, experiment.mesh),
        cost=cost_per_item(experiment.task, predict, as_variables(thinned)),
        cut=cut,
    )


def _update(matched: PyTree, later: PyTree) -> PyTree:
    """`matched` with what `later` has instead, where it has a rule."""
    is_entry = lambda x: x is None or isinstance(x, Rule)  # noqa: E731
    return jax.tree.map(lambda rule, new: new or rule, matched, later, is_leaf=is_entry)


def cut_state(state: State, cut: Cut) -> State:
    """What a cut leaves of the whole state; a teacher stays whole."""
    return State(
        step=state.step,
        params=thin(state.params, cut.subtree("params")),
        collections=_without_params(thin(as_variables(state), cut)),
        opt_state=thin_opt_state(state.opt_state, state.params, cut.subtree("params")),
        teacher=state.teacher,
    )


def as_variables(state: State) -> Variables:
    """What a model computes with."""
    return {"params": state.params, **state.collections}


def place_state(experiment: Experiment, make: Callable[..., State], *inputs: Any):
    """`make(*inputs)`, a state of the experiment, made where it will live."""
    return jax.jit(make, out_shardings=experiment.shardings)(*inputs)


def read_weights(experiment: Experiment) -> Variables | None:
    """The variables that an experiment starts from, as NumPy arrays; None for random.

    Raises:
      WeightsError: if the weights are missing, damaged or of another model.
    """
    options = experiment.config.model
    if not options.weights:
        return None
    try:
        state_dict = read_state_dict(options.weights)
        return from_state_dict(options.name, state_dict, experiment.whole)
    except WeightsError as error:
        raise WeightsError(
            f"config.model.weights: {error}. Give the file that the experiment starts "
            f"from as --config.model.weights=FILE, or --config.model.weights= to start "
            f"from random weights"
        ) from error


def init_state(experiment: Experiment, variables: Variables | None = None) -> State:
    """The state before the first step, pruned already where schedules begin with it.

    Args:
      experiment: what will run.
      variables: to start from; by default they are drawn by the experiment's seed.
    """
    make = functools.partial(_init_state, experiment.config, experiment.tx)
    if variables is not None:
        return place_state(experiment, make, variables)

    def init(key: jax.Array) -> State:
        return make(_init_variables(experiment.task, key))

    return place_state(experiment, init, jax.random.key(experiment.config.seed))


def _init_state(
    config: Config, tx: optax.GradientTransformation, variables: Variables
) -> State:
    params, collections = variables["params"], _without_params(variables)
    if config.prune.fold_norms:  # `init` takes no scores; it ranks what it is given
        opt_state = tx.init(fold_norms(params, collections["batch_stats"]))
    else:
        opt_state = tx.init(params)
    if config.prune.enabled:
        params = apply_masks(params, get_masks(opt_state))
    return State(jnp.zeros((), jnp.int32), params, collections, opt_state)
