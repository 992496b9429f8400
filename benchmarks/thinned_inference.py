"""How much faster a thinned model runs, and how long it takes to thin one.

    python -m benchmarks.thinned_inference

Two tables:

- Inference: networks with part of the units of every group cut out, compiled, against
  the whole network, in turn in one run. "of dense" is a ratio of times, beside that of
  multiply-adds and of parameters. With `round_to=16` widths stay multiples of 16.
- Thinning: seconds to find the couplings of a network, to cut half of every exact group
  out of its shapes, and to trace the thinned function for the first time. Nothing is
  allocated, least of all the decoder of 8 B parameters.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import agp_jax as agp
from agp_jax.models import make_model
from agp_jax.thinning.cuts import cut_units
from benchmarks import measurements, networks

_INFERENCE = {
    "network": "",
    "units_cut": ".0%",
    "round_to": "d",
    "ms": ",.1f",
    "of_dense": ".3f",
    "MACs_of_dense": ".3f",
    "parameters_of_dense": ".3f",
}
_THINNING = {
    "network": "",
    "parameters": ",d",
    "groups": "d",
    "find_couplings_s": ".2f",
    "cut_s": ".2f",
    "first_trace_s": ".2f",
}


class Network(NamedTuple):
    """A function of variables and one input, with both as shapes."""

    name: str
    function: Callable[[Any, Any], Any]
    variables: Any
    data: Any


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    small = [_resnet20(width=4, batch=2)]
    fast = small if options.small else _networks()
    every = small if options.small else [*fast, _decoder()]
    inference = [row for x in fast for row in _time_inference(x, options.rounds)]
    thinning = [_time_thinning(network) for network in every]
    tables = {"inference": inference, "thinning": thinning}
    measurements.print_table("Inference", inference, _INFERENCE)
    measurements.print_table("Thinning", thinning, _THINNING)
    measurements.report(tables, measurements.default_device(), options.json)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = measurements.make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args(arguments)


def _networks() -> list[Network]:
    resnet50 = networks.RESNET50
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    variables = networks.abstract(resnet50.shapes())
    return [
        _resnet20(width=16, batch=64),
        Network("ResNet-50", resnet50.logits, variables, images),
    ]


def _resnet20(width: int, batch: int) -> Network:
    model = make_model("resnet20", 10, width)
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    predict = functools.partial(model.apply, train=False)
    return Network("ResNet-20", predict, variables, images)


def _decoder() -> Network:
    network = networks.QWEN3_8B
    tokens = jax.ShapeDtypeStruct((1, 33), jnp.int32)
    variables = networks.abstract(network.shapes())
    return Network("decoder, 36 layers", network.loss, variables, tokens)


def _cut(couplings: agp.Couplings, part: float, round_to: int = 1) -> agp.Cut:
    """A cut of so much of every exact group."""
    flags = []
    for group in couplings.groups:
        kept = math.ceil((1 - part * group.exact) * group.num_units)
        kept = min(group.num_units, -(-kept // round_to) * round_to)
        flags.append(np.arange(group.num_units) >= kept)
    return cut_units(couplings, flags)


def _time_inference(network: Network, rounds: int) -> Iterator[dict[str, Any]]:
    """The whole network and thinned ones, in turn."""
    measurements.note(f"{network.name}, inference")
    couplings = agp.find_couplings(network.function, network.variables, network.data)
    variables = jax.tree.map(_random, network.variables)
    data = _random(network.data)
    runs: dict[tuple[float, int], measurements.Measurement] = {}
    costs = {}
    for part, round_to in ((0.0, 1), (0.5, 1), (0.45, 1), (0.45, 16)):
        cut = _cut(couplings, part, round_to)
        function = agp.thin_function(network.function, network.variables, cut)
        thinned = agp.thin(variables, cut)
        costs[part, round_to] = agp.measure_cost(function, thinned, data)
        run = functools.partial(jax.jit(function), thinned, data)
        runs[part, round_to] = measurements.stopwatch(run)
    medians = measurements.medians(measurements.in_turn(runs, rounds))
    dense, whole = medians[0.0, 1], costs[0.0, 1]
    for key, cost in costs.items():
        seconds = medians[key]
        yield {
            "network": network.name,
            "units_cut": key[0],
            "round_to": key[1],
            "ms": 1e3 * seconds,
            "of_dense": seconds / dense,
            "MACs_of_dense": cost.macs / whole.macs,
            "parameters_of_dense": cost.params / whole.params,
        }


def _time_thinning(network: Network) -> dict[str, Any]:
    measurements.note(f"{network.name}, thinning")
    function, variables, data = network.function, network.variables, network.data
    began = time.perf_counter()
    couplings = agp.find_couplings(function, variables, data)
    found = time.perf_counter()
    cut = _cut(couplings, 0.5)
    thinned = agp.thin(variables, cut)
    cut_out = time.perf_counter()
    jax.eval_shape(agp.thin_function(function, variables, cut), thinned, data)
    traced = time.perf_counter()
    return {
        "network": network.name,
        "parameters": sum(x.size for x in jax.tree.leaves(variables)),
        "groups": len(couplings.groups),
        "find_couplings_s": found - began,
        "cut_s": cut_out - found,
        "first_trace_s": traced - cut_out,
    }


def _random(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Small positive numbers, which are fit for variances too."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(0.01, 0.1, shape.shape), shape.dtype)


if __name__ == "__main__":
    main()
