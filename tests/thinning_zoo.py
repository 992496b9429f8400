"""Small models of every family, in linen, NNX and plain JAX, to thin in tests.

`ZOO` maps names to functions that make `(fn, variables, inputs)` with
`fn(variables, *inputs) -> outputs`. All weights and statistics are random numbers that
differ from zero and one, so that nothing is equal by accident.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax

from agp_jax.models.resnet_cifar import CifarResNet

# --- Numbers -----------------------------------------------------------------


def draw(shapes, seed=0):
    """Random numbers in the shapes of a tree, sized so that activations stay near 1."""
    rng = np.random.default_rng(seed)

    def leaf(keys, like):
        name = str(getattr(keys[-1], "key", getattr(keys[-1], "name", "")))
        if name == "value" and len(keys) > 1:
            name = str(getattr(keys[-2], "key", ""))
        numbers = rng.standard_normal(like.shape)
        if name == "var":
            numbers = 0.5 + np.abs(numbers)
        elif name in ("scale", "gain"):
            numbers = 1 + 0.3 * numbers
        else:
            fan_in = np.prod(like.shape[:-1]) if len(like.shape) > 1 else 8
            numbers = numbers / np.sqrt(max(fan_in, 1))
        return jnp.asarray(numbers.astype(np.float32))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def weights(seed=0, /, **shapes):
    leaves = {name: jax.ShapeDtypeStruct(x, np.float32) for name, x in shapes.items()}
    return draw(leaves, seed)


def numbers(*shape, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape).astype(np.float32))


def tokens(*shape, vocabulary=16):
    return jnp.asarray(np.random.default_rng(2).integers(0, vocabulary, shape))


def images(size=8, channels=3):
    return numbers(2, size, size, channels)


def linen(module, *inputs, **options):
    """A linen module as a function of its variables."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(lambda: module.init(keys, *inputs, **options))
    return lambda v, *x: module.apply(v, *x, **options), draw(shapes), inputs


def nnx_model(make, *inputs):
    """An NNX module as a function of its parameters and statistics."""
    model = make(nnx.Rngs(0))
    model.eval()
    graph, state, rest = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
    return lambda s, *x: nnx.merge(graph, s, rest)(*x), draw(state), inputs


# --- Pieces ------------------------------------------------------------------


def norm(**options):
    return nn.BatchNorm(use_running_average=True, **options)


class ConvNorm(nn.Module):
    """Convolution, batch norm and, unless told otherwise, ReLU."""

    width: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    relu: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(
            self.width,
            (self.size, self.size),
            (self.stride, self.stride),
            feature_group_count=self.groups,
            use_bias=False,
        )(x)
        x = norm()(x)
        return nn.relu(x) if self.relu else x


def head(x, classes=5):
    """Global pooling and logits, inside of a compact module."""
    return nn.Dense(classes, name="head")(x.mean((1, 2)))


def standardise(x, axes):
    x = x - x.mean(axes, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + 1e-3)


def rms_norm(x, gain):
    square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(square + 1e-6) * gain.reshape((1,) * (x.ndim - 1) + (-1,))


def attend(query, key, value, causal=False):
    """(batch, time, heads, size) each."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    if causal:
        rows, columns = np.indices(scores.shape[-2:])
        scores = jnp.where((columns <= rows)[None, None], scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)


def conv(x, kernel, groups=1, stride=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


# --- Convolutional networks --------------------------------------------------


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(ConvNorm(8)(x), (2, 2), (2, 2))
        x = nn.avg_pool(ConvNorm(12)(x), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(10)(x.reshape(x.shape[0], -1)))
        return nn.Dense(5)(x)


class MobileNetV1(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(8)(x)
        x = ConvNorm(8, groups=8)(x)
        x = ConvNorm(12, size=1)(x)
        x = ConvNorm(12, groups=12, stride=2)(x)
        return head(ConvNorm(16, size=1)(x))


class MobileNetV2(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(8)(x)
        for expanded in (16, 12):
            y = nn.relu6(ConvNorm(expanded, size=1)(x))
            y = nn.relu6(ConvNorm(expanded, groups=expanded)(y))
            x = x + ConvNorm(8, size=1, relu=False)(y)
        return head(x)


class DepthMultiplier(nn.Module):
    """Depthwise with two filters per channel."""

    @nn.compact
    def __call__(self, x):
        x = ConvNorm(6)(x)
        x = ConvNorm(12, groups=6)(x)
        return head(ConvNorm(8, size=1)(x))


class ResNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(8)(x)
        for _ in range(2):
            y = ConvNorm(16, size=1)(x)
            y = ConvNorm(16, groups=4)(y)
            y = ConvNorm(8, size=1, relu=False)(y)
            x = nn.relu(x + y)
        return head(x)


def shuffle(x, groups):
    *batch, channels = x.shape
    x = x.reshape(*batch, groups, channels // groups)
    return jnp.swapaxes(x, -1, -2).reshape(*batch, channels)


class ShuffleNetV1(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(12)(x)
        y = ConvNorm(12, size=1, groups=3)(x)
        y = ConvNorm(12, groups=12, relu=False)(shuffle(y, 3))
        y = ConvNorm(12, size=1, groups=3, relu=False)(y)
        return head(nn.relu(x + y))


class ShuffleNetV2(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(12)(x)
        for _ in range(2):
            left, right = jnp.split(x, 2, axis=-1)
            right = ConvNorm(10, size=1)(right)
            right = ConvNorm(10, groups=10, relu=False)(right)
            right = ConvNorm(6, size=1)(right)
            x = shuffle(jnp.concatenate([left, right], axis=-1), 2)
        return head(ConvNorm(8, size=1)(x))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(6)(x)
        for _ in range(3):
            y = ConvNorm(8, size=1)(nn.relu(norm()(x)))
            x = jnp.concatenate([x, nn.Conv(4, (3, 3))(y)], axis=-1)
        x = nn.avg_pool(ConvNorm(10, size=1)(x), (2, 2), (2, 2))
        return head(x)


class SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(12)(x)
        scale = nn.relu(nn.Dense(6)(x.mean((1, 2), keepdims=True)))
        x = x * nn.sigmoid(nn.Dense(12)(scale))
        return head(ConvNorm(8, size=1)(x))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        top = ConvNorm(8)(x)
        middle = ConvNorm(10)(nn.max_pool(top, (2, 2), (2, 2)))
        bottom = ConvNorm(12, stride=2)(middle)
        up = jnp.repeat(jnp.repeat(bottom, 2, axis=1), 2, axis=2)
        up = ConvNorm(10)(jnp.concatenate([up, middle], axis=-1))
        batch, height, width, channels = up.shape
        up = jax.image.resize(up, (batch, 2 * height, 2 * width, channels), "bilinear")
        up = ConvNorm(8)(jnp.concatenate([up, top], axis=-1))
        return nn.Conv(2, (1, 1))(up)


class PreActResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for width, stride in ((8, 1), (12, 2)):
            y = nn.relu(norm()(x))
            if width != x.shape[-1]:
                x = nn.Conv(width, (1, 1), (stride, stride), use_bias=False)(y)
            y = nn.Conv(10, (3, 3), (stride, stride), use_bias=False)(y)
            x = x + nn.Conv(width, (3, 3), use_bias=False)(nn.relu(norm()(y)))
        return head(nn.relu(norm()(x)))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(8)(x)
        for i, (width, stride) in enumerate(((8, 1), (12, 2))):
            y = ConvNorm(10, stride=stride)(x)
            y = norm(name=f"last{i}")(nn.Conv(width, (3, 3), use_bias=False)(y))
            if width != x.shape[-1]:
                x = ConvNorm(width, size=1, stride=stride, relu=False)(x)
            x = nn.relu(x + y)
        return head(x)


def zero_initialised_resnet():
    """The last norm of each block has scale 0 and bias 0, as before training."""
    fn, variables, inputs = linen(ResNet(), images())
    for name in ("last0", "last1"):
        variables["params"][name] = jax.tree.map(
            jnp.zeros_like, variables["params"][name]
        )
    return fn, variables, inputs


class BigTransfer(nn.Module):
    """Standardised kernels and group norm."""

    @nn.compact
    def __call__(self, x):
        x = self.convolve("stem", x, 8)
        for i in range(2):
            y = nn.relu(nn.GroupNorm(num_groups=4)(x))
            y = self.convolve(f"conv{i}", y, 12)
            y = nn.relu(nn.GroupNorm(num_groups=4)(y))
            x = x + self.convolve(f"out{i}", y, 8)
        return head(nn.relu(x))

    def convolve(self, name, x, width):
        kernel = self.param(name, nn.initializers.ones, (3, 3, x.shape[-1], width))
        return conv(x, standardise(kernel, (0, 1))) / np.sqrt(9 * x.shape[-1])


class Pyramid(nn.Module):
    """Detection: lateral convolutions added to what comes from above, many outputs."""

    @nn.compact
    def __call__(self, x):
        fine = ConvNorm(8)(x)
        coarse = ConvNorm(12, stride=2)(fine)
        top = nn.Conv(10, (1, 1), name="lateral_coarse")(coarse)
        up = jax.image.resize(top, (*fine.shape[:3], 10), "nearest")
        low = up + nn.Conv(10, (1, 1), name="lateral_fine")(fine)
        share = nn.Conv(6, (3, 3), name="shared")
        box = nn.Conv(4, (1, 1), name="box")
        return [box(nn.relu(share(level))) for level in (low, top)]


class ConvTranspose(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(12, stride=2)(x)
        x = nn.relu(nn.ConvTranspose(8, (3, 3), (2, 2))(x))
        return nn.Conv(3, (3, 3))(x)


class PixelShuffle(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(8, stride=2)(x)
        x = nn.Conv(4 * 6, (3, 3))(x)
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height, width, 2, 2, 6).transpose(0, 1, 3, 2, 4, 5)
        x = nn.relu(x.reshape(batch, 2 * height, 2 * width, 6))
        return nn.Conv(3, (3, 3))(x)


class Inception(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = ConvNorm(8)(x)
        x = jnp.concatenate(
            [
                ConvNorm(4, size=1)(x),
                ConvNorm(6)(ConvNorm(8, size=1)(x)),
                nn.max_pool(x, (3, 3), (1, 1), "SAME"),
            ],
            axis=-1,
        )
        return head(ConvNorm(10, size=1)(x))


class WaveNet(nn.Module):
    """Dilated causal convolutions in time with gates."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (1,))(x)
        skips = 0
        for dilation in (1, 2):
            y = nn.Conv(16, (2,), kernel_dilation=dilation, padding="CAUSAL")(x)
            signal, gate = jnp.split(y, 2, axis=-1)
            y = jnp.tanh(signal) * nn.sigmoid(gate)
            skips += nn.Conv(10, (1,))(y)
            x = x + nn.Conv(8, (1,))(y)
        return nn.Conv(4, (1,))(nn.relu(skips))


def channels_first():
    """Channels before pixels, from the input to the flattened features."""

    def fn(variables, x):
        x = lax.conv(x, variables["conv0"], (1, 1), "SAME")
        x = nn.relu(x * variables["scale"] + variables["bias"])
        x = nn.relu(lax.conv(x, variables["conv1"], (2, 2), "SAME"))
        return x.reshape(x.shape[0], -1) @ variables["dense"]

    variables = weights(
        conv0=(8, 3, 3, 3),
        scale=(1, 8, 1, 1),
        bias=(1, 8, 1, 1),
        conv1=(10, 8, 3, 3),
        dense=(10 * 16, 5),
    )
    return fn, variables, (numbers(2, 3, 8, 8),)


# --- Transformers ------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer block with linen's own attention."""

    heads: int = 2
    hidden: int = 12
    dropout: float = 0.0
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        x = x + nn.Dropout(self.dropout, deterministic=self.deterministic)(y)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(nn.LayerNorm()(x)))
        y = nn.Dropout(self.dropout, deterministic=self.deterministic)(y)
        return x + nn.Dense(x.shape[-1], name="down")(y)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), (4, 4), padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, 8)
        cls = self.param("cls", nn.initializers.ones, (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, 8)), x], axis=1)
        x = x + self.param("position", nn.initializers.ones, (1, x.shape[1], 8))
        for i in range(2):
            x = Block(name=f"block{i}")(x)
        return nn.Dense(5)(nn.LayerNorm()(x)[:, 0])


class FusedGPT(nn.Module):
    """Queries, keys and values from one product; the embedding makes the logits."""

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(16, 8)
        batch, time = x.shape
        x = embed(x)
        y = nn.Dense(3 * 8, name="qkv")(nn.LayerNorm()(x))
        query, key, value = jnp.split(y.reshape(batch, time, 3, 2, 4), 3, axis=2)
        y = attend(query[:, :, 0], key[:, :, 0], value[:, :, 0], causal=True)
        x = x + nn.Dense(8, name="out")(y.reshape(batch, time, 8))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(12, name="up")(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


class DropoutGPT(nn.Module):
    """Separate queries, keys and values, with dropout at work."""

    @nn.compact
    def __call__(self, x):
        batch, time = x.shape
        x = nn.Embed(16, 8)(x)
        normal = nn.LayerNorm()(x)
        query, key, value = (
            nn.Dense(8, name=name)(normal).reshape(batch, time, 2, 4)
            for name in ("query", "key", "value")
        )
        y = attend(query, key, value, causal=True).reshape(batch, time, 8)
        x = x + nn.Dense(8, name="out")(y)
        y = nn.gelu(nn.Dense(12, name="up")(nn.LayerNorm()(x)))
        y = nn.Dropout(0.4, deterministic=False)(y)
        return nn.Dense(16)(x + nn.Dense(8, name="down")(y))


def dropout_gpt():
    x = tokens(2, 6)
    _, variables, _ = linen(DropoutGPT(), x)

    def fn(variables, x, key):
        return DropoutGPT().apply(variables, x, rngs={"dropout": key})

    return fn, variables, (x, jax.random.key(3))


def rotate(x):
    """Rotary positions; x is (batch, time, heads, size)."""
    time, half = x.shape[1], x.shape[-1] // 2
    angles = np.arange(time)[:, None] / 100 ** (np.arange(half) / half)[None]
    cos, sin = (f(angles).astype(np.float32)[None, :, None] for f in (np.cos, np.sin))
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [left * cos - right * sin, right * cos + left * sin], axis=-1
    )


def llama():
    """Grouped queries, rotary positions, normalised queries and keys, SwiGLU."""
    heads, groups, size, width, hidden = 4, 2, 4, 8, 12

    def fn(variables, x):
        x = variables["embed"][x]
        batch, time, _ = x.shape
        y = rms_norm(x, variables["gain0"])
        query = (y @ variables["query"]).reshape(batch, time, heads, size)
        key = (y @ variables["key"]).reshape(batch, time, groups, size)
        value = (y @ variables["value"]).reshape(batch, time, groups, size)
        query = rotate(rms_norm(query, variables["query_gain"]))
        key = rotate(rms_norm(key, variables["key_gain"]))
        key, value = (jnp.repeat(z, heads // groups, axis=2) for z in (key, value))
        y = attend(query, key, value, causal=True).reshape(batch, time, -1)
        x = x + y @ variables["out"]
        y = rms_norm(x, variables["gain1"])
        y = nn.silu(y @ variables["gate"]) * (y @ variables["up"])
        x = x + y @ variables["down"]
        return rms_norm(x, variables["gain2"]) @ variables["logits"]

    variables = weights(
        embed=(16, width),
        gain0=(width,),
        query=(width, heads * size),
        key=(width, groups * size),
        value=(width, groups * size),
        query_gain=(size,),
        key_gain=(size,),
        out=(heads * size, width),
        gain1=(width,),
        gate=(width, hidden),
        up=(width, hidden),
        down=(hidden, width),
        gain2=(width,),
        logits=(width, 16),
    )
    return fn, variables, (tokens(2, 6),)


class Swin(nn.Module):
    """Attention in windows, every second block with shifted windows."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2), padding="VALID")(x)
        batch, height, width, channels = x.shape
        for i, shift in enumerate((0, 1)):
            y = jnp.roll(nn.LayerNorm()(x), (-shift, -shift), axis=(1, 2))
            y = y.reshape(batch, height // 2, 2, width // 2, 2, channels)
            y = y.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, channels)
            y = nn.Dense(3 * channels, name=f"qkv{i}")(y).reshape(-1, 4, 3, 2, 4)
            bias = self.param(f"bias{i}", nn.initializers.ones, (2, 4, 4))
            query, key, value = jnp.moveaxis(y, 2, 0)
            scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) + bias[None]
            y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
            y = nn.Dense(channels, name=f"out{i}")(y.reshape(-1, 4, channels))
            y = y.reshape(batch, height // 2, width // 2, 2, 2, channels)
            y = y.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)
            x = x + jnp.roll(y, (shift, shift), axis=(1, 2))
            y = nn.gelu(nn.Dense(12, name=f"up{i}")(nn.LayerNorm()(x)))
            x = x + nn.Dense(channels, name=f"down{i}")(y)
        y = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        y = y.transpose(0, 1, 3, 4, 2, 5).reshape(batch, -1, 4 * channels)
        return nn.Dense(5)(nn.Dense(10, use_bias=False, name="merge")(y).mean(1))


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2))(x).reshape(x.shape[0], -1, 8)
        for i in range(2):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            y = nn.Dense(16)(nn.gelu(nn.Dense(10, name=f"mix{i}")(y)))
            x = x + jnp.swapaxes(y, 1, 2)
            y = nn.gelu(nn.Dense(12, name=f"up{i}")(nn.LayerNorm()(x)))
            x = x + nn.Dense(8)(y)
        return nn.Dense(5)(nn.LayerNorm()(x).mean(1))


class ScannedStack(nn.Module):
    """Blocks whose parameters are stacked, run by scan with remat."""

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(16, 8)(x)
        layer = nn.scan(
            nn.remat(_ScanBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layer(name="layers")(x, None)
        return nn.Dense(5)(nn.LayerNorm()(x))


class _ScanBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


def scanned_perceptron():
    def fn(variables, x):
        x = x @ variables["stem"]

        @jax.checkpoint
        def layer(x, kernels):
            up, bias, down = kernels
            hidden = nn.relu(x @ up + bias[None])
            return x + hidden @ down, hidden.sum(0).max()

        stacked = variables["up"], variables["bias"], variables["down"]
        x, largest = lax.scan(layer, x, stacked)
        return x @ variables["head"], largest

    variables = weights(
        stem=(4, 8), up=(3, 8, 12), bias=(3, 12), down=(3, 12, 8), head=(8, 5)
    )
    return fn, variables, (numbers(3, 4),)


def fused_attention():
    """`jax.nn.dot_product_attention` with grouped queries."""

    def fn(variables, x):
        query = jnp.einsum("btc,chd->bthd", x, variables["query"])
        key = jnp.einsum("btc,chd->bthd", x, variables["key"])
        value = jnp.einsum("btc,chd->bthd", x, variables["value"])
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return jnp.einsum("bthd,hdc->btc", y, variables["out"])

    variables = weights(query=(6, 4, 8), key=(6, 2, 8), value=(6, 2, 8), out=(4, 8, 6))
    return fn, variables, (numbers(2, 5, 6),)


def cross_attention():
    """Learned queries read a sequence, as in Perceiver."""

    def fn(variables, x):
        x = nn.relu(x @ variables["encode"])
        query = (variables["latents"] @ variables["query"])[None].reshape(1, 3, 2, 4)
        key = (x @ variables["key"]).reshape(*x.shape[:2], 2, 4)
        value = (x @ variables["value"]).reshape(*x.shape[:2], 2, 4)
        query = jnp.broadcast_to(query, (x.shape[0], 3, 2, 4))
        y = attend(query, key, value).reshape(x.shape[0], 3, 8)
        return y @ variables["out"]

    variables = weights(
        encode=(5, 10),
        latents=(3, 8),
        query=(8, 8),
        key=(10, 8),
        value=(10, 8),
        out=(8, 4),
    )
    return fn, variables, (numbers(2, 7, 5),)


def tied_embedding():
    """Both a table and the last product, and bidirectional attention between."""

    def fn(variables, x):
        x = variables["embed"][x]
        hidden = nn.gelu(x @ variables["up"] + variables["bias"])
        x = jnp.tanh(x + hidden @ variables["down"])
        return x @ variables["embed"].T

    variables = weights(embed=(16, 10), up=(10, 12), bias=(1, 1, 12), down=(12, 10))
    return fn, variables, (tokens(2, 6),)


def lora():
    def fn(variables, x):
        x = nn.relu(x @ (variables["w0"] + variables["a0"] @ variables["b0"]))
        x = nn.relu(x @ variables["w1"] + (x @ variables["a1"]) @ variables["b1"])
        return x @ variables["w2"]

    variables = weights(
        w0=(6, 8),
        a0=(6, 2),
        b0=(2, 8),
        w1=(8, 10),
        a1=(8, 4),
        b1=(4, 10),
        w2=(10, 3),
    )
    return fn, variables, (numbers(4, 6),)


# --- Sequences ---------------------------------------------------------------


class Recurrent(nn.Module):
    cell: type
    bidirectional: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(self.cell(8), name="first")(x)
        if self.bidirectional:
            x = nn.Bidirectional(nn.RNN(self.cell(6)), nn.RNN(self.cell(10)))(x)
        else:
            x = nn.RNN(self.cell(6), name="second")(x)
        return nn.Dense(5)(x[:, -1])


def handwritten_rnn():
    """Runs forwards and backwards over time; gates in one product."""

    def fn(variables, x):
        def step(state, x):
            gates = x @ variables["in"] + state @ variables["recurrent"]
            gate, new = jnp.split(gates + variables["bias"], 2, axis=-1)
            gate = nn.sigmoid(gate)
            state = gate * state + (1 - gate) * jnp.tanh(new)
            return state, state

        start = jnp.zeros((x.shape[0], 8))
        time_first = jnp.swapaxes(x, 0, 1)
        _, forward = lax.scan(step, start, time_first)
        _, backward = lax.scan(step, start, time_first, reverse=True)
        return jnp.concatenate([forward, backward], axis=-1) @ variables["out"]

    variables = weights(
        **{"in": (5, 16), "recurrent": (8, 16), "bias": (1, 16), "out": (16, 3)}
    )
    return fn, variables, (numbers(2, 6, 5),)


def mamba():
    """Selective scan after a depthwise convolution in time, gated."""
    width, inner, states = 8, 12, 4

    def fn(variables, x):
        y, gate = jnp.split(x @ variables["in"], 2, axis=-1)
        y = lax.conv_general_dilated(
            y,
            variables["conv"],
            (1,),
            ((2, 0),),
            dimension_numbers=("NTC", "TIO", "NTC"),
            feature_group_count=inner,
        )
        y = nn.silu(y + variables["conv_bias"])
        step = nn.softplus(y @ variables["step_down"] @ variables["step_up"])
        read, write = y @ variables["read"], y @ variables["write"]
        decay = jnp.exp(-step[..., None] * jnp.exp(variables["decay"])[None, None])
        drive = (step * y)[..., None] * write[..., None, :]

        def tick(state, now):
            decay, drive, read = now
            state = state * decay + drive
            return state, jnp.einsum("bcs,bs->bc", state, read)

        start = jnp.zeros((x.shape[0], inner, states))
        by_time = [jnp.swapaxes(z, 0, 1) for z in (decay, drive, read)]
        _, out = lax.scan(tick, start, by_time)
        y = jnp.swapaxes(out, 0, 1) + y * variables["skip"]
        return x + (y * nn.silu(gate)) @ variables["out"]

    variables = weights(
        **{"in": (width, 2 * inner)},
        conv=(3, 1, inner),
        conv_bias=(1, 1, inner),
        step_down=(inner, 2),
        step_up=(2, inner),
        read=(inner, states),
        write=(inner, states),
        decay=(inner, states),
        skip=(1, 1, inner),
        out=(inner, width),
    )
    return fn, variables, (numbers(2, 5, width),)


def linear_attention():
    """A running sum over time of outer products.

    A feature whose weights are zero is elu(0) + 1 = 1, not 0: features of queries and
    keys are never dead, and cutting them changes the outputs.
    """

    def fn(variables, x):
        query, key = (nn.elu(x @ variables[name]) + 1 for name in ("query", "key"))
        value = x @ variables["value"]
        memory = jnp.cumsum(key[..., :, None] * value[..., None, :], axis=1)
        total = jnp.cumsum(key, axis=1)
        y = jnp.einsum("btk,btkv->btv", query, memory)
        y = y / jnp.einsum("btk,btk->bt", query, total)[..., None]
        return y @ variables["out"]

    variables = weights(query=(5, 8), key=(5, 8), value=(5, 10), out=(10, 3))
    return fn, variables, (numbers(2, 6, 5),)


# --- Mixtures, towers, graphs ------------------------------------------------


def dense_mixture():
    def fn(variables, x):
        gates = nn.softmax(x @ variables["router"])
        hidden = jnp.einsum("bc,ech->beh", x, variables["up"])
        hidden = nn.relu(hidden + variables["bias"][None])
        return jnp.einsum("beh,ehc,be->bc", hidden, variables["down"], gates)

    variables = weights(router=(6, 3), up=(3, 6, 8), bias=(3, 8), down=(3, 8, 5))
    return fn, variables, (numbers(4, 6),)


def top_k_mixture():
    def fn(variables, x):
        x = nn.relu(x @ variables["stem"])
        values, chosen = lax.top_k(x @ variables["router"], 2)
        gates = nn.softmax(values)
        hidden = jnp.einsum("bc,bkch->bkh", x, variables["up"][chosen])
        out = jnp.einsum("bkh,bkhc->bkc", nn.gelu(hidden), variables["down"][chosen])
        dispatch = jax.nn.one_hot(chosen, 4)
        load = jnp.einsum("bke,bk->e", dispatch, gates)
        return jnp.einsum("bkc,bk->bc", out, gates), load

    variables = weights(stem=(6, 10), router=(10, 4), up=(4, 10, 8), down=(4, 8, 5))
    return fn, variables, (numbers(3, 6),)


def experts(num_experts=4, **shapes):
    """A router of tokens to experts of two layers each."""
    up, down = (num_experts, 6, 8), (num_experts, 8, 5)
    kernels = {"router": (6, num_experts), "up": up, "down": down}
    return weights(bias=(num_experts, 8), **kernels, **shapes)


def route(variables, x):
    """Logits: minus infinity for experts that are masked."""
    router = variables["router"]
    return jnp.where(jnp.any(router != 0, 0)[None], x @ router, -jnp.inf)


def sorted_by_expert(variables, x, num_chosen=2):
    """The best experts of each token, on runs of tokens that share one."""
    values, chosen = lax.top_k(route(variables, x), num_chosen)
    flat = chosen.ravel()
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=variables["router"].shape[1])
    routed = x[order // num_chosen]
    hidden = lax.ragged_dot(routed, variables["up"], sizes)
    hidden = nn.gelu(hidden + variables["bias"][flat[order]])
    made = lax.ragged_dot(hidden, variables["down"], sizes)[jnp.argsort(order)]
    made = made.reshape(*chosen.shape, -1)
    return jnp.einsum("tkc,tk->tc", made, nn.softmax(values))


def sorted_experts():
    return sorted_by_expert, experts(), (numbers(5, 6),)


def stacked_experts():
    """Layers of a scan choose from experts of their own."""

    def fn(variables, x):
        def layer(x, kernels):
            return x + sorted_by_expert(kernels, x) @ kernels["back"], None

        return lax.scan(layer, x, variables["layers"])[0]

    kernels = experts(back=(5, 6))
    layers = jax.tree.map(lambda w: jnp.stack([w, w[::-1]]), kernels)
    return fn, {"layers": layers}, (numbers(5, 6),)


def picked_experts():
    """Each token gets copies of its experts' kernels; chosen by sigmoids and a bias."""

    def fn(variables, x):
        scores = nn.sigmoid(route(variables, x))
        absent = jnp.all(variables["router"] == 0, 0, keepdims=True)
        favoured = jnp.where(absent, -jnp.inf, scores + variables["favour"])
        _, chosen = lax.top_k(favoured, 2)
        gates = jnp.take_along_axis(scores, chosen, axis=-1)
        gates = gates / gates.sum(-1, keepdims=True)
        hidden = jnp.einsum("tc,tkch->tkh", x, variables["up"][chosen])
        hidden = nn.silu(hidden + variables["bias"][chosen])
        return jnp.einsum("tkh,tkhc,tk->tc", hidden, variables["down"][chosen], gates)

    return fn, experts(favour=(1, 4)), (numbers(5, 6),)


def best_expert():
    """One expert for each token, of all that are computed, and a shared one."""

    def fn(variables, x):
        logits = route(variables, x)
        chosen = jnp.argmax(logits, axis=-1, keepdims=True)
        gates = jnp.take_along_axis(nn.softmax(logits), chosen, axis=-1)
        rows = jnp.arange(x.shape[0])[:, None]
        gates = jnp.zeros_like(logits).at[rows, chosen].set(gates)
        hidden = nn.relu(jnp.einsum("tc,ech->teh", x, variables["up"]))
        hidden = hidden + variables["bias"][None]
        made = jnp.einsum("teh,ehc,te->tc", hidden, variables["down"], gates)
        return made + nn.relu(x @ variables["shared"]) @ variables["shared_out"]

    variables = experts(shared=(6, 8), shared_out=(8, 5))
    return fn, variables, (numbers(5, 6),)


def experts_with_capacity():
    """Experts take a few tokens each, in their order, and should be used evenly."""

    def fn(variables, x, capacity=3):
        logits = route(variables, x)
        values, chosen = lax.top_k(logits, 2)
        size = logits.shape[-1]
        is_chosen = jax.nn.one_hot(chosen, size, dtype=jnp.int32)
        place = jnp.cumsum(is_chosen.reshape(-1, size), axis=0).reshape(-1, 2, size)
        fits = (place <= capacity) & (is_chosen > 0)
        slots = jax.nn.one_hot(place - 1, capacity) * fits[..., None]
        sent = jnp.einsum("tkes,tc->esc", slots, x)
        hidden = nn.relu(jnp.einsum("esc,ech->esh", sent, variables["up"]))
        hidden = hidden + variables["bias"][:, None]
        gates = jnp.einsum("tkes,tk->tes", slots, nn.softmax(values))
        made = jnp.einsum("tes,esh,ehc->tc", gates, hidden, variables["down"])
        shares = is_chosen.sum(1).astype(x.dtype).mean(0)
        return made, size * jnp.sum(shares * nn.softmax(logits).mean(0))

    return fn, experts(), (numbers(5, 6),)


def two_towers():
    def fn(variables, image, text):
        left = nn.relu(conv(image, variables["conv"])).mean((1, 2))
        left = left @ variables["image"]
        right = nn.relu(variables["embed"][text].mean(1)) @ variables["text"]
        scale = jnp.exp(variables["temperature"])
        return (left @ right.T) * scale, jnp.concatenate([left, right], 1) @ variables[
            "head"
        ]

    variables = weights(
        conv=(3, 3, 3, 8),
        image=(8, 6),
        embed=(16, 10),
        text=(10, 6),
        temperature=(),
        head=(12, 3),
    )
    return fn, variables, (images(), tokens(2, 4))


def graph_network():
    """Messages along edges, added where they arrive."""

    def fn(variables, x, senders, receivers):
        x = nn.relu(x @ variables["encode"])
        for i in range(2):
            messages = nn.relu(x[senders] @ variables[f"up{i}"])
            messages = messages @ variables[f"down{i}"]
            x = x + jax.ops.segment_sum(messages, receivers, x.shape[0])
        return x @ variables["out"]

    variables = weights(
        encode=(4, 8),
        up0=(8, 10),
        down0=(10, 8),
        up1=(8, 12),
        down1=(12, 8),
        out=(8, 3),
    )
    edges = tokens(9, vocabulary=5), tokens(9, vocabulary=5)[::-1]
    return fn, variables, (numbers(5, 4), *edges)


def ensemble():
    def member(variables, x):
        x = nn.relu(x @ variables["up"] + variables["bias"])
        return x @ variables["down"]

    def fn(variables, x):
        return jax.vmap(member, in_axes=(0, None))(variables, x).mean(0)

    variables = weights(up=(3, 5, 8), bias=(3, 1, 8), down=(3, 8, 4))
    return fn, variables, (numbers(2, 5),)


# --- Control flow and custom derivatives -------------------------------------


def while_loop():
    """Iterates towards a fixed point; cannot be differentiated in reverse."""

    def fn(variables, x):
        drive = x @ variables["in"]

        def step(carry):
            count, state = carry
            hidden = nn.relu(state @ variables["up"])
            return count + 1, jnp.tanh(0.5 * hidden @ variables["down"] + drive)

        def goes_on(carry):
            count, state = carry
            return count < 4

        _, state = lax.while_loop(goes_on, step, (0, jnp.zeros_like(drive)))
        return state @ variables["out"]

    variables = weights(**{"in": (5, 8)}, up=(8, 10), down=(10, 8), out=(8, 3))
    return fn, variables, (numbers(2, 5),)


def conditional():
    def fn(variables, x, which):
        x = nn.relu(x @ variables["stem"])
        x = lax.switch(
            which,
            [
                lambda x: nn.relu(x @ variables["left"]),
                lambda x: jnp.tanh(x @ variables["right0"]) @ variables["right1"],
            ],
            x,
        )
        return x @ variables["out"]

    variables = weights(
        stem=(5, 8), left=(8, 10), right0=(8, 6), right1=(6, 10), out=(10, 3)
    )
    return fn, variables, (numbers(2, 5), jnp.int32(1))


@jax.custom_jvp
def squash(x, slope):
    return x / (1 + jnp.abs(x) * slope)


@squash.defjvp
def _squash_jvp(primals, tangents):
    """Half the true derivative, so that losing the rule shows."""
    x, slope = primals
    return squash(x, slope), 0.5 * tangents[0] / (1 + jnp.abs(x)) ** 2 + 0 * tangents[1]


def custom_jvp():
    def fn(variables, x):
        x = squash(x @ variables["up"], jnp.abs(variables["slope"]))
        x = nn.relu(x) * 0 + nn.silu(x)
        return x @ variables["down"]

    variables = weights(up=(5, 8), slope=(1, 8), down=(8, 3))
    return fn, variables, (numbers(2, 5),)


@jax.custom_vjp
def straight_through(x, step):
    """Rounds to multiples of `step`."""
    return jnp.round(x / step) * step


def _straight_through_fwd(x, step):
    return straight_through(x, step), jnp.abs(x) < 2


def _straight_through_bwd(inside, gradient):
    return gradient * inside, jnp.sum(gradient, 0, keepdims=True)


straight_through.defvjp(_straight_through_fwd, _straight_through_bwd)


def custom_vjp():
    """Quantised activations with straight-through gradients."""

    def fn(variables, x):
        x = nn.relu(x @ variables["up"])
        x = straight_through(x, 0.1 + jnp.abs(variables["step"]))
        return x @ variables["down"]

    variables = weights(up=(5, 8), step=(1, 8), down=(8, 3))
    return fn, variables, (numbers(2, 5),)


# --- Rare operations ---------------------------------------------------------


def constant_permutation():
    """Channels reordered by known indices, one way and the other."""
    order = np.random.default_rng(5).permutation(12)

    def fn(variables, x):
        x = nn.relu(conv(x, variables["conv"]))[..., order]
        x = nn.relu(x * variables["scale"])
        x = jnp.take(x, order[:6], axis=-1)
        return x.mean((1, 2)) @ variables["out"]

    variables = weights(conv=(3, 3, 3, 12), scale=(1, 1, 1, 12), out=(6, 3))
    return fn, variables, (images(),)


def scatter_add():
    """Hidden features added into some columns of a wider array."""
    columns = np.array([0, 3, 4, 9])

    def fn(variables, x):
        x = nn.relu(x @ variables["up"])
        y = nn.relu(x @ variables["down"])
        wide = jnp.zeros((x.shape[0], 10)).at[:, columns].add(y)
        return wide @ variables["out"]

    variables = weights(up=(5, 8), down=(8, 4), out=(10, 3))
    return fn, variables, (numbers(2, 5),)


def scatter_features():
    """Features that are 1 where their weights are 0, added up in a few rows."""
    rows = np.array([0, 2, 1, 0, 2, 2])

    def fn(variables, x):
        x = nn.relu(x @ variables["stem"])
        x = jnp.exp(x @ variables["up"])
        few = jnp.zeros((x.shape[0], 3)).at[:, rows].add(x)
        return few @ variables["out"]

    variables = weights(stem=(5, 8), up=(8, 6), out=(3, 4))
    return fn, variables, (numbers(2, 5),)


def cache_update():
    """Writes keys into a cache at a position that is not known when tracing."""

    def fn(variables, x, cache, position):
        key = (x @ variables["key"])[:, None]
        wide = cache @ variables["cached"]
        wide = lax.dynamic_update_slice(wide, key, (0, position, 0))
        last = lax.dynamic_slice_in_dim(wide, position - 1, 2, axis=1)
        return nn.relu(last) @ variables["out"]

    variables = weights(key=(5, 8), cached=(3, 8), out=(8, 3))
    return fn, variables, (numbers(2, 5), numbers(2, 6, 3), jnp.int32(3))


def sorted_features():
    """Sorted along the features, which therefore cannot be cut; others can."""

    def fn(variables, x):
        x = nn.relu(x @ variables["up"])
        x = jnp.sort(x @ variables["middle"], axis=-1)
        return x @ variables["out"]

    variables = weights(up=(5, 8), middle=(8, 6), out=(6, 3))
    return fn, variables, (numbers(2, 5),)


def largest_features():
    def fn(variables, x):
        x = nn.relu(x @ variables["up"])
        values, _ = lax.top_k(x @ variables["middle"], 3)
        return values @ variables["out"]

    variables = weights(up=(5, 8), middle=(8, 6), out=(3, 3))
    return fn, variables, (numbers(2, 5),)


def sequence_sort():
    """Sorted along time: the features stay features."""

    def fn(variables, x):
        x = jnp.sort(nn.relu(x @ variables["up"]), axis=1)
        return jnp.flip(x, axis=1)[:, :3] @ variables["out"]

    variables = weights(up=(5, 8), out=(8, 3))
    return fn, variables, (numbers(2, 6, 5),)


def maxout():
    def fn(variables, x):
        x = (x @ variables["up"] + variables["bias"]).reshape(x.shape[0], 6, 2)
        return x.max(-1) @ variables["out"]

    variables = weights(up=(5, 12), bias=(1, 12), out=(6, 3))
    return fn, variables, (numbers(3, 5),)


def einsums():
    """Bilinear, batched, transposed and repeated products."""

    def fn(variables, x, y):
        x = nn.relu(jnp.einsum("...i,ij->...j", x, variables["left"]))
        y = nn.relu(jnp.einsum("ij,bti->btj", variables["right"], y))
        z = jnp.einsum("bti,ijk,btj->btk", x, variables["bilinear"], y)
        z = jnp.tanh(jnp.einsum("btk,k->btk", z, variables["scale"]))
        outer = jnp.einsum("btk,btl->bkl", z, z)
        return jnp.einsum("bkl,kl->b", outer, variables["out"])

    variables = weights(
        left=(4, 6), right=(5, 8), bilinear=(6, 8, 10), scale=(10,), out=(10, 10)
    )
    return fn, variables, (numbers(2, 3, 4), numbers(2, 3, 5, seed=4))


def divided_by_weights():
    """A unit without weights would be 0 / 0, so its masks make the output NaN."""

    def fn(variables, x):
        x = nn.relu(x @ variables["stem"])
        x = x @ variables["up"] / variables["divisor"]
        return jnp.tanh(x) @ variables["down"]

    variables = weights(stem=(5, 10), up=(10, 8), divisor=(1, 8), down=(8, 3))
    return fn, variables, (numbers(2, 5),)


def kernel_of_features():
    """A Gaussian kernel: the exponential of 0 is 1, which the next product sees."""

    def fn(variables, x, y):
        x, y = jnp.exp(x @ variables["left"]), jnp.exp(y @ variables["right"])
        x, y = x @ variables["mix"], y @ variables["mix"]
        return jnp.exp(x) @ jnp.exp(y).T

    variables = weights(left=(4, 6), right=(5, 6), mix=(6, 8))
    return fn, variables, (numbers(2, 4), numbers(3, 5, seed=4))


def shared_layer():
    """One kernel used three times: its inputs and outputs are the same units."""

    def fn(variables, x):
        x = x @ variables["in"]
        for _ in range(3):
            x = nn.relu(x @ variables["shared"] + variables["bias"])
        return x @ variables["out"]

    variables = weights(**{"in": (5, 8)}, shared=(8, 8), bias=(1, 8), out=(8, 3))
    return fn, variables, (numbers(2, 5),)


def grouped_norms():
    """Group norm written with reshapes, then an instance norm."""

    def fn(variables, x):
        x = conv(x, variables["conv0"])
        groups = x.reshape(*x.shape[:3], 4, 2)
        x = standardise(groups, (1, 2, 4)).reshape(x.shape)
        x = conv(nn.relu(x * variables["scale"]), variables["conv1"])
        x = standardise(x, (1, 2))
        return nn.relu(x).mean((1, 2)) @ variables["out"]

    variables = weights(
        conv0=(3, 3, 3, 8), scale=(1, 1, 1, 8), conv1=(3, 3, 8, 10), out=(10, 3)
    )
    return fn, variables, (images(),)


# --- NNX ---------------------------------------------------------------------


class NNXConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv0 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm0 = nnx.BatchNorm(8, rngs=rngs)
        self.conv1 = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.conv2 = nnx.Conv(8, 10, (1, 1), rngs=rngs)
        self.norm1 = nnx.BatchNorm(10, rngs=rngs)
        self.head = nnx.Linear(10, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm0(self.conv0(x)))
        x = nnx.relu(self.norm1(self.conv2(self.conv1(x))))
        return self.head(x.mean((1, 2)))


class NNXTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x + self.attention(self.norm(x))
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.embed.attend(x)


class NNXRecurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(5, 8, rngs=rngs))
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x, initial_carry=jnp.zeros((x.shape[0], 8))))


ZOO = {
    # convolutional
    "plain": lambda: linen(Plain(), images()),
    "mobilenet_v1": lambda: linen(MobileNetV1(), images()),
    "mobilenet_v2": lambda: linen(MobileNetV2(), images()),
    "depth_multiplier": lambda: linen(DepthMultiplier(), images()),
    "resnext": lambda: linen(ResNeXt(), images()),
    "shufflenet_v1": lambda: linen(ShuffleNetV1(), images()),
    "shufflenet_v2": lambda: linen(ShuffleNetV2(), images()),
    "densenet": lambda: linen(DenseNet(), images()),
    "squeeze_excite": lambda: linen(SqueezeExcite(), images()),
    "unet": lambda: linen(UNet(), images()),
    "preact_resnet": lambda: linen(PreActResNet(), images()),
    "zero_initialised_resnet": zero_initialised_resnet,
    "padded_shortcuts": lambda: linen(
        CifarResNet(5, depth=8, width=8), images(), train=False
    ),
    "big_transfer": lambda: linen(BigTransfer(), images()),
    "pyramid": lambda: linen(Pyramid(), images()),
    "conv_transpose": lambda: linen(ConvTranspose(), images()),
    "pixel_shuffle": lambda: linen(PixelShuffle(), images()),
    "inception": lambda: linen(Inception(), images()),
    "wavenet": lambda: linen(WaveNet(), numbers(2, 8, 3)),
    "channels_first": channels_first,
    "grouped_norms": grouped_norms,
    # transformers
    "vit": lambda: linen(ViT(), images()),
    "fused_gpt": lambda: linen(FusedGPT(), tokens(2, 6)),
    "dropout_gpt": dropout_gpt,
    "llama": llama,
    "swin": lambda: linen(Swin(), images()),
    "mixer": lambda: linen(Mixer(), images()),
    "scanned_stack": lambda: linen(ScannedStack(), tokens(2, 6)),
    "scanned_perceptron": scanned_perceptron,
    "fused_attention": fused_attention,
    "cross_attention": cross_attention,
    "tied_embedding": tied_embedding,
    "lora": lora,
    # sequences
    "lstm": lambda: linen(Recurrent(nn.OptimizedLSTMCell), numbers(2, 4, 5)),
    "gru": lambda: linen(Recurrent(nn.GRUCell), numbers(2, 4, 5)),
    "bidirectional": lambda: linen(Recurrent(nn.SimpleCell, True), numbers(2, 4, 5)),
    "handwritten_rnn": handwritten_rnn,
    "mamba": mamba,
    "linear_attention": linear_attention,
    # mixtures, towers, graphs
    "dense_mixture": dense_mixture,
    "top_k_mixture": top_k_mixture,
    "sorted_experts": sorted_experts,
    "stacked_experts": stacked_experts,
    "picked_experts": picked_experts,
    "best_expert": best_expert,
    "experts_with_capacity": experts_with_capacity,
    "two_towers": two_towers,
    "graph_network": graph_network,
    "ensemble": ensemble,
    # control flow and custom derivatives
    "while_loop": while_loop,
    "conditional": conditional,
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    # rare operations
    "constant_permutation": constant_permutation,
    "scatter_add": scatter_add,
    "scatter_features": scatter_features,
    "cache_update": cache_update,
    "sorted_features": sorted_features,
    "largest_features": largest_features,
    "sequence_sort": sequence_sort,
    "maxout": maxout,
    "einsums": einsums,
    "divided_by_weights": divided_by_weights,
    "kernel_of_features": kernel_of_features,
    "shared_layer": shared_layer,
    # NNX
    "nnx_conv_net": lambda: nnx_model(NNXConvNet, images()),
    "nnx_transformer": lambda: nnx_model(NNXTransformer, tokens(2, 6)),
    "nnx_recurrent": lambda: nnx_model(NNXRecurrent, numbers(2, 4, 5)),
}
