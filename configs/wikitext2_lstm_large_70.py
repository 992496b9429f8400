"""LSTM on WikiText-2, 70 % of all weights pruned: 25,775,100 of 85,917,000 weights
left.

    python train.py --config=configs/wikitext2_lstm_large_70.py --plan
    python train.py --config=configs/wikitext2_lstm_large_70.py --config.data.dir=DIR

Published: 85.84 test perplexity (90.59 validation; dense 83.85).
Not trained here: that needs the text and an accelerator.
"""

from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import word_language


def get_config() -> Config:
    return word_language.large(
        (0.7, 0.7),
        0.7,
        epochs=((2, 20, 1), (2, 20, 1), (3, 21, 1)),
        published=Published(
            source=f"{word_language.SOURCE}.LARGE_70.schedule_agp.yaml",
            sparsity="70",
            nonzero=25_487_550,
            perplexity="85.84",
            base_perplexity="83.85",
            errata=(
                "25,487,550 weights left are those of 70B; this schedule leaves "
                "25,775,100",
            ),
        ),
    )
