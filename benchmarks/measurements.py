"""Times measured in turn, and the tables and JSON in which results come out."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

Row = Mapping[str, Any]
Measurement = Callable[[], float]
Name = TypeVar("Name", bound=Hashable)  # of what is measured


def stopwatch(
    function: Callable[[], Any], *, least_seconds: float = 0.02, calls: int = 0
) -> Measurement:
    """A measurement of the seconds that one call of `function` takes.

    A call is only over when its result is there. A measurement makes `calls` of them,
    or as many as last for `least_seconds`.
    """

    def time_calls(count: int) -> float:
        result = None
        began = time.perf_counter()
        for _ in range(count):
            result = function()
        jax.block_until_ready(result)
        return time.perf_counter() - began

    if not calls:
        time_calls(1)  # pages in its memory
        calls = max(1, round(least_seconds / time_calls(1)))
    return lambda: time_calls(calls) / calls


def in_turn(
    measurements: Mapping[Name, Measurement], rounds: int
) -> dict[Name, list[float]]:
    """Makes all measurements once in every round, so that none has the quieter time."""
    seconds: dict[Name, list[float]] = {name: [] for name in measurements}
    for i in range(rounds):
        names = list(measurements)
        for name in names if i % 2 else reversed(names):
            seconds[name].append(measurements[name]())
    return seconds


def medians(seconds: Mapping[Name, Sequence[float]]) -> dict[Name, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--json", type=Path, help="a file for the results")
    return parser


def note(text: str) -> None:
    """Says on the standard error stream what is being measured."""
    print(f"... {text}", file=sys.stderr, flush=True)


def report(tables: Mapping[str, Sequence[Row]], device: str, path: Path | None) -> None:
    """Prints what the results belong to, and writes everything to `path` as JSON."""
    facts = {
        "device": device,
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "commit": _commit(),
    }
    print("\n" + ", ".join(f"{name}: {fact}" for name, fact in facts.items()))
    if path:
        path.write_text(json.dumps({**facts, "tables": tables}, indent=1) + "\n")


def default_device() -> str:
    """What the benchmark runs on, in words."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def print_table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Prints `columns` of `rows` as a Markdown table.

    Args:
      title: a line above the table.
      rows: one dict per row; what is missing or None is printed as a dash.
      columns: the format of each column by its name, such as ".1f"; "" is for text.
    """
    cells = [[name.replace("_", " ") for name in columns]]
    for row in rows:
        cells.append(
            [format_cell(row.get(name), form) for name, form in columns.items()]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [
        "-" * (width - 1) + (":" if form else "-")
        for width, form in zip(widths, columns.values(), strict=True)
    ]
    print(f"\n{title}\n")
    for line in (cells[0], rule, *cells[1:]):
        padded = [
            text.rjust(width) if form else text.ljust(width)
            for text, width, form in zip(line, widths, columns.values(), strict=True)
        ]
        print(f"| {' | '.join(padded)} |")


def format_cell(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _commit() -> str | None:
    """The commit of the code, with a plus where files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
