"""ResNet-20 on CIFAR-10, trained from scratch while 90 % of its weights are pruned.

    python -m agp_jax.data prepare cifar10 --source=cifar-10-binary.tar.gz
    python train.py --config=configs/cifar10_resnet20_element_90.py

Augmentation and normalisation are those of the published ResNet-20 runs: random crops
of 32 pixels out of 40, flips, pixels scaled to [-1, 1]. About 200 epochs. Not measured
here: it wants an accelerator.
"""

import agp_jax as agp
from agp_jax.training.config import Config, Data, Model, Optimizer, Prune

_EPOCH = 390  # steps of 128 of the 50,000 training images


def get_config() -> Config:
    return Config(
        steps=200 * _EPOCH,
        batch_size=128,
        log_every=_EPOCH,
        checkpoint_every=10 * _EPOCH,
        data=Data(name="cifar10", augment="crop_flip"),
        model=Model(name="resnet20"),
        optimizer=Optimizer(
            learning_rate=0.1,
            decay="steps",
            decay_at=(100 * _EPOCH, 150 * _EPOCH),
            weight_decay=1e-4,
        ),
        prune=Prune(
            final_sparsity=0.9,
            begin_step=20 * _EPOCH,
            end_step=120 * _EPOCH,
            frequency=_EPOCH,
            rules=(agp.Rule(".*/kernel", agp.element()),),
        ),
    )
