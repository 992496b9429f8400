"""ResNet-18 on ImageNet, 59.9 % of its weights pruned one by one.

    python train.py --config=configs/resnet18_element_60.py --plan
    python train.py --config=configs/resnet18_element_60.py

Published: 69.872 % top-1 (dense 69.76 %), after the last epoch, at 59.92283 % sparsity.
Recomputed: 4,680,578 of 11,678,912 weights left, 59.92283 %; multiply-adds stay
1,814,073,344. Three groups of convolutions with a final sparsity each; all others stay
dense, and so does the classifier.

Not trained here: that needs ImageNet and accelerators. It starts from the file
resnet18.safetensors in the current directory, or --config.model.weights=FILE
(docs/models.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import distiller

_LOW = (
    "stage2/block0/conv2|stage3/block1/conv[12]|stage4/block0/conv[12]"
    "|stage4/block0/shortcut_conv|stage4/block1/conv1"
)
_MIDDLE = (
    "stage1/block1/conv[12]|stage2/block0/conv1|stage2/block0/shortcut_conv"
    "|stage3/block0/conv2|stage4/block1/conv2"
)
_HIGH = "stage1/block0/conv[12]|stage2/block1/conv[12]|stage3/block0/conv1"

RULES = (
    distiller.pruner(f"({_LOW})/kernel", agp.element(), (0.05, 0.60), (0, 16, 2)),
    distiller.pruner(f"({_MIDDLE})/kernel", agp.element(), (0.05, 0.67), (4, 16, 2)),
    distiller.pruner(f"({_HIGH})/kernel", agp.element(), (0.05, 0.76), (4, 16, 2)),
)


def get_config() -> Config:
    return distiller.imagenet(
        "resnet18",
        weights="resnet18.safetensors",
        epochs=100,
        hold_out=0.1,
        optimizer=distiller.exponential(0.001, 0.9, start=13, end=100),
        rules=RULES,
        published=Published(
            source="examples/agp-pruning/resnet18.schedule_agp.yaml",
            sparsity="59.92283",
            nonzero=4_680_578,
            top1="69.872",
            base_top1="69.76",
        ),
    )
