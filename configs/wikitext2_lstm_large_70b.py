"""LSTM on WikiText-2, half of the LSTM and 85 % of the embedding pruned: 25,487,550 of
85,917,000 weights left.

    python train.py --config=configs/wikitext2_lstm_large_70b.py --plan
    python train.py --config=configs/wikitext2_lstm_large_70b.py --config.data.dir=DIR

Published: 82.93 test perplexity (87.40 validation; dense 83.85).
Not trained here: that needs the text and an accelerator.
"""

from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import word_language


def get_config() -> Config:
    return word_language.large(
        (0.5, 0.5),
        0.85,
        published=Published(
            source=f"{word_language.SOURCE}.LARGE_70B.schedule_agp.yaml",
            sparsity="70",
            nonzero=25_487_550,
            perplexity="82.93",
            base_perplexity="83.85",
            errata=("70 % is 70.33 %",),
        ),
    )
