"""How fast the LSTM language model trains, beside Flax's cells and PyTorch's LSTM.

    python -m benchmarks.lstm_speed

A step is the gradient of the cross-entropy of a batch, SGD, and the state that the next
batch starts from, for two layers with the embedding tied to the decoder:

- "agp_jax": `agp_jax.models.lstm`.
- "flax": the same from `nn.Embed` and `nn.RNN` over `nn.OptimizedLSTMCell`.
- "torch": the same from `torch.nn.LSTM`, on the CPU, where torch is installed.

None drops. Steps are measured in turn, in rounds, each on a state of its own. Seconds
are medians over the rounds; "of agp_jax" is the median of the ratios within a round.
"""

import argparse
import functools
import importlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from agp_jax.models.lstm import LstmLanguageModel
from benchmarks import measurements

_COLUMNS = {
    "model": "",
    "parameters": ",d",
    "ms": ",.2f",
    "tokens/s": ",.0f",
    "of_agp_jax": ".3f",
}
_RATE = 1e-3  # too small to change what a step costs
_DEPTH = 2


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.small:
        options.hidden, options.vocabulary, options.rows, options.length = 8, 20, 2, 3
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
    rows = [
        {
            "model": name,
            "parameters": parameters[name],
            "ms": 1e3 * medians[name],
            "tokens/s": options.rows * options.length / medians[name],
            "of_agp_jax": statistics.median(
                a / b for a, b in zip(seconds[name], seconds["agp_jax"], strict=True)
            ),
            "seconds": seconds[name],
        }
        for name in makers
    ]
    title = (
        f"Training step, {options.hidden} units, vocabulary of {options.vocabulary:,}, "
        f"{options.rows} rows of {options.length} tokens"
    )
    measurements.print_table(title, rows, _COLUMNS)
    device = measurements.default_device()
    measurements.report({"training_step": rows}, device, options.json)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = measurements.make_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--length", type=int, default=35, help="of backpropagation")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args(arguments)


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
