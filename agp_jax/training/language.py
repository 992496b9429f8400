"""Language modelling: the task that the bundled models of text learn."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from agp_jax.data.corpora import CorpusFacts, corpus_facts, load_corpus
from agp_jax.data.text import eval_tokens, train_tokens
from agp_jax.models import LANGUAGE_MODELS
from agp_jax.training.config import Config, ConfigError, Model
from agp_jax.training.distillation import divergence
from agp_jax.training.tasks import Batch, Quality, Splits, Task


def make_language(config: Config) -> Task:
    """The task of a config whose dataset is a text: to predict the next token.

    A batch is `{"tokens", "targets": int32 (rows, bptt), "starts": bool (rows,)}`, in
    evaluation with a `"weight"`, float32 (rows, bptt), 0 for padding. Perplexity is the
    exponential of the mean loss.
    """
    options = config.data
    facts = corpus_facts(options.name)
    shape = config.batch_size, options.bptt
    return Task(
        model=_make_model(config.model, facts.vocabulary_size),
        example={
            "tokens": np.zeros(shape, np.int32),
            "targets": np.zeros(shape, np.int32),
            "starts": np.ones(config.batch_size, bool),
        },
        num_items=math.prod(shape),
        item="token",
        inputs=lambda batch: (batch["tokens"], batch["starts"]),
        measure=_measure,
        describe=_describe,
        quality=Quality("perplexity", ".2f", higher_is_better=False),
        load=functools.partial(_load, config, facts),
        distill=divergence,
    )


def _measure(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    targets = batch["targets"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    weight = batch.get("weight", np.ones(targets.shape, np.float32))
    return {"count": jnp.sum(weight), "loss": jnp.sum(losses * weight)}


def _describe(means: dict[str, float]) -> dict[str, float]:
    # A loss that has run away still makes a number that JSON and pictures take.
    return means | {"perplexity": math.exp(min(means["loss"], 700.0))}


def _make_model(options: Model, vocabulary_size: int) -> nn.Module:
    sizes = {"width": options.width, "depth": options.depth}  # 0: the model's own
    chosen: dict[str, Any] = {name: size for name, size in sizes.items() if size}
    chosen["dropout"] = options.dropout
    if options.name == "lstm":
        chosen["tied"] = options.tied
    else:
        chosen["num_heads"] = options.num_heads
        chosen["num_kv_heads"] = options.num_kv_heads or None
        chosen["num_experts"] = options.num_experts
        chosen["experts_per_token"] = options.experts_per_token
        chosen["dtype"] = jnp.dtype(options.dtype)
        chosen["remat"] = options.remat
    return LANGUAGE_MODELS[options.name](vocabulary_size, **chosen)


def _load(config: Config, facts: CorpusFacts) -> Splits:
    """The text that a config trains on and is judged by.

    Raises:
      ConfigError: if it is too short for the batches.
      DataError: if it is missing or damaged.
    """
    options = config.data
    corpus = load_corpus(options.name, options.dir)
    if len(corpus.vocabulary) > facts.vocabulary_size:
        raise ConfigError(
            f"config.data.dir: the text has {len(corpus.vocabulary)} types, but "
            f"{options.name} has {facts.vocabulary_size}, which the model is made for: "
            f"give the directory of that text"
        )
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def train(start_step: int):
        return train_tokens(
            corpus.train,
            batch_size=config.batch_size,
            bptt=options.bptt,
            seed=config.seed,
            start_step=start_step,
            **share,
        )

    def whole(tokens: np.ndarray):
        return functools.partial(
            eval_tokens,
            tokens,
            bptt=options.bptt,
            eval_rows=options.eval_rows,
            pad_rows_to=jax.device_count(),
            **share,
        )

    return Splits(
        train=train,
        test=whole(corpus.test),
        validation=whole(corpus.validation),
        saved={
            "corpus": {"version": corpus.version, "checksum": corpus.checksum},
            "vocabulary": {
                "unit": corpus.vocabulary.unit,
                "entries": list(corpus.vocabulary.entries),
            },
        },
    )
