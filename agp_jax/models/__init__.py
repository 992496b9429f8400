"""Models whose published pruning results this library reproduces, in Flax linen.

A model of images is called with images (batch, height, width, channels) and `train=`,
and gives logits (batch, classes). One of text is called with tokens (rows, length),
bools (rows,) that tell where texts start, and `train=`, and gives logits (rows, length,
vocabulary). All are as wide as their stored variables, thinned ones included.
"""

from collections.abc import Callable

from flax import linen as nn

from agp_jax.models.alexnet import AlexNet
from agp_jax.models.gpt import Gpt
from agp_jax.models.lstm import LstmLanguageModel
from agp_jax.models.mlp import Mlp
from agp_jax.models.mobilenet import MobileNet
from agp_jax.models.resnet import resnet18, resnet50, resnext101
from agp_jax.models.resnet_cifar import CifarResNet
from agp_jax.models.vit import VisionTransformer

# name: (how it is made from the number of classes and a width, its published width)
MODELS: dict[str, tuple[Callable[[int, int], nn.Module], int]] = {
    "mlp": (lambda classes, width: Mlp(classes, (width, width // 2)), 128),
    "resnet20": (lambda classes, width: CifarResNet(classes, 20, width), 16),
    "resnet20_projection": (
        lambda classes, width: CifarResNet(classes, 20, width, shortcut="conv"),
        16,
    ),
    "alexnet": (AlexNet, 64),
    "mobilenet": (MobileNet, 32),
    "resnet18": (resnet18, 64),
    "resnet50": (resnet50, 64),
    "resnext101": (resnext101, 64),
    "vit_b16": (VisionTransformer, 768),
}


# Models of text: called with the number of tokens there are, and `width=` and so on.
LANGUAGE_MODELS: dict[str, Callable[..., nn.Module]] = {
    "lstm": LstmLanguageModel,
    "gpt": Gpt,
}


def make_model(name: str, num_classes: int, width: int | None = None) -> nn.Module:
    """The model of a name in `MODELS`, by default at its published width."""
    make, published_width = MODELS[name]
    return make(num_classes, width or published_width)
