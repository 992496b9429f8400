"""Models whose published pruning results this library reproduces, in Flax linen.

A model is called with images (batch, height, width, channels) and `train=`, and gives
logits (batch, classes).
"""

from collections.abc import Callable

from flax import linen as nn

from agp_jax.models.mlp import Mlp
from agp_jax.models.resnet_cifar import CifarResNet

# name: (how it is made from the number of classes and a width, its published width)
MODELS: dict[str, tuple[Callable[[int, int], nn.Module], int]] = {
    "mlp": (lambda classes, width: Mlp(classes, (width, width // 2)), 128),
    "resnet20": (lambda classes, width: CifarResNet(classes, 20, width), 16),
}


def make_model(name: str, num_classes: int, width: int | None = None) -> nn.Module:
    """The model of a name in `MODELS`, by default at its published width."""
    make, published_width = MODELS[name]
    return make(num_classes, width or published_width)
