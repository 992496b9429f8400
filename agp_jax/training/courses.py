"""Courses: how many weights a run has in each step, and what it has computed.

A run that prunes early trains a smaller model for longer, so arXiv:2501.12486 compares
sparse and dense training by the average number of weights over all steps. Everything
here is counted from schedules, without masks.
"""

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax

from agp_jax.cells import Leaf
from agp_jax.contests import count_removed
from agp_jax.rules import Rule
from agp_jax.structures import num_cells
from agp_jax.training.config import teacher_step
from agp_jax.training.experiment import Experiment
from agp_jax.trees import Shape, flatten_with_paths
from agp_jax.units import rank_groups


class Course(NamedTuple):
    """What holds from each of some steps on.

    Attributes:
      steps: increasing, from 0.
      nonzero: how many weights are not zero in the steps that begin there.
      macs: multiply-adds for one item, forward.
    """

    steps: tuple[int, ...]
    nonzero: tuple[float, ...]
    macs: tuple[int, ...]

    def then(self, later: "Course", step: int) -> "Course":
        """This course until `step`, and from there on the later one."""
        end = bisect.bisect_left(self.steps, step)
        start = bisect.bisect_right(later.steps, step) - 1
        return Course(
            (*self.steps[:end], step, *later.steps[start + 1 :]),
            (*self.nonzero[:end], *later.nonzero[start:]),
            (*self.macs[:end], *later.macs[start:]),
        )

    def average_weights(self, num_steps: int) -> float:
        """The mean number of non-zero weights over the first `num_steps` steps."""
        return _integral(self.steps, self.nonzero, num_steps) / num_steps

    def training_macs(self, num_steps: int, items_per_step: int) -> int:
        """Multiply-adds of so many steps, of which a backward pass is two forward."""
        return 3 * items_per_step * int(_integral(self.steps, self.macs, num_steps))


def _integral(steps: Sequence[int], values: Sequence[float], num_steps: int) -> float:
    ends = [min(end, num_steps) for end in (*steps[1:], num_steps)]
    lengths = [max(end - begin, 0) for begin, end in zip(steps, ends, strict=True)]
    return sum(length * value for length, value in zip(lengths, values, strict=True))


def training_macs(experiment: Experiment, course: Course) -> int:
    """Multiply-adds of a whole training, with what its teacher predicts."""
    steps, items = experiment.config.steps, items_per_step(experiment)
    taught = teacher_step(experiment.config)
    lessons = 0 if taught is None else steps - taught
    teaching = lessons * items * experiment.whole_cost.macs
    return course.training_macs(steps, items) + teaching


def items_per_step(experiment: Experiment) -> int:
    """How many items a training step sees, over all devices."""
    task = experiment.task
    rows = len(jax.tree.leaves(task.example)[0])
    return task.num_items * experiment.config.batch_size // rows


def make_course(experiment: Experiment) -> Course:
    """How an experiment, as it is before or after its cut, goes on without another."""
    schedules = {rule.schedule for rule in experiment.rules if rule.schedule}
    events = {int(step) for s in schedules for step in s.events()[0]}
    steps = sorted({0, *events})
    weights = [x.path.removeprefix("params/") for x in experiment.cost.weights]
    counts = [count_nonzero_by_path(experiment, step) for step in steps]
    return Course(
        tuple(steps),
        tuple(float(sum(count[path] for path in weights)) for count in counts),
        (experiment.cost.macs,) * len(steps),
    )


def count_nonzero_by_path(experiment: Experiment, step: int) -> dict[str, Fraction]:
    """How many entries of each parameter are not zero at a step, as schedules have it.

    Whole numbers, but where cells or units of several tensors are ranked together:
    there each loses an equal part, and only the sum of cells is exact.
    """
    paths, shapes, treedef = flatten_with_paths(experiment.shapes.params)
    matched = treedef.flatten_up_to(experiment.matched)
    rules = {
        path: rule
        for path, rule in zip(paths, matched, strict=True)
        if rule in experiment.rules
    }
    arrays = dict(zip(paths, shapes, strict=True))
    gone = _slices_gone(experiment, rules, arrays, step)
    counts = {}
    for path, array in arrays.items():
        kept = Fraction(1)
        for axis, size in enumerate(array.shape):
            kept *= size - gone[path, axis]
        rule = rules.get(path)
        if rule is not None and not (experiment.ranking and rule.prunes_units):
            kept *= 1 - _removed_part(rule, path, rules, arrays, step)
        counts[path] = kept
    return counts


def _removed_part(
    rule: Rule,
    path: str,
    rules: Mapping[str, Rule],
    arrays: Mapping[str, Any],
    step: int,
) -> Fraction:
    """The part of a parameter's cells that its rule has removed."""
    rows, cells = count_cells(rule, arrays[path].shape)
    if rule.scope == "rule":
        peers = [arrays[p].shape for p, other in rules.items() if other == rule]
        cells = sum(math.prod(count_cells(rule, shape)) for shape in peers)
    return Fraction(count_removed(rule, cells, step), cells) if cells else Fraction(0)


def count_cells(rule: Rule, shape: Shape) -> tuple[int, int]:
    """The separately ranked rows of a parameter, and the cells of each."""
    assert rule.structure is not None  # it prunes
    rows, tensor = rule.divide(shape)
    return math.prod(rows), num_cells(rule.structure, tensor)


def _slices_gone(
    experiment: Experiment,
    rules: Mapping[str, Rule],
    arrays: Mapping[str, Any],
    step: int,
) -> dict[tuple[str, int], Fraction]:
    """How many slices along each leaf's axis have gone with coupled units."""
    gone: dict[tuple[str, int], Fraction] = defaultdict(Fraction)
    if experiment.ranking is None:
        return gone
    leaves = {
        path: Leaf(path, rule, arrays[path], None, None, None)
        for path, rule in rules.items()
    }
    ranked = rank_groups(leaves, arrays, experiment.ranking)
    for group, rule, _ in ranked:
        units = group.num_units
        if rule.scope == "rule":
            units = sum(math.prod(g.shape) for g, other, _ in ranked if other == rule)
        removed = Fraction(count_removed(rule, units, step) * group.num_units, units)
        for member in group.members:
            gone[member.path, member.axis] += removed * member.indices.shape[1]
    return gone
