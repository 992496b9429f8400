"""Text that a trained language model writes: from the checkpoint of a run."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.data.vocabularies import Vocabulary, decode, encode
from agp_jax.thinning.cuts import Cut
from agp_jax.training import checkpoint
from agp_jax.training.config import Config, ConfigError
from agp_jax.training.experiment import Experiment, Variables, cut_experiment, set_up
from agp_jax.training.plans import find_twin


def write_text(
    config: Config,
    workdir: str | Path,
    start: str,
    *,
    length: int = 400,
    temperature: float = 1.0,
    seed: int = 0,
) -> str:
    """A text that the latest checkpoint of a run in `workdir` goes on with.

    Args:
      config: of the run.
      workdir: of the run.
      start: what the text begins with, at least one token.
      length: how many tokens follow.
      temperature: what logits are divided by; 0 takes the likeliest token each time.
      seed: of the draws.

    Raises:
      ConfigError: if the model is none of text, or a number is out of range.
      DataError: if `start` is not made of tokens that the model knows.
      CheckpointError: if there is no checkpoint, or it cannot be read.
    """
    if not 0 <= temperature < np.inf:
        raise ConfigError(f"temperature must be at least 0, got {temperature}")
    if length < 1:
        raise ConfigError(f"length must be at least 1, got {length}")
    experiment = set_up(find_twin(config))
    with checkpoint.open_checkpoints(workdir, writes=False) as manager:
        vocabulary = checkpoint.read_value(manager, "vocabulary")
        if vocabulary is None:
            raise ConfigError(f"{workdir} holds no model of text, so it writes none")
        if cut := checkpoint.read_value(manager, "cut"):
            experiment = cut_experiment(experiment, Cut.from_dict(cut))
    words = Vocabulary(vocabulary["unit"], tuple(vocabulary["entries"]))
    tokens = encode(words, start).tolist()
    if not tokens:
        raise ConfigError("the text must begin with at least one token, got nothing")
    variables = jax.device_put(checkpoint.restore_variables(workdir, step="latest"))
    make_reader = _read_on if "carry" in variables else _read_window
    next_logits = make_reader(experiment, variables)
    rng = np.random.default_rng(seed)
    for _ in range(length):
        logits = next_logits(tokens)
        if temperature:
            # The largest of logits with Gumbel noise is a draw from their softmax.
            logits = logits / temperature + rng.gumbel(size=logits.shape)
        tokens.append(int(np.argmax(logits)))
    return decode(words, np.array(tokens, np.int32))


# A function of all tokens so far that gives the logits of the next one.
Reader = Callable[[list[int]], np.ndarray]


def _read_on(experiment: Experiment, variables: Variables) -> Reader:
    """Of a model that carries its state: it reads only what is new."""
    predict = jax.jit(experiment.predict)
    params = variables["params"]
    collections = {name: x for name, x in variables.items() if name != "params"}
    collections["carry"] = jax.tree.map(
        lambda x: np.zeros((1, *x.shape[1:]), x.dtype), variables["carry"]
    )
    num_read = 0

    def read(tokens: list[int]) -> np.ndarray:
        nonlocal collections, num_read
        outputs = None
        for place in range(num_read, len(tokens)):
            token = jnp.array([[tokens[place]]], jnp.int32)
            starts = jnp.array([place == 0])
            outputs, changes = predict({"params": params, **collections}, token, starts)
            collections = {**collections, **changes}
        num_read = len(tokens)
        assert outputs is not None, "nothing is new"
        return np.asarray(outputs[0, -1], np.float64)

    return read


def _read_window(experiment: Experiment, variables: Variables) -> Reader:
    """Of any other model: it reads a window of as many tokens as it was trained on."""
    length = experiment.config.data.bptt

    @jax.jit
    def logits_of(window: jax.Array) -> jax.Array:
        return experiment.predict(variables, window, jnp.ones(1, bool))[0][0]

    def read(tokens: list[int]) -> np.ndarray:
        recent = tokens[-length:]
        window = np.zeros((1, length), np.int32)  # what follows is not looked at
        window[0, : len(recent)] = recent
        return np.asarray(logits_of(window)[len(recent) - 1], np.float64)

    return read
