"""What a run tells people: its plan, what it starts from and what it ends with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from agp_jax.rules import Rule
from agp_jax.schedules import Schedule
from agp_jax.training.counts import TensorCount, total_sparsity, total_target
from agp_jax.training.experiment import Experiment
from agp_jax.training.plans import Plan
from agp_jax.training.printing import group_rows, print_table, say
from agp_jax.training.published import Published, compare
from agp_jax.training.tasks import Task
from agp_jax.trees import describe_shape

_MAX_EVENTS = 24  # that a plan lists; of more the middle is left out


def print_counts(console: Console, counts: Sequence[TensorCount]) -> None:
    """Prints a line for each tensor and one for all; equal tensors share one."""
    is_cut = any(count.left != count.shape for count in counts)
    # After a cut what rules ask for is of units that are gone, or of the rest.
    has_targets = not is_cut and any(count.target is not None for count in counts)
    rows = []
    for count in counts:
        row = [count.path, describe_shape(count.shape)]
        row += [describe_shape(count.left)] if is_cut else []
        row += [f"{count.nonzero:,}", f"{count.sparsity:.2%}"]
        rows.append([*row, _describe_target(count)] if has_targets else row)
    target = total_target(counts)
    total = ["total", *[""] * (2 if is_cut else 1)]
    total += [f"{sum(c.nonzero for c in counts):,}", f"{total_sparsity(counts):.2%}"]
    if has_targets:
        total.append("" if target is None else _percent(target))
    rest = ["sparsity", "asked for"] if has_targets else ["sparsity"]
    _print_tensors(console, is_cut, rows, rest, [total], spare_last=has_targets)


def _print_tensors(
    console: Console,
    is_cut: bool,
    rows: Sequence[Sequence[str]],
    titles: Sequence[str],
    totals: Sequence[Sequence[str]] = (),
    *,
    spare_last: bool,
) -> None:
    """Prints rows of a path, a shape (before and after a cut), non-zeros and others."""
    grouped = group_rows(rows)
    shapes = ["before", "after"] if is_cut else ["shape"]
    nonzero = "non-zero" if len(grouped) == len(rows) else "non-zero each"
    table = [*grouped, *totals]
    titles = ["tensor", *shapes, nonzero, *titles]
    print_table(console, titles, table, spare_last=spare_last)


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
            say(console, f"{rule} by {rule.structure}")
        _print_events(console, schedule, steps_per_epoch)
        console.print()
    if config.prune.cut_step:
        epoch = _describe_epoch(config.prune.cut_step, steps_per_epoch)
        say(console, f"cut after step {config.prune.cut_step:,}, epoch {epoch}")
        console.print()
    rows = []
    for tensor in plan.tensors:
        nonzero = tensor.after.nonzero or 0
        row = [tensor.path, describe_shape(tensor.before.shape)]
        row += [describe_shape(tensor.after.shape)] if plan.is_cut else []
        sparsity = f"{1 - nonzero / tensor.before.params:.2%}"
        is_dense = not tensor.rules and nonzero == tensor.before.params
        rows.append([*row, f"{nonzero:,}", "dense" if is_dense else sparsity])
    _print_tensors(console, plan.is_cut, rows, ["sparsity"], spare_last=plan.is_cut)
    console.print()
    _print_totals(console, plan, experiment.task.item)
    if config.published:
        print_comparison(console, plan, config.published)


def _print_events(
    console: Console, schedule: Schedule, steps_per_epoch: int | None
) -> None:
    rows = [
        ["", f"{step:,}", _describe_epoch(step, steps_per_epoch), f"{level:.2%}"]
        for step, level in zip(*schedule.events(), strict=True)
    ]
    if len(rows) > _MAX_EVENTS:
        half = _MAX_EVENTS // 2
        rows[half:-half] = [["", "...", "...", "..."]]
    print_table(console, ["", "step", "epoch", "sparsity"], rows)


def _describe_epoch(step: int, steps_per_epoch: int | None) -> str:
    return f"{step / steps_per_epoch:,.1f}" if steps_per_epoch else "?"


def _print_totals(console: Console, plan: Plan, item: str) -> None:
    before, after, average = plan.before, plan.after, plan.average_weights
    rows = [
        [title, f"{first:,}", f"{last:,}", f"{last / first:.4%}"]
        for title, first, last in (
            ("weights", before.weight_params, after.weight_params),
            ("non-zero weights", before.weight_params, plan.nonzero),
            (f"multiply-adds per {item}", before.macs, after.macs),
        )
    ]
    kept = f"{average / before.weight_params:.4%}"
    rows += [
        ["sparsity", "", f"{plan.sparsity:.5%}", ""],
        ["average weights in training", "", f"{average:,.0f}", kept],
        ["multiply-adds of training", "", f"{plan.training_macs:.4g}", ""],
    ]
    print_table(console, ["in all", "before", "after", "kept"], rows)


def print_comparison(console: Console, plan: Plan, published: Published) -> None:
    """Prints published figures beside those of a plan, and what is wrong there."""
    rows = [
        [row.quantity, row.published, row.here, "same" if row.agrees else "differs"]
        for row in compare(published, plan.before, plan.after)
    ]
    console.print()
    say(console, f"published in {published.source}:")
    print_table(console, ["published", "there", "here", ""], rows)
    for title, value, base in (
        ("accuracy, % top-1", published.top1, published.base_top1),
        ("test perplexity", published.perplexity, published.base_perplexity),
    ):
        if value:
            dense = f", {base} dense" if base else ""
            say(console, f"published {title}: {value}{dense}")
    for erratum in published.errata:
        say(console, f"note: {erratum}")


def _percent(fraction: float) -> str:
    """As few digits as tell it: `90%`, `87.65%`."""
    return f"{100 * fraction:.4g}%"


def _describe_target(count: TensorCount) -> str:
    if count.target is None:
        return "dense"
    of = {"tensor": "", "rule": " of all", "units": " of units", "rest": " of rest"}
    return f"{_percent(count.target)}{of[count.target_of]}"


def describe_record(task: Task, record: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a record of metrics, ready to print, as progress wants them."""
    name, form = task.quality.name, task.quality.format
    speed = record[f"{task.item}s_per_second"]
    figures = {
        "loss": f"loss {record['loss']:.4f}",
        "train": f"train {form(record[f'train_{name}'])}",
        "test": f"test {form(record[f'test_{name}'])}",
        "sparsity": f"sparsity {record['sparsity']:.2%}",
    }
    return figures | ({"speed": f"{speed:,.0f} {task.item}s/s"} if speed else {})


def announce(
    console: Console, experiment: Experiment, workdir: Path, step: int
) -> None:
    """Prints what is about to run, from which step on."""
    say(console, f"work directory: {workdir}")
    if experiment.mesh.size > 1:
        axes = " x ".join(f"{name} {n}" for name, n in experiment.mesh.shape.items())
        count = jax.process_count()
        of = f" of {count} processes" if count > 1 else ""
        say(console, f"{experiment.mesh.size} devices ({axes}){of}")
    rules: list[Rule] = jax.tree.leaves(experiment.matched)  # one for each tensor
    for rule in dict.fromkeys(rules):
        ranked = "together" if rule.ranks_together else "each"
        say(
            console,
            f"{rule} prunes {rules.count(rule)} tensors by {rule.structure}, {ranked}: "
            f"{rule.schedule}",
        )
    if not rules:
        say(console, "nothing is pruned: this trains the dense model")
    if step == experiment.config.steps:
        say(console, f"already finished, with step {step:,}: this is its result")
    elif step:
        say(console, f"resumes after step {step:,}")


def print_cut(console: Console, experiment: Experiment, step: int) -> None:
    """Prints what a cut has left."""
    before, after = experiment.whole_cost, experiment.cost
    say(
        console,
        f"cut after step {step:,}: {before.weight_params:,} -> "
        f"{after.weight_params:,} weights, {before.macs:,} -> {after.macs:,} "
        f"multiply-adds per {experiment.task.item}",
    )


def print_result(
    console: Console,
    task: Task,
    counts: Sequence[TensorCount],
    summary: Mapping[str, Any],
) -> None:
    """Prints what a run ends with."""
    console.print()
    print_counts(console, counts)
    console.print()
    if summary["cut"]:
        _print_cut(console, task, summary["cut"])
        console.print()
    name = task.quality.name
    say(
        console,
        f"test {name} {task.quality.format(summary[f'test_{name}'])} with "
        f"{summary['nonzero']:,} of {summary['weights']:,} weights left, "
        f"sparsity {summary['sparsity']:.2%}",
    )


def _print_cut(console: Console, task: Task, cut: Mapping[str, Any]) -> None:
    """Prints a model before and after its cut, side by side."""
    name = task.quality.name
    rows = []
    for key, title, form in (
        ("weights", "weights", ","),
        ("all_params", "all parameters", ","),
        ("macs", f"multiply-adds per {task.item}", ","),
        (f"test_{name}", f"test {name} at the cut", task.quality.form),
        ("seconds_per_step", "seconds per step", ".4f"),
    ):
        values = [cut[when][key] for when in ("before", "after")]
        rows.append([title, *("" if x is None else format(x, form) for x in values)])
    print_table(console, ["the cut", "before", "after"], rows)
