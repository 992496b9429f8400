"""Networks of published shapes, as plain functions of flat dicts of arrays.

The parameters of a network are a dict from path to array; its shapes are a dict from
path to shape, so a network can be compiled without ever being allocated.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

Shapes = dict[str, tuple[int, ...]]


def abstract(shapes: Shapes, dtype=jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays that are described and not allocated."""
    return {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}


def random(shapes: Shapes, dtype=jnp.float32, seed: int = 0) -> dict[str, jax.Array]:
    """Normally distributed arrays."""
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
        for path, shape in shapes.items()
    }


def kernels(shapes: Shapes) -> Shapes:
    """The convolution and dense weights alone."""
    return {path: shape for path, shape in shapes.items() if len(shape) > 1}


def num_weights(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@dataclasses.dataclass(frozen=True)
class ResNet:
    """A ResNet of bottleneck blocks (arXiv:1512.03385), ResNet-50 by default.

    It has no running statistics: normalisation is by the batch.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    num_classes: int = 1000

    def shapes(self) -> Shapes:
        convs: Shapes = {"stem": (7, 7, 3, self.width)}
        features = self.width
        for block, width, strides in self._blocks():
            convs[f"{block}/conv1"] = (1, 1, features, width)
            convs[f"{block}/conv2"] = (3, 3, width, width)
            convs[f"{block}/conv3"] = (1, 1, width, 4 * width)
            if features != 4 * width or strides > 1:
                convs[f"{block}/shortcut"] = (1, 1, features, 4 * width)
            features = 4 * width
        shapes: Shapes = {}
        for name, shape in convs.items():
            shapes[f"{name}/kernel"] = shape
            shapes[f"{name}/norm/scale"] = shapes[f"{name}/norm/bias"] = shape[-1:]
        shapes["head/kernel"] = (features, self.num_classes)
        shapes["head/bias"] = (self.num_classes,)
        return shapes

    def logits(self, params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        """(batch, classes) of `images` (batch, height, width, 3)."""
        conv = partial(_conv_norm, params)
        x = jax.nn.relu(conv("stem", images, 2))
        x = jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"
        )
        for block, _, strides in self._blocks():
            y = jax.nn.relu(conv(f"{block}/conv1", x))
            y = jax.nn.relu(conv(f"{block}/conv2", y, strides))
            y = conv(f"{block}/conv3", y)
            if f"{block}/shortcut/kernel" in params:
                x = conv(f"{block}/shortcut", x, strides)
            x = jax.nn.relu(x + y)
        return x.mean((1, 2)) @ params["head/kernel"] + params["head/bias"][None]

    def loss(self, params: dict[str, jax.Array], images: jax.Array, labels: jax.Array):
        """The cross-entropy of `images`."""
        return _cross_entropy(self.logits(params, images), labels)

    def _blocks(self):
        """The path, width and strides of each block."""
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                strides = 2 if stage and not i else 1
                yield f"stage{stage + 1}/block{i}", self.width * 2**stage, strides


@dataclasses.dataclass(frozen=True)
class Gpt2:
    """The shapes of GPT-2, the small one by default."""

    layers: int = 12
    width: int = 768
    vocabulary: int = 50257
    positions: int = 1024

    def shapes(self) -> Shapes:
        width = self.width
        shapes: Shapes = {
            "tokens/embedding": (self.vocabulary, width),
            "positions/embedding": (self.positions, width),
        }
        for i in range(self.layers):
            for name, n_in, n_out in (
                ("qkv", width, 3 * width),
                ("project", width, width),
                ("up", width, 4 * width),
                ("down", 4 * width, width),
            ):
                shapes[f"layer{i}/{name}/kernel"] = (n_in, n_out)
                shapes[f"layer{i}/{name}/bias"] = (n_out,)
        return shapes


@dataclasses.dataclass(frozen=True)
class Llama:
    """A decoder like Llama's (arXiv:2307.09288).

    Its layers are stacked for a scan, or (`stacked=False`) each has its own arrays.
    """

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32000
    stacked: bool = True

    def shapes(self) -> Shapes:
        width, hidden = self.width, self.hidden
        kv_width = width // self.heads * self.kv_heads
        layer: Shapes = {
            "norm1/scale": (width,),
            "query/kernel": (width, width),
            "key/kernel": (width, kv_width),
            "value/kernel": (width, kv_width),
            "out/kernel": (width, width),
            "norm2/scale": (width,),
            "gate/kernel": (width, hidden),
            "up/kernel": (width, hidden),
            "down/kernel": (hidden, width),
        }
        if self.stacked:
            layers = {f"layers/{k}": (self.layers, *x) for k, x in layer.items()}
        else:
            layers = {
                f"layer{i}/{k}": x for i in range(self.layers) for k, x in layer.items()
            }
        return {
            "embed/embedding": (self.vocabulary, width),
            **layers,
            "norm/scale": (width,),
            "unembed/kernel": (width, self.vocabulary),
        }

    def specs(self) -> dict[str, PartitionSpec]:
        """Fully sharded over "fsdp", and split over "tensor" as Megatron does."""
        into = PartitionSpec(None, "fsdp", "tensor")
        back = PartitionSpec(None, "tensor", "fsdp")
        specs = dict.fromkeys(self.shapes(), into)
        specs |= {"layers/out/kernel": back, "layers/down/kernel": back}
        specs["embed/embedding"] = PartitionSpec("tensor", "fsdp")
        specs["unembed/kernel"] = PartitionSpec("fsdp", "tensor")
        norms = [path for path in specs if path.endswith("scale")]
        return specs | dict.fromkeys(norms, PartitionSpec())

    def loss(
        self,
        params: dict[str, jax.Array],
        tokens: jax.Array,
        place: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> jax.Array:
        """The cross-entropy of each token of (batch, length) after the ones before.

        `place` is applied to what goes from layer to layer, (batch, length, width), and
        can say where that lies on a mesh.
        """

        def run_layer(x: jax.Array, layer: dict[str, jax.Array]):
            return place(self._layer(place(x), layer)), None

        x = params["embed/embedding"][tokens[:, :-1]]
        if self.stacked:
            x, _ = jax.lax.scan(jax.checkpoint(run_layer), x, _part(params, "layers/"))
        else:
            for i in range(self.layers):
                x, _ = run_layer(x, _part(params, f"layer{i}/"))
        x = _rms_norm(x, params["norm/scale"])
        return _cross_entropy(x @ params["unembed/kernel"], tokens[:, 1:])

    def _layer(self, x: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
        batch, length, width = x.shape
        y = _rms_norm(x, layer["norm1/scale"])
        query, key, value = (
            (y @ layer[f"{name}/kernel"]).reshape(batch, length, heads, -1)
            for name, heads in (
                ("query", self.heads),
                ("key", self.kv_heads),
                ("value", self.kv_heads),
            )
        )
        y = jax.nn.dot_product_attention(
            _rotate(query), _rotate(key), value, is_causal=True
        )
        x = x + y.reshape(batch, length, width) @ layer["out/kernel"]
        y = _rms_norm(x, layer["norm2/scale"])
        gated = jax.nn.silu(y @ layer["gate/kernel"]) * (y @ layer["up/kernel"])
        return x + gated @ layer["down/kernel"]


RESNET50 = ResNet()
GPT2_SMALL = Gpt2()
LLAMA_7B = Llama()
QWEN3_8B = Llama(36, 4096, 32, 8, 12288, 151936, stacked=False)
LLAMA_70B = Llama(layers=80, width=8192, heads=64, kv_heads=8, hidden=28672)


def _part(params: dict[str, jax.Array], start: str) -> dict[str, jax.Array]:
    return {k.removeprefix(start): x for k, x in params.items() if k.startswith(start)}


def _conv_norm(
    params: dict[str, jax.Array], name: str, x: jax.Array, strides: int = 1
) -> jax.Array:
    x = jax.lax.conv_general_dilated(
        x,
        params[f"{name}/kernel"],
        (strides, strides),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    axes = (0, 1, 2)
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    scale, bias = (params[f"{name}/norm/{part}"] for part in ("scale", "bias"))
    x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
    return x * jnp.expand_dims(scale, axes) + jnp.expand_dims(bias, axes)


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * jnp.expand_dims(scale, range(x.ndim - 1))


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary positions of (batch, length, heads, size)."""
    _, length, _, size = x.shape
    rates = 10000.0 ** (-jnp.arange(size // 2) / (size // 2))
    angles = jnp.arange(length)[None, :, None, None] * rates[None, None, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
    return turned.astype(x.dtype)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - at_label)
