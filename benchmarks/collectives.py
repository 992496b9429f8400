"""What devices tell each other when a sharded optimizer prunes: the collectives.

    python -m benchmarks.collectives
    python -m benchmarks.collectives --tpu v5e:2x4

Compiles the step of SGD with momentum, wrapped by `agp.prune` and bare, on a mesh of
2x4 devices: those there are, or virtual CPU devices, or the TPUs of a topology that
need not be there (`--tpu`, needs the package libtpu). Nothing runs. Each row is a
structure, a sharding of its matrices and a type of mesh, and lists the collectives in
the wrapped step that the bare one does not have: how many stand in the compiled
program, the bytes that a device has after the largest, and how many stand in loops,
which an event runs a few or a dozen times. A step without an event runs none of them
unless the row says "in every step".

"keeps shardings" says whether masks, parameters and momentum come out of the step as
they went in, the compiler being left to choose, and "temporaries per weight" are bytes
for each weight on a device, those of the bare step not counted. The second table grows
the number of tensors.
"""

import argparse
import math
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, PartitionSpec

import agp_jax as agp
from benchmarks import measurements, networks, programs

_MESH_SHAPE = (2, 4)
_MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
_SHARDINGS = {
    "rows": (("x", "y"), None),
    "columns": (None, ("x", "y")),
    "both": ("x", "y"),
    "replicated": (None, None),
}
_STRUCTURES = {
    "element": agp.element(),
    "packed": agp.element(),  # with masks of one bit per weight
    "block": agp.block((8, 1)),
    "filters": agp.filters(),
    "n_of_m": agp.n_of_m(2, 4),
    "global": agp.element(),  # three tensors ranked together
    "stacked": agp.element(),  # four tensors in one array, each ranked by itself
}
_COLUMNS = {
    "structure": "",
    "tensors": "d",
    "sharding": "",
    "mesh": "",
    "beyond_the_bare_step": "",
    "temporaries_per_weight": ".1f",
    "keeps_shardings": "",
}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    jax.config.update("jax_num_cpu_devices", math.prod(_MESH_SHAPE))
    size = (64, 128) if options.small else (4096, 11008)
    structures = ["element", "n_of_m"] if options.small else list(_STRUCTURES)
    shardings = ["both"] if options.small else list(_SHARDINGS)
    by_structure = [
        _row(name, _num_tensors(name), size, sharding, mesh, options.tpu)
        for name in structures
        for sharding in shardings
        for mesh in _MESHES
    ]
    title = "By structure and sharding"
    measurements.print_table(title, _merged(by_structure), _COLUMNS)
    by_number = [
        _row("element", count, size, "both", mesh, options.tpu)
        for count in ((2,) if options.small else (1, 4, 16))
        for mesh in _MESHES
    ]
    measurements.print_table("By number of tensors", _merged(by_number), _COLUMNS)
    mesh = programs.make_mesh(_MESH_SHAPE, ("x", "y"), topology=options.tpu)
    device = f"compiled for {programs.devices_of(mesh)}"
    tables = {"by_structure": by_structure, "by_number": by_number}
    measurements.report(tables, device, options.json)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = measurements.make_parser(__doc__)
    parser.add_argument("--tpu", help="a topology to compile for, such as v5e:2x4")
    return parser.parse_args(arguments)


def _num_tensors(name: str) -> int:
    return 3 if name == "global" else 1


def _row(
    name: str,
    num_tensors: int,
    size: tuple[int, int],
    sharding: str,
    mesh_type: str,
    topology: str | None,
) -> dict[str, Any]:
    """What the wrapped step of matrices of a size has beyond the bare one."""
    measurements.note(f"{num_tensors} x {name}, {sharding}, {mesh_type}")
    mesh = programs.make_mesh(_MESH_SHAPE, ("x", "y"), _MESHES[mesh_type], topology)
    stack = (4,) if name == "stacked" else ()
    spec = PartitionSpec(*[None for _ in stack], *_SHARDINGS[sharding])
    shapes: networks.Shapes = {
        f"layer{i}/kernel": (*stack, *size) for i in range(num_tensors)
    }
    params = programs.place(
        networks.abstract(shapes), mesh, dict.fromkeys(shapes, spec)
    )
    rule = agp.Rule(
        ".*",
        _STRUCTURES[name],
        agp.polynomial_schedule(0.5, begin_step=0, end_step=1000, frequency=100),
        scope="rule" if name == "global" else "tensor",
        stacked_axes=len(stack),
    )
    bare = optax.sgd(0.1, momentum=0.9)
    row = {
        "structure": name,
        "tensors": num_tensors,
        "sharding": sharding,
        "mesh": mesh_type,
    }
    try:
        before, _ = _compile(bare, params, mesh, spec)
        after, kept = _compile(
            agp.prune(bare, [rule], packed=name == "packed"), params, mesh, spec
        )
    except Exception as error:  # a finding too
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return {**row, "beyond_the_bare_step": f"fails: {reason}", "error": str(error)}
    found = programs.collectives(after) - programs.collectives(before)
    temporaries = after.memory["temporaries"] - before.memory["temporaries"]
    weights_here = sum(
        math.prod(x.sharding.shard_shape(x.shape)) for x in params.values()
    )
    kinds = programs.by_kind(found)
    return {
        **row,
        "beyond_the_bare_step": programs.describe(kinds),
        "temporaries_per_weight": temporaries / weights_here,
        "keeps_shardings": "yes" if kept else "no",
        "kinds": kinds,
        "compile_s": after.seconds,
    }


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in the mesh alone as one."""
    merged: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        shown = tuple(
            measurements.format_cell(row.get(name), form)
            for name, form in _COLUMNS.items()
            if name != "mesh"
        )
        same = merged.get(shown)
        mesh = f"{same['mesh']}, {row['mesh']}" if same else row["mesh"]
        merged[shown] = {**row, "mesh": mesh}
    return list(merged.values())


def _compile(
    tx: optax.GradientTransformation, params: Any, mesh: Mesh, spec: PartitionSpec
) -> tuple[programs.Build, bool]:
    """A compiled optimizer step, and whether all stays where it was in it."""
    state = jax.eval_shape(tx.init, params)
    state = programs.place(state, mesh, dict.fromkeys(params, spec))
    step = programs.make_step(tx)
    program = programs.build(step, params, state, params, donate=(0, 1))
    return program, programs.keeps_shardings(program, (params, state))


if __name__ == "__main__":
    main()
