"""MobileNet, version 1 (arXiv:1704.04861)."""

from functools import partial

import jax
from flax import linen as nn

from agp_jax.models.layers import Conv, Dense, Norm

# Of each block: how many times the width of the first layer it has, and its strides.
_BLOCKS = (
    (2, 1),
    (4, 2),
    (4, 1),
    (8, 2),
    (8, 1),
    (16, 2),
    *[(16, 1)] * 5,
    (32, 2),
    (32, 1),
)


class MobileNet(nn.Module):
    """Classifies images with depthwise separable convolutions.

    Attributes:
      num_classes: how many classes there are.
      width: filters of the first layer; all other widths are multiples of it.
    """

    num_classes: int
    width: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, num_classes) of `images` (batch, height, width, channels)."""
        x = Conv(self.width, (3, 3), strides=2, padding=1, name="conv")(images)
        x = nn.relu(Norm(use_running_average=not train, name="norm")(x))
        for i, (multiple, strides) in enumerate(_BLOCKS):
            x = _Block(multiple * self.width, strides, name=f"block{i}")(x, train)
        return Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


class _Block(nn.Module):
    width: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(Norm, use_running_average=not train)
        channels = x.shape[-1]
        depthwise = Conv(
            channels, (3, 3), self.strides, 1, groups=channels, name="depthwise"
        )
        x = nn.relu(norm(name="norm1")(depthwise(x)))
        x = Conv(self.width, (1, 1), name="pointwise")(x)
        return nn.relu(norm(name="norm2")(x))
