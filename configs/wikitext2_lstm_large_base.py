"""LSTM on WikiText-2, 60 % of the first layer, 80 % of the second, 90 % of the
embedding pruned: 15,791,700 of 85,917,000 weights left.

    python train.py --config=configs/wikitext2_lstm_large_base.py --plan
    python train.py --config=configs/wikitext2_lstm_large_base.py --config.data.dir=DIR

Published: no result.
Not trained here: that needs the text and an accelerator.
"""

from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import word_language


def get_config() -> Config:
    return word_language.large(
        (0.6, 0.8),
        0.9,
        epochs=((2, 20, 1), (2, 20, 1), (3, 21, 1)),
        published=Published(
            source=f"{word_language.SOURCE}.schedule_agp.yaml",
        ),
    )
