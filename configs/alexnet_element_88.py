"""AlexNet on ImageNet, 88.3 % of its weights pruned one by one.

    python train.py --config=configs/alexnet_element_88.py --plan
    python train.py --config=configs/alexnet_element_88.py

Published: 56.528 % top-1 (dense 56.55 %), after the last epoch, at 88.30579 % sparsity.
Recomputed: 7,144,049 of 61,090,496 weights left, 88.30579 %; multiply-adds stay
714,188,480. The first convolution stays dense.

Not trained here: that needs ImageNet and accelerators. It starts from the file
alexnet.safetensors in the current directory, or --config.model.weights=FILE
(docs/models.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import distiller


def get_config() -> Config:
    return distiller.imagenet(
        "alexnet",
        weights="alexnet.safetensors",
        epochs=90,
        hold_out=0.1,
        optimizer=distiller.exponential(0.005, 0.9, start=24, end=200),
        rules=(
            distiller.pruner("conv2/kernel", agp.element(), (0.03, 0.62), (1, 11, 2)),
            distiller.pruner("conv3/kernel", agp.element(), (0.03, 0.65), (1, 11, 2)),
            distiller.pruner(
                "conv[45]/kernel", agp.element(), (0.03, 0.43), (1, 11, 2)
            ),
            distiller.pruner(
                "dense[12]/kernel", agp.element(), (0.05, 0.91), (0, 18, 2)
            ),
            distiller.pruner("head/kernel", agp.element(), (0.05, 0.75), (0, 18, 2)),
        ),
        published=Published(
            source="examples/agp-pruning/alexnet.schedule_agp.yaml",
            sparsity="88.30579",
            nonzero=7_144_049,
            top1="56.528",
            base_top1="56.55",
        ),
    )
