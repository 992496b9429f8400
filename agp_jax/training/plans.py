"""What an experiment will end with, found without data or training.

Where each tensor is ranked by itself and nothing is cut, schedules and shapes tell all
numbers. Else they are counted on masks that `make_masks` has made and on what `thin`
has left, of random weights: which weights go depends on them, how many does not.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from agp_jax.costs import Cost, LeafCost
from agp_jax.masks import apply_masks, make_masks
from agp_jax.models.torch_weights import published_names
from agp_jax.planning import count_cells, count_nonzero_at
from agp_jax.pruning import get_masks
from agp_jax.rules import Rule
from agp_jax.thinning.trees import thin
from agp_jax.training.config import Config, ConfigError, Distill, last_event
from agp_jax.training.counts import describe_cost
from agp_jax.training.courses import (
    make_course,
    rank_experiment,
    training_macs,
)
from agp_jax.training.experiment import (
    Experiment,
    as_variables,
    cost_per_item,
    cut_experiment,
    cut_of_masks,
    set_up,
)
from agp_jax.trees import PyTree, flatten_with_paths


class TensorPlan(NamedTuple):
    """A convolution or dense kernel, before any cut and in the end.

    Attributes:
      path: our name.
      published_name: that of the tensor in published tables; None if there is none.
      rules: those that prune it, the first until a cut.
      cells: how many cells it is divided into by the first of them, before any cut.
      before: its shape and cost before any cut.
      after: its shape, cost and non-zero weights in the end.
    """

    path: str
    published_name: str | None
    rules: tuple[Rule, ...]
    cells: int | None
    before: LeafCost
    after: LeafCost


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an experiment will end with.

    Attributes:
      rules: those that prune, in their order.
      tensors: every convolution and dense kernel: what published results count.
      before: the cost of the model for one item, before any cut.
      after: the same in the end, with non-zero weights.
      average_weights: how many weights are not zero on average over training.
      training_macs: the multiply-adds of the whole training, backward passes included;
        zeros are multiplied, what is cut out is not.
    """

    rules: tuple[Rule, ...]
    tensors: tuple[TensorPlan, ...]
    before: Cost
    after: Cost
    average_weights: float
    training_macs: int

    @property
    def nonzero(self) -> int:
        """How many weights are not zero in the end."""
        assert self.after.nonzero_weights is not None  # it was counted
        return self.after.nonzero_weights

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that is zero in the end or has been cut out."""
        return 1.0 - self.nonzero / self.before.weight_params

    @property
    def sparsity_left(self) -> float:
        """The fraction of zeros among the weights after any cut, as published."""
        return 1.0 - self.nonzero / self.after.weight_params

    @property
    def is_cut(self) -> bool:
        """Whether anything is cut out."""
        return any(t.before.shape != t.after.shape for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, in the words of a run's summary."""
        before, after = (describe_cost(cost) for cost in (self.before, self.after))
        return {
            "sparsity": self.sparsity,
            "nonzero": self.nonzero,
            **before,
            "cut": {"before": before, "after": after} if self.is_cut else None,
            "average_weights": self.average_weights,
            "training_macs": self.training_macs,
            "rules": [_describe_rule(rule) for rule in self.rules],
            "tensors": [
                {
                    "path": tensor.path,
                    "published_name": tensor.published_name,
                    "rules": [rule.pattern for rule in tensor.rules],
                    "cells": tensor.cells,
                    "shape": list(tensor.before.shape),
                    "shape_left": list(tensor.after.shape),
                    "nonzero": tensor.after.nonzero,
                }
                for tensor in self.tensors
            ],
        }


def _describe_rule(rule: Rule) -> dict[str, Any]:
    assert rule.schedule is not None  # it prunes
    steps, levels = rule.schedule.events()
    return {
        "pattern": rule.pattern,
        "structure": str(rule.structure),
        "steps": steps.tolist(),
        "sparsities": levels.tolist(),
    }


def make_plan(experiment: Experiment) -> Plan:
    """What `experiment`, of which nothing has been cut yet, will end with.

    With `scope="rule"` the counts of single tensors are those of random weights; their
    sum is exact.
    """
    first, cut_step = experiment, experiment.config.prune.cut_step
    if experiment.couplings or any(rule.ranks_together for rule in experiment.rules):
        experiment, after = _rank(experiment)
    else:
        after = _count(experiment)
    before, course = first.whole_cost, make_course(first)
    if experiment.cut:
        course = course.then(make_course(experiment), cut_step)
    steps = first.config.steps
    return Plan(
        rules=tuple(rule for rule in first.rules if rule.structure),
        tensors=_pair(first, experiment, before, after),
        before=before,
        after=after,
        average_weights=course.average_weights(steps),
        training_macs=training_macs(first, course),
    )


def _count(experiment: Experiment) -> Cost:
    """The cost in the end of an experiment that nothing needs to be ranked for."""
    counts = count_nonzero_at(experiment.config.steps, rank_experiment(experiment))
    start = "params/"
    leaves = [
        dataclasses.replace(leaf, nonzero=int(counts[leaf.path.removeprefix(start)]))
        if leaf.path.startswith(start)
        else leaf
        for leaf in experiment.cost.leaves
    ]
    return dataclasses.replace(experiment.cost, leaves=tuple(leaves))


def _rank(experiment: Experiment) -> tuple[Experiment, Cost]:
    """The experiment and its cost in the end, by masks of random weights."""
    cut_step = experiment.config.prune.cut_step
    params = _draw(experiment.whole["params"])
    masks, begin = _keep_all(experiment), 0
    if experiment.couplings and cut_step:
        masks = _prune(experiment, params, masks, 0, cut_step)
        cut, begin = cut_of_masks(experiment, masks), cut_step + 1
        experiment = cut_experiment(experiment, cut)
        params, masks = (thin(tree, cut.subtree("params")) for tree in (params, masks))
    masks = _prune(experiment, params, masks, begin, experiment.config.steps)
    variables = as_variables(experiment.shapes)
    variables["params"] = apply_masks(params, masks)
    cost = cost_per_item(experiment.task, experiment.predict, variables)
    return experiment, cost


def find_twin(config: Config) -> Config:
    """The dense experiment of equal size that `config.prune.twin` asks for.

    It has the same model, as wide as makes its weights nearest to those of the pruned
    one. Without a `twin` the config comes back as it is.

    Raises:
      ConfigError: if the model is one of a task of your own, whose width is not known
        here, or no width makes one.
    """
    asked = config.prune.twin
    if not asked or not config.prune.enabled:
        return config
    if config.task is not None:
        raise ConfigError(
            "config.prune.twin chooses the width of a bundled model; with config.task "
            "give your dense model its width yourself"
        )
    pruned = dataclasses.replace(config, prune=dataclasses.replace(config.prune))
    pruned.prune.twin = ""
    plan = make_plan(set_up(pruned))
    wanted = plan.nonzero if asked == "final" else plan.average_weights
    dense = dataclasses.replace(config.prune, enabled=False)

    def of_width(width: int) -> Config:
        model = dataclasses.replace(config.model, width=width)
        return dataclasses.replace(config, model=model, prune=dense, distill=Distill())

    def weights(width: int) -> int:
        return set_up(of_width(width)).whole_cost.weight_params

    unit = 2 * config.model.num_heads if config.model.name == "gpt" else 1
    narrow, wide = 1, 2  # in units; of fewer and of more weights than wanted
    while weights(wide * unit) < wanted:
        narrow, wide = wide, 2 * wide
    while wide - narrow > 1:
        middle = (narrow + wide) // 2
        if weights(middle * unit) < wanted:
            narrow = middle
        else:
            wide = middle
    return of_width(
        unit * min((narrow, wide), key=lambda n: abs(weights(n * unit) - wanted))
    )


def _draw(shapes: PyTree) -> PyTree:
    """Random weights, none of them zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.random(x.shape, np.float32) + 1, shapes)


def _keep_all(experiment: Experiment) -> PyTree:
    """Masks before any event."""
    if not experiment.rules:
        return {}
    shapes = get_masks(experiment.shapes.opt_state)
    return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)


def _prune(
    experiment: Experiment, params: PyTree, masks: PyTree, first: int, last: int
) -> PyTree:
    """The masks after the events of the steps from `first` to `last`.

    Of the events of a rule it is enough to make the last one.
    """

    @jax.jit
    def make(params: PyTree, masks: PyTree, step: Any) -> PyTree:
        return make_masks(
            params, experiment.rules, step, masks, couplings=experiment.ranking
        )

    ends = {last_event([rule]) for rule in experiment.rules if rule.schedule}
    for step in sorted({min(end, last) for end in ends if end >= first}):
        masks = make(params, masks, np.int32(step))
    return masks


def _pair(
    first: Experiment, last: Experiment, before: Cost, after: Cost
) -> tuple[TensorPlan, ...]:
    names = _published_names(first)
    start = "params/"
    rules: dict[str, tuple[Rule, ...]] = {}
    for experiment in (first, last):
        paths, _, treedef = flatten_with_paths(experiment.shapes.params)
        matched = treedef.flatten_up_to(experiment.matched)
        for path, rule in zip(paths, matched, strict=True):
            known = rules.setdefault(path, ())
            if rule is not None and rule not in known:
                rules[path] = (*known, rule)
    end = {leaf.path: leaf for leaf in after.leaves}
    tensors = []
    for leaf in before.weights:
        path = leaf.path.removeprefix(start)
        tensors.append(
            TensorPlan(
                path=path,
                published_name=names.get(leaf.path),
                rules=rules[path],
                cells=math.prod(count_cells(rules[path][0], leaf.shape))
                if rules[path]
                else None,
                before=leaf,
                after=end[leaf.path],
            )
        )
    return tuple(tensors)


def _published_names(experiment: Experiment) -> dict[str, str]:
    if experiment.config.task is not None:
        return {}
    try:
        return published_names(experiment.config.model.name, experiment.whole)
    except ValueError:  # a model that nobody has published weights of
        return {}
