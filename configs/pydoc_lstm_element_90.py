"""An LSTM that learns Python's documentation character by character, 90 % pruned.

    python train.py --config=configs/pydoc_lstm_element_90.py
    python train.py --config=configs/pydoc_lstm_element_90.py --sample="The "

Two layers of width 256, pruned weight by weight from random weights while they train.
The dense model of equal size: --config.prune.twin=final; that of equal average size:
--config.prune.twin=average.

The text comes with CPython and differs between its versions; a checkpoint has version
and checksum.
"""

import agp_jax as agp
from agp_jax.training.config import Config, Data, Model, Optimizer, Prune


def get_config() -> Config:
    return Config(
        steps=3000,
        batch_size=32,
        log_every=250,
        checkpoint_every=500,
        data=Data(name="pydoc_chars", bptt=64, eval_rows=32),
        model=Model(name="lstm", width=256, dropout=0.1),
        optimizer=Optimizer(
            name="adamw", learning_rate=0.004, warmup_steps=100, clip_norm=1.0
        ),
        prune=Prune(
            final_sparsity=0.9,
            begin=0.1,
            end=0.7,
            frequency=50,
            rules=(
                agp.Rule("layer[01]/(input|hidden)/kernel", agp.element()),
                agp.Rule("embedding/embedding", agp.element()),
            ),
        ),
    )
