"""MobileNet v1 on ImageNet, 51.6 % of its weights pruned one by one.

    python train.py --config=configs/mobilenet_element_52.py --plan
    python train.py --config=configs/mobilenet_element_52.py

Published: 68.808 % top-1 at 51.57602 % sparsity. Recomputed: 2,038,208 of 4,209,088
weights left, 51.57602 %; multiply-adds stay 568,740,352. Half of the ten last pointwise
convolutions and 60 % of the classifier go; depthwise and early layers stay dense.

The checkpoint it starts from has 68.848 % top-1; Distiller's README prints 68.9. The
published log is of epoch 199 of a run that held out a tenth of the training images,
which its command does not do.

Not trained here: that needs ImageNet and accelerators. It starts from the file
mobilenet_sgd_68.848.pth.tar in the current directory, or --config.model.weights=FILE
(docs/models.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config, Optimizer
from agp_jax.training.published import Published
from configs import distiller


def get_config() -> Config:
    return distiller.imagenet(
        "mobilenet",
        weights="mobilenet_sgd_68.848.pth.tar",
        epochs=96,
        optimizer=Optimizer(learning_rate=0.001, decay="steps", decay_at=(30, 60, 90)),
        rules=(
            distiller.pruner(
                r"block([3-9]|1\d)/pointwise/kernel",
                agp.element(),
                (0.15, 0.5),
                (0, 20, 2),
            ),
            distiller.pruner("head/kernel", agp.element(), (0.15, 0.6), (0, 20, 2)),
        ),
        published=Published(
            source="examples/agp-pruning/mobilenet.imagenet.schedule_agp.yaml",
            sparsity="51.57602",
            nonzero=2_038_208,
            top1="68.808",
            base_top1="68.848",
            errata=(
                "the README's dense 68.9 is 68.848 in the checkpoint's name",
                "the command says 96 epochs without validation split, the log is of "
                "epoch 199 with one",
            ),
        ),
    )
