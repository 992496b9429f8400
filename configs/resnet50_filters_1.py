"""ResNet-50 on ImageNet, half the filters of each inner convolution cut out.

    python train.py --config=configs/resnet50_filters_1.py --plan
    python train.py --config=configs/resnet50_filters_1.py

The first two convolutions of every block lose half of their filters by epoch 29, and
after epoch 31 these are cut out: with their normalisation and the channels that read
them.

Published: 74.472 % top-1 (dense 76.15 %), the best epoch on the test images.
Recomputed: 12,335,296 of 25,502,912 weights left, 48.37 %; 1,822,031,872 of
4,089,184,256 multiply-adds, 44.56 %. The published 43.37 % of the weights is a slip:
its own counts give 48.37 %.

Not trained here: that needs ImageNet and accelerators. It starts from the file
resnet50.safetensors in the current directory, or --config.model.weights=FILE
(docs/models.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import distiller

INNER_CONVOLUTIONS = distiller.pruner(
    "stage.*/conv[12]/kernel", agp.filters(), (0.05, 0.5), (0, 30, 1)
)


def get_config() -> Config:
    return distiller.resnet50_filters(
        rules=(INNER_CONVOLUTIONS,),
        published=Published(
            source="examples/agp-pruning/resnet50.schedule_agp.filters.yaml",
            sparsity="0.0",
            params_kept="43.37",
            compute_kept="44.56",
            params=12_335_296,
            macs=1_822_031_872,
            top1="74.472",
            base_top1="76.15",
            errata=(
                "12,335,296 / 25,502,912 weights are 48.37 %, not 43.37 % (the removed "
                "part is 51.63 %, as a sibling file says, not 56.63 %)",
                "the pruners fc_pruner and fine_pruner are defined, never scheduled",
            ),
        ),
    )
