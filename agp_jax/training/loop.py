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
from rich.console import Console

from agp_jax.costs import Cost
from agp_jax.data.batches import eval_batches, train_batches
from agp_jax.data.sources import AnySource
from agp_jax.masks import fingerprint
from agp_jax.pruning import get_masks
from agp_jax.rules import Rule
from agp_jax.thinning.cuts import Cut
from agp_jax.training import checkpoint, reports
from agp_jax.training.config import Config, target_step, to_dict
from agp_jax.training.counts import (
    TensorCount,
    count_weights,
    total_sparsity,
    total_target,
)
from agp_jax.training.experiment import (
    Experiment,
    Sources,
    State,
    as_variables,
    cost_before,
    cost_now,
    cut_experiment,
    cut_state,
    init_state,
    load_sources,
    make_eval_step,
    make_train_step,
    place_state,
    plan_experiment_cut,
    read_weights,
    set_up,
)
from agp_jax.training.meshes import put_batch
from agp_jax.training.optimizers import make_learning_rate, note_loss, plateau_scale
from agp_jax.training.plans import Plan, make_plan
from agp_jax.training.processes import check_same, failing_together
from agp_jax.training.records import (
    append_metrics,
    read_metrics,
    rewind_metrics,
    write_plan,
    write_summary,
)
from agp_jax.training.workdirs import check_workdir
from agp_jax.trees import PyTree


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
    with failing_together():
        experiment = set_up(config)
        sources = load_sources(experiment)
        weights = None if checkpoint.has_steps(workdir) else read_weights(experiment)
    check_same([_checksum(config)], "the processes were started with different configs")
    check_workdir(workdir, to_dict(config))
    with checkpoint.open_checkpoints(workdir) as manager:
        experiment, state = _start_or_resume(experiment, weights, manager)
        step = int(state.step)
        with failing_together():
            if jax.process_index() == 0:
                rewind_metrics(workdir, step)
        _announce(console, experiment, workdir, step)
        experiment, state = _train(
            experiment, sources, state, manager, workdir, console
        )
        return _finish(experiment, state, manager, workdir, console)


def show_plan(
    config: Config, workdir: str | Path | None = None, console: Console | None = None
) -> Plan:
    """Prints what an experiment will end with; with a `workdir` also writes it there.

    Needs no data and trains nothing.

    Raises:
      ConfigError: if the config is not fit to run.
      WorkdirError: if `plan.json` cannot be written.
    """
    if console is None:
        console = Console()
        if not console.is_terminal:
            console.width = 120  # tables in a file keep paths whole
    plan = make_plan(set_up(config))
    reports.print_plan(console, plan, config)
    if workdir is not None:
        path = write_plan(Path(workdir), plan)
        console.print(f"wrote {path}", soft_wrap=True)
    return plan


def _checksum(config: Config) -> int:
    """32 bits that tell configs apart, layouts on devices included."""
    values = [to_dict(config), dataclasses.asdict(config.devices)]
    return zlib.crc32(json.dumps(values).encode())


def _start_or_resume(
    experiment: Experiment, weights: PyTree, manager: Any
) -> tuple[Experiment, State]:
    if checkpoint.latest_step(manager) is None:
        return experiment, init_state(experiment, weights or read_weights(experiment))
    cut = checkpoint.read_value(manager, "cut")
    if cut is not None:
        experiment = cut_experiment(experiment, Cut.from_dict(cut))
    _, items = checkpoint.restore(manager, as_items(experiment.shapes))
    return experiment, State(**items["variables"], **items["training"])


def as_items(state: State) -> dict[str, PyTree]:
    """A state as it is saved: what a model needs, and what only training does."""
    return {
        "variables": as_variables(state),
        "training": {"step": state.step, "opt_state": state.opt_state},
    }


def _train(
    experiment: Experiment,
    sources: Sources,
    state: State,
    manager: Any,
    workdir: Path,
    console: Console,
) -> tuple[Experiment, State]:
    config = experiment.config
    first_step = int(state.step)
    train_step = make_train_step(experiment)
    evaluate = _make_evaluate(experiment, sources)
    learning_rate = make_learning_rate(config)
    batches = train_batches(
        sources.train,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=first_step,
        augment=config.data.augment,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    recent: list[PyTree] = []  # metrics on the device: fetching them would wait
    began = time.perf_counter()
    with reports.show_progress(console, first_step, config.steps) as show:
        for step in range(first_step + 1, config.steps + 1):
            batch = put_batch(next(batches), experiment.mesh)
            state, metrics = train_step(state, batch)
            recent.append(metrics)
            if step % config.log_every and step < config.steps:
                show(step, "")
                continue
            seconds = time.perf_counter() - began
            before_cut = {}
            if step == config.prune.cut_step and experiment.couplings:
                before_cut["masked_test_accuracy"] = evaluate(state)["test_accuracy"]
                experiment, state = _cut_out(experiment, state, console)
                train_step = make_train_step(experiment)
                evaluate = _make_evaluate(experiment, sources)
            rate = learning_rate(step - 1) * plateau_scale(state.opt_state)
            record = {
                **_measure(experiment, state, recent),
                **evaluate(state),
                **before_cut,
                "learning_rate": float(np.asarray(rate)),
                "examples_per_second": config.batch_size * len(recent) / seconds,
            }
            judge = "validation" if sources.validation else "test"
            if step > config.optimizer.decay_begin:
                loss = record[f"{judge}_loss"]
                state = state._replace(
                    opt_state=note_loss(config, state.opt_state, loss)
                )
            if jax.process_index() == 0:
                append_metrics(workdir, record)
            show(step, _describe(record))
            if step % config.checkpoint_every == 0 or step == config.steps:
                at_target = step >= target_step(config)
                score = record[f"{judge}_accuracy"] if at_target else None
                values = {"cut": experiment.cut.to_dict()} if experiment.cut else {}
                checkpoint.save(
                    manager, step, as_items(state), score=score, values=values
                )
            recent, began = [], time.perf_counter()
    return experiment, state


def _measure(
    experiment: Experiment, state: State, recent: Sequence[PyTree]
) -> dict[str, Any]:
    """The means of recent metrics, and how sparse the state is."""
    means = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(recent))
    counts = _count_weights(experiment, state)
    return {
        "step": int(state.step),
        "loss": means["loss"],
        "train_accuracy": means["accuracy"],
        "sparsity_target": total_target(counts),
        "sparsity": total_sparsity(counts),
        "mask_fingerprint": _agreed_fingerprint(experiment, state),
    }


def _cut_out(
    experiment: Experiment, state: State, console: Console
) -> tuple[Experiment, State]:
    """The experiment and its state without the units that are masked."""
    cut = plan_experiment_cut(experiment, state)
    smaller = cut_experiment(experiment, cut)
    state = place_state(smaller, functools.partial(cut_state, cut=cut), state)
    before, after = cost_before(smaller), cost_now(smaller)
    console.print(
        f"cut after step {int(state.step)}: {before.weight_params:,} -> "
        f"{after.weight_params:,} convolution and dense weights, {before.macs:,} -> "
        f"{after.macs:,} multiply-adds per image",
        soft_wrap=True,
    )
    return smaller, state


def _count_weights(experiment: Experiment, state: State) -> list[TensorCount]:
    return count_weights(
        state.params,
        experiment.matched,
        int(state.step),
        original=experiment.original["params"],
        coupled=experiment.config.prune.coupled,
    )


def _make_evaluate(
    experiment: Experiment, sources: Sources
) -> Callable[[State], dict[str, float]]:
    eval_step, mesh = make_eval_step(experiment), experiment.mesh

    def mean_over(source: AnySource, state: State) -> dict[str, float]:
        batches = eval_batches(
            source,
            batch_size=experiment.config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        sums = [
            eval_step(state.params, state.batch_stats, put_batch(batch, mesh))
            for batch in batches
        ]
        total = jax.tree.map(lambda *x: float(sum(x)), *jax.device_get(sums))
        return {name: value / len(source) for name, value in total.items()}

    def evaluate(state: State) -> dict[str, float]:
        """Loss and accuracy on the test split, and on what was held out."""
        judged = {"test": sources.test, "validation": sources.validation}
        return {
            f"{split}_{name}": value
            for split, source in judged.items()
            if source is not None
            for name, value in mean_over(source, state).items()
        }

    return evaluate


_fingerprint = jax.jit(fingerprint)


def _agreed_fingerprint(experiment: Experiment, state: State) -> str:
    """The fingerprint of the masks, of which all devices must have the same.

    Devices that hold whole masks compute it each from its own, and so do groups of
    devices that divide the masks among them: copies that have come apart show.

    Raises:
      ProcessError: on all processes, if there are several fingerprints.
    """
    masks = get_masks(state.opt_state) if experiment.config.prune.enabled else {}
    copies = [int(shard.data) for shard in _fingerprint(masks).addressable_shards]
    check_same(
        copies,
        f"after step {int(state.step)} the devices do not all have the same masks. The "
        f"same command resumes from the last checkpoint, where they had. If they come "
        f"apart again, look for a broken device or a host with other software. The "
        f"fingerprints of the masks",
    )
    return f"{copies[0]:08x}"


def _list_rules(experiment: Experiment) -> list[Rule]:
    """The rule of each tensor that is pruned."""
    return jax.tree.leaves(experiment.matched)


def _describe(record: dict[str, Any]) -> str:
    return (
        f"loss {record['loss']:.4f}  train {record['train_accuracy']:.2%}  "
        f"test {record['test_accuracy']:.2%}  sparsity {record['sparsity']:.2%}  "
        f"{record['examples_per_second']:,.0f} images/s"
    )


def _announce(
    console: Console, experiment: Experiment, workdir: Path, step: int
) -> None:
    console.print(f"work directory: {workdir}", soft_wrap=True)
    if experiment.mesh.size > 1:
        axes = " x ".join(f"{name} {n}" for name, n in experiment.mesh.shape.items())
        count = jax.process_count()
        console.print(
            f"{experiment.mesh.size} devices ({axes})"
            + (f" of {count} processes" if count > 1 else ""),
            highlight=False,
        )
    rules = _list_rules(experiment)
    for rule in dict.fromkeys(rules):
        console.print(
            f"{rule} prunes {rules.count(rule)} tensors by {rule.structure}, "
            f"{'together' if rule.scope == 'rule' else 'each'}: {rule.schedule}",
            markup=False,
            soft_wrap=True,
        )
    if not rules:
        console.print("nothing is pruned: this trains the dense model")
    if step:
        console.print(f"resumes after step {step}")


def _finish(
    experiment: Experiment,
    state: State,
    manager: Any,
    workdir: Path,
    console: Console,
) -> dict | None:
    """Writes the summary and the picture, and prints the report."""
    counts = _count_weights(experiment, state)
    best_step = checkpoint.best_step(manager)
    if jax.process_index() > 0:
        return None
    records = read_metrics(workdir)
    accuracies = {r["step"]: r["test_accuracy"] for r in records}
    summary = {
        "step": int(state.step),
        "test_accuracy": records[-1]["test_accuracy"],
        "best_step": best_step,
        "best_test_accuracy": accuracies.get(best_step),
        "sparsity": total_sparsity(counts),
        "sparsity_target": total_target(counts),
        "nonzero": sum(c.nonzero for c in counts),
        "params": sum(c.weights for c in counts),
        "all_params": sum(x.size for x in jax.tree.leaves(state.params)),
        "cut": _describe_cut(experiment, records) if experiment.cut else None,
        "config": to_dict(experiment.config),
    }
    reports.print_table(console, counts)
    if summary["cut"]:
        console.print(reports.cut_table(summary["cut"]))
    written = [
        write_summary(workdir, summary),
        reports.plot_metrics(workdir, records),
    ]
    console.print(
        f"test accuracy {summary['test_accuracy']:.2%} with "
        f"{summary['nonzero']:,} of {summary['params']:,} convolution and dense "
        f"weights left, {summary['sparsity']:.2%} sparse",
        soft_wrap=True,
    )
    console.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)
    return summary


def _describe_cut(
    experiment: Experiment, records: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """What the model was before the cut and is after it.

    The accuracies are those at the cut, and seconds are medians over the run.
    """
    cut_step = experiment.config.prune.cut_step
    (at_cut,) = (r for r in records if r["step"] == cut_step)
    batch_size = experiment.config.batch_size

    def describe(cost: Cost, accuracy: float, part: list[float]) -> dict[str, Any]:
        return {
            "weights": cost.weight_params,
            "params": cost.subtree("params").params,
            "macs": cost.macs,
            "test_accuracy": accuracy,
            "seconds_per_step": batch_size / float(np.median(part)) if part else None,
        }

    speeds = [(r["step"], r["examples_per_second"]) for r in records]
    return {
        "before": describe(
            cost_before(experiment),
            at_cut["masked_test_accuracy"],
            [speed for step, speed in speeds if step <= cut_step],
        ),
        "after": describe(
            cost_now(experiment),
            at_cut["test_accuracy"],
            [speed for step, speed in speeds if step > cut_step],
        ),
    }
