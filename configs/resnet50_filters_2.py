"""ResNet-50 on ImageNet, half the filters of most inner convolutions cut out.

    python train.py --config=configs/resnet50_filters_2.py --plan
    python train.py --config=configs/resnet50_filters_2.py

As configs/resnet50_filters_1.py, but three sensitive convolutions keep all filters.

Published: 74.782 % top-1 (dense 76.15 %), the best epoch on the test images.
Recomputed: 12,671,168 of 25,502,912 weights left, 49.69 %; 2,037,186,560 of
4,089,184,256 multiply-adds, 49.82 %.

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
            # All but the first layers of two blocks and one second layer.
            agp.dense("stage[23]/block0/conv1/kernel|stage2/block1/conv2/kernel"),
            INNER_CONVOLUTIONS,
        ),
        published=Published(
            source="examples/agp-pruning/resnet50.schedule_agp.filters_2.yaml",
            sparsity="0.0",
            params_kept="49.69",
            compute_kept="49.82",
            params=12_671_168,
            macs=2_037_186_560,
            top1="74.782",
            base_top1="76.15",
            errata=(
                "the pruners fc_pruner and fine_pruner are defined, never scheduled",
            ),
        ),
    )
