"""ResNet-20 on CIFAR-10, half the filters of its second stage cut out, others sparse.

    python train.py --config=configs/resnet20_filters_1.py --plan
    python train.py --config=configs/resnet20_filters_1.py

All filters of the second stage compete, half go by epoch 28 and are cut out after epoch
30. Then 70 % of the weights of two blocks of the third stage go one by one, and half of
the classifier's inputs.

Published: 91.34 % top-1 (dense 91.78 %), the best epoch on the test images, with
120,000 non-zero weights and 30,655,104 multiply-adds. Recomputed: 223,536 of 270,896
weights left, of which 120,000 are not zero, 46.31737 % sparse; 30,655,104 of 40,813,184
multiply-adds, 75.11 %.

Not trained here: that needs CIFAR-10 and an accelerator. It starts from
checkpoint_trained_dense.pth.tar of Distiller's repository, in the current directory, or
--config.model.weights=FILE (docs/models.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import distiller

SECOND_STAGE = distiller.pruner(
    "stage2/.*/kernel", agp.filters(), (0.1, 0.5), (0, 30, 2)
)
LAST_BLOCKS = distiller.pruner(
    "stage3/block[12]/.*/kernel", agp.element(), (0.05, 0.7), (30, 50, 2)
)
# Whole inputs of the classifier, as blocks: these are not cut out.
CLASSIFIER = distiller.pruner(
    "head/kernel", agp.block((1, 10)), (0.05, 0.5), (30, 50, 2)
)
NO_LEADER = (
    "the residual stream of the second stage is pruned without a leader: its "
    "convolutions lose different channels, and their sum mixes them"
)


def get_config() -> Config:
    return distiller.cifar10(
        learning_rate=0.4,
        rules=(
            SECOND_STAGE,
            LAST_BLOCKS,
            CLASSIFIER,
        ),
        cut_epoch=30,
        published=Published(
            source="examples/agp-pruning/resnet20_filters.schedule_agp.yaml",
            sparsity="46.31737",
            nonzero=120_000,
            macs=30_655_104,
            top1="91.34",
            base_top1="91.78",
            errata=(
                "120,000 / 270,896 weights are 44.3 %; the published 55.7 % is what is "
                "gone",
                NO_LEADER,
            ),
        ),
    )
