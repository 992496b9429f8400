"""ResNet-50 on ImageNet, half the filters of each 3x3 convolution cut out.

    python train.py --config=configs/resnet50_filters_3.py --plan
    python train.py --config=configs/resnet50_filters_3.py

The second convolution of every block loses half of its filters by epoch 28, and after
epoch 31 these are cut out.

Published: 75.748 % top-1 (dense 76.15 %), the best epoch on the test images.
Recomputed: 17,329,344 of 25,502,912 weights left, 67.95 %; 2,753,298,432 of
4,089,184,256 multiply-adds, 67.33 %.

Not trained here: that needs ImageNet and accelerators. It starts from the file
resnet50.safetensors in the current directory, or --config.model.weights=FILE
(docs/models.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import distiller


def get_config() -> Config:
    return distiller.resnet50_filters(
        decay_end=100,
        rules=(
            distiller.pruner(
                "stage.*/conv2/kernel", agp.filters(), (0.05, 0.5), (0, 30, 2)
            ),
        ),
        published=Published(
            source="examples/agp-pruning/resnet50.schedule_agp.filters_3.yaml",
            sparsity="0.0",
            params_kept="67.95",
            compute_kept="67.33",
            params=17_329_344,
            macs=2_753_298_432,
            top1="75.748",
            base_top1="76.15",
            errata=(
                "the pruners fc_pruner and fine_pruner are defined, never scheduled",
            ),
        ),
    )
