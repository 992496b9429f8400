"""LSTM on WikiText-2, 40 % of the LSTM and 85 % of the embedding pruned: 29,087,550 of
85,917,000 weights left.

    python train.py --config=configs/wikitext2_lstm_large_73.py --plan
    python train.py --config=configs/wikitext2_lstm_large_73.py --config.data.dir=DIR

Published: no result.
Not trained here: that needs the text and an accelerator.
"""

from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import word_language


def get_config() -> Config:
    return word_language.large(
        (0.4, 0.4),
        0.85,
        published=Published(
            source=f"{word_language.SOURCE}.LARGE_73.schedule_agp.yaml",
            errata=("73 % of the name counts the tied embedding twice; it is 66.14 %",),
        ),
    )
