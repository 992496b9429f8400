"""ResNet-50 on ImageNet, half the inner filters cut out, and a sparse classifier.

    python train.py --config=configs/resnet50_filters_fc.py --plan
    python train.py --config=configs/resnet50_filters_fc.py

As configs/resnet50_filters_1.py, and the classifier loses 70 % of its weights one by
one.

Published: 74.564 % top-1 (dense 76.15 %), the best epoch on the test images, at
11.62193 % sparsity. Recomputed: 12,335,296 of 25,502,912 weights left, of which
10,901,696 are not zero, 11.62193 % sparse; 1,822,031,872 of 4,089,184,256 multiply-
adds, 44.56 %. The published 42.74 % counts non-zero weights, unlike the rows before,
and is cut off, not rounded: 42.747 %.

Not trained here: that needs ImageNet and accelerators. It starts from the file
resnet50.safetensors in the current directory, or --config.model.weights=FILE
(docs/models.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import distiller
from configs.resnet50_filters_1 import INNER_CONVOLUTIONS


def get_config() -> Config:
    return distiller.resnet50_filters(
        rules=(
            INNER_CONVOLUTIONS,
            distiller.pruner("head/kernel", agp.element(), (0.05, 0.7), (0, 30, 3)),
        ),
        published=Published(
            source="examples/agp-pruning/resnet50.schedule_agp.filters_with_FC.yaml",
            sparsity="11.62193",
            params_kept="42.74",
            compute_kept="44.56",
            nonzero=10_901_696,
            macs=1_822_031_872,
            top1="74.564",
            base_top1="76.15",
            errata=(
                "42.74 is 10,901,696 / 25,502,912 = 42.747 cut off, and counts "
                "non-zero weights; 48.37 % of all are left, as in resnet50_filters_1",
                "the command names the schedule without FC; fine_pruner is defined, "
                "never scheduled",
            ),
        ),
    )
