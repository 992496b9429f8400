"""GPT on Python's documentation, two of every four weights kept.

    python train.py --config=configs/pydoc_gpt_2_of_4.py
    python train.py --config=configs/pydoc_gpt_2_of_4.py --sample="The "

A decoder of four layers and width 128 whose layers are stacked for a scan, trained on
Python's documentation character by character, from random weights. Of every four
neighbours along the input features four, then three, then two are left.

The text comes with CPython and differs between its versions; a checkpoint has version
and checksum.
"""

import agp_jax as agp
from agp_jax.training.config import Config
from configs import pydoc


def get_config() -> Config:
    return pydoc.decoder(
        final_sparsity=0.5,
        rules=(agp.Rule("blocks/.*/kernel", agp.n_of_m(2, 4), stacked_axes=1),),
    )
