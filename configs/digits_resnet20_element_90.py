"""ResNet-20 on scikit-learn's digits, 90 % of its weights pruned one by one.

    python train.py

The experiment that `train.py` runs by itself. It needs no download. Measured over three
seeds: 99.0 % test accuracy, dense 99.1 % (docs/results.md).
"""

import agp_jax as agp
from agp_jax.training.config import Config, Data, Model, Optimizer, Prune


def get_config() -> Config:
    return Config(
        steps=800,
        batch_size=64,
        log_every=50,
        checkpoint_every=200,
        data=Data(name="digits", augment="shift"),
        model=Model(name="resnet20"),
        optimizer=Optimizer(
            learning_rate=0.1, warmup_steps=40, nesterov=True, weight_decay=1e-4
        ),
        prune=Prune(
            final_sparsity=0.9,
            begin_step=100,
            end_step=500,
            frequency=20,
            rules=(agp.Rule(".*/kernel", agp.element()),),
        ),
    )
