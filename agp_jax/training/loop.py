"""Runs an experiment: trains, prunes, evaluates, saves and reports."""

import dataclasses
import functools
import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import CheckpointManager
from rich.console import Console

from agp_jax.costs import Cost
from agp_jax.thinning.cuts import Cut
from agp_jax.training import checkpoint, reports
from agp_jax.training.config import (
    Config,
    default_dict,
    list_events,
    make_rules,
    teacher_step,
    to_dict,
)
from agp_jax.training.counts import describe_cost, total_sparsity, total_target
from agp_jax.training.courses import Course, make_course, training_macs
from agp_jax.training.evaluation import (
    EvalStep,
    count_state,
    describe_training,
    evaluate,
)
from agp_jax.training.experiment import (
    Experiment,
    State,
    appoint_teacher,
    as_variables,
    cut_experiment,
    cut_state,
    init_state,
    place_state,
    plan_experiment_cut,
    read_weights,
    set_up,
    with_teacher,
)
from agp_jax.training.meshes import put_batch
from agp_jax.training.optimizers import note_loss, rate_of_step
from agp_jax.training.pictures import Baseline, plot_metrics
from agp_jax.training.plans import Plan, find_twin, make_plan
from agp_jax.training.printing import say
from agp_jax.training.processes import check_same, failing_together
from agp_jax.training.progress import show_progress, show_wait
from agp_jax.training.records import (
    append_metrics,
    read_dense_summary,
    read_metrics,
    rewind_metrics,
    write_plan,
    write_summary,
)
from agp_jax.training.steps import Sums, make_eval_step, make_train_step
from agp_jax.training.tasks import Batch, Splits, Task
from agp_jax.training.workdirs import WorkdirError, check_workdir
from agp_jax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run holds beside its state; a cut replaces the first four."""

    experiment: Experiment
    course: Course
    train_step: Callable[[State, Batch], tuple[State, Sums]]
    eval_step: EvalStep
    splits: Splits
    manager: CheckpointManager
    workdir: Path
    console: Console


def run(
    config: Config, workdir: str | Path, console: Console | None = None
) -> dict | None:
    """Trains the experiment in `workdir`, or goes on where it was stopped there.

    Leaves `metrics.jsonl`, `summary.json`, a picture and checkpoints in `workdir`. All
    processes of a run call this; the first one writes and reports, and each saves its
    part of the checkpoints.

    Args:
      config: what to run.
      workdir: an empty, new or earlier directory of the same experiment, which all
        processes share.
      console: where progress and the report go; by default the standard output of the
        first process.

    Returns:
      The summary; None on other processes than the first.

    Raises:
      ConfigError, DataError, WeightsError, WorkdirError, CheckpointError: before any
        training, if the config, the data, the weights to start from, the work directory
        or its checkpoint is not fit for it.
      ProcessError: if that is so on another process, or the processes were started
        with different configs; or during training, if their masks differ.
    """
    if console is None:
        console = Console(quiet=jax.process_index() > 0)
    workdir = Path(workdir)
    with show_wait(console, "setting up"), failing_together():
        config = find_twin(config)
        experiment = set_up(config)
        splits = experiment.task.load()
        resumes = checkpoint.has_steps(workdir)
        weights = None if resumes else read_weights(experiment)
    check_same([_checksum(config)], "the processes were started with different configs")
    check_workdir(workdir, to_dict(config), default_dict())
    with checkpoint.open_checkpoints(workdir) as manager:
        with show_wait(
            console,
            "reading the checkpoint" if resumes else "making the initial weights",
        ):
            course = make_course(experiment)
            if resumes:
                _check_saved(manager, splits)
                experiment, state = _resume(experiment, manager)
            else:
                state = init_state(experiment, weights)
            step = int(state.step)
        with failing_together():
            if jax.process_index() == 0:
                rewind_metrics(workdir, step)
        reports.announce(console, experiment, workdir, step)
        run = Run(
            experiment=experiment,
            train_step=make_train_step(experiment),
            eval_step=make_eval_step(experiment),
            course=_course_of(course, experiment),
            splits=splits,
            manager=manager,
            workdir=workdir,
            console=console,
        )
        if step < experiment.config.steps:
            run, state = _train(run, state)
        return _finish(run, state)


def show_plan(
    config: Config, workdir: str | Path | None = None, console: Console | None = None
) -> Plan:
    """Prints what an experiment will end with; with a `workdir` also writes it there.

    Needs no data and trains nothing.

    Raises:
      ConfigError: if the config is not fit to run.
      WorkdirError: if `plan.json` cannot be written.
    """
    console = console or Console()
    with show_wait(console, "planning"):
        experiment = set_up(find_twin(config))
        plan = make_plan(experiment)
    reports.print_plan(console, plan, experiment)
    if workdir is not None:
        path = write_plan(Path(workdir), plan)
        say(console, f"wrote {path}")
    return plan


def _checksum(config: Config) -> int:
    """32 bits that tell configs apart, layouts on devices included."""
    values = [to_dict(config), dataclasses.asdict(config.devices)]
    return zlib.crc32(json.dumps(values).encode())


def _resume(
    experiment: Experiment, manager: CheckpointManager
) -> tuple[Experiment, State]:
    taught = teacher_step(experiment.config)
    step = checkpoint.latest_step(manager) or 0
    if taught is not None and taught < step < experiment.config.steps:
        experiment = with_teacher(experiment)
    cut = checkpoint.read_value(manager, "cut")
    if cut is not None:
        experiment = cut_experiment(experiment, Cut.from_dict(cut))
    _, items = checkpoint.restore(manager, as_items(experiment.shapes))
    variables = items["variables"]
    params = variables.pop("params")
    return experiment, State(
        params=params,
        collections=variables,
        teacher=items.get("teacher"),
        **items["training"],
    )


def _check_saved(manager: CheckpointManager, splits: Splits) -> None:
    """Whether the data is what the run began with."""
    for name, value in splits.saved.items():
        stored = checkpoint.read_value(manager, name)
        if stored != json.loads(json.dumps(value)):
            raise WorkdirError(
                f"the data's {name} is not that of the checkpoints in "
                f"{manager.directory}: resume with the data that the run began with, "
                f"or give a new work directory"
            )


def as_items(state: State) -> dict[str, PyTree]:
    """A state as it is saved: what a model needs, and what only training does."""
    items = {
        "variables": as_variables(state),
        "training": {"step": state.step, "opt_state": state.opt_state},
    }
    return items if state.teacher is None else items | {"teacher": state.teacher}


def _train(run: Run, state: State) -> tuple[Run, State]:
    config = run.experiment.config
    first_step, taught = int(state.step), teacher_step(config)
    batches = run.splits.train(first_step)
    recent: list[Sums] = []  # on the devices: fetching them would wait
    compiled, untimed, began = None, 0, time.perf_counter()
    with show_progress(run.console, first_step, config.steps) as show:
        for step in range(first_step + 1, config.steps + 1):
            if step - 1 == taught:
                run, state = _appoint_teacher(run, state)
            if run.train_step is not compiled:
                show(step - 1, doing="compiling")
            batch = put_batch(next(batches), run.experiment.mesh)
            state, sums = run.train_step(state, batch)
            recent.append(sums)
            if run.train_step is not compiled:  # it was now, which is no part of a step
                jax.block_until_ready(sums)
                compiled, untimed = run.train_step, len(recent)
                began = time.perf_counter()
            if step % config.log_every and step < config.steps:
                show(step)
                continue
            jax.block_until_ready(sums)  # or the clock would show when steps were asked
            seconds = time.perf_counter() - began
            speed = _describe_speed(run.experiment.task, recent[untimed:], seconds)
            show(step, doing="evaluating")
            run, state, record = _take_stock(run, state, recent, speed)
            show(step, reports.describe_record(run.experiment.task, record))
            if step % config.checkpoint_every == 0 or step == config.steps:
                show(step, doing="saving")
                _save(run, state, record)
            recent, untimed, began = [], 0, time.perf_counter()
    return run, state


def _describe_speed(
    task: Task, timed: Sequence[Sums], seconds: float
) -> dict[str, float | None]:
    """How fast steps were; None where there was none but what had to be compiled."""
    num_items = sum(float(sums["count"]) for sums in jax.device_get(timed))
    return {
        "seconds_per_step": seconds / len(timed) if timed else None,
        f"{task.item}s_per_second": num_items / seconds if timed else None,
    }


def _take_stock(
    run: Run, state: State, recent: Sequence[Sums], speed: Mapping[str, float | None]
) -> tuple[Run, State, dict[str, Any]]:
    """What is due after a window of steps: the cut, evaluation, a line of metrics."""
    step, config = int(state.step), run.experiment.config
    task, before_cut = run.experiment.task, {}
    if step == config.prune.cut_step and run.experiment.couplings:
        name = f"test_{task.quality.name}"
        before_cut[f"masked_{name}"] = _judge(run, state)[name]
        run, state = _cut_out(run, state)
    judged = _judge(run, state)
    record = {
        **describe_training(run.experiment, state, recent),
        "average_weights": run.course.average_weights(step),
        **judged,
        **before_cut,
        "learning_rate": rate_of_step(config, state.opt_state, step),
        **speed,
    }
    loss = judged[f"{_judging_split(run)}_loss"]
    state = state._replace(opt_state=note_loss(config, state.opt_state, loss, step))
    if jax.process_index() == 0:
        append_metrics(run.workdir, record)
    return run, state, record


def _judge(run: Run, state: State) -> dict[str, float]:
    return evaluate(run.experiment, run.eval_step, run.splits, state)


def _judging_split(run: Run) -> str:
    """The split that decides about the learning rate and the best checkpoint."""
    return "validation" if run.splits.validation else "test"


def _save(run: Run, state: State, record: Mapping[str, Any]) -> None:
    experiment, score = run.experiment, None
    if record["step"] == experiment.config.steps:
        state = state._replace(teacher=None)  # nothing is left to learn from it
    if record["step"] >= experiment.target_step:
        quality = experiment.task.quality
        score = record[f"{_judging_split(run)}_{quality.name}"]
        score = score if quality.higher_is_better else -score
    values = dict(run.splits.saved)
    if experiment.cut:
        values["cut"] = experiment.cut.to_dict()
    checkpoint.save(
        run.manager, record["step"], as_items(state), score=score, values=values
    )


def _appoint_teacher(run: Run, state: State) -> tuple[Run, State]:
    """The run and its state with what the model is now as its teacher."""
    experiment = with_teacher(run.experiment)
    state = place_state(experiment, appoint_teacher, state)
    train_step = make_train_step(experiment)
    return dataclasses.replace(run, experiment=experiment, train_step=train_step), state


def _cut_out(run: Run, state: State) -> tuple[Run, State]:
    """The run and its state without the units that are masked."""
    cut = plan_experiment_cut(run.experiment, state)
    smaller = cut_experiment(run.experiment, cut)
    state = place_state(smaller, functools.partial(cut_state, cut=cut), state)
    reports.print_cut(run.console, smaller, int(state.step))
    run = dataclasses.replace(
        run,
        experiment=smaller,
        course=_course_of(run.course, smaller),
        train_step=make_train_step(smaller),
        eval_step=make_eval_step(smaller),
    )
    return run, state


def _course_of(whole: Course, experiment: Experiment) -> Course:
    """The course of a run, of which the whole model's is known, and of any cut."""
    if experiment.cut is None:
        return whole
    return whole.then(make_course(experiment), experiment.config.prune.cut_step)


def _finish(run: Run, state: State) -> dict | None:
    """Writes the summary and the picture, and prints the report."""
    experiment = run.experiment
    counts = count_state(experiment, state)
    best_step = checkpoint.best_step(run.manager)
    if jax.process_index() > 0:
        return None
    quality = experiment.task.quality
    judged = f"test_{quality.name}"
    records = read_metrics(run.workdir)
    summary = {
        "step": int(state.step),
        judged: records[-1][judged],
        "best_step": best_step,
        f"best_{judged}": {r["step"]: r[judged] for r in records}.get(best_step),
        "sparsity": total_sparsity(counts),
        "sparsity_target": total_target(counts),
        "nonzero": sum(c.nonzero for c in counts),
        **describe_cost(experiment.whole_cost),
        **_describe_training(run),
        "cut": _describe_cut(experiment, records) if experiment.cut else None,
        "config": to_dict(experiment.config),
    }
    written = [
        write_summary(run.workdir, summary),
        plot_metrics(
            run.workdir,
            records,
            quality,
            events=list_events(make_rules(experiment.config)),
            cut_step=experiment.config.prune.cut_step if experiment.cut else None,
            baseline=_find_baseline(run),
        ),
    ]
    reports.print_result(run.console, experiment.task, counts, summary)
    for path in written:
        say(run.console, f"wrote {path}")
    return summary


def _find_baseline(run: Run) -> Baseline | None:
    """How good the dense model is: of a run beside this one, or else as published."""
    config, name = run.experiment.config, run.experiment.task.quality.name
    if not config.prune.enabled:
        return None
    summary = read_dense_summary(run.workdir, to_dict(config))
    if summary is not None:
        return Baseline("dense", summary[f"test_{name}"])
    published = config.published
    if published and name == "accuracy" and published.base_top1:
        return Baseline("dense, published", float(published.base_top1) / 100)
    if published and name == "perplexity" and published.base_perplexity:
        return Baseline("dense, published", float(published.base_perplexity))
    return None


def _describe_training(run: Run) -> dict[str, Any]:
    """What the whole training has had in weights and computed."""
    return {
        "average_weights": run.course.average_weights(run.experiment.config.steps),
        "training_macs": training_macs(run.experiment, run.course),
    }


def _describe_cut(
    experiment: Experiment, records: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """What the model was before the cut and is after it.

    Its quality is that at the cut, and seconds are medians over the run.
    """
    cut_step = experiment.config.prune.cut_step
    judged = f"test_{experiment.task.quality.name}"
    (at_cut,) = (r for r in records if r["step"] == cut_step)

    def describe(cost: Cost, quality: float, seconds: list[float]) -> dict[str, Any]:
        return {
            **describe_cost(cost),
            judged: quality,
            "seconds_per_step": float(np.median(seconds)) if seconds else None,
        }

    # Some windows have none, and neither do records of earlier versions.
    timed = [r for r in records if r.get("seconds_per_step") is not None]
    before = [r["seconds_per_step"] for r in timed if r["step"] <= cut_step]
    after = [r["seconds_per_step"] for r in timed if r["step"] > cut_step]
    return {
        "before": describe(experiment.whole_cost, at_cut[f"masked_{judged}"], before),
        "after": describe(experiment.cost, at_cut[judged], after),
    }
