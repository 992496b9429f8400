"""ResNet-20 on the digits, half of the filters inside its blocks masked.

    python train.py --config=configs/digits_resnet20_filters.py

Only the first convolution of each block is pruned: nothing outside the block sees its
filters. They are masked; making the arrays smaller is not done yet.
Measured with one seed: 99.3 % test accuracy (docs/results.md).
"""

import agp_jax as agp
from agp_jax.config import Config
from configs import digits_resnet20_element_90


def get_config() -> Config:
    config = digits_resnet20_element_90.get_config()
    config.prune.final_sparsity = 0.5
    config.prune.rules = (agp.Rule("stage.*/conv1/kernel", agp.filters()),)
    return config
