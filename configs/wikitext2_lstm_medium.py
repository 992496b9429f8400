"""LSTM on WikiText-2, dense, of width 650: 28,390,700 weights.

    python train.py --config=configs/wikitext2_lstm_medium.py --plan
    python train.py --config=configs/wikitext2_lstm_medium.py --config.data.dir=DIR

Published: 84.21 test perplexity (88.17 validation).
Not trained here: that needs the text and an accelerator.
"""

from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import word_language


def get_config() -> Config:
    return word_language.lstm(
        650,
        dropout=0.5,
        published=Published(
            source="docs/tutorial-lang_model.md",
            nonzero=28_390_700,
            perplexity="84.21",
        ),
    )
