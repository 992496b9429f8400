"""ResNets (arXiv:1512.03385) and ResNeXts (arXiv:1611.05431) for ImageNet.

As torchvision has them: where a bottleneck strides, its 3x3 convolution does.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from flax import linen as nn

from agp_jax.models.layers import Conv, Dense, Norm


class ResNet(nn.Module):
    """Classifies images with four stages of residual blocks.

    Attributes:
      num_classes: how many classes there are.
      blocks: how many blocks each stage has.
      make_block: makes a block from its width, its strides and its name.
      width: of the first stage; each other one is twice as wide as the one before.
    """

    num_classes: int
    blocks: Sequence[int]
    make_block: Callable[..., nn.Module]
    width: int = 64

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, num_classes) of `images` (batch, height, width, channels)."""
        x = Conv(self.width, (7, 7), strides=2, padding=3, name="conv")(images)
        x = nn.relu(Norm(use_running_average=not train, name="norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.blocks):
            x = _Stage(
                self.width * 2**stage,
                blocks,
                self.make_block,
                strides=2 if stage else 1,
                name=f"stage{stage + 1}",
            )(x, train)
        return Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


def resnet18(num_classes: int, width: int = 64) -> ResNet:
    """ResNet-18."""
    return ResNet(num_classes, (2, 2, 2, 2), BasicBlock, width)


def resnet50(num_classes: int, width: int = 64) -> ResNet:
    """ResNet-50."""
    return ResNet(num_classes, (3, 4, 6, 3), Bottleneck, width)


def resnext101(num_classes: int, width: int = 64) -> ResNet:
    """ResNeXt-101 32x4d: 32 groups, which have 4 channels in the first stage."""
    make_block = partial(Bottleneck, groups=width // 2, inner=2)
    return ResNet(num_classes, (3, 4, 23, 3), make_block, width)


class _Stage(nn.Module):
    width: int
    blocks: int
    make_block: Callable[..., nn.Module]
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(self.blocks):
            strides = 1 if i else self.strides
            x = self.make_block(self.width, strides, name=f"block{i}")(x, train)
        return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions.

    Attributes:
      width: of both.
      strides: of the first one.
    """

    width: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(Norm, use_running_average=not train)
        y = Conv(self.width, (3, 3), self.strides, padding=1, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = Conv(self.width, (3, 3), name="conv2")(y)
        y = norm(name="norm2")(y)
        return nn.relu(_shortcut(self, x, y, self.strides, train) + y)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, with an output four times the width.

    Attributes:
      width: of the stage.
      strides: of the 3x3 convolution.
      groups: of the 3x3 convolution.
      inner: how many times the width the 3x3 convolution has.
    """

    width: int
    strides: int
    groups: int = 1
    inner: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(Norm, use_running_average=not train)
        inner = self.inner * self.width
        y = Conv(inner, (1, 1), name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = Conv(inner, (3, 3), self.strides, 1, self.groups, name="conv2")(y)
        y = nn.relu(norm(name="norm2")(y))
        y = Conv(4 * self.width, (1, 1), name="conv3")(y)
        y = norm(name="norm3")(y)
        return nn.relu(_shortcut(self, x, y, self.strides, train) + y)


def _shortcut(
    block: nn.Module, x: jax.Array, y: jax.Array, strides: int, train: bool
) -> jax.Array:
    """`x` in the shape of `y`, through layers of `block` if that takes any."""
    name = "shortcut_conv"
    # A cut may leave equal widths where the block was made with unequal ones.
    if x.shape == y.shape and not block.has_variable("params", name):
        return x
    x = Conv(y.shape[-1], (1, 1), strides, name=name, parent=block)(x)
    norm = Norm(use_running_average=not train, name="shortcut_norm", parent=block)
    return norm(x)
