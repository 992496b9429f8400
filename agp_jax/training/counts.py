"""Counts: how much of every weight is left, and how much was asked to go."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from agp_jax.boxes import count_nonzero
from agp_jax.costs import Cost
from agp_jax.rules import Rule
from agp_jax.trees import PyTree, flatten_with_paths


class TensorCount(NamedTuple):
    """One kernel or table of rows, and how much of it is left.

    `shape` is that before any cut, `left` the one after it; what was cut out counts as
    zero. `target` is the sparsity its rule asks for: of it, of all tensors of the rule,
    of the units that it is part of or of the rest that a cut has left, as `target_of`
    says; None where no rule prunes it.
    """

    path: str
    shape: tuple[int, ...]
    left: tuple[int, ...]
    nonzero: int
    target: float | None
    target_of: Literal["tensor", "rule", "units", "rest"]

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        return 1.0 - self.nonzero / self.weights


def count_weights(
    params: PyTree, matched: PyTree, step: int, *, before: Cost, coupled: bool
) -> list[TensorCount]:
    """Counts the non-zeros of every weight, as `Cost.weights` tells which these are.

    Biases and normalisation are left out, as they are in published pruning results.

    Args:
      params: the parameters.
      matched: the rules by parameter, from `match_rules`.
      step: the number of updates done, which fixes the targets.
      before: the cost of the parameters before anything was cut out; what was counts
        as zero.
      coupled: whether rules with filters, channels or heads prune units.
    """
    paths, leaves, treedef = flatten_with_paths(params)
    arrays = dict(zip(paths, leaves, strict=True))
    rules = dict(zip(paths, treedef.flatten_up_to(matched), strict=True))
    left = [arrays[whole.path] for whole in before.weights]
    return [
        TensorCount(
            whole.path,
            whole.shape,
            array.shape,
            nonzero,
            rule.schedule.sparsity_at(step) if rule else None,
            _target_of(rule, coupled, is_cut=array.shape != whole.shape),
        )
        for whole, array, nonzero, rule in zip(
            before.weights,
            left,
            count_nonzero(left),
            [rules[whole.path] for whole in before.weights],
            strict=True,
        )
    ]


def _target_of(rule: Rule | None, coupled: bool, *, is_cut: bool) -> Any:
    if rule is None:
        return "tensor"
    if rule.prunes_units and (coupled or is_cut):
        return "units"
    return "rest" if is_cut and rule.scope == "tensor" else rule.scope


def describe_cost(cost: Cost) -> dict[str, int]:
    """The size of a model in the words of `summary.json` and `plan.json`."""
    return {
        "weights": cost.weight_params,
        "all_params": cost.subtree("params").params,
        "macs": cost.macs,
    }


def total_sparsity(counts: Sequence[TensorCount]) -> float:
    """The fraction of all counted weights that are zero."""
    return 1.0 - sum(c.nonzero for c in counts) / sum(c.weights for c in counts)


def total_target(counts: Sequence[TensorCount]) -> float | None:
    """The fraction of all counted weights that the rules ask to remove.

    None where they count units, which may share weights, or what a cut has left.
    """
    if any(c.target_of in ("units", "rest") for c in counts):
        return None
    asked = sum((c.target or 0.0) * c.weights for c in counts)
    return asked / sum(c.weights for c in counts)
