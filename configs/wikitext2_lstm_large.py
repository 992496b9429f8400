"""LSTM on WikiText-2, dense, of width 1500: 85,917,000 weights.

    python train.py --config=configs/wikitext2_lstm_large.py --plan
    python train.py --config=configs/wikitext2_lstm_large.py --config.data.dir=DIR

Published: 83.85 test perplexity (87.49 validation).
Not trained here: that needs the text and an accelerator.
"""

from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import word_language


def get_config() -> Config:
    return word_language.lstm(
        1500,
        dropout=0.65,
        published=Published(
            source="docs/tutorial-lang_model.md",
            nonzero=85_917_000,
            perplexity="83.85",
        ),
    )
