"""The directory of a run, and the config that says whose it is."""

import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from agp_jax.training.processes import failing_together

PathLike = str | os.PathLike[str]

_CONFIG = "config.json"
_CONFIG_TEMPORARY = ".config.json.tmp"
_PLAN = "plan.json"  # may be there before the run it is of
_SECONDS_BEHIND = 30  # that a network file system may take to show a new file
_WRITTEN_BY = "agp_jax"  # tells our config.json from another program's


class WorkdirError(Exception):
    """A work directory, or what is in it, is not what it should be; says what to do."""


def check_workdir(
    workdir: PathLike,
    config: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> bool:
    """Makes `workdir` the home of the run that `config` describes.

    A new or empty directory gets a `config.json` with `config`, a nested dict of
    plain JSON values, and the answer is False. A directory that holds the same config
    is left as it is and the answer is True: the run resumes there. Its config may lack
    fields, as one of an earlier version does, if here they are as in `defaults`, where
    the first entry of a list stands for all. All processes call this; the first one
    looks and writes, and the others check that they see it.

    Raises:
      WorkdirError: `workdir` holds another config (with one line per field that
        differs) or files of something else, is no directory, or cannot be written.
        Nothing in it is touched. Or a process does not see what the first one wrote.
      ProcessError: another process raised one of these.
      ValueError: `config` is more than plain JSON.
    """
    try:
        plain_config = json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a config holds plain JSON values only: {error}") from error
    resumes = False
    with failing_together():
        if jax.process_index() == 0:
            resumes = _claim(Path(workdir), plain_config, defaults or {})
    with failing_together():
        _check_shared(Path(workdir))
    return bool(multihost_utils.broadcast_one_to_all(np.array(resumes)))


def read_config(workdir: PathLike) -> dict[str, Any]:
    """The config of the run in `workdir`, as `check_workdir` stored it.

    Raises:
      WorkdirError: there is none, or it cannot be read.
    """
    path = Path(workdir) / _CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WorkdirError(
            f"{workdir} is no work directory of agp_jax: it has no {_CONFIG}"
        ) from error
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read: {describe_cause(error)}") from error
    ours = isinstance(content, dict) and content.get("written_by") == _WRITTEN_BY
    if not ours or "config" not in content:
        raise WorkdirError(
            f"{workdir} is no work directory of agp_jax: another program wrote its "
            f"{_CONFIG}"
        )
    return content["config"]


def list_differences(
    old: dict[str, str], new: dict[str, str], in_old: str, in_new: str
) -> list[str]:
    """A line for each name that has another value in `new` than in `old`."""
    return [
        f"  {name}: {old.get(name, 'nothing')} {in_old}, "
        f"{new.get(name, 'nothing')} {in_new}"
        for name in new | old
        if old.get(name) != new.get(name)
    ]


def describe_cause(error: BaseException) -> str:
    """The first line of what `error` comes from."""
    while error.__cause__ is not None:
        error = error.__cause__
    first_line = str(error).strip().partition("\n")[0].partition(" [tensorstore")[0]
    return f"{type(error).__name__}: {first_line[:400]}"


def _claim(workdir: Path, config: dict[str, Any], defaults: Mapping[str, Any]) -> bool:
    if re.match(r"\w\w+:/", os.fspath(workdir)):
        raise WorkdirError(
            f"{workdir} is in an object store; give a local or mounted directory"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in workdir.iterdir()} - {_CONFIG_TEMPORARY, _PLAN}
        if not names:
            _write_config(workdir, config)
            return False
        if _CONFIG in names:  # learn now, not at the first save, if it is read-only
            with tempfile.TemporaryFile(dir=workdir):
                pass
    except OSError as error:
        raise WorkdirError(
            f"{workdir} cannot be the work directory: {describe_cause(error)}"
        ) from error
    if _CONFIG not in names:
        raise WorkdirError(
            f"{workdir} holds files of something else ({', '.join(sorted(names)[:3])}"
            f"{', ...' if len(names) > 3 else ''}) and no {_CONFIG}; give a new or "
            f"empty directory"
        )
    _check_same_config(workdir, read_config(workdir), config, defaults)
    return True


def _check_shared(workdir: Path) -> None:
    """Every process writes its part of a checkpoint, so all must see one directory."""
    for _ in range(_SECONDS_BEHIND):
        if (workdir / _CONFIG).exists():
            return
        time.sleep(1)
    raise WorkdirError(
        f"process {jax.process_index()} does not see {workdir / _CONFIG}, which "
        f"process 0 wrote: give a work directory that all hosts share"
    )


def _write_config(workdir: Path, config: dict[str, Any]) -> None:
    temporary = workdir / _CONFIG_TEMPORARY
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"written_by": _WRITTEN_BY, "config": config}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(workdir / _CONFIG)  # atomic: a config is whole or absent


def _check_same_config(
    workdir: Path, stored: Any, asked: Any, defaults: Mapping[str, Any]
) -> None:
    old, usual = _fields(stored), _fields(defaults)
    new = {
        name: value
        for name, value in _fields(asked).items()
        if name in old or usual.get(_of_the_first(name)) != value
    }
    differences = list_differences(old, new, "in the workdir", "asked")
    if differences:
        raise WorkdirError(
            f"{workdir} belongs to a run with another config:\n"
            + "\n".join(differences)
            + "\nask for the same to resume it, or give a new work directory"
        )


def _of_the_first(name: str) -> str:
    """The name of the same field of the first entry of a list."""
    return re.sub(r"\.\d+\b", ".0", name)


def _fields(value: Any, name: str = "") -> dict[str, str]:
    """Values spelled as in Python, by dotted name: `{"prune.final_sparsity": "0.9"}`"""
    if isinstance(value, dict) and value:
        entries = value.items()
    elif isinstance(value, list) and value:
        entries = enumerate(value)
    else:
        return {name: repr(value)}
    prefix = f"{name}." if name else ""
    return {k: v for key, x in entries for k, v in _fields(x, f"{prefix}{key}").items()}
