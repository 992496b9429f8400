"""How fast language models train, beside Flax's cells and PyTorch's, pruned and cut.

    python -m benchmarks.language_speed

Two tables:

- Training step of an LSTM: the gradient of the cross-entropy of a batch, SGD, and the
  state that the next batch starts from, for two layers with the embedding tied to the
  decoder. "agp_jax" is `agp_jax.models.lstm`; "flax" the same from `nn.Embed` and
  `nn.RNN` over `nn.OptimizedLSTMCell`; "torch" from `torch.nn.LSTM`, on the CPU, where
  torch is installed. None drops.
- Pruned and cut: training and predicting, as runs do it, of an LSTM and of the decoder
  of configs/pydoc_gpt_channels_50.py. Dense; with 90 % of the elements masked; with
  half of the units masked (of the LSTM all that can go, of the decoder heads and MLP
  channels); and with these cut out.

Steps are measured in turn, in rounds, each on a state of its own. Seconds are medians
over the rounds; "of agp_jax" and "of dense" are medians of the ratios within a round.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import agp_jax as agp
from agp_jax.models.lstm import LstmLanguageModel
from agp_jax.training.config import Config, Data, Model, Optimizer, Prune
from agp_jax.training.experiment import (
    Experiment,
    State,
    cut_experiment,
    cut_state,
    init_state,
    place_state,
    plan_experiment_cut,
    set_up,
)
from agp_jax.training.meshes import put_batch
from agp_jax.training.steps import make_eval_step, make_train_step
from benchmarks import measurements
from configs import pydoc_gpt_channels_50

_LSTM = {
    "model": "",
    "parameters": ",d",
    "ms": ",.2f",
    "tokens/s": ",.0f",
    "of_agp_jax": ".3f",
}
_PRUNED = {
    "model": "",
    "doing": "",
    "weights": "",
    "ms": ",.2f",
    "tokens/s": ",.0f",
    "of_dense": ".3f",
    "MACs_of_dense": ".3f",
}
_RATE = 1e-3  # too small to change what a step costs
_DEPTH = 2


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.small:
        options.hidden, options.vocabulary, options.rows, options.length = 8, 20, 2, 3
        models = {"LSTM": _lstm(width=4, rows=8, length=2)}
    else:
        models = {"LSTM": _lstm(width=400, rows=20, length=35), "decoder": _decoder()}
    lstm = _time_lstm(options)
    pruned = [
        row
        for name, config in models.items()
        for row in _time_pruned(name, config, options.rounds)
    ]
    measurements.print_table(
        f"Training step of an LSTM, {options.hidden} units, vocabulary of "
        f"{options.vocabulary:,}, {options.rows} rows of {options.length} tokens",
        lstm,
        _LSTM,
    )
    measurements.print_table("Pruned and cut", pruned, _PRUNED)
    tables = {"training_step": lstm, "pruned": pruned}
    measurements.report(tables, measurements.default_device(), options.json)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = measurements.make_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--length", type=int, default=35, help="of backpropagation")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args(arguments)


def _time_lstm(options: argparse.Namespace) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    shape = (options.rows, options.length + 1)
    texts = rng.integers(0, options.vocabulary, shape, np.int32)
    makers = {"agp_jax": _our_step, "flax": _flax_step}
    if importlib.util.find_spec("torch"):
        makers["torch"] = _torch_step
    steps, parameters = {}, {}
    for name, make in makers.items():
        measurements.note(f"compiling {name}")
        step, parameters[name] = make(options.vocabulary, options.hidden, texts)
        steps[name] = measurements.stopwatch(step, least_seconds=0.1)
    seconds = measurements.in_turn(steps, options.rounds)
    medians = measurements.medians(seconds)
    return [
        {
            "model": name,
            "parameters": parameters[name],
            "ms": 1e3 * medians[name],
            "tokens/s": options.rows * options.length / medians[name],
            "of_agp_jax": _ratio(seconds[name], seconds["agp_jax"]),
            "seconds": seconds[name],
        }
        for name in makers
    ]


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def _time_pruned(name: str, config: Config, rounds: int) -> Iterator[dict[str, Any]]:
    units = set_up(config)
    state = init_state(units)  # its masks are final: the only event is at step 0
    cut = plan_experiment_cut(units, state)
    smaller = cut_experiment(units, cut)
    elements = (agp.Rule(".*/(kernel|embedding)", agp.element(), agp.one_shot(0.9)),)
    dense = set_up(_with_prune(config, enabled=False))
    sparse = set_up(_with_prune(config, rules=elements))
    cut_out = place_state(smaller, functools.partial(cut_state, cut=cut), state)
    arms = {
        "dense": (dense, init_state(dense)),
        "90 % of elements masked": (sparse, init_state(sparse)),
        "half of units masked": (units, state),
        "half of units cut": (smaller, cut_out),
    }
    steps = {}
    for weights, (experiment, state) in arms.items():
        measurements.note(f"compiling {name}, {weights}")
        steps |= {
            (weights, doing): measurements.stopwatch(step, least_seconds=0.1)
            for doing, step in _steps(experiment, state).items()
        }
    seconds = measurements.in_turn(steps, rounds)
    for weights, doing in sorted(steps, key=lambda key: key[1], reverse=True):
        values = seconds[weights, doing]
        median = statistics.median(values)
        yield {
            "model": name,
            "doing": doing,
            "weights": weights,
            "ms": 1e3 * median,
            "tokens/s": units.task.num_items / median,
            "of_dense": _ratio(values, seconds["dense", doing]),
            "MACs_of_dense": arms[weights][0].cost.macs / dense.cost.macs,
            "seconds": values,
        }


def _steps(experiment: Experiment, state: State) -> dict[str, Callable[[], Any]]:
    """Training, from state to state, and predicting, from the first."""
    batch = put_batch(experiment.task.example, experiment.mesh)
    train_step, eval_step = make_train_step(experiment), make_eval_step(experiment)
    first = jax.tree.map(jnp.copy, (state.params, state.collections))

    def train() -> Any:
        nonlocal state
        state, _ = train_step(state, batch)
        return state

    return {"training": train, "predicting": lambda: eval_step(*first, batch)}


def _lstm(width: int, rows: int, length: int) -> Config:
    rules = (agp.Rule(r"layer\d/.*/kernel", agp.filters(), agp.one_shot(0.5)),)
    return Config(
        batch_size=rows,
        data=Data(name="pydoc_chars", bptt=length),
        model=Model(name="lstm", width=width),
        optimizer=Optimizer(clip_norm=0.25),
        prune=Prune(rules=rules, coupled=True),
    )


def _decoder() -> Config:
    config = pydoc_gpt_channels_50.get_config()
    rules = tuple(
        dataclasses.replace(rule, schedule=agp.one_shot(0.5))
        for rule in config.prune.rules
    )
    return _with_prune(config, rules=rules, cut_step=0)


def _with_prune(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(
        config, prune=dataclasses.replace(config.prune, **changes)
    )


def _our_step(
    vocabulary: int, hidden: int, texts: np.ndarray
) -> tuple[Callable[[], Any], int]:
    model = LstmLanguageModel(vocabulary, hidden, _DEPTH, dropout=0.0)
    starts = jnp.zeros(len(texts), bool)

    def run(params: Any, carry: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        logits, changes = model.apply(
            {"params": params, "carry": carry},
            tokens,
            starts,
            train=True,
            mutable=["carry"],
        )
        return logits, changes["carry"]

    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), jnp.asarray(texts[:, :-1]), starts)
    return _jitted_step(run, variables["params"], variables["carry"], texts)


class _FlaxModel(nn.Module):
    vocabulary: int
    hidden: int

    @nn.compact
    def __call__(self, carry: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        embedding = nn.Embed(self.vocabulary, self.hidden)
        x = embedding(tokens)
        carries = []
        for before in carry:
            layer = nn.RNN(nn.OptimizedLSTMCell(self.hidden), return_carry=True)
            after, x = layer(x, initial_carry=before)
            carries.append(after)
        bias = self.param("bias", nn.initializers.zeros, (self.vocabulary,))
        return embedding.attend(x) + bias[None, None], carries


def _flax_step(
    vocabulary: int, hidden: int, texts: np.ndarray
) -> tuple[Callable[[], Any], int]:
    model = _FlaxModel(vocabulary, hidden)
    zeros = lambda: jnp.zeros((len(texts), hidden))  # noqa: E731
    carry = [(zeros(), zeros()) for _ in range(_DEPTH)]  # each is donated by itself
    variables = jax.jit(model.init)(jax.random.key(0), carry, texts[:, :-1])

    def run(params: Any, carry: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        return model.apply({"params": params}, carry, tokens)

    return _jitted_step(run, variables["params"], carry, texts)


def _jitted_step(
    run: Callable[..., tuple[jax.Array, Any]],
    params: Any,
    carry: Any,
    texts: np.ndarray,
) -> tuple[Callable[[], Any], int]:
    """A step that goes on from the one before, and how many parameters it moves."""
    tx = optax.sgd(_RATE)
    tokens, labels = jnp.asarray(texts[:, :-1]), jnp.asarray(texts[:, 1:])

    def loss(params: Any, carry: Any) -> tuple[jax.Array, Any]:
        logits, carry = run(params, carry, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), carry

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, carry: Any) -> tuple[Any, Any]:
        gradients, carry = jax.grad(loss, has_aux=True)(params, carry)
        updates, _ = tx.update(gradients, tx.init(params), params)
        return optax.apply_updates(params, updates), carry

    held = params, carry

    def advance() -> Any:
        nonlocal held
        held = step(*held)
        return held

    return advance, sum(x.size for x in jax.tree.leaves(params))


def _torch_step(
    vocabulary: int, hidden: int, texts: np.ndarray
) -> tuple[Callable[[], Any], int]:
    torch = importlib.import_module("torch")
    embedding = torch.nn.Embedding(vocabulary, hidden)
    layers = torch.nn.LSTM(hidden, hidden, _DEPTH)
    decoder = torch.nn.Linear(hidden, vocabulary)
    decoder.weight = embedding.weight
    model = torch.nn.ModuleList([embedding, layers, decoder])
    optimizer = torch.optim.SGD(model.parameters(), _RATE)
    tokens, labels = (
        torch.from_numpy(x.T.astype(np.int64)) for x in (texts[:, :-1], texts[:, 1:])
    )
    zeros = torch.zeros(_DEPTH, len(texts), hidden)
    carry = zeros, zeros

    def advance() -> float:
        nonlocal carry
        optimizer.zero_grad()
        x, after = layers(embedding(tokens), carry)
        logits = decoder(x).reshape(-1, vocabulary)
        loss = torch.nn.functional.cross_entropy(logits, labels.reshape(-1))
        loss.backward()
        optimizer.step()
        carry = tuple(x.detach() for x in after)
        return loss.item()

    return advance, sum(x.numel() for x in model.parameters())


if __name__ == "__main__":
    main()
