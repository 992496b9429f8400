"""LSTM on WikiText-2, dense, of width 200: 7,295,600 weights.

    python train.py --config=configs/wikitext2_lstm_small.py --plan
    python train.py --config=configs/wikitext2_lstm_small.py --config.data.dir=DIR

Published: 96.29 test perplexity (101.13 validation).
Not trained here: that needs the text and an accelerator.
"""

from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import word_language


def get_config() -> Config:
    return word_language.lstm(
        200,
        dropout=0.2,
        published=Published(
            source="docs/tutorial-lang_model.md",
            nonzero=7_135_600,
            perplexity="96.29",
            errata=(
                "7,135,600 weights are 160,000 short of 7,295,600: one of the four "
                "matrices of the LSTM, 200 x 800, is missing",
            ),
        ),
    )
