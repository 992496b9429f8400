"""What a run tells: its plan, metrics as they come, and a report at the end."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
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

from agp_jax.config import Config, Published
from agp_jax.forecasts import Forecast, compare
from agp_jax.rules import Rule
from agp_jax.schedules import Schedule
from agp_jax.trees import PyTree, flatten_with_paths
from agp_jax.workdirs import WorkdirError

_METRICS = "metrics.jsonl"


class TensorCount(NamedTuple):
    """One convolution or dense kernel, and how much of it is left.

    `shape` is that before any cut. `target` is the sparsity its rule asks for: of it,
    of all tensors of the rule, of the units that it is part of or of the rest that a
    cut has left, as `target_of` says; None where no rule prunes it.
    """

    path: str
    shape: tuple[int, ...]
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
    params: PyTree, matched: PyTree, step: int, *, original: PyTree, coupled: bool
) -> list[TensorCount]:
    """Counts the non-zero weights of every kernel: of parameters with two or more axes.

    Biases and normalisation are left out, as they are in published pruning results.

    Args:
      params: the parameters.
      matched: the rules by parameter, from `match_rules`.
      step: the number of updates done, which fixes the targets.
      original: arrays or shapes of the parameters before anything was cut out; what
        was counts as zero.
      coupled: whether rules with filters, channels or heads prune units.
    """
    paths, leaves, treedef = flatten_with_paths(params)
    rules = treedef.flatten_up_to(matched)
    whole = treedef.flatten_up_to(original)
    return [
        TensorCount(
            path,
            before.shape,
            int(count),
            rule.schedule.sparsity_at(step) if rule else None,
            _target_of(rule, coupled, is_cut=leaf.shape != before.shape),
        )
        for path, leaf, before, rule, count in zip(
            paths,
            leaves,
            whole,
            rules,
            jax.device_get(_count_nonzero(leaves)),
            strict=True,
        )
        if before.ndim > 1
    ]


def _target_of(rule: Rule | None, coupled: bool, *, is_cut: bool) -> Any:
    if rule is None:
        return "tensor"
    if rule.prunes_units and (coupled or is_cut):
        return "units"
    return "rest" if is_cut and rule.scope == "tensor" else rule.scope


@jax.jit
def _count_nonzero(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(leaf != 0, dtype=jnp.int32) for leaf in leaves]


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


def append_metrics(workdir: Path, record: Mapping[str, Any]) -> None:
    """Adds a line to the metrics of a run."""
    with open(workdir / _METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The metrics of a run so far; a line cut short by an interruption is left out.

    Raises:
      WorkdirError: if the file is not what `append_metrics` wrote.
    """
    path = workdir / _METRICS
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read: {error}") from error


def rewind_metrics(workdir: Path, step: int) -> None:
    """Forgets the metrics after `step`, where a run starts or resumes.

    Raises:
      WorkdirError: if the metrics do not reach that step.
    """
    records = [r for r in read_metrics(workdir) if r["step"] <= step]
    if step and (not records or records[-1]["step"] != step):
        raise WorkdirError(
            f"{workdir / _METRICS} does not reach step {step}, where the run resumes: "
            f"put it back, or give a new work directory"
        )
    text = "".join(json.dumps(record) + "\n" for record in records)
    _write_atomically(workdir / _METRICS, text)


def write_summary(workdir: Path, summary: Mapping[str, Any]) -> Path:
    """Writes `summary.json`."""
    path = workdir / "summary.json"
    _write_atomically(path, json.dumps(summary, indent=2) + "\n")
    return path


def plot_metrics(workdir: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Draws sparsity and accuracy against steps; the path of the picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    accuracy_axis = figure.subplots()
    sparsity_axis = accuracy_axis.twinx()
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
    accuracy_axis.plot(
        steps,
        [100 * r["test_accuracy"] for r in records],
        color="tab:blue",
        label="test accuracy",
    )
    accuracy_axis.set(xlabel="step", ylabel="test accuracy (%)")
    sparsity_axis.set(ylabel="zero weights (%)", ylim=(0, 100))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    path = workdir / "sparsity_and_accuracy.png"
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


def print_forecast(console: Console, forecast: Forecast, config: Config) -> None:
    """Prints a plan: the events, every tensor, the totals, and what is published."""
    schedules: dict[Schedule, list[Rule]] = {}
    for rule in forecast.rules:
        assert rule.schedule is not None  # it prunes
        schedules.setdefault(rule.schedule, []).append(rule)
    for schedule, rules in schedules.items():
        for rule in rules:
            console.print(f"{rule} by {rule.structure}", markup=False, soft_wrap=True)
        console.print(_events_table(schedule, config.steps_per_epoch))
        console.print()
    if config.prune.cut_step:
        epoch = config.prune.cut_step / config.steps_per_epoch
        console.print(f"cut after step {config.prune.cut_step:,}, epoch {epoch:g}\n")
    console.print(_tensors_table(forecast))
    console.print()
    console.print(_totals_table(forecast))
    if config.published:
        print_comparison(console, forecast, config.published)


def _events_table(schedule: Schedule, steps_per_epoch: int) -> Table:
    table = _make_table("  ", "step", "epoch", "sparsity")
    for step, level in zip(*schedule.events(), strict=True):
        epoch = f"{step / steps_per_epoch:.6g}"
        table.add_row("", f"{step:,}", epoch, f"{level:.2%}")
    return table


def _tensors_table(forecast: Forecast) -> Table:
    table = _make_table(
        "tensor", "shape", "structure", "cells", "final shape", "non-zero", "sparsity"
    )
    for tensor in forecast.tensors:
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


def _totals_table(forecast: Forecast) -> Table:
    before, after = forecast.before, forecast.after
    table = _make_table("convolution and dense layers", "before", "after", "kept")
    nonzero = forecast.nonzero
    for title, first, last in (
        ("weights", before.weight_params, after.weight_params),
        ("non-zero weights", before.weight_params, nonzero),
        ("multiply-adds per image", before.macs, after.macs),
    ):
        table.add_row(title, f"{first:,}", f"{last:,}", f"{last / first:.4%}")
    table.add_row("sparsity", "", f"{100 * forecast.sparsity:.5f} %", "")
    return table


def print_comparison(
    console: Console, forecast: Forecast, published: Published
) -> None:
    """Prints published figures beside those of a forecast, and what is wrong there."""
    table = _make_table("published", "there", "here", "")
    for row in compare(forecast, published):
        table.add_row(
            row.quantity,
            row.published,
            row.forecast,
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
    for erratum in published.errata:
        console.print(f"note: {erratum}", soft_wrap=True, markup=False)


def write_plan(workdir: Path, forecast: Forecast) -> Path:
    """Writes `plan.json`.

    Raises:
      WorkdirError: if it cannot be written.
    """
    path = workdir / "plan.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, json.dumps(forecast.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise WorkdirError(f"cannot write {path}: {error}") from error
    return path


def _make_table(title: str, *columns: str) -> Table:
    """An empty table whose columns but the first hold numbers."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(title, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _describe_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def cut_table(cut: Mapping[str, Mapping[str, float | None]]) -> Table:
    """A model before and after a cut, side by side."""
    table = _make_table("", *cut)
    for key, title, form in (
        ("weights", "convolution and dense weights", "{:,}"),
        ("params", "all parameters", "{:,}"),
        ("macs", "multiply-adds per image", "{:,}"),
        ("test_accuracy", "test accuracy at the cut", "{:.2%}"),
        ("seconds_per_step", "seconds per step", "{:.4f}"),
    ):
        values = [part[key] for part in cut.values()]
        cells = ["" if x is None else form.format(x) for x in values]
        table.add_row(title, *cells)
    return table


def _describe_target(count: TensorCount) -> str:
    if count.target is None:
        return "dense"
    of = {"tensor": "", "rule": " of all", "units": " of units", "rest": " of rest"}
    return f"{count.target:.2%}{of[count.target_of]}"


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


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
