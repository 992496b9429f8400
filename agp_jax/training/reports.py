"""What a run tells: its plan, metrics as they come, and a report at the end."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from agp_jax.rules import Rule
from agp_jax.schedules import Schedule
from agp_jax.training.counts import TensorCount, total_sparsity, total_target
from agp_jax.training.experiment import Experiment
from agp_jax.training.plans import Plan
from agp_jax.training.published import Published, compare
from agp_jax.training.tasks import Quality, Task


def plot_metrics(
    workdir: Path, records: Sequence[Mapping[str, Any]], quality: Quality
) -> Path:
    """Draws sparsity and the model's quality against steps; the path of the picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    quality_axis = figure.subplots()
    sparsity_axis = quality_axis.twinx()
    label = f"test {quality.name}"
    in_percent = quality.form.endswith("%")
    steps = [r["step"] for r in records]
    targets = [r["sparsity_target"] for r in records]
    if None not in targets:
        sparsity_axis.plot(
            steps,
            [100 * target for target in targets],
            color="tab:orange",
            linewidth=5,
            alpha=0.3,
            label="sparsity asked",
        )
    sparsity_axis.plot(
        steps,
        [100 * r["sparsity"] for r in records],
        color="tab:orange",
        label="sparsity",
    )
    quality_axis.plot(
        steps,
        [(100 if in_percent else 1) * r[f"test_{quality.name}"] for r in records],
        color="tab:blue",
        label=label,
    )
    quality_axis.set(xlabel="step", ylabel=f"{label} (%)" if in_percent else label)
    sparsity_axis.set(ylabel="zero weights (%)", ylim=(0, 100))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    path = workdir / f"sparsity_and_{quality.name}.png"
    figure.savefig(path, dpi=150)
    return path


def print_table(console: Console, counts: Sequence[TensorCount]) -> None:
    """Prints a line for each tensor and one for all."""
    table = _make_table("tensor", "shape", "weights", "non-zero", "sparsity", "target")
    for count in counts:
        table.add_row(
            count.path,
            _describe_shape(count.shape),
            f"{count.weights:,}",
            f"{count.nonzero:,}",
            f"{count.sparsity:.2%}",
            _describe_target(count),
        )
    target = total_target(counts)
    table.add_row(
        "total",
        "",
        f"{sum(c.weights for c in counts):,}",
        f"{sum(c.nonzero for c in counts):,}",
        f"{total_sparsity(counts):.2%}",
        "" if target is None else f"{target:.2%}",
    )
    console.print()
    console.print(table)
    console.print()


def print_plan(console: Console, plan: Plan, experiment: Experiment) -> None:
    """Prints a plan: the events, every tensor, the totals, and what is published."""
    config = experiment.config
    steps_per_epoch = None if config.task else config.steps_per_epoch
    schedules: dict[Schedule, list[Rule]] = {}
    for rule in plan.rules:
        assert rule.schedule is not None  # it prunes
        schedules.setdefault(rule.schedule, []).append(rule)
    for schedule, rules in schedules.items():
        for rule in rules:
            console.print(f"{rule} by {rule.structure}", markup=False, soft_wrap=True)
        console.print(_events_table(schedule, steps_per_epoch))
        console.print()
    if config.prune.cut_step:
        epoch = _describe_epoch(config.prune.cut_step, steps_per_epoch)
        console.print(f"cut after step {config.prune.cut_step:,}, epoch {epoch}\n")
    console.print(_tensors_table(plan))
    console.print()
    console.print(_totals_table(plan, experiment.task.item))
    if config.published:
        print_comparison(console, plan, config.published)


def _events_table(schedule: Schedule, steps_per_epoch: int | None) -> Table:
    table = _make_table("  ", "step", "epoch", "sparsity")
    for step, level in zip(*schedule.events(), strict=True):
        epoch = _describe_epoch(step, steps_per_epoch)
        table.add_row("", f"{step:,}", epoch, f"{level:.2%}")
    return table


def _describe_epoch(step: int, steps_per_epoch: int | None) -> str:
    return f"{step / steps_per_epoch:.6g}" if steps_per_epoch else "?"


def _tensors_table(plan: Plan) -> Table:
    table = _make_table(
        "tensor", "shape", "structure", "cells", "final shape", "non-zero", "sparsity"
    )
    for tensor in plan.tensors:
        after = tensor.after
        table.add_row(
            tensor.path,
            _describe_shape(tensor.before.shape),
            ", ".join(str(rule.structure) for rule in tensor.rules) or "dense",
            "" if tensor.cells is None else f"{tensor.cells:,}",
            _describe_shape(after.shape),
            f"{after.nonzero:,}",
            f"{1 - (after.nonzero or 0) / after.params:.2%}",
        )
    return table


def _totals_table(plan: Plan, item: str) -> Table:
    before, after = plan.before, plan.after
    table = _make_table("in all", "before", "after", "kept")
    nonzero = plan.nonzero
    for title, first, last in (
        ("weights", before.weight_params, after.weight_params),
        ("non-zero weights", before.weight_params, nonzero),
        (f"multiply-adds per {item}", before.macs, after.macs),
    ):
        table.add_row(title, f"{first:,}", f"{last:,}", f"{last / first:.4%}")
    table.add_row("sparsity", "", f"{100 * plan.sparsity:.5f} %", "")
    average = plan.average_weights
    kept = f"{average / before.weight_params:.4%}"
    table.add_row("average weights in training", "", f"{average:,.0f}", kept)
    table.add_row("multiply-adds of training", "", f"{plan.training_macs:.4g}", "")
    return table


def print_comparison(console: Console, plan: Plan, published: Published) -> None:
    """Prints published figures beside those of a plan, and what is wrong there."""
    table = _make_table("published", "there", "here", "")
    for row in compare(published, plan.before, plan.after):
        table.add_row(
            row.quantity,
            row.published,
            row.here,
            "the same" if row.agrees else "differs",
        )
    console.print()
    console.print(f"published in {published.source}:", soft_wrap=True)
    console.print(table)
    if published.top1:
        console.print(
            f"published accuracy: {published.top1} % top-1"
            + (f", {published.base_top1} % dense" if published.base_top1 else "")
        )
    if published.perplexity:
        base = published.base_perplexity
        console.print(
            f"published test perplexity: {published.perplexity}"
            + (f", {base} dense" if base else "")
        )
    for erratum in published.errata:
        console.print(f"note: {erratum}", soft_wrap=True, markup=False)


def _make_table(title: str, *columns: str) -> Table:
    """An empty table whose columns but the first hold numbers."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(title, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _describe_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def cut_table(cut: Mapping[str, Mapping[str, float | None]], task: Task) -> Table:
    """A model before and after a cut, side by side."""
    table = _make_table("", *cut)
    name = task.quality.name
    for key, title, form in (
        ("weights", "weights", ","),
        ("params", "all parameters", ","),
        ("macs", f"multiply-adds per {task.item}", ","),
        (f"test_{name}", f"test {name} at the cut", task.quality.form),
        ("seconds_per_step", "seconds per step", ".4f"),
    ):
        values = [part[key] for part in cut.values()]
        cells = ["" if x is None else format(x, form) for x in values]
        table.add_row(title, *cells)
    return table


def _describe_target(count: TensorCount) -> str:
    if count.target is None:
        return "dense"
    of = {"tensor": "", "rule": " of all", "units": " of units", "rest": " of rest"}
    return f"{count.target:.2%}{of[count.target_of]}"


def describe_record(task: Task, record: Mapping[str, Any]) -> str:
    """A record of metrics in a line."""
    name, form = task.quality.name, task.quality.format
    speed = record[f"{task.item}s_per_second"]
    return (
        f"loss {record['loss']:.4f}  train {form(record[f'train_{name}'])}  "
        f"test {form(record[f'test_{name}'])}  sparsity {record['sparsity']:.2%}"
    ) + (f"  {speed:,.0f} {task.item}s/s" if speed else "")


def announce(
    console: Console, experiment: Experiment, workdir: Path, step: int
) -> None:
    """Prints what is about to run, from which step on."""
    console.print(f"work directory: {workdir}", soft_wrap=True)
    if experiment.mesh.size > 1:
        axes = " x ".join(f"{name} {n}" for name, n in experiment.mesh.shape.items())
        count = jax.process_count()
        console.print(
            f"{experiment.mesh.size} devices ({axes})"
            + (f" of {count} processes" if count > 1 else ""),
            highlight=False,
        )
    rules: list[Rule] = jax.tree.leaves(experiment.matched)  # one for each tensor
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


def print_cut(console: Console, experiment: Experiment, step: int) -> None:
    """Prints what a cut has left."""
    before, after = experiment.whole_cost, experiment.cost
    console.print(
        f"cut after step {step}: {before.weight_params:,} -> {after.weight_params:,} "
        f"weights, {before.macs:,} -> {after.macs:,} multiply-adds per "
        f"{experiment.task.item}",
        soft_wrap=True,
    )


def print_result(
    console: Console,
    task: Task,
    counts: Sequence[TensorCount],
    summary: Mapping[str, Any],
) -> None:
    """Prints what a run ends with."""
    print_table(console, counts)
    if summary["cut"]:
        console.print(cut_table(summary["cut"], task))
    name = task.quality.name
    console.print(
        f"test {name} {task.quality.format(summary[f'test_{name}'])} with "
        f"{summary['nonzero']:,} of {summary['params']:,} weights left, "
        f"{summary['sparsity']:.2%} sparse",
        soft_wrap=True,
    )


@contextlib.contextmanager
def show_progress(
    console: Console, first_step: int, num_steps: int
) -> Iterator[Callable[[int, str], None]]:
    """Shows how far a run is: a live line on a terminal, else a line per message.

    Yields a function of the steps done and of a message, empty to keep the last one.
    """
    if not console.is_terminal:

        def print_line(step: int, message: str) -> None:
            if message:
                console.print(f"step {step}/{num_steps}  {message}", soft_wrap=True)

        yield print_line
        return
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=num_steps, completed=first_step)

        def move_bar(step: int, message: str) -> None:
            progress.update(task, completed=step, description=message or None)

        yield move_bar
