"""Checkpoints to resume a run from, or to use.

    workdir/checkpoints/<step>/   one directory per step, in it one per item

An item is a named pytree of `jax.Array`s. A run saves two, so that nothing is stored
twice and the weights can be had without the rest:

    variables   {"params": ..., "batch_stats": ...}
    training    step, optimizer state with masks, keys: what only resuming needs

Any pytree will do: NamedTuples, `optax.MaskedNode()`, None, bool and bfloat16 arrays,
PRNG keys. What is no array, such as a cut, is saved as JSON beside them. Work
directories are local or mounted; object stores are not supported.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from agp_jax.training.workdirs import (
    PathLike,
    WorkdirError,
    describe_cause,
    list_differences,
)
from agp_jax.trees import PyTree

_MAX_LEAVES_SHOWN = 8


class CheckpointError(WorkdirError):
    """A checkpoint is not what it should be; the message says what to do."""


@contextlib.contextmanager
def open_checkpoints(
    workdir: PathLike, *, keep: int = 2, writes: bool = True
) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints under `workdir`, for the functions below.

    Without `writes` they can be read alone, also those of a run in progress.
    On disk stay the latest `keep` steps and, if it is older, the best one. What an
    interrupted save left behind is removed. Leaving the `with` block waits until the
    last save is complete. One run at a time may open a work directory.

    Raises:
      CheckpointError: the list of steps cannot be read; or, when leaving, the last
        save failed.
    """
    if keep < 1:
        raise ValueError(f"keep at least 1 checkpoint, got keep={keep}")
    manager = _open_manager(workdir, keep=keep, writes=writes)
    try:
        yield manager
    finally:
        try:
            wait(manager)
        finally:
            manager.close()


def save(
    manager: ocp.CheckpointManager,
    step: int,
    items: Mapping[str, PyTree],
    *,
    score: float | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Starts saving `items` as `step` and returns as soon as they are copied.

    The state may be donated right after; files are written in the background, one
    save at a time, and a step appears only when it is complete. `score` (higher is
    better) enters the step for `best_step`; give it only at target sparsity. One that
    is not finite counts as none. `values` are saved as JSON beside the items.

    Raises:
      CheckpointError: the save before this one failed, or this one at once.
      ValueError: `step` is not after the last saved one, or a leaf is no `jax.Array`.
    """
    wait(manager)
    step, latest = int(step), manager.latest_step()
    if latest is not None and step <= latest:
        raise ValueError(
            f"step {step} cannot be saved after step {latest}; compare with "
            f"latest_step, or use a new work directory"
        )
    for path, leaf in ocp.tree.to_flat_dict(dict(items), sep="/").items():
        if not isinstance(leaf, jax.Array):
            raise ValueError(
                f"{path} is a {type(leaf).__name__}, and only jax.Arrays are saved; "
                f"create the state under jax.jit"
            )
    if score is not None:
        score = float(score) if math.isfinite(score) else None
    try:
        manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                **{name: ocp.args.JsonSave(x) for name, x in (values or {}).items()},
            ),
            # Orbax logs a warning for a step without metrics, hence a score of None.
            metrics={"score": score},
            force=True,
        )
    except OSError as error:
        raise _not_saved(manager, step, error) from error


def wait(manager: ocp.CheckpointManager) -> None:
    """Returns when the save in progress, if any, is complete on disk.

    Raises:
      CheckpointError: it failed. The steps before it are as they were.
    """
    step = manager.latest_step()
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _not_saved(manager, step, error) from error


def has_steps(workdir: PathLike) -> bool:
    """Whether there is a step under `workdir` to resume from, without opening it."""
    directory = _directory(workdir)
    return directory.is_dir() and any(x.name.isdigit() for x in directory.iterdir())


def latest_step(manager: ocp.CheckpointManager) -> int | None:
    """The last step, that of a save in progress included; None if there is none."""
    return manager.latest_step()


def best_step(manager: ocp.CheckpointManager) -> int | None:
    """The step with the highest score, the later of equals; None if none has one."""
    wait(manager)
    step = manager.best_step()
    if step is None or _score(manager.metrics(step)) == -math.inf:
        return None
    return step


def restore(
    manager: ocp.CheckpointManager,
    targets: Mapping[str, PyTree],
    *,
    step: int | None = None,
) -> tuple[int, dict[str, PyTree]]:
    """The step restored (the latest unless `step` is given) and its items.

    `targets` has one tree per wanted item: `jax.ShapeDtypeStruct`s with a sharding, or
    arrays. What comes back has their structure, shapes, dtypes and shardings, and the
    values that were saved, bit for bit, on whatever devices they were saved from.

    Raises:
      CheckpointError: there is no such step; the checkpoint holds another model (with
        the leaves that differ); or it cannot be read. Nothing on disk is touched, and
        no other step is taken in its place.
      ValueError: a target has no sharding, or one that does not divide its shape.
    """
    wait(manager)
    step = _existing_step(manager, step)
    targets = {name: jax.tree.map(_as_target, tree) for name, tree in targets.items()}
    directory = _step_directory(manager, step)
    with _explain_unreadable(manager, step):
        stored = {name: _stored_shapes(manager, step, name) for name in targets}
        _check_same_model(directory, stored, jax.tree.map(_as_stored, targets))
        composite = manager.restore(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(t) for name, t in targets.items()}
            ),
        )
    restored = {name: composite[name] for name in targets}
    _check_same_model(directory, restored, targets)  # now with the kinds of keys
    return step, restored


def read_shapes(
    manager: ocp.CheckpointManager, item: str, *, step: int | None = None
) -> PyTree:
    """The shapes and dtypes stored for `item`, of the latest step unless given.

    The tree has dicts for NamedTuples, lists for tuples, and a PRNG key as its data.
    For `variables`, which are dicts, it is what a thinned model needs to be resumed:
    the shapes its parameters had when it was saved.
    """
    wait(manager)
    step = _existing_step(manager, step)
    with _explain_unreadable(manager, step):
        return _stored_shapes(manager, step, item)


def read_value(
    manager: ocp.CheckpointManager, name: str, *, step: int | None = None
) -> Any:
    """A value that was saved as JSON with a step (the latest); None if there is none.

    Raises:
      CheckpointError: there is no such step, or the value cannot be read.
    """
    wait(manager)
    step = _existing_step(manager, step)
    if not (_step_directory(manager, step) / name).exists():
        return None
    with _explain_unreadable(manager, step):
        args = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
        return manager.restore(step, args=args)[name]


def restore_variables(
    workdir: PathLike, *, step: Literal["best", "latest"] | int = "best"
) -> PyTree:
    """The `variables` of one checkpoint under `workdir`, as numpy arrays.

    `step` is "best", "latest" or a number. Needs no model, shapes, optimizer or the
    devices of the run, and writes nothing, so it can look at a run in progress.

    Raises:
      CheckpointError: there is no such step, or it cannot be read.
    """
    manager = _open_manager(workdir, keep=1, writes=False)
    with contextlib.closing(manager):
        latest = _existing_step(manager, None)
        match step:
            case "best":
                chosen = best_step(manager)
            case "latest":
                chosen = latest
            case _:
                chosen = _existing_step(manager, step)
        if chosen is None:
            raise CheckpointError(
                f"no checkpoint in {manager.directory} has a score: the run has not "
                f'been measured at target sparsity; step="latest" is {latest}'
            )
        with _explain_unreadable(manager, chosen):
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                _stored_shapes(manager, chosen, "variables"),
            )
            with ocp.PyTreeCheckpointer() as checkpointer:
                return checkpointer.restore(
                    _step_directory(manager, chosen) / "variables",
                    args=ocp.args.PyTreeRestore(restore_args=as_numpy),
                )


def _directory(workdir: PathLike) -> Path:
    return Path(workdir).absolute() / "checkpoints"


def _open_manager(
    workdir: PathLike, *, keep: int, writes: bool
) -> ocp.CheckpointManager:
    # Under absl's app.run, Orbax logs some fifty lines for every save.
    logging.getLogger("absl").addFilter(_is_worth_reading)
    directory = _directory(workdir)
    options = ocp.CheckpointManagerOptions(
        create=writes,
        cleanup_tmp_directories=writes,
        best_fn=_score,
        # `max_to_keep` would delete the latest step when its score is worse.
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        ),
    )
    try:
        return ocp.CheckpointManager(directory, options=options)
    except (OSError, ValueError) as error:
        for metrics in sorted(directory.glob("*/metrics/metrics")):
            if not _is_json(metrics):
                steps = [int(p.name) for p in directory.iterdir() if p.name.isdigit()]
                raise _unreadable(metrics.parent.parent, steps, error) from error
        raise CheckpointError(
            f"{directory} cannot be opened: {describe_cause(error)}"
        ) from error


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "orbax" not in record.pathname


def _score(metrics: Mapping[str, float | None] | None) -> float:
    score = (metrics or {}).get("score")
    return -math.inf if score is None else score


def _existing_step(manager: ocp.CheckpointManager, step: int | None) -> int:
    steps = manager.all_steps()
    if not steps:
        raise CheckpointError(f"{manager.directory} has no complete checkpoint")
    if step is None:
        return max(steps)
    if step not in steps:
        raise CheckpointError(
            f"{manager.directory} has no step {step}; there is "
            f"{', '.join(map(str, sorted(steps)))}"
        )
    return step


def _step_directory(manager: ocp.CheckpointManager, step: int):
    return manager.directory / str(step)


def _stored_shapes(manager: ocp.CheckpointManager, step: int, item: str) -> PyTree:
    directory = _step_directory(manager, step) / item
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        ocp.StandardCheckpointHandler().metadata(directory).tree,
    )


def _as_target(leaf: Any) -> jax.ShapeDtypeStruct:
    if getattr(leaf, "sharding", None) is None:
        raise ValueError(f"a restore target needs a sharding, got {leaf}")
    leaf.sharding.shard_shape(leaf.shape)  # raises where it does not divide
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _as_stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf)
    return leaf


def _check_same_model(
    directory: PurePath, stored: Mapping[str, PyTree], targets: Mapping[str, PyTree]
) -> None:
    differences = list_differences(
        _leaves(stored), _leaves(targets), "in the checkpoint", "in the model"
    )
    if differences:
        more = len(differences) - _MAX_LEAVES_SHOWN
        raise CheckpointError(
            f"{directory} holds another model:\n"
            + "\n".join(differences[:_MAX_LEAVES_SHOWN])
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nresume it with the model it was saved from, or give a new work "
            "directory"
        )


def _leaves(items: Mapping[str, PyTree]) -> dict[str, str]:
    return {
        f"{name}/{path}": f"{leaf.dtype}{list(leaf.shape)}"
        for name, tree in items.items()
        for path, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()
    }


@contextlib.contextmanager
def _explain_unreadable(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # a device without room says nothing about the file
    except Exception as error:  # Orbax raises bare ones too
        directory = _step_directory(manager, step)
        raise _unreadable(directory, manager.all_steps(), error) from error


def _unreadable(
    directory: PurePath, steps: Iterable[int], error: Exception
) -> CheckpointError:
    latest = max((s for s in steps if s != int(directory.name)), default=None)
    resume = "start again" if latest is None else f"resume from step {latest}"
    return CheckpointError(
        f"{directory} cannot be read: {describe_cause(error)}\n"
        f"if it is damaged, delete that directory to {resume}"
    )


def _not_saved(
    manager: ocp.CheckpointManager, step: int | None, error: Exception
) -> CheckpointError:
    return CheckpointError(
        f"step {step} could not be saved in {manager.directory}: "
        f"{describe_cause(error)}\n"
        f"make room or mend the file system; the steps before it are complete"
    )
