"""What the configs of Intel Distiller's word-level language models share.

An LSTM of two layers on WikiText-2, its decoder tied to its embedding, pruned weight by
weight while it trains from random weights: batches of 20 rows of 35 tokens, 40 epochs,
SGD at a learning rate of 20 without momentum, gradients clipped to a norm of 0.25,
weight decay 1e-6, and a learning rate halved after every epoch whose validation loss is
no lower than the lowest. docs/published.md has all results; the last step counts, not
the best.

The text is three files, which `--config.data.dir` names; see docs/data.md. Distiller
evaluated in 10 rows: `--config.data.eval_rows=10`.
"""

import agp_jax as agp
from agp_jax.training.config import Config, Data, Model, Optimizer, Prune
from agp_jax.training.published import Published
from configs import distiller

SOURCE = "examples/agp-pruning/word_lang_model"


def lstm(
    width: int,
    *,
    dropout: float,
    published: Published,
    rules: tuple[agp.Rule, ...] = (),
) -> Config:
    """An LSTM of one of the published widths, dense where there are no rules."""
    return distiller.in_steps(
        Config(
            steps=40,
            batch_size=20,
            log_every=1,
            checkpoint_every=1,
            data=Data(name="wikitext2", bptt=35),
            model=Model(name="lstm", width=width, dropout=dropout),
            optimizer=Optimizer(
                learning_rate=20.0,
                momentum=0.0,
                weight_decay=1e-6,
                clip_norm=0.25,
                decay="plateau",
                decay_factor=0.5,
            ),
            prune=Prune(enabled=bool(rules), rules=rules),
            published=published,
        )
    )


def large(
    recurrent: tuple[float, float],
    embedding: float,
    *,
    published: Published,
    epochs: tuple[tuple[int, int, int], ...] = ((1, 25, 3), (2, 25, 3), (3, 26, 3)),
) -> Config:
    """The model of width 1500, of 85,917,000 weights, pruned in three groups.

    Args:
      recurrent: final sparsities of both matrices of the first layer and of the second.
      embedding: that of the embedding, which is the decoder, too.
      published: what Distiller has.
      epochs: Distiller's starting_epoch, ending_epoch and frequency of each group.
    """
    patterns = (
        "layer0/(input|hidden)/kernel",
        "layer1/(input|hidden)/kernel",
        "embedding/embedding",
    )
    rules = tuple(
        distiller.pruner(pattern, agp.element(), (0.05, final), when)
        for pattern, final, when in zip(
            patterns, (*recurrent, embedding), epochs, strict=True
        )
    )
    return lstm(1500, dropout=0.65, rules=rules, published=published)
