"""LSTM on WikiText-2, 74 % of the LSTM and 85 % of the embedding pruned: 16,847,550 of
85,917,000 weights left.

    python train.py --config=configs/wikitext2_lstm_large_80.py --plan
    python train.py --config=configs/wikitext2_lstm_large_80.py --config.data.dir=DIR

Published: 83.64 test perplexity (89.31 validation; dense 83.85).
Not trained here: that needs the text and an accelerator.
"""

from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import word_language


def get_config() -> Config:
    return word_language.large(
        (0.74, 0.74),
        0.85,
        published=Published(
            source=f"{word_language.SOURCE}.LARGE_80.schedule_agp.yaml",
            sparsity="80.4",
            nonzero=16_847_550,
            perplexity="83.64",
            base_perplexity="83.85",
        ),
    )
