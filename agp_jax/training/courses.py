"""Courses: how many weights a run has in each step, and what it has computed.

A run that prunes early trains a smaller model for longer, so arXiv:2501.12486 compares
sparse and dense training by the average number of weights over all steps. Everything
here is counted from schedules, without masks.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import jax

from agp_jax.planning import Ranking, count_nonzero_at, rank
from agp_jax.training.config import teacher_step
from agp_jax.training.experiment import Experiment
from agp_jax.trees import flatten_with_paths


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
    ranking = rank_experiment(experiment)
    counts = [count_nonzero_at(step, ranking) for step in steps]
    return Course(
        tuple(steps),
        tuple(float(sum(count[path] for path in weights)) for count in counts),
        (experiment.cost.macs,) * len(steps),
    )


def rank_experiment(experiment: Experiment) -> Ranking:
    """What an experiment's rules rank, as it is before or after its cut."""
    paths, shapes, treedef = flatten_with_paths(experiment.shapes.params)
    matched = treedef.flatten_up_to(experiment.matched)
    rules = {
        path: rule
        for path, rule in zip(paths, matched, strict=True)
        if rule in experiment.rules
    }
    return rank(dict(zip(paths, shapes, strict=True)), rules, experiment.ranking)
