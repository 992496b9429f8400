"""Decoder-only transformers, as Llama (arXiv:2307.09288) has them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from agp_jax.models.layers import Dense, Embedding, stored_or_new

_EPSILON = 1e-5
_LONGEST_WAVE = 10_000.0  # of rotary positions, in steps of 2 pi


class Gpt(nn.Module):
    """Tells what token follows each token of texts.

    Layers are stacked for a scan: their kernels have a leading axis `depth`, so a rule
    for them has `stacked_axes=1`. Queries of several heads may share one key and value.
    Training with dropout needs a key for "dropout".

    A cut may take features of the MLPs, experts, features of values, and heads: keys
    and values with all of their queries, or as many queries of each key. It may take
    others in each layer, but as many; and it may take whole layers, unless these have
    routers. Queries and keys keep their features, by whose number a kernel tells how
    many heads it has. An expert whose router weights are all zero is never chosen.

    Attributes:
      vocabulary: how many tokens there are; the embedding also makes the logits.
      width: of the residual stream.
      depth: how many layers there are, if none are stored yet.
      num_heads: how many heads of queries a layer has.
      num_kv_heads: how many of keys and values; by default as many.
      head_dim: features of a head, an even number; by default heads share the width.
      mlp_width: hidden features of a layer's MLP; by default 8/3 of the width,
        rounded up to a multiple of 8.
      num_experts: how many MLPs of that width a layer has, of which a router chooses
        some for each token; 0 for one, which all tokens go through.
      experts_per_token: how many it chooses. The softmax of their logits weighs them.
      dropout: the fraction that training drops of what enters the residual stream.
      dtype: what layers compute in. Parameters, normalisation and logits are float32.
      remat: whether layers are computed again for the gradient instead of remembered.
    """

    vocabulary: int
    width: int = 512
    depth: int = 8
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    num_experts: int = 0
    experts_per_token: int = 2
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, tokens: jax.Array, starts: jax.Array, *, train: bool
    ) -> jax.Array:
        """Logits (rows, length, vocabulary) of what follows each of the tokens.

        Args:
          tokens: int32 (rows, length); each row is a text of its own.
          starts: bool (rows,), not read: nothing is carried from call to call.
          train: whether to drop.
        """
        del starts
        head_dim, kv_heads = self._heads()
        embedding = Embedding(self.vocabulary, self.width, name="embedding")
        x = embedding(tokens).astype(self.dtype)  # (rows, length, width)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = nn.remat(_Block, prevent_cse=False) if self.remat else _Block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self._stored_depth() or self.depth,
        )(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_width=self.mlp_width or 8 * -(-self.width // 3),
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            dropout=self.dropout if train else 0.0,
            # What a layer adds is as large in sum, however many there are.
            out_scale=0.02 / (2 * self.depth) ** 0.5,
            dtype=self.dtype,
            name="blocks",
        )
        x, _ = blocks(x, *waves(tokens.shape[1], head_dim))
        return embedding.attend(_RmsNorm(self.width, name="final_norm")(x))

    def _stored_depth(self) -> int | None:
        """How many layers the stored kernels have; None if there are none yet."""
        if not self.has_variable("params", "blocks"):
            return None
        kernels = jax.tree.leaves(self.get_variable("params", "blocks"))
        return kernels[0].shape[0]

    def _heads(self) -> tuple[int, int]:
        """How many features a head has, and how many heads of keys there are."""
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of the {kv_heads} heads of keys, got "
                f"{self.num_heads}"
            )
        if not self.head_dim and self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of the {self.num_heads} heads, got "
                f"{self.width}; or give head_dim"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must be from 1 to the {self.num_experts} experts, "
                f"got {self.experts_per_token}"
            )
        head_dim = self.head_dim or self.width // self.num_heads
        if head_dim % 2:
            raise ValueError(
                f"a head must have an even number of features, which are rotated in "
                f"pairs, got {head_dim}"
            )
        return head_dim, kv_heads


class _Block(nn.Module):
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    num_experts: int
    experts_per_token: int
    dropout: float
    out_scale: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, None]:
        drop = nn.Dropout(self.dropout, deterministic=not self.dropout)
        attention = _Attention(
            self.width,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.out_scale,
            self.dtype,
            name="attention",
        )
        sizes = self.width, self.mlp_width, self.out_scale, self.dtype
        mlp = (
            _Experts(*sizes, self.num_experts, self.experts_per_token, name="mlp")
            if self.num_experts
            else _Mlp(*sizes, name="mlp")
        )
        x = x + drop(attention(_RmsNorm(self.width, name="norm1")(x), cos, sin))
        x = x + drop(mlp(_RmsNorm(self.width, name="norm2")(x)))
        return x, None


class _Attention(nn.Module):
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    out_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        kv_width = self.num_kv_heads * self.head_dim
        query = _dense(self.num_heads * self.head_dim, self.dtype, "query")(x)
        key = _dense(kv_width, self.dtype, "key")(x)
        value = _dense(kv_width, self.dtype, "value")(x)
        outer = x.shape[:-1]  # (rows, length)
        key = key.reshape(*outer, -1, self.head_dim)  # (*outer, kv_heads, head_dim)
        heads = key.shape[-2]
        value = value.reshape(*outer, heads, -1)
        query = query.reshape(*outer, -1, self.head_dim)
        query, key = (rotate(y, cos, sin) for y in (query, key))
        query = query.reshape(*outer, heads, -1, self.head_dim)
        y = _attend(query, key, value, self.head_dim**-0.5)
        y = y.reshape(*outer, -1)
        return _dense(self.width, self.dtype, "out", self.out_scale)(y)


class _Mlp(nn.Module):
    width: int
    hidden: int
    out_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = _dense(self.hidden, self.dtype, "gate")(x)
        up = _dense(self.hidden, self.dtype, "up")(x)
        return _dense(self.width, self.dtype, "down", self.out_scale)(
            nn.silu(gate) * up
        )


class _Experts(nn.Module):
    """A mixture of MLPs (arXiv:1701.06538), each of which sees the tokens it is for."""

    width: int
    hidden: int
    out_scale: float
    dtype: Any
    num_experts: int
    num_chosen: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.reshape(-1, x.shape[-1])  # (tokens, width)
        logits = self._logits(tokens)  # (tokens, experts)
        values, chosen = jax.lax.top_k(logits, self.num_chosen)  # (tokens, chosen)
        # Tokens in runs of one expert each, and how long these are.
        order = jnp.argsort(chosen.reshape(-1))
        lengths = jnp.bincount(chosen.reshape(-1), length=logits.shape[-1])
        runs = tokens[order // self.num_chosen]

        def products(runs: jax.Array, name: str, features: int, scale: float = 0.02):
            shape = (self.num_experts, runs.shape[-1], features)
            kernel = _Kernel(shape, scale, name=name)().astype(self.dtype)
            return jax.lax.ragged_dot(runs.astype(self.dtype), kernel, lengths)

        gate, up = (products(runs, name, self.hidden) for name in ("gate", "up"))
        made = products(nn.silu(gate) * up, "down", self.width, self.out_scale)
        made = made[jnp.argsort(order)].reshape(*chosen.shape, -1)
        weights = nn.softmax(values).astype(made.dtype)
        return jnp.einsum("tkd,tk->td", made, weights).reshape(*x.shape[:-1], -1)

    def _logits(self, tokens: jax.Array) -> jax.Array:
        """How well each expert is for each token, in float32."""
        kernel = _Kernel((self.width, self.num_experts), 0.02, name="router")()
        logits = tokens.astype(kernel.dtype) @ kernel
        # An expert without weights is not there.
        is_there = jnp.any(kernel != 0, axis=0, keepdims=True)
        return jnp.where(is_there, logits, -jnp.inf)


class _Kernel(nn.Module):
    """A kernel that is multiplied elsewhere."""

    shape: tuple[int, ...]
    scale: float

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.normal(self.scale)
        return stored_or_new(self, "kernel", init, self.shape)


class _RmsNorm(nn.Module):
    """Divides by the root of the mean square, computed in float32 at least."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # A stream that has lost features is divided as before, like one with zeros.
        mean = jnp.square(wide).sum(-1, keepdims=True) / self.width
        scale = stored_or_new(self, "scale", nn.initializers.ones, x.shape[-1:])
        wide = wide * jax.lax.rsqrt(mean + _EPSILON)
        return (wide * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def waves(length: int, features: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (length, features / 2) of rotary positions (arXiv:2104.09864).

    Pair i of the features turns by `10000 ** (-2 * i / features)` with each position.
    """
    half = features // 2
    # Counted by a sum, along which nothing can be cut: heads keep their features.
    pairs = jnp.cumsum(jnp.ones(half)) - 1
    rates = _LONGEST_WAVE ** (-pairs / half)
    angles = jnp.outer(jnp.arange(length), rates)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`x` (rows, length, heads, features) turned by its positions.

    Features i and i + features / 2 are a pair, as in Llama. The product of two results
    depends on how far apart they are, not on where.
    """
    cos, sin = (jnp.expand_dims(y, (0, 2)) for y in (cos, sin))
    left, right = jnp.split(x, 2, axis=-1)
    turned = [left * cos - right * sin, right * cos + left * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float
) -> jax.Array:
    """What each position gets from itself and those before it.

    Args:
      query: (rows, length, kv_heads, queries of each, features).
      key: (rows, length, kv_heads, features).
      value: (rows, length, kv_heads, value features).
      scale: of the scores.

    Returns:
      (rows, length, kv_heads, queries of each, value features).
    """
    scores = scale * jnp.einsum(
        "rqhgd,rkhd->rhgqk",
        query,
        key,
        preferred_element_type=jnp.promote_types(query.dtype, jnp.float32),
    )
    is_past = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(jnp.expand_dims(is_past, (0, 1, 2)), scores, -jnp.inf)
    weights = nn.softmax(scores).astype(value.dtype)
    return jnp.einsum("rhgqk,rkhd->rqhgd", weights, value)


def _dense(features: int, dtype: Any, name: str, scale: float = 0.02) -> Dense:
    init = nn.initializers.normal(scale)
    return Dense(features, use_bias=False, kernel_init=init, dtype=dtype, name=name)
