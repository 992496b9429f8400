"""ResNet-20 on CIFAR-10, half of two stages' filters cut out, others sparse.

    python train.py --config=configs/resnet20_filters_4.py --plan
    python train.py --config=configs/resnet20_filters_4.py

As configs/resnet20_filters_1.py, and the residual stream of the third stage loses half
of its channels, ranked by its first convolution alone; the cut is after epoch 32.

Published: 90.89 % top-1 (dense 91.78 %), the best epoch on the test images, with 78,776
non-zero weights and 24,723,776 multiply-adds. Recomputed: 130,544 of 270,896 weights
left, of which 78,776 are not zero, 39.65560 % sparse; 24,723,776 of 40,813,184
multiply-adds, 60.58 %.

Not trained here: that needs CIFAR-10 and an accelerator. It starts from
checkpoint_trained_dense.pth.tar of Distiller's repository, in the current directory, or
--config.model.weights=FILE (docs/models.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import distiller
from configs.resnet20_filters_1 import CLASSIFIER, LAST_BLOCKS, NO_LEADER, SECOND_STAGE


def get_config() -> Config:
    return distiller.cifar10(
        learning_rate=0.3,
        rules=(
            SECOND_STAGE,
            # The leader: it alone ranks the channels that its group loses.
            distiller.pruner(
                "stage3/block0/conv2/kernel", agp.filters(), (0.1, 0.5), (0, 30, 2)
            ),
            LAST_BLOCKS,
            CLASSIFIER,
        ),
        cut_epoch=32,
        published=Published(
            source="examples/agp-pruning/resnet20_filters.schedule_agp_4.yaml",
            sparsity="39.65560",
            nonzero=78_776,
            macs=24_723_776,
            top1="90.89",
            base_top1="91.78",
            errata=(NO_LEADER,),
        ),
    )
