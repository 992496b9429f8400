"""Runs an experiment: trains, prunes, evaluates, saves and reports."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from agp_jax import checkpoint, reports
from agp_jax.batches import eval_batches, train_batches
from agp_jax.config import Config, make_learning_rate, to_dict
from agp_jax.experiment import (
    Experiment,
    State,
    init_state,
    make_eval_step,
    make_train_step,
    set_up,
)
from agp_jax.rules import Rule
from agp_jax.trees import PyTree
from agp_jax.workdirs import check_workdir


def run(config: Config, workdir: str | Path, console: Console | None = None) -> dict:
    """Trains the experiment in `workdir`, or goes on where it was stopped there.

    Leaves `metrics.jsonl`, `summary.json`, a picture and checkpoints in `workdir`.

    Args:
      config: what to run.
      workdir: an empty, new or earlier directory of the same experiment.
      console: where progress and the report go; the standard output by default.

    Returns:
      The summary.

    Raises:
      ConfigError, DataError, WorkdirError, CheckpointError: before any training, if the
        config, the data, the work directory or its checkpoint is not fit for it.
    """
    if console is None:
        console = Console(quiet=jax.process_index() > 0)
    workdir = Path(workdir)
    experiment = set_up(config)
    check_workdir(workdir, to_dict(config))
    with checkpoint.open_checkpoints(workdir) as manager:
        state = _start_or_resume(experiment, manager)
        step = int(state.step)
        if jax.process_index() == 0:
            reports.rewind_metrics(workdir, step)
        _announce(console, experiment, workdir, step)
        state = _train(experiment, state, manager, workdir, console)
        return _finish(experiment, state, manager, workdir, console)


def _start_or_resume(experiment: Experiment, manager: Any) -> State:
    if checkpoint.latest_step(manager) is None:
        return init_state(experiment)
    _, items = checkpoint.restore(manager, as_items(experiment.shapes))
    return State(**items["variables"], **items["training"])


def as_items(state: State) -> dict[str, PyTree]:
    """A state as it is saved: what a model needs, and what only training does."""
    return {
        "variables": {"params": state.params, "batch_stats": state.batch_stats},
        "training": {"step": state.step, "opt_state": state.opt_state},
    }


def _train(
    experiment: Experiment,
    state: State,
    manager: Any,
    workdir: Path,
    console: Console,
) -> State:
    config, mesh = experiment.config, experiment.mesh
    first_step = int(state.step)
    train_step = make_train_step(experiment)
    evaluate = _make_evaluate(experiment)
    learning_rate = make_learning_rate(config)
    batches = train_batches(
        experiment.train_source,
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
            state, metrics = train_step(state, _on_devices(next(batches), mesh))
            recent.append(metrics)
            if step % config.log_every and step < config.steps:
                show(step, "")
                continue
            means = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(recent))
            seconds = time.perf_counter() - began
            counts = reports.count_weights(state.params, experiment.matched, step)
            record = {
                "step": step,
                "loss": means["loss"],
                "train_accuracy": means["accuracy"],
                "test_accuracy": evaluate(state),
                "sparsity_target": reports.total_target(counts),
                "sparsity": reports.total_sparsity(counts),
                "learning_rate": float(np.asarray(learning_rate(step - 1))),
                "examples_per_second": config.batch_size * len(recent) / seconds,
            }
            if jax.process_index() == 0:
                reports.append_metrics(workdir, record)
            show(step, _describe(record))
            if step % config.checkpoint_every == 0 or step == config.steps:
                at_target = step >= _last_event(experiment.matched)
                score = record["test_accuracy"] if at_target else None
                checkpoint.save(manager, step, as_items(state), score=score)
            recent, began = [], time.perf_counter()
    return state


def _make_evaluate(experiment: Experiment) -> Callable[[State], float]:
    eval_step = make_eval_step(experiment)

    def evaluate(state: State) -> float:
        """The accuracy on the test split."""
        batches = eval_batches(
            experiment.test_source,
            batch_size=experiment.config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        correct = [
            eval_step(
                state.params, state.batch_stats, _on_devices(batch, experiment.mesh)
            )
            for batch in batches
        ]
        return float(sum(jax.device_get(correct))) / len(experiment.test_source)

    return evaluate


def _on_devices(batch: PyTree, mesh: Mesh) -> PyTree:
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )


def _last_event(matched: PyTree) -> int:
    """The step from which on all rules are at their final sparsity."""
    rules = jax.tree.leaves(matched, is_leaf=lambda x: isinstance(x, Rule))
    return max((int(r.schedule.events()[0][-1]) for r in rules), default=0)


def _describe(record: dict[str, float]) -> str:
    return (
        f"loss {record['loss']:.4f}  train {record['train_accuracy']:.2%}  "
        f"test {record['test_accuracy']:.2%}  sparsity {record['sparsity']:.2%}  "
        f"{record['examples_per_second']:,.0f} images/s"
    )


def _announce(
    console: Console, experiment: Experiment, workdir: Path, step: int
) -> None:
    console.print(f"work directory: {workdir}", soft_wrap=True)
    rules = jax.tree.leaves(experiment.matched, is_leaf=lambda x: isinstance(x, Rule))
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
) -> dict:
    """Writes the summary and the picture, and prints the report."""
    records = reports.read_metrics(workdir)
    counts = reports.count_weights(
        state.params, experiment.matched, experiment.config.steps
    )
    best_step = checkpoint.best_step(manager)
    accuracies = {r["step"]: r["test_accuracy"] for r in records}
    summary = {
        "step": int(state.step),
        "test_accuracy": records[-1]["test_accuracy"],
        "best_step": best_step,
        "best_test_accuracy": accuracies.get(best_step),
        "sparsity": reports.total_sparsity(counts),
        "sparsity_target": reports.total_target(counts),
        "nonzero": sum(c.nonzero for c in counts),
        "params": sum(c.weights for c in counts),
        "all_params": sum(x.size for x in jax.tree.leaves(state.params)),
        "config": to_dict(experiment.config),
    }
    if jax.process_index() == 0:
        reports.print_table(console, counts)
        written = [
            reports.write_summary(workdir, summary),
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
