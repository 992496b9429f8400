"""Programs whose groups are known by hand."""

import jax
import jax.numpy as jnp
from jax import lax

import agp_jax as agp


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(x, kernel, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def normalise(x, params, stats):
    scale = lax.rsqrt(stats["var"] + 1e-5) * params["scale"]
    return (x - stats["mean"][None, None, None]) * scale[None, None, None] + params[
        "bias"
    ][None, None, None]


def residual(variables, x):
    """conv0 and conv2 write to one stream of 4 channels, conv1 has 6 of its own."""
    p, s = variables["params"], variables["batch_stats"]
    stream = normalise(conv(x, p["conv0"]), p["norm0"], s["norm0"])
    hidden = normalise(conv(stream, p["conv1"]), p["norm1"], s["norm1"])
    hidden = conv(jax.nn.relu(hidden), p["conv2"])
    stream = stream + normalise(hidden, p["norm2"], s["norm2"])
    return stream.mean((1, 2)) @ p["head"]


WIDTHS = {"norm0": 4, "norm1": 6, "norm2": 4}
RESIDUAL = {
    "params": {
        "conv0": shaped(3, 3, 2, 4),
        "conv1": shaped(3, 3, 4, 6),
        "conv2": shaped(3, 3, 6, 4),
        "head": shaped(4, 3),
        **{k: {"bias": shaped(n), "scale": shaped(n)} for k, n in WIDTHS.items()},
    },
    "batch_stats": {
        k: {"mean": shaped(n), "var": shaped(n)} for k, n in WIDTHS.items()
    },
}
IMAGES = shaped(2, 8, 8, 2)


def perceptron(params, x):
    return jnp.tanh(x @ params["up"] + params["bias"][None]) @ params["down"]


PERCEPTRON = {"up": shaped(3, 5), "bias": shaped(5), "down": shaped(5, 2)}


def attention(params, x):
    """Queries, keys and values of 2 heads with 4 features from one kernel."""
    batch, time, _ = x.shape
    fused = (x @ params["qkv"]).reshape(batch, time, 6, 4)
    q, k, v = jnp.split(fused, 3, axis=2)
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
    return mixed.reshape(batch, time, 8) @ params["out"]


ATTENTION = {"qkv": shaped(6, 24), "out": shaped(8, 6)}


def stacked(params, x):
    """Three residual layers of hidden width 5 on a stream of 4, as a scan."""

    def layer(stream, weights):
        hidden = jnp.maximum(stream @ weights["up"], 0)
        return stream + hidden @ weights["down"], None

    stream, _ = lax.scan(layer, x @ params["stem"], params["layers"])
    return stream @ params["head"]


STACKED = {
    "stem": shaped(3, 4),
    "layers": {"up": shaped(3, 4, 5), "down": shaped(3, 5, 4)},
    "head": shaped(4, 2),
}


def find(fn, variables, *inputs):
    """The couplings, and their groups as {name: (units, {(path, axis, role)})}."""
    couplings = agp.find_couplings(fn, variables, *inputs)
    return couplings, {
        group.name: (group.num_units, {(m.path, m.axis, m.role) for m in group.members})
        for group in couplings.groups
    }


def indices_of(group, path):
    (member,) = (m for m in group.members if m.path == path)
    return member.indices.tolist()
