"""What an experiment will end with, found without data or training.

Every number is counted on masks that `make_masks` has made and on what `thin` has left,
of weights drawn at random: which weights go depends on them, how many does not.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from agp_jax.costs import Cost, LeafCost
from agp_jax.masks import apply_masks, make_masks
from agp_jax.models.torch_weights import published_names
from agp_jax.pruning import get_masks
from agp_jax.rules import Rule
from agp_jax.structures import num_cells
from agp_jax.thinning.trees import thin
from agp_jax.training.config import last_event
from agp_jax.training.experiment import (
    Experiment,
    as_variables,
    cost_per_item,
    cut_experiment,
    cut_of_masks,
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
    """

    rules: tuple[Rule, ...]
    tensors: tuple[TensorPlan, ...]
    before: Cost
    after: Cost

    @property
    def nonzero(self) -> int:
        """How many weights are not zero in the end."""
        assert self.after.nonzero_weights is not None  # it was counted
        return self.after.nonzero_weights

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the weights after any cut."""
        return 1.0 - self.nonzero / self.after.weight_params

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, the sparsity in percent."""
        return {
            "params_dense": self.before.weight_params,
            "params": self.after.weight_params,
            "nonzero": self.nonzero,
            "sparsity": 100 * self.sparsity,
            "macs_dense": self.before.macs,
            "macs": self.after.macs,
            "rules": [_describe_rule(rule) for rule in self.rules],
            "tensors": [
                {
                    "path": tensor.path,
                    "published_name": tensor.published_name,
                    "rules": [rule.pattern for rule in tensor.rules],
                    "cells": tensor.cells,
                    "shape_dense": list(tensor.before.shape),
                    "shape": list(tensor.after.shape),
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
    before = first.whole_cost
    after = cost_per_item(experiment.task, experiment.predict, variables)
    return Plan(
        rules=tuple(rule for rule in first.rules if rule.structure),
        tensors=_pair(first, experiment, before, after),
        before=before,
        after=after,
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
                cells=_count_cells(rules[path][0], leaf) if rules[path] else None,
                before=leaf,
                after=end[leaf.path],
            )
        )
    return tuple(tensors)


def _count_cells(rule: Rule, leaf: LeafCost) -> int:
    assert rule.structure is not None  # it prunes
    rows, tensor = leaf.shape[: rule.stacked_axes], leaf.shape[rule.stacked_axes :]
    return math.prod(rows) * num_cells(rule.structure, tensor)


def _published_names(experiment: Experiment) -> dict[str, str]:
    if experiment.config.task is not None:
        return {}
    try:
        return published_names(experiment.config.model.name, experiment.whole)
    except ValueError:  # a model that nobody has published weights of
        return {}
