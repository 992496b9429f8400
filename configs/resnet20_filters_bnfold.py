"""ResNet-20 on CIFAR-10, as resnet20_filters_1, ranked with folded normalisation.

    python train.py --config=configs/resnet20_filters_bnfold.py --plan
    python train.py --config=configs/resnet20_filters_bnfold.py

Kernels are ranked as they are once the batch normalisation that follows is folded into
them. That changes which filters go, and no count.

Published: 91.34 % top-1 (dense 91.78 %), the best epoch on the test images, with
120,000 non-zero weights and 30,655,104 multiply-adds. Recomputed: the same as
configs/resnet20_filters_1.py.

Not trained here: that needs CIFAR-10 and an accelerator. It starts from
checkpoint_trained_dense.pth.tar of Distiller's repository, in the current directory, or
--config.model.weights=FILE (docs/models.md).
"""

import dataclasses

from agp_jax.training.config import Config
from configs import resnet20_filters_1


def get_config() -> Config:
    config = resnet20_filters_1.get_config()
    assert config.published is not None
    config.prune.fold_norms = True
    config.published = dataclasses.replace(
        config.published,
        source="examples/agp-pruning/resnet20_filters.bn_fold.schedule_agp.yaml",
    )
    return config
