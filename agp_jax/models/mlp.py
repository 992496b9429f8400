"""A multilayer perceptron."""

from collections.abc import Sequence

import jax
from flax import linen as nn

from agp_jax.models.layers import Dense


class Mlp(nn.Module):
    """Classifies flattened images with fully connected layers.

    Attributes:
      num_classes: how many classes there are.
      hidden: the widths of the hidden layers.
    """

    num_classes: int
    hidden: Sequence[int] = (128, 64)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, num_classes) of `images` (batch, height, width, channels)."""
        del train  # the same in training and evaluation
        x = images.reshape(images.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(Dense(width, name=f"hidden{i}")(x))
        return Dense(self.num_classes, name="head")(x)
