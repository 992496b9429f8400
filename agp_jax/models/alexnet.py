"""AlexNet on a single device (arXiv:1404.5997), as torchvision has it."""

from functools import partial

import jax
from flax import linen as nn

from agp_jax.models.layers import Conv, Dense

_Conv = partial(Conv, use_bias=True, kernel_init=nn.initializers.he_normal())
_pool = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))


class AlexNet(nn.Module):
    """Classifies images of 224 x 224 pixels; others give `dense1` another input width.

    Training needs a key for "dropout".

    Attributes:
      num_classes: how many classes there are.
      width: filters of the first layer; all other widths are multiples of it.
      dropout: the fraction of inputs that the two hidden dense layers lose.
    """

    num_classes: int
    width: int = 64
    dropout: float = 0.5

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, num_classes) of `images` (batch, height, width, channels)."""
        width = self.width
        x = _Conv(width, (11, 11), strides=4, padding=2, name="conv1")(images)
        x = _pool(nn.relu(x))
        x = nn.relu(_Conv(3 * width, (5, 5), name="conv2")(x))
        x = _pool(x)
        x = nn.relu(_Conv(6 * width, (3, 3), name="conv3")(x))
        x = nn.relu(_Conv(4 * width, (3, 3), name="conv4")(x))
        x = nn.relu(_Conv(4 * width, (3, 3), name="conv5")(x))
        x = _pool(x)
        x = x.reshape(x.shape[0], -1)
        for name in ("dense1", "dense2"):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.relu(Dense(64 * width, name=name)(x))
        return Dense(self.num_classes, name="head")(x)
