"""ResNet-20 on CIFAR-10, 40 % of some inner filters cut out, the last stage sparse.

    python train.py --config=configs/resnet20_filters_2.py --plan
    python train.py --config=configs/resnet20_filters_2.py

The first convolutions of the blocks of two stages lose 40 % of their filters by epoch
18, cut out after epoch 22; the residual stream keeps its width. 70 % of the weights of
two blocks of the third stage go one by one.

Published: 91.63 % top-1 (dense 91.78 %), the best epoch on the test images, with
143,488 non-zero weights and 30,638,720 multiply-adds. Recomputed: 246,704 of 270,896
weights left, of which 143,488 are not zero, 41.83799 % sparse; 30,638,720 of 40,813,184
multiply-adds, 75.07 %.

Not trained here: that needs CIFAR-10 and an accelerator. It starts from
checkpoint_trained_dense.pth.tar of Distiller's repository, in the current directory, or
--config.model.weights=FILE (docs/models.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import distiller


def get_config() -> Config:
    return distiller.cifar10(
        learning_rate=0.1,
        rules=(
            distiller.pruner(
                "stage[12]/.*/conv1/kernel", agp.filters(), (0.1, 0.4), (0, 20, 2)
            ),
            distiller.pruner(
                "stage3/block[12]/.*/kernel", agp.element(), (0.05, 0.7), (20, 40, 2)
            ),
        ),
        cut_epoch=22,
        published=Published(
            source="examples/agp-pruning/resnet20_filters.schedule_agp_2.yaml",
            sparsity="41.83799",
            nonzero=143_488,
            macs=30_638_720,
            top1="91.63",
            base_top1="91.78",
        ),
    )
