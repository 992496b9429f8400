"""Records: what a run writes for other programs, its metrics, summary and plan."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agp_jax.training.plans import Plan
from agp_jax.training.workdirs import WorkdirError

_METRICS, _SUMMARY = "metrics.jsonl", "summary.json"


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
    path = workdir / _SUMMARY
    _write_atomically(path, json.dumps(summary, indent=2) + "\n")
    return path


def read_dense_summary(
    workdir: Path, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The summary of the same experiment without pruning, of a run beside `workdir`.

    None where no directory beside it holds one that has finished.
    """

    def without_pruning(config: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k not in ("prune", "distill")}

    for path in sorted(workdir.resolve().parent.glob(f"*/{_SUMMARY}")):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            other = summary["config"]
            is_dense = not other["prune"]["enabled"]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # somebody else's
        if is_dense and without_pruning(other) == without_pruning(config):
            return summary
    return None


def write_plan(workdir: Path, plan: Plan) -> Path:
    """Writes `plan.json`.

    Raises:
      WorkdirError: if it cannot be written.
    """
    path = workdir / "plan.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, json.dumps(plan.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise WorkdirError(f"cannot write {path}: {error}") from error
    return path


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
