"""ResNeXt-101 32x4d on ImageNet, 75 % of its weights pruned one by one.

    python train.py --config=configs/resnext101_element_75.py --plan
    python train.py --config=configs/resnext101_element_75.py

Published: 78.658 % top-1 (dense 78.19 %), the best epoch on the test images, at
74.98398 % sparsity. Recomputed: 11,016,768 of 44,038,848 weights left, 74.98398 %;
multiply-adds stay 7,969,996,800. Only the first convolution stays dense; the published
table leaves its line out, but not its weights.

The learning rate falls tenfold whenever the test loss has not improved for more than 3
epochs, from epoch 70 on.

Not trained here: that needs ImageNet and accelerators. It starts from the file
resnext101_32x4d.safetensors in the current directory, or --config.model.weights=FILE
(docs/models.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config, Optimizer
from agp_jax.training.published import Published
from configs import distiller


def get_config() -> Config:
    return distiller.imagenet(
        "resnext101",
        weights="resnext101_32x4d.safetensors",
        epochs=81,
        optimizer=Optimizer(
            learning_rate=0.01,
            decay="plateau",
            decay_begin=70,
            patience=3,
            cooldown=3,
        ),
        rules=(
            agp.dense("conv/kernel"),
            distiller.pruner(".*/kernel", agp.element(), (0.01, 0.75), (1, 80, 1)),
        ),
        published=Published(
            source="examples/agp-pruning/prune_resnext101_fine75.yaml",
            sparsity="74.98398",
            nonzero=11_016_768,
            top1="78.658",
            base_top1="78.19",
            errata=(
                "the README's 75.0 is 74.98; the table lacks the first convolution's "
                "9,408 dense weights, which its total has",
            ),
        ),
    )
