"""Compiled programs: how long they took to make, their memory, their collectives."""

import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_KINDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")


class Build(NamedTuple):
    """A compiled function with the seconds it took to trace and to compile."""

    compiled: Any
    lower_seconds: float
    compile_seconds: float

    @property
    def seconds(self) -> float:
        return self.lower_seconds + self.compile_seconds

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on each device.

        What is aliased is counted among both arguments and outputs.
        """
        analysis = self.compiled.memory_analysis()
        return {
            "arguments": analysis.argument_size_in_bytes,
            "outputs": analysis.output_size_in_bytes,
            "aliased": analysis.alias_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
        }


def build(
    function: Callable[..., Any],
    *arguments: Any,
    donate: Sequence[int] = (),
    out_shardings: Any = None,
) -> Build:
    """Compiles `function` afresh for arguments that may be abstract."""
    jax.clear_caches()
    began = time.perf_counter()
    jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)
    lowered = jitted.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return Build(compiled, traced - began, time.perf_counter() - traced)


def make_step(
    tx: optax.GradientTransformation, loss: Callable[..., jax.Array] | None = None
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """A step of params, optimizer state and gradients, or of a batch for `loss`."""

    def step(params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
        gradients = jax.grad(loss)(params, inputs) if loss else inputs
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


class Collective(NamedTuple):
    """A collective operation in a compiled program.

    Attributes:
      kind: such as "all-reduce".
      num_bytes: what one device has afterwards.
      repeats: whether it stands inside of a loop.
      every_step: whether it runs under no condition.
    """

    kind: str
    num_bytes: int
    repeats: bool
    every_step: bool


def collectives(program: Build) -> Counter[Collective]:
    """The collectives in the text of a program; one in a loop counts once."""
    computations: dict[str, list[str]] = {}
    body: list[str] = []
    for line in program.compiled.as_text().splitlines():
        if header := _COMPUTATION.match(line):
            body = computations.setdefault(header[1], [])
        body.append(line)
    looped = _run_by("while", computations)
    conditional = _run_by("conditional", computations)
    return Counter(
        Collective(
            found[2], _result_bytes(found), name in looped, name not in conditional
        )
        for name, lines in computations.items()
        for line in lines
        if (found := _COLLECTIVE.search(line))
    )


def _run_by(operation: str, computations: Mapping[str, Sequence[str]]) -> set[str]:
    """The names of the computations that operations of a kind run."""
    run: set[str] = set()
    every_line = [line for body in computations.values() for line in body]
    lines = [line for line in every_line if f" {operation}(" in line]
    while lines:
        called = {name for line in lines for name in _called_by(line)} - run
        run |= called
        lines = [line for name in called for line in computations.get(name, ())]
    return run


def _called_by(line: str) -> list[str]:
    """The names of the computations that an operation runs."""
    branches = _BRANCHES.search(line)
    several = re.findall(r"[\w.\-]+", branches[1]) if branches else []
    return _CALLED.findall(line) + several


def _result_bytes(collective: re.Match[str]) -> int:
    sizes = [
        math.prod(int(size) for size in shape.split(",") if size)
        * max(1, int(bits or 8) // 8)
        for bits, shape in _ARRAY.findall(collective[1])
    ]
    if collective[3] and collective[2] in ("all-gather", "collective-permute"):
        return max(sizes)  # a started one gives its operand and more beside its result
    return sum(sizes)


def by_kind(counts: Mapping[Collective, int]) -> dict[str, dict[str, int]]:
    """For each kind how many there are, and where, and the bytes of the largest."""
    table: dict[str, dict[str, int]] = {}
    for one, count in sorted(counts.items()):
        row = table.setdefault(
            one.kind, {"count": 0, "in_loops": 0, "every_step": 0, "largest_bytes": 0}
        )
        row["count"] += count
        row["in_loops"] += count * one.repeats
        row["every_step"] += count * one.every_step
        row["largest_bytes"] = max(row["largest_bytes"], one.num_bytes)
    return table


def describe(kinds: Mapping[str, Mapping[str, int]]) -> str:
    """What `by_kind` gives, in words."""
    parts = []
    for kind, row in kinds.items():
        text = f"{row['count']} {kind} ≤ {row['largest_bytes']:,} B"
        if row["in_loops"]:
            text += f", {row['in_loops']} in loops"
        if row["every_step"]:
            text += f", {row['every_step']} in every step"
        parts.append(text)
    return "; ".join(parts) or "none"


def make_mesh(
    shape: Sequence[int],
    names: Sequence[str],
    axis_type: AxisType = AxisType.Auto,
    topology: str | None = None,
) -> Mesh:
    """A mesh of the devices there are, of virtual CPU devices, or of absent TPUs.

    Args:
      shape: how many devices along each axis.
      names: of the axes.
      axis_type: of all axes.
      topology: TPUs to compile for that need not be there, such as "v5e:2x4".
    """
    size = math.prod(shape)
    if topology:
        devices = _topology_devices(topology)
    else:
        devices = jax.devices() if jax.device_count() >= size else jax.devices("cpu")
    if len(devices) < size:
        raise ValueError(f"a mesh {tuple(shape)} needs {size} devices, not {devices}")
    return Mesh(
        np.array(devices[:size]).reshape(shape),
        tuple(names),
        axis_types=(axis_type,) * len(shape),
    )


def devices_of(mesh: Mesh) -> str:
    """Which devices a mesh has, in words."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def num_devices(topology: str) -> int:
    return len(_topology_devices(topology))


def place(tree: Any, mesh: Mesh, specs: Mapping[str, PartitionSpec]) -> Any:
    """Abstract arrays on `mesh`, sharded by the last key of their paths with a spec.

    So an optimizer's moments lie where their parameters do. What has no spec, or fewer
    axes than it, is replicated. Axes that do not divide are not sharded.
    """

    def place_leaf(keys, leaf):
        names = [getattr(key, "key", getattr(key, "name", None)) for key in keys]
        spec = next((specs[x] for x in reversed(names) if x in specs), PartitionSpec())
        spec = spec if len(spec) <= leaf.ndim else PartitionSpec()
        parts = [
            axis if size % _num_shards(mesh, axis) == 0 else None
            for size, axis in zip(leaf.shape, spec, strict=False)
        ]
        sharding = NamedSharding(mesh, PartitionSpec(*parts))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map_with_path(place_leaf, tree)


def keeps_shardings(program: Build, inputs: Any) -> bool:
    """Whether what comes out of `program` lies as `inputs`, a tree like it, do."""
    outputs = jax.tree.leaves(program.compiled.output_shardings)
    pairs = zip(jax.tree.leaves(inputs), outputs, strict=True)
    return all(after.is_equivalent_to(x.sharding, x.ndim) for x, after in pairs)


def _num_shards(mesh: Mesh, axis: Any) -> int:
    names = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(mesh.shape[name] for name in names if name)


def _topology_devices(topology: str) -> list[jax.Device]:
    """TPUs as their compiler knows them; needs the package libtpu and no TPU."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return list(topologies.get_topology_desc(topology, "tpu").devices)
