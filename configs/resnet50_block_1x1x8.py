"""ResNet-50 on ImageNet, 70 % of the 1x1x8 blocks of its 3x3 convolutions pruned.

    python train.py --config=configs/resnet50_block_1x1x8.py --plan
    python train.py --config=configs/resnet50_block_1x1x8.py

A block is 8 consecutive input channels of one filter at one position; the classifier
loses 70 % of its weights one by one.

Published: 76.358 % top-1 (dense 76.15 %), the best epoch at full sparsity on the test
images, at 36.68447 % sparsity. Recomputed: 16,147,304 of 25,502,912 weights left,
36.68447 %; multiply-adds stay 4,089,184,256.

Not trained here: that needs ImageNet and accelerators. It starts from the file
resnet50.safetensors in the current directory, or --config.model.weights=FILE
(docs/models.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import distiller


def get_config() -> Config:
    return distiller.imagenet(
        "resnet50",
        weights="resnet50.safetensors",
        epochs=100,
        optimizer=distiller.exponential(0.0005, 0.95, start=40, end=80),
        rules=(
            distiller.pruner(
                "stage.*/conv2/kernel", agp.block((1, 1, 8, 1)), (0.05, 0.7), (0, 30, 1)
            ),
            distiller.pruner("head/kernel", agp.element(), (0.05, 0.7), (0, 30, 3)),
        ),
        published=Published(
            source="examples/agp-pruning/resnet50.schedule_agp.1x1x8-blocks.yaml",
            sparsity="36.68447",
            nonzero=16_147_304,
            top1="76.358",
            base_top1="76.15",
            errata=(
                "the README's 1x1x8 is height x width x depth; the file's block_shape "
                "is [repetitions, depth, height, width]",
            ),
        ),
    )
