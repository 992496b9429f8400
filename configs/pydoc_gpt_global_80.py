"""GPT on Python's documentation, 80 % of all kernels pruned, ranked together.

    python train.py --config=configs/pydoc_gpt_global_80.py
    python train.py --config=configs/pydoc_gpt_global_80.py --sample="The "

A decoder of four layers and width 128 whose layers are stacked for a scan, trained on
Python's documentation character by character, from random weights. All layers of all
kernels are ranked together.

The text comes with CPython and differs between its versions; a checkpoint has version
and checksum.
"""

import agp_jax as agp
from agp_jax.training.config import Config
from configs import pydoc


def get_config() -> Config:
    return pydoc.decoder(
        final_sparsity=0.8,
        rules=(agp.Rule("blocks/.*/kernel", agp.element(), scope="rule"),),
    )
