"""What pruning costs an optimizer step of 7 or 70 billion weights, by compilation.

    python -m benchmarks.abstract_scale
    python -m benchmarks.abstract_scale --tpu v5e:16x16 --models 7b
    python -m benchmarks.abstract_scale --train-step --models 7b --dtypes bfloat16

Compiles an AdamW step of a decoder like Llama's, whose layers are stacked for a scan,
wrapped by `agp.prune` and bare. The arrays are abstract, so nothing is allocated and
nothing runs. Parameters, gradients and moments are sharded over a mesh of "fsdp" and
"tensor" axes: 256 virtual CPU devices for 7 billion weights and 512 for 70 billion, or
the TPUs of a topology that need not be there (`--tpu`, needs the package libtpu).

Each row gives the memory of one device in MB (arguments are parameters, gradients,
moments and masks; donated, so the outputs take no more), the temporaries in bytes for
each of its weights, the collectives that the bare step does not have, and the seconds
of tracing and compiling. A step without an event runs none of those collectives unless
the row says "in every step". "keeps shardings" says whether the compiler, left to
choose, puts each output where its input was. `--train-step` compiles the forward and
backward pass too, with the outputs' places given; for TPUs that takes a minute a row.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import agp_jax as agp
from benchmarks import measurements, networks, programs

_MODELS = {  # with the number of virtual devices
    "7b": (networks.LLAMA_7B, 256),
    "70b": (networks.LLAMA_70B, 512),
    "tiny": (networks.Llama(2, 64, 8, 4, 128, 256), 16),
}
_TENSOR_PARALLEL = 8
_LENGTH = 2049  # tokens of an example; the last is only predicted
_SCHEDULE = agp.polynomial_schedule(0.5, begin_step=0, end_step=10_000, frequency=100)
_COLUMNS = {
    "model": "",
    "devices": "",
    "pruned": "",
    "arguments_MB": ",.1f",
    "temporaries_MB": ",.1f",
    "temporaries_per_weight": ".2f",
    "collectives_beyond_bare": "",
    "trace_s": ".1f",
    "compile_s": ".1f",
    "keeps_shardings": "",
}
# name: (structure, whether masks are packed)
_STRUCTURES = {
    "element": (agp.element(), False),
    "element, packed": (agp.element(), True),
    "2:4": (agp.n_of_m(2, 4), False),
}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    names = ["tiny"] if options.small else options.models
    dtypes = ["float32"] if options.small else options.dtypes
    jax.config.update("jax_num_cpu_devices", max(_MODELS[name][1] for name in names))
    rows = [
        row
        for name in names
        for dtype in dtypes
        for row in _rows(name, dtype, options.tpu, options.train_step)
    ]
    step = "training" if options.train_step else "AdamW"
    measurements.print_table(f"One {step} step, per device", rows, _COLUMNS)
    device = f"compiled for {options.tpu or rows[-1]['devices']}"
    measurements.report({"abstract_scale": rows}, device, options.json)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = measurements.make_parser(__doc__)
    parser.add_argument("--tpu", help="a topology to compile for, such as v5e:16x16")
    parser.add_argument("--models", nargs="+", choices=_MODELS, default=["7b", "70b"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--train-step", action="store_true")
    return parser.parse_args(arguments)


def _rows(
    name: str, dtype: str, topology: str | None, trains: bool
) -> Iterator[dict[str, Any]]:
    """The bare step of a model, then the one of each structure."""
    model, num_devices = _MODELS[name]
    if topology:
        num_devices = programs.num_devices(topology)
    shape = num_devices // _TENSOR_PARALLEL, _TENSOR_PARALLEL
    mesh = programs.make_mesh(shape, ("fsdp", "tensor"), topology=topology)
    params = networks.abstract(model.shapes(), dtype)
    params = programs.place(params, mesh, model.specs())
    # The gradients are given, or those of a loss of a batch.
    loss, inputs = _training(model, mesh) if trains else (None, params)
    bare = optax.adamw(1e-3)
    optimizers = {"bare": bare}
    for pruned, (structure, packed) in _STRUCTURES.items():
        rule = agp.Rule("layers/.*/kernel", structure, _SCHEDULE, stacked_axes=1)
        optimizers[pruned] = agp.prune(bare, [rule], packed=packed)
    weights_here = networks.num_weights(model.shapes()) / num_devices
    bare_collectives: Counter[programs.Collective] = Counter()
    for pruned, tx in optimizers.items():
        measurements.note(f"{name}, {dtype}, {pruned}")
        state = programs.place(jax.eval_shape(tx.init, params), mesh, model.specs())
        step = programs.make_step(tx, loss)
        given = jax.tree.map(lambda x: x.sharding, (params, state)) if trains else None
        program = programs.build(
            step, params, state, inputs, donate=(0, 1), out_shardings=given
        )
        found = programs.collectives(program)
        if tx is bare:
            bare_collectives = found
        beyond = programs.by_kind(found - bare_collectives)
        kept = programs.keeps_shardings(program, (params, state))
        memory = program.memory
        yield {
            "model": f"{name}, {dtype}",
            "devices": programs.devices_of(mesh),
            "pruned": pruned,
            "arguments_MB": memory["arguments"] / 1e6,
            "temporaries_MB": memory["temporaries"] / 1e6,
            "temporaries_per_weight": memory["temporaries"] / weights_here,
            "collectives_beyond_bare": programs.describe(beyond),
            "trace_s": program.lower_seconds,
            "compile_s": program.compile_seconds,
            "keeps_shardings": "yes" if kept else "no",
            "memory": memory,
            "collectives": programs.by_kind(found),
            "beyond_bare": beyond,
        }


def _training(
    model: networks.Llama, mesh: Mesh
) -> tuple[Callable[[Any, Any], jax.Array], Any]:
    """The loss of a model that is trained on a mesh, and a batch for it."""
    tokens = jax.ShapeDtypeStruct((mesh.shape["fsdp"], _LENGTH), jnp.int32)
    specs = {"tokens": PartitionSpec("fsdp")}
    by_example = NamedSharding(mesh, PartitionSpec("fsdp"))
    place = partial(jax.lax.with_sharding_constraint, shardings=by_example)

    def loss(params: Any, batch: Any) -> jax.Array:
        return model.loss(params, batch["tokens"], place)

    return loss, programs.place({"tokens": tokens}, mesh, specs)


if __name__ == "__main__":
    main()
