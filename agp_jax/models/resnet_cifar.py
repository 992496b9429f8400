"""ResNets for small images: three stages of basic blocks (arXiv:1512.03385, 4.2)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from agp_jax.models.layers import Conv, Dense, Norm


class CifarResNet(nn.Module):
    """Classifies images with 6n + 2 layers, ResNet-20 by default.

    With shortcuts "pad" it cannot run variables that lack channels of the residual
    stream, as shapes do not tell where the zeros go; `agp_jax.thin_function` can.

    Attributes:
      num_classes: how many classes there are.
      depth: number of layers, 6n + 2 for n blocks per stage.
      width: channels of the first stage; the others have twice and four times as many.
      shortcut: how a shortcut changes shape. "pad" skips every other pixel and appends
        zero channels, without weights (the paper's option A); "conv" is a 1x1
        convolution with batch norm (option B).
    """

    num_classes: int
    depth: int = 20
    width: int = 16
    shortcut: str = "pad"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, num_classes) of `images` (batch, height, width, channels)."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2, such as 20, got {self.depth}")
        x = Conv(self.width, (3, 3), name="conv")(images)
        x = nn.relu(Norm(use_running_average=not train, name="norm")(x))
        for stage in range(3):
            x = _Stage(
                self.width * 2**stage,
                blocks,
                strides=2 if stage else 1,
                shortcut=self.shortcut,
                name=f"stage{stage + 1}",
            )(x, train)
        return Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


class _Stage(nn.Module):
    width: int
    blocks: int
    strides: int
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(self.blocks):
            strides = 1 if i else self.strides
            block = _Block(self.width, strides, self.shortcut, name=f"block{i}")
            x = block(x, train)
        return x


class _Block(nn.Module):
    width: int
    strides: int
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(Norm, use_running_average=not train)
        y = Conv(self.width, (3, 3), self.strides, padding=1, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = Conv(self.width, (3, 3), name="conv2")(y)
        y = norm(name="norm2")(y)
        if self.strides > 1:  # as the block was made: a cut may change widths
            if self.shortcut == "conv":
                x = Conv(self.width, (1, 1), self.strides, name="shortcut_conv")(x)
                x = norm(name="shortcut_norm")(x)
            else:
                x = _pad_shortcut(x, self.strides, self.width)
        return nn.relu(x + y)


def _pad_shortcut(x: jax.Array, strides: int, width: int) -> jax.Array:
    x = x[:, ::strides, ::strides]
    missing = width - x.shape[-1]
    before = missing // 2
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, missing - before)))
