"""LSTM on WikiText-2, 90 % of all weights pruned: 8,591,700 of 85,917,000 weights left.

    python train.py --config=configs/wikitext2_lstm_large_90.py --plan
    python train.py --config=configs/wikitext2_lstm_large_90.py --config.data.dir=DIR

Published: 85.67 test perplexity (90.70 validation; dense 83.85).
Not trained here: that needs the text and an accelerator.
"""

from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import word_language


def get_config() -> Config:
    return word_language.large(
        (0.9, 0.9),
        0.9,
        published=Published(
            source=f"{word_language.SOURCE}.LARGE_90.schedule_agp.yaml",
            sparsity="90",
            nonzero=8_591_700,
            perplexity="85.67",
            base_perplexity="83.85",
        ),
    )
