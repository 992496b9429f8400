"""ResNet-20 on CIFAR-10, as resnet20_filters_1 and more of the last stage sparse.

    python train.py --config=configs/resnet20_filters_3.py --plan
    python train.py --config=configs/resnet20_filters_3.py

The first block of the third stage loses half of its weights, too; the cut is after
epoch 32.

Published: 91.29 % top-1 (dense 91.78 %), the last and best epoch, at 56.62444 %
sparsity. Recomputed: 223,536 of 270,896 weights left, of which 96,960 are not zero,
56.62444 % sparse; 30,655,104 of 40,813,184 multiply-adds, 75.11 %. The header of the
published file is of another run, in which three more filters had died and were cut out:
95,922 non-zero weights, 30,433,920 multiply-adds.

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
        learning_rate=0.4,
        rules=(
            SECOND_STAGE,
            distiller.pruner(
                "stage3/block0/conv[12]/kernel", agp.element(), (0.05, 0.5), (30, 50, 2)
            ),
            LAST_BLOCKS,
            CLASSIFIER,
        ),
        cut_epoch=32,
        published=Published(
            source="examples/agp-pruning/resnet20_filters.schedule_agp_3.yaml",
            sparsity="56.62444",
            nonzero=95_922,
            macs=30_433_920,
            top1="91.29",
            base_top1="91.78",
            errata=(
                "95,922 and 30,433,920 are of another run, in which three more filters "
                "of the third stage had died: 96,960 - 3 * 346 and 30,655,104 - "
                "3 * 73,728; the file's own table says 96,960",
                NO_LEADER,
            ),
        ),
    )
