"""Several processes that train one model: how they meet, agree and end.

All processes call the functions here at the same point of the program, `leave` alone
excepted. A single process agrees with itself.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

_HOW_TO_CONNECT = (
    "outside of TPU pods, Slurm and Open MPI give each process --num_processes, its "
    "--process_id and the same --coordinator_address=HOST:PORT, a free port on the "
    "host of process 0"
)
_MAX_LISTED = 8


class ProcessError(Exception):
    """The processes of a run cannot work together; says why."""


def connect(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins this process to the others of its run, before anything else uses JAX.

    The arguments are those of `jax.distributed.initialize`; on TPU pods and under Slurm
    and Open MPI it finds them by itself.

    Raises:
      ProcessError: an argument is missing or wrong, or JAX is in use already.
    """
    if coordinator_address and not re.fullmatch(r".+:\d+", coordinator_address):
        raise ProcessError(
            f"--coordinator_address must be HOST:PORT, got {coordinator_address!r}"
        )
    # By default JAX takes a SIGTERM for itself, and training goes on until a SIGKILL.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX also ends a process that has waited for 5 minutes: the hint comes before.
    hint = threading.Timer(
        20,
        print,
        [f"still waiting for the other processes; {_HOW_TO_CONNECT}"],
        {"file": sys.stderr},
    )
    hint.daemon = True
    hint.start()
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ProcessError(
            f"cannot connect to the other processes: {error}\n{_HOW_TO_CONNECT}"
        ) from error
    finally:
        hint.cancel()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Runs a block that may fail on one process alone: then it fails on all of them.

    The others would go on otherwise, and wait for ever for the one that is gone.

    Raises:
      ProcessError: on a process where nothing failed, naming those where it did.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = np.flatnonzero(_gather([failure is not None]))
    if failure is not None:
        raise failure
    if len(failed):
        raise ProcessError(f"process {_listed(failed)} cannot go on and says why")


def check_same(values: Sequence[int], problem: str) -> None:
    """Checks that `values`, numbers of 32 bits, are all equal, and on all processes.

    Raises:
      ProcessError: on all processes, with `problem` and which process has which value.
    """
    gathered = _gather(np.array(values, np.uint32))
    owners: dict[str, list[int]] = {}
    for process, row in enumerate(gathered):
        own = " and ".join(f"{value:08x}" for value in np.unique(row))
        owners.setdefault(own, []).append(process)
    if len(np.unique(gathered)) > 1:
        lines = [f"  process {_listed(who)}: {own}" for own, who in owners.items()]
        raise ProcessError("\n".join([f"{problem}:", *lines]))


def leave(message: str) -> NoReturn:
    """Ends this process with an error, without waiting for the others.

    Python's own exit waits until the others exit too, as JAX asks it to, and they may
    be waiting for this one in the middle of a step.
    """
    if not jax.distributed.is_initialized():
        sys.exit(message)
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if jax.process_index() == 0:
        time.sleep(2)  # the others end with this one: they may have something to say
    os._exit(1)


def _gather(values: Sequence[int] | np.ndarray) -> np.ndarray:
    """`values` of all processes, (process_count, len(values))."""
    if jax.process_count() == 1:
        return np.asarray(values)[None]
    return multihost_utils.process_allgather(np.asarray(values))


def _listed(numbers: Sequence[int] | np.ndarray) -> str:
    more = len(numbers) - _MAX_LISTED
    listed = ", ".join(str(number) for number in numbers[:_MAX_LISTED])
    return f"{listed} and {more} more" if more > 0 else listed
