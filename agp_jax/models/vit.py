"""Vision transformers (arXiv:2010.11929)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from agp_jax.models.layers import Conv, Dense, stored_or_new

_EPSILON = 1e-6


class VisionTransformer(nn.Module):
    """Classifies images as sequences of patches, ViT-B/16 by default.

    A cut may take heads, their features and features of the MLPs, in each layer others,
    and features of the residual stream, in all layers the same.

    Attributes:
      num_classes: how many classes there are.
      width: of the residual stream; the MLPs have four times as many features.
      depth: how many layers there are.
      num_heads: how many heads a layer has; they share the width.
      patch: height and width of a patch.
    """

    num_classes: int
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    patch: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, num_classes) of `images` (batch, height, width, channels)."""
        del train  # the same in training and evaluation
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of the {self.num_heads} heads, got "
                f"{self.width}"
            )
        x = Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            padding=0,
            use_bias=True,
            kernel_init=nn.initializers.lecun_normal(),
            name="patches",
        )(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # (batch, patches, width)
        width = x.shape[-1]
        zeros, normal = nn.initializers.zeros, nn.initializers.normal(0.02)
        token = self.param("class_token", zeros, (1, 1, width))
        tokens = jnp.broadcast_to(token, (x.shape[0], 1, width))
        x = jnp.concatenate([tokens.astype(x.dtype), x], axis=1)
        x = x + self.param("positions", normal, (1, *x.shape[1:])).astype(x.dtype)
        for i in range(self.depth):
            x = _Layer(self.width, self.num_heads, name=f"layer{i}")(x)
        x = _LayerNorm(self.width, name="norm")(x)
        return Dense(self.num_classes, name="head")(x[:, 0])


class _Layer(nn.Module):
    width: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _LayerNorm(self.width, name="norm1")(x)
        x = x + _Attention(self.width, self.num_heads, name="attention")(y)
        y = _LayerNorm(self.width, name="norm2")(x)
        y = nn.gelu(Dense(4 * self.width, name="mlp1")(y), approximate=False)
        return x + Dense(self.width, name="mlp2")(y)


class _Attention(nn.Module):
    width: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        head_dim = self.width // self.num_heads
        query, key, value = (
            Dense((self.num_heads, head_dim), name=name)(
                x
            )  # (batch, tokens, heads, head_dim)
            for name in ("query", "key", "value")
        )
        # A head that has lost features is scaled as before, so its scores are the same.
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / head_dim**0.5
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
        return Dense(self.width, num_axes=2, name="out")(y)


class _LayerNorm(nn.Module):
    """Flax's LayerNorm, also of a stream that has lost features."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # Sums are divided as before, like those of a stream with zeros.
        mean = wide.sum(-1, keepdims=True) / self.width
        square = jnp.square(wide).sum(-1, keepdims=True) / self.width
        variance = jnp.maximum(square - jnp.square(mean), 0)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = stored_or_new(self, "scale", ones, x.shape[-1:])
        bias = stored_or_new(self, "bias", zeros, x.shape[-1:])
        one, other = (jnp.expand_dims(p, range(x.ndim - 1)) for p in (scale, bias))
        y = (wide - mean) * (jax.lax.rsqrt(variance + _EPSILON) * one) + other
        return y.astype(jnp.result_type(x, scale))
