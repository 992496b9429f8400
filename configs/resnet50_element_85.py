"""ResNet-50 on ImageNet, 84.6 % of its weights pruned one by one.

    python train.py --config=configs/resnet50_element_85.py --plan
    python train.py --config=configs/resnet50_element_85.py

Published: 75.662 % top-1 (dense 76.15 %), the best epoch on the test images, at
84.56702 % sparsity. Recomputed: 3,935,859 of 25,502,912 weights left, 84.56702 %;
multiply-adds stay 4,089,184,256. Convolutions but the first lose 85 %, the classifier
80 %.

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
        epochs=120,
        optimizer=distiller.exponential(0.005, 0.95, start=40, end=100),
        rules=(
            agp.dense("conv/kernel"),
            distiller.pruner("head/kernel", agp.element(), (0.05, 0.80), (1, 35, 1)),
            distiller.pruner(".*/kernel", agp.element(), (0.05, 0.85), (0, 35, 1)),
        ),
        published=Published(
            source="examples/agp-pruning/resnet50_84.6-sparsity.schedule_agp.yaml",
            sparsity="84.56702",
            nonzero=3_935_859,
            top1="75.662",
            base_top1="76.15",
            errata=(
                "75.662 is epoch 94, chosen on the test images; the last has 75.544",
                "the command names the file of the 80 % schedule",
            ),
        ),
    )
