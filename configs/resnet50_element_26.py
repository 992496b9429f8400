"""ResNet-50 on ImageNet, 26 % of its weights pruned, for accuracy.

    python train.py --config=configs/resnet50_element_26.py --plan
    python train.py --config=configs/resnet50_element_26.py

Published: 76.538 % top-1 (dense 76.15 %) at 26.00178 % sparsity. Recomputed: 18,871,702
of 25,502,912 weights left, 26.00178 %; multiply-adds stay 4,089,184,256. It prunes the
layers that configs/resnet18_element_60.py prunes in ResNet-18, by their names.

The published command names the file of the 80 % schedule, and its 80 epochs do not
reach the epoch 80 of its log.

Not trained here: that needs ImageNet and accelerators. It starts from the file
resnet50.safetensors in the current directory, or --config.model.weights=FILE
(docs/models.md).
"""

from agp_jax.training.config import Config
from agp_jax.training.published import Published
from configs import distiller
from configs.resnet18_element_60 import RULES


def get_config() -> Config:
    return distiller.imagenet(
        "resnet50",
        weights="resnet50.safetensors",
        epochs=80,
        hold_out=0.1,
        optimizer=distiller.exponential(0.001, 0.9, start=13, end=100),
        rules=RULES,
        published=Published(
            source="examples/agp-pruning/resnet50_pruning_for_accuracy.schedule_agp"
            ".yaml",
            sparsity="26.00178",
            nonzero=18_871_702,
            top1="76.538",
            base_top1="76.15",
            errata=(
                "the command names resnet50.schedule_agp.yaml, now the 80 % schedule",
                "the command trains 80 epochs, the log is of an 81st",
            ),
        ),
    )
