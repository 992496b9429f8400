"""What pruning costs the steps of training, in time, memory and compilation.

    python -m benchmarks.step_cost

Compares steps whose optimizer `agp.prune` wraps with the bare ones, in three tables:

- The optimizer's step of ResNet-50: 161 parameters, of which the 54 kernels are pruned
  to 80 %, gradients given. Beside it an event at which masks go from 70 to 80 %, and
  the peer, which sorts at an event (see peer.py).
- The training step of ResNet-20 on images like the digits, (64, 8, 8, 1).
- Seconds to trace and to compile, by the number of kernels that are pruned, for the
  optimizer's step and for a training step of ResNet-50 on images (8, 224, 224, 3),
  which is not run.

Steps are measured in turn, in rounds, each on a state of its own that is donated. There
is no event in them unless the row says so. Seconds are medians over the rounds, also of
compiling; "of bare" is the ratio to the bare step's.
"""

import argparse
import functools
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import agp_jax as agp
from agp_jax.models import make_model
from benchmarks import measurements, networks, peer, programs

_OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "SGD + momentum": optax.sgd(0.01, momentum=0.9),
    "AdamW": optax.adamw(1e-3),
}
_EVENT = 1_000_000  # the only one, but for the one at step 0
_SCHEDULE = agp.polynomial_schedule(
    0.8, initial_sparsity=0.7, begin_step=0, end_step=_EVENT, frequency=_EVENT
)
_TIMES = {
    "optimizer": "",
    "step": "",
    "ms": ",.2f",
    "of_bare": ".3f",
    "temporaries_MB": ",.1f",
}
_COMPILATION = {
    "step_of": "",
    "pruned": "",
    "trace_s": ".2f",
    "compile_s": ".2f",
    "of_bare": ".2f",
    "temporaries_MB": ",.1f",
}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    optimizers = list(_OPTIMIZERS)
    if options.small:
        resnet, image_size, model = networks.ResNet((1,), 4, 10), 16, "mlp"
        optimizers = optimizers[:1]
    else:
        resnet, image_size, model = networks.RESNET50, 224, "resnet20"
    rounds = options.rounds
    tables = {
        "optimizer_step": [
            row
            for name in optimizers
            for row in _time_optimizer_step(resnet.shapes(), name, rounds)
        ],
        "training_step": _time_training_step(model, rounds),
        "compilation": [
            row
            for name in optimizers
            for row in _compile_steps(resnet, image_size, name, options.compile_rounds)
        ],
    }
    measurements.print_table("Optimizer step", tables["optimizer_step"], _TIMES)
    measurements.print_table("Training step", tables["training_step"], _TIMES)
    measurements.print_table("Compilation", tables["compilation"], _COMPILATION)
    device = measurements.default_device()
    measurements.report(tables, device, options.json)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = measurements.make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile-rounds", type=int, default=3)
    return parser.parse_args(arguments)


class Step(NamedTuple):
    """A compiled step, and what it starts from; it takes params, state and inputs."""

    program: programs.Build
    params: Any
    state: Any
    inputs: Any


def _time_optimizer_step(
    shapes: networks.Shapes, name: str, rounds: int
) -> list[dict[str, Any]]:
    inner = _OPTIMIZERS[name]
    gradients = networks.random(shapes, seed=1)
    steps: dict[str, Step] = {}
    for variant, tx in _wrapped(inner, networks.kernels(shapes)).items():
        measurements.note(f"the optimizer's step, {name}, {variant}")
        params = networks.random(shapes)
        state = jax.jit(tx.init)(params)
        if variant != "bare":
            params = agp.apply_masks(params, agp.get_masks(state))
        steps[variant] = _build(programs.make_step(tx), params, state, gradients)
    params = steps["pruned"].params
    masks = {k: (params[k] != 0).astype(jnp.uint8) for k in networks.kernels(shapes)}
    sorting = peer.make_step(inner, _EVENT, float(_SCHEDULE.final_sparsity))
    steps["peer"] = _build(sorting, params, peer.init(inner, params, masks), gradients)
    seconds = measurements.in_turn(
        {variant: _time_steps(step) for variant, step in steps.items()}
        | {"pruned, event": _time_event(steps["pruned"])},
        rounds,
    )
    seconds |= measurements.in_turn({"peer, event": _time_event(steps["peer"])}, 1)
    return _time_rows(name, steps, seconds)


def _time_training_step(model_name: str, rounds: int) -> list[dict[str, Any]]:
    model = make_model(model_name, 10)
    images = jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
    labels = jnp.arange(len(images)) % 10
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(1), images)
    weights, stats = variables["params"], variables.get("batch_stats", {})

    def make_step(tx: optax.GradientTransformation):
        def step(params, state, batch):
            opt_state, stats = state

            def loss(params):
                logits, changed = model.apply(
                    {"params": params, "batch_stats": stats},
                    batch[0],
                    train=True,
                    mutable=["batch_stats"],
                )
                losses = optax.softmax_cross_entropy_with_integer_labels(
                    logits, batch[1]
                )
                return losses.mean(), changed.get("batch_stats", {})

            gradients, stats = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), (opt_state, stats)

        return step

    steps: dict[str, Step] = {}
    name = "SGD + momentum"
    for variant, tx in _wrapped(_OPTIMIZERS[name]).items():
        measurements.note(f"the training step, {variant}")
        params, state = weights, jax.jit(tx.init)(weights)
        if variant != "bare":
            params = agp.apply_masks(params, agp.get_masks(state))
        steps[variant] = _build(make_step(tx), params, (state, stats), (images, labels))
    measured = {variant: _time_steps(step) for variant, step in steps.items()}
    return _time_rows(name, steps, measurements.in_turn(measured, rounds))


def _wrapped(
    inner: optax.GradientTransformation, kernels: Iterable[str] = ()
) -> dict[str, optax.GradientTransformation]:
    """The optimizer as it is and pruned, by default all that is called kernel."""
    pattern = "|".join(map(re.escape, kernels)) or ".*/kernel"
    rules = [agp.Rule(pattern, agp.element(), _SCHEDULE)]
    return {
        "bare": inner,
        "pruned": agp.prune(inner, rules),
        "pruned, packed": agp.prune(inner, rules, packed=True),
    }


def _build(function: Callable, params: Any, state: Any, inputs: Any) -> Step:
    program = programs.build(function, params, state, inputs, donate=(0, 1))
    return Step(program, params, state, inputs)


def _time_steps(step: Step) -> measurements.Measurement:
    """Measures one step after the other, without an event."""
    held = jax.tree.map(jnp.copy, (step.params, step.state))

    def advance() -> Any:
        nonlocal held
        held = step.program.compiled(*held, step.inputs)
        return held

    return measurements.stopwatch(advance, least_seconds=0.1)


def _time_event(step: Step) -> measurements.Measurement:
    """Measures the step at which masks change, each time the same one."""
    start = step.params, step.state._replace(step=jnp.int32(_EVENT - 1))

    def measure() -> float:
        held = jax.block_until_ready(jax.tree.map(jnp.copy, start))
        prune_once = lambda: step.program.compiled(*held, step.inputs)  # noqa: E731
        return measurements.stopwatch(prune_once, calls=1)()

    return measure


def _time_rows(
    optimizer: str, steps: Mapping[str, Step], seconds: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    took = measurements.medians(seconds)
    rows = []
    for name in took:
        step = steps.get(name)
        rows.append(
            {
                "optimizer": optimizer,
                "step": name,
                "ms": took[name] * 1e3,
                "of_bare": took[name] / took["bare"],
                "temporaries_MB": step and step.program.memory["temporaries"] / 1e6,
                "seconds": seconds[name],
            }
        )
    return rows


def _compile_steps(
    resnet: networks.ResNet, image_size: int, name: str, rounds: int
) -> list[dict[str, Any]]:
    """Compiles steps that prune more and more kernels, on abstract arrays."""
    params = networks.abstract(resnet.shapes())
    kernels = list(networks.kernels(resnet.shapes()))
    inner = _OPTIMIZERS[name]
    pruned = {"none": inner}
    for count in sorted({1, min(10, len(kernels)), len(kernels)}):
        chosen = kernels[:: len(kernels) // count][:count]
        pruned[str(count)] = _wrapped(inner, chosen)["pruned"]
    pruned[f"{len(kernels)}, packed"] = _wrapped(inner, kernels)["pruned, packed"]
    rows = _compile_each(f"optimizer, {name}", pruned, params, params, rounds)
    images = {
        "images": jax.ShapeDtypeStruct((8, image_size, image_size, 3), jnp.float32),
        "labels": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    loss = lambda params, batch: resnet.loss(params, **batch)  # noqa: E731
    ends = {kind: pruned[kind] for kind in ("none", str(len(kernels)))}
    return rows + _compile_each(f"training, {name}", ends, params, images, rounds, loss)


def _compile_each(
    step_of: str,
    optimizers: Mapping[str, optax.GradientTransformation],
    params: Any,
    inputs: Any,
    rounds: int,
    loss: Callable[..., jax.Array] | None = None,
) -> list[dict[str, Any]]:
    made: dict[str, list[programs.Build]] = {pruned: [] for pruned in optimizers}
    for i in range(rounds):
        measurements.note(f"compiling {step_of}, round {i + 1}")
        for pruned, tx in optimizers.items():
            state = jax.eval_shape(tx.init, params)
            step = programs.make_step(tx, loss)
            made[pruned].append(
                programs.build(step, params, state, inputs, donate=(0, 1))
            )
    seconds = {pruned: [x.seconds for x in built] for pruned, built in made.items()}
    took = measurements.medians(seconds)
    return [
        {
            "step_of": step_of,
            "pruned": pruned,
            "trace_s": statistics.median(x.lower_seconds for x in built),
            "compile_s": statistics.median(x.compile_seconds for x in built),
            "of_bare": took[pruned] / took["none"],
            "temporaries_MB": built[0].memory["temporaries"] / 1e6,
            "seconds": seconds[pruned],
        }
        for pruned, built in made.items()
    ]


if __name__ == "__main__":
    main()
