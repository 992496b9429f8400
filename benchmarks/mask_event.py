"""How fast masks are made: exact selection of the weights that stay.

    python -m benchmarks.mask_event
    python -m benchmarks.mask_event --cases ResNet-50 filters --no-peer

Measures `jax.jit(agp.make_masks)` on weights that are normally distributed, at a first
event and at a second one that takes the first one's masks (which removed four fifths as
much) and the weights that they leave. In turn with it, in rounds, it measures

- one read: `jnp.sum` of the same weights, on all cores and, on a CPU, in a process that
  is confined to one core;
- the peer: a sort of all magnitudes (see peer.py); once, if that takes over a second.

Times are medians over the rounds. "reads" is a time divided by the time of one read,
and "temp B/weight" is the scratch memory of the compiled program per weight.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import agp_jax as agp
from benchmarks import measurements, networks, peer, programs
from benchmarks.networks import Shapes

Weights = dict[str, jax.Array]

_COLUMNS = {
    "case": "",
    "weights": ",d",
    "dtype": "",
    "sparsity": ".2f",
    "event": "",
    "ms": ",.1f",
    "ns/weight": ".2f",
    "reads": ",.1f",
    "one-core_reads": ",.1f",
    "x_faster_than_peer": ",.1f",
    "temp_B/weight": ".3f",
    "peer's_temp_B/weight": ".1f",
    "compile_s": ".1f",
    "peer's_compile_s": ".1f",
}


class Case(NamedTuple):
    """Tensors that are pruned by `structure`, whose cells have the shape `box`."""

    name: str
    shapes: Shapes
    structure: agp.Structure = agp.element()
    box: tuple[int, ...] | None = None  # of a single weight
    scope: str = "tensor"
    dtypes: tuple[DTypeLike, ...] = (jnp.float32,)
    sparsities: tuple[float, ...] = (0.9,)


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.serve_reads:
        _serve_reads()
        return
    rows = []
    with _one_core() as ask:
        for case in _small_cases() if options.small else _cases():
            if options.cases and not any(x in case.name for x in options.cases):
                continue
            for dtype in case.dtypes:
                weights = networks.random(case.shapes, dtype)
                for sparsity in case.sparsities:
                    measurements.note(f"{case.name}, {jnp.dtype(dtype).name}")
                    rows += _rows(case, weights, sparsity, ask, options)
    measurements.print_table("Masks at an event", rows, _COLUMNS)
    device = measurements.default_device()
    measurements.report({"mask_event": rows}, device, options.json)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = measurements.make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", help="parts of the names of cases to run")
    parser.add_argument("--no-peer", action="store_true", help="leave the slow one out")
    parser.add_argument("--serve-reads", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _cases() -> list[Case]:
    resnet50 = networks.kernels(networks.RESNET50.shapes())
    gpt2 = networks.kernels(networks.GPT2_SMALL.shapes())
    conv: Shapes = {"kernel": (3, 3, 512, 5536)}
    every = {
        "dtypes": (jnp.float32, jnp.bfloat16),
        "sparsities": (0.5, 0.9),
    }
    return [
        Case("matrix 4096 x 6226", {"kernel": (4096, 6226)}, **every),
        Case("matrix 4096 x 11008", {"kernel": (4096, 11008)}, **every),
        Case("blocks 1x1x8", conv, agp.block((1, 1, 8, 1)), (1, 1, 8, 1)),
        Case("filters", conv, agp.filters(), (3, 3, 512, 1)),
        Case("ResNet-50", resnet50),
        Case("ResNet-50, global", resnet50, scope="rule"),
        Case("GPT-2 small", gpt2),
    ]


def _small_cases() -> list[Case]:
    conv: Shapes = {"kernel": (3, 3, 16, 8)}
    return [
        Case("matrix", {"kernel": (64, 96)}, dtypes=(jnp.bfloat16,)),
        Case("blocks 1x1x8", conv, agp.block((1, 1, 8, 1)), (1, 1, 8, 1)),
        Case("global", {"one": (32, 8), "other": (8, 16)}, scope="rule"),
    ]


def _rows(
    case: Case,
    weights: Weights,
    sparsity: float,
    ask_one_core: Callable[[Case, DTypeLike], measurements.Measurement] | None,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """What a first event and a second one take."""
    events = _events(case, weights, sparsity)
    for program, arguments in events.values():
        _check_counts(program.compiled(*arguments), case, sparsity)
    dtype = next(iter(weights.values())).dtype
    read = programs.build(_read, weights).compiled
    measured = {
        name: measurements.stopwatch(functools.partial(program.compiled, *arguments))
        for name, (program, arguments) in events.items()
    }
    measured["read"] = measurements.stopwatch(lambda: read(weights))
    if ask_one_core:
        measured["one-core read"] = ask_one_core(case, dtype)
    sorting, seconds = None, {}
    if not options.no_peer:
        together = case.scope == "rule"
        sort = functools.partial(peer.make_masks, box=case.box, together=together)
        sorting = programs.build(sort, weights, jnp.float32(sparsity))
        call = functools.partial(sorting.compiled, weights, jnp.float32(sparsity))
        once = measurements.stopwatch(call, calls=1)
        seconds["peer"] = [once()]
        if seconds["peer"][0] < 1:
            measured["peer"] = measurements.stopwatch(call)
    seconds |= measurements.in_turn(measured, options.rounds)
    took = measurements.medians(seconds)
    size = networks.num_weights(case.shapes)
    for name, (program, _) in events.items():
        row = {
            "case": case.name,
            "weights": size,
            "dtype": dtype.name,
            "sparsity": sparsity,
            "event": name,
            "ms": took[name] * 1e3,
            "ns/weight": took[name] / size * 1e9,
            "reads": took[name] / took["read"],
            "temp_B/weight": program.memory["temporaries"] / size,
            "compile_s": program.seconds,
            "seconds": seconds,
        }
        if ask_one_core:
            row["one-core_reads"] = took[name] / took["one-core read"]
        if sorting:
            row["x_faster_than_peer"] = took["peer"] / took[name]
            row["peer's_temp_B/weight"] = sorting.memory["temporaries"] / size
            row["peer's_compile_s"] = sorting.seconds
        yield row


def _events(
    case: Case, weights: Weights, sparsity: float
) -> dict[str, tuple[programs.Build, tuple]]:
    """The programs of a first event and of a second one, with their arguments."""
    schedule = agp.polynomial_schedule(
        sparsity, initial_sparsity=0.8 * sparsity, begin_step=0, end_step=1, frequency=1
    )
    rules = [agp.Rule(".*", case.structure, schedule, scope=case.scope)]
    masks = jax.jit(lambda weights: agp.make_masks(weights, rules, 0))(weights)

    def make_masks(weights: Weights, step: jax.Array, masks: Any = None) -> Weights:
        return agp.make_masks(weights, rules, step, masks)

    arguments = {
        "first": (weights, jnp.int32(1)),
        "second": (agp.apply_masks(weights, masks), jnp.int32(1), masks),
    }
    return {
        name: (programs.build(make_masks, *given), given)
        for name, given in arguments.items()
    }


def _check_counts(masks: Weights, case: Case, sparsity: float) -> None:
    """That exactly as many cells are gone as should be."""
    cell_size = math.prod(case.box or ())
    cells = {path: math.prod(x) // cell_size for path, x in case.shapes.items()}
    removed = {
        path: int(cells[path] - jnp.sum(mask, dtype=jnp.int32) // cell_size)
        for path, mask in masks.items()
    }
    if case.scope == "rule":
        assert sum(removed.values()) == math.floor(sparsity * sum(cells.values()))
    else:
        assert removed == {path: math.floor(sparsity * n) for path, n in cells.items()}


def _read(weights: Weights) -> list[jax.Array]:
    return [jnp.sum(x) for x in weights.values()]


@contextlib.contextmanager
def _one_core() -> Iterator[
    Callable[[Case, DTypeLike], measurements.Measurement] | None
]:
    """Gives measurements of a read on one core, by a process that has no other."""
    if jax.default_backend() != "cpu" or not hasattr(os, "sched_setaffinity"):
        yield None
        return
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.mask_event", "--serve-reads"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def request(order: dict[str, Any]) -> float:
            assert process.stdin and process.stdout
            print(json.dumps(order), file=process.stdin, flush=True)
            return float(process.stdout.readline())

        def prepare(case: Case, dtype: DTypeLike) -> measurements.Measurement:
            request({"shapes": case.shapes, "dtype": jnp.dtype(dtype).name})
            return lambda: request({})

        yield prepare


def _serve_reads() -> None:
    """Answers each line on the standard input with the seconds of a read.

    A line is JSON: what to read, or {} for the same again.
    """
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    measure = None
    for line in sys.stdin:
        if order := json.loads(line):
            shapes = {path: tuple(shape) for path, shape in order["shapes"].items()}
            weights = networks.random(shapes, order["dtype"])
            read = programs.build(_read, weights).compiled
            measure = measurements.stopwatch(functools.partial(read, weights))
        assert measure
        print(measure(), flush=True)


if __name__ == "__main__":
    main()
