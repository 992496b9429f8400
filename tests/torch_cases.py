"""Weights, images and small models on which torch and we compute the same logits."""

import json
import math
import zlib
from functools import partial
from pathlib import Path

import jax
import numpy as np

from agp_jax.models.alexnet import AlexNet
from agp_jax.models.mobilenet import MobileNet
from agp_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from agp_jax.models.resnet_cifar import CifarResNet
from agp_jax.models.torch_weights import from_state_dict
from agp_jax.models.vit import VisionTransformer

VECTORS = Path(__file__).parent / "vectors" / "torch_logits.json"

_RESNEXT = ResNet(5, (1, 1, 2, 1), partial(Bottleneck, groups=4, inner=2), width=8)

# A case: the model's name, its small version, height and width of its images.
SMALL = {
    "alexnet": ("alexnet", AlexNet(5, width=2), (224, 224)),
    "mobilenet": ("mobilenet", MobileNet(5, width=4), (40, 72)),
    "resnet18": ("resnet18", ResNet(5, (1, 2, 1, 1), BasicBlock, 4), (40, 72)),
    "resnet20_projection": (
        "resnet20_projection",
        CifarResNet(5, depth=8, width=4, shortcut="conv"),
        (16, 20),
    ),
    "resnet50": ("resnet50", ResNet(5, (1, 2, 1, 1), Bottleneck, 4), (40, 72)),
    "resnext101": ("resnext101", _RESNEXT, (40, 72)),
    "resnext101_cadene": ("resnext101", _RESNEXT, (40, 72)),
    "vit_b16": ("vit_b16", VisionTransformer(5, 24, 2, num_heads=4, patch=8), (16, 24)),
}


def random_tensors(shapes):
    """The same tensor for the same name and shape, wherever it is drawn.

    NumPy promises never to change what RandomState draws.
    """
    return {name: _draw(name, tuple(shape)) for name, shape in shapes.items()}


def _draw(name, shape):
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        drawn = np.exp(normal / 2)
    elif (
        name.endswith("weight") and len(shape) > 1
    ):  # as large after the next rectifier
        drawn = normal * math.sqrt(2 / math.prod(shape[1:]))
    else:
        drawn = normal / 4 + name.endswith("weight")
    return drawn.astype(np.float32)


def random_images(height, width, count=2):
    draw = np.random.RandomState(0).standard_normal((count, height, width, 3))
    return draw.astype(np.float32)


def shapes_of(model, images):
    """What our model's init makes, in the precision of the images."""
    init = lambda key: model.init(key, images, train=False)  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, images.dtype), shapes)


def our_logits(name, model, state_dict, images):
    """What our model makes of torch's weights."""
    variables = from_state_dict(name, state_dict, shapes_of(model, images))
    return np.asarray(_predict(model, variables, images))


def our_small_logits(case, shapes):
    """What our small model makes of random tensors of torch's names and shapes."""
    name, model, size = SMALL[case]
    return our_logits(name, model, random_tensors(shapes), random_images(*size))


@partial(jax.jit, static_argnums=0)
def _predict(model, variables, images):
    return model.apply(variables, images, train=False)


def relative_difference(ours, theirs):
    """The largest difference, as a fraction of the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def read_vectors():
    """Of each small case: torch's tensors' shapes, and its logits for our images."""
    return json.loads(VECTORS.read_text())
