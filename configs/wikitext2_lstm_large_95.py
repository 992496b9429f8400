"""LSTM on WikiText-2, 95 % of all weights pruned: 4,295,850 of 85,917,000 weights left.

    python train.py --config=configs/wikitext2_lstm_large_95.py --plan
    python train.py --config=configs/wikitext2_lstm_large_95.py --config.data.dir=DIR

Published: 92.79 test perplexity (98.42 validation; dense 83.85).
Not trained here: that needs the text and an accelerator.
"""

from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import word_language


def get_config() -> Config:
    return word_language.large(
        (0.95, 0.95),
        0.95,
        published=Published(
            source=f"{word_language.SOURCE}.LARGE_95.schedule_agp.yaml",
            sparsity="95",
            nonzero=4_295_850,
            perplexity="92.79",
            base_perplexity="83.85",
        ),
    )
