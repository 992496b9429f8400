"""Layers that are as wide as their stored kernels.

`features` is the width of a new kernel. Applied to stored variables, a layer is as wide
as they are, so a model also runs with the variables that `agp_jax.thin` returns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

NORM_EPSILON = 1e-5
Norm = partial(nn.BatchNorm, momentum=0.9, epsilon=NORM_EPSILON)


class Conv(nn.Module):
    """A convolution of images (batch, height, width, channels).

    Attributes:
      features: how many filters there are.
      kernel_size: height and width of a filter.
      strides: the step from one output to the next, in both directions.
      padding: "SAME", or how many zeros stand on each side.
      groups: into how many groups channels and filters fall; a filter sees the channels
        of its group. Stored kernels tell by how many these are.
      use_bias: whether a bias is added.
      kernel_init: makes a new kernel.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: str | int = "SAME"
    groups: int = 1
    use_bias: bool = False
    kernel_init: Callable[..., jax.Array] = nn.initializers.variance_scaling(
        2.0, "fan_out", "normal"
    )

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The convolved `x` (batch, height, width, features)."""
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = stored_or_new(self, "kernel", self.kernel_init, shape)
        x, kernel = promote_dtype(x, kernel)
        y = lax.conv_general_dilated(
            x,
            kernel,
            (self.strides, self.strides),
            [(self.padding, self.padding)] * 2
            if isinstance(self.padding, int)
            else self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1] // kernel.shape[-2],
        )
        return _add_bias(self, y, kernel.shape[-1:]) if self.use_bias else y


class Dense(nn.Module):
    """A fully connected layer.

    Attributes:
      features: how many outputs there are, or the sizes of several axes of them.
      num_axes: how many last axes of its inputs it sums over.
      use_bias: whether a bias is added.
      kernel_init: makes a new kernel; by default LeCun's normal.
      dtype: what it computes in; by default what inputs and kernel promote to.
    """

    features: int | tuple[int, ...]
    num_axes: int = 1
    use_bias: bool = True
    kernel_init: Callable[..., jax.Array] | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` (..., *inputs) as (..., *features)."""
        split = self.num_axes
        features = self.features
        outputs = (features,) if isinstance(features, int) else features
        shape = (*x.shape[x.ndim - split :], *outputs)
        init = self.kernel_init or nn.initializers.lecun_normal(
            range(split), range(split, len(shape))
        )
        kernel = stored_or_new(self, "kernel", init, shape)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        y = jnp.tensordot(x, kernel, axes=split)
        return _add_bias(self, y, kernel.shape[split:]) if self.use_bias else y


class Embedding(nn.Module):
    """A vector for each token, which may also tell how well a token fits.

    Attributes:
      vocabulary: how many tokens there are.
      features: how many numbers a vector has.
      embedding_init: makes new vectors.
    """

    vocabulary: int
    features: int
    embedding_init: Callable[..., jax.Array] = nn.initializers.normal(0.02)

    def setup(self) -> None:
        shape = (self.vocabulary, self.features)
        self.embedding = stored_or_new(self, "embedding", self.embedding_init, shape)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The vectors (..., features) of `tokens` (...)."""
        return self.embedding[tokens]

    def attend(self, x: jax.Array) -> jax.Array:
        """The products (..., vocabulary) of `x` (..., features) with all vectors.

        The factors have the dtype of `x`; the sums are float32 at least.
        """
        # Over merged axes the gradients are plain products, too, which CPUs do faster.
        products = jnp.einsum(
            "nd,vd->nv",
            x.reshape(-1, x.shape[-1]),
            self.embedding.astype(x.dtype),
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )
        return products.reshape(*x.shape[:-1], -1)


def _add_bias(layer: nn.Module, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    bias = layer.param("bias", nn.initializers.zeros, shape)
    (bias,) = promote_dtype(bias, dtype=x.dtype)
    return x + bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)


def stored_or_new(
    layer: nn.Module, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...]
) -> jax.Array:
    """A parameter as it is stored, or a new one of the given shape."""
    if layer.has_variable("params", name):
        shape = layer.get_variable("params", name).shape
    return layer.param(name, init, shape)
