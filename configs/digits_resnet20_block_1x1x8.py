"""ResNet-20 on the digits, 70 % of its 1x1x8 blocks pruned.

    python train.py --config=configs/digits_resnet20_block_1x1x8.py

A block is 8 consecutive input channels of one filter at one position, as in the
published ResNet-50 example: hardware skips it as one vector. The first convolution has
one input channel and stays dense, and so does the classifier.
Measured with one seed: 98.9 % test accuracy (docs/results.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config
from configs import digits_resnet20_element_90


def get_config() -> Config:
    config = digits_resnet20_element_90.get_config()
    config.prune.final_sparsity = 0.7
    config.prune.rules = (agp.Rule("stage.*/kernel", agp.block((1, 1, 8, 1))),)
    return config
