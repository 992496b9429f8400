"""GPT on Python's documentation, half of its heads and MLP channels cut out.

    python train.py --config=configs/pydoc_gpt_channels_50.py
    python train.py --config=configs/pydoc_gpt_channels_50.py --sample="The "

A decoder of four layers and width 128 whose layers are stacked for a scan, trained on
Python's documentation character by character, from random weights. Half of the heads
of keys and values, with their queries, and half of the channels of the MLPs go
gradually in each layer and are cut out at 70 % of the run; a smaller model trains on.

The text comes with CPython and differs between its versions; a checkpoint has version
and checksum.
"""

import agp_jax as agp
from agp_jax.training.config import Config
from configs import pydoc


def get_config() -> Config:
    return pydoc.decoder(
        final_sparsity=0.5,
        rules=(
            agp.Rule(
                "blocks/attention/(key|value)/kernel", agp.heads(4), stacked_axes=1
            ),
            agp.Rule("blocks/mlp/(gate|up)/kernel", agp.filters(), stacked_axes=1),
        ),
        cut_step=1400,
    )
