"""Models of every family: thinned, they compute what the masked model computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from thinning_zoo import ZOO

import agp_jax as agp
from agp_jax.trees import flatten_with_paths

CNN = "params/ConvNorm_{}/Conv_0/kernel".format
ATTENTION = "params/{}/MultiHeadDotProductAttention_0/{}/kernel".format

# What must be found, from the architecture by hand: with half of all exact units cut,
# these leaves are at most this large.
AT_MOST = {
    "plain": {
        CNN(0): (3, 3, 3, 4),
        CNN(1): (3, 3, 4, 6),
        "params/Dense_0/kernel": (24, 5),
        "params/Dense_1/kernel": (5, 5),
    },
    "mobilenet_v1": {
        CNN(1): (3, 3, 1, 4),
        CNN(2): (1, 1, 4, 6),
        "batch_stats/ConvNorm_3/BatchNorm_0/var": (6,),
        "params/head/kernel": (8, 5),
    },
    "mobilenet_v2": {
        CNN(0): (3, 3, 3, 4),
        CNN(2): (3, 3, 1, 8),
        CNN(3): (1, 1, 8, 4),
        CNN(5): (3, 3, 1, 6),
        "params/head/kernel": (4, 5),
    },
    "depth_multiplier": {CNN(0): (3, 3, 3, 3), CNN(2): (1, 1, 6, 4)},
    "resnext": {CNN(0): (3, 3, 3, 4), CNN(1): (1, 1, 4, 8), CNN(3): (1, 1, 8, 4)},
    "shufflenet_v1": {CNN(0): (3, 3, 3, 6), "params/head/kernel": (6, 5)},
    "shufflenet_v2": {
        CNN(2): (3, 3, 1, 5),
        CNN(5): (3, 3, 1, 5),
        "params/head/kernel": (4, 5),
    },
    "densenet": {
        CNN(0): (3, 3, 3, 3),
        "params/Conv_1/kernel": (3, 3, 4, 2),
        CNN(4): (1, 1, 9, 5),
        "params/BatchNorm_2/scale": (7,),
    },
    "squeeze_excite": {
        CNN(0): (3, 3, 3, 6),
        "params/Dense_0/kernel": (6, 3),
        "params/Dense_1/kernel": (3, 6),
    },
    "unet": {
        CNN(0): (3, 3, 3, 4),
        CNN(2): (3, 3, 5, 6),
        CNN(3): (3, 3, 11, 5),
        CNN(4): (3, 3, 9, 4),
    },
    "preact_resnet": {
        "params/Conv_0/kernel": (3, 3, 3, 4),
        "params/Conv_1/kernel": (3, 3, 4, 5),
        "params/Conv_2/kernel": (3, 3, 5, 4),
        "params/head/kernel": (6, 5),
    },
    "zero_initialised_resnet": {
        CNN(0): (3, 3, 3, 4),
        CNN(1): (3, 3, 4, 5),
        "params/Conv_1/kernel": (3, 3, 5, 6),
        "params/last1/scale": (6,),
        CNN(3): (1, 1, 4, 6),
    },
    "padded_shortcuts": {
        "params/stage1/block0/conv1/kernel": (3, 3, 4, 4),
        "params/stage2/block0/conv1/kernel": (3, 3, 4, 8),
        "params/head/kernel": (16, 5),
    },
    "big_transfer": {
        "params/conv0": (3, 3, 4, 6),
        "params/out0": (3, 3, 6, 4),
        "params/head/kernel": (4, 5),
    },
    "pyramid": {
        CNN(1): (3, 3, 4, 6),
        "params/lateral_coarse/kernel": (1, 1, 6, 5),
        "params/shared/kernel": (3, 3, 5, 3),
        "params/box/kernel": (1, 1, 3, 4),
    },
    "conv_transpose": {
        "params/ConvTranspose_0/kernel": (3, 3, 6, 4),
        "params/Conv_0/kernel": (3, 3, 4, 3),
    },
    "pixel_shuffle": {
        "params/Conv_0/kernel": (3, 3, 4, 12),
        "params/Conv_1/kernel": (3, 3, 3, 3),
    },
    "inception": {CNN(0): (3, 3, 3, 4), CNN(4): (1, 1, 9, 5)},
    "wavenet": {
        "params/Conv_0/kernel": (1, 3, 4),
        "params/Conv_1/kernel": (2, 4, 8),
        "params/Conv_2/kernel": (1, 4, 5),
        "params/Conv_7/kernel": (1, 5, 4),
    },
    "channels_first": {"conv1": (5, 4, 3, 3), "dense": (80, 5)},
    "grouped_norms": {"conv1": (3, 3, 4, 5), "out": (5, 3)},
    "vit": {
        "params/block0/up/kernel": (8, 6),
        "params/block1/down/kernel": (6, 8),
        ATTENTION("block0", "query"): (8, 1, 2),
        ATTENTION("block0", "out"): (1, 2, 8),
    },
    "fused_gpt": {
        "params/qkv/kernel": (8, 6),
        "params/out/kernel": (2, 8),
        "params/up/kernel": (8, 6),
    },
    "dropout_gpt": {
        "params/query/kernel": (8, 2),
        "params/out/kernel": (2, 8),
        "params/down/kernel": (6, 8),
    },
    "llama": {
        "gate": (8, 6),
        "up": (8, 6),
        "down": (6, 8),
        "value": (8, 2),
        "out": (2, 8),
    },
    "swin": {
        "params/qkv1/kernel": (8, 6),
        "params/out1/kernel": (2, 8),
        "params/bias0": (1, 4, 4),
        "params/merge/kernel": (32, 5),
    },
    "mixer": {"params/mix0/kernel": (16, 5), "params/up1/kernel": (8, 6)},
    "scanned_stack": {
        "params/layers/block/up/kernel": (3, 8, 6),
        "params/layers/block/down/kernel": (3, 6, 8),
        ATTENTION("layers/block", "value"): (3, 8, 1, 2),
    },
    "scanned_perceptron": {"stem": (4, 4), "up": (3, 4, 12), "head": (4, 5)},
    "fused_attention": {"query": (6, 2, 4), "value": (6, 1, 4), "out": (2, 4, 6)},
    "cross_attention": {"encode": (5, 5), "latents": (3, 4), "out": (4, 4)},
    "tied_embedding": {"embed": (16, 5), "up": (5, 6), "down": (6, 5)},
    "lora": {"w0": (6, 4), "b0": (1, 4), "a1": (4, 2), "w2": (5, 3)},
    "lstm": {
        "params/OptimizedLSTMCell_0/hf/kernel": (4, 4),
        "params/OptimizedLSTMCell_1/ii/kernel": (4, 3),
        "params/Dense_0/kernel": (3, 5),
    },
    "gru": {
        "params/GRUCell_0/hn/kernel": (4, 4),
        "params/GRUCell_1/ir/kernel": (4, 3),
        "params/Dense_0/kernel": (3, 5),
    },
    "bidirectional": {
        "params/SimpleCell_0/h/kernel": (4, 4),
        "params/SimpleCell_2/i/kernel": (4, 5),
        "params/Dense_0/kernel": (8, 5),
    },
    "handwritten_rnn": {"in": (5, 8), "recurrent": (4, 8), "out": (8, 3)},
    "mamba": {"in": (8, 12), "conv": (3, 1, 6), "decay": (6, 2), "out": (6, 8)},
    "linear_attention": {"value": (5, 5), "out": (5, 3)},
    "dense_mixture": {"up": (3, 6, 4), "bias": (3, 4), "down": (3, 4, 5)},
    "top_k_mixture": {"stem": (6, 5), "up": (4, 5, 4), "down": (4, 4, 5)},
    "sorted_experts": {"router": (6, 2), "up": (2, 6, 4), "down": (2, 4, 5)},
    "stacked_experts": {
        "layers/router": (2, 6, 2),
        "layers/up": (2, 2, 6, 4),
        "layers/bias": (2, 2, 4),
        "layers/back": (2, 3, 6),
    },
    "picked_experts": {"router": (6, 2), "favour": (1, 2), "down": (2, 4, 5)},
    "best_expert": {"up": (2, 6, 4), "bias": (2, 4), "shared": (6, 4)},
    "experts_with_capacity": {"router": (6, 2), "up": (2, 6, 4), "down": (2, 4, 5)},
    "two_towers": {
        "conv": (3, 3, 3, 4),
        "image": (4, 3),
        "embed": (16, 5),
        "head": (6, 3),
    },
    "graph_network": {"up0": (8, 5), "down1": (6, 8)},
    "ensemble": {"up": (3, 5, 4), "down": (3, 4, 4)},
    "while_loop": {"in": (5, 4), "up": (4, 5), "out": (4, 3)},
    "conditional": {"stem": (5, 4), "right0": (4, 3), "right1": (3, 5)},
    "custom_jvp": {"up": (5, 4), "slope": (1, 4), "down": (4, 3)},
    "custom_vjp": {"up": (5, 4), "step": (1, 4), "down": (4, 3)},
    "constant_permutation": {"out": (3, 3)},
    "scatter_add": {"up": (5, 4), "down": (4, 4)},
    "scatter_features": {"stem": (5, 4), "up": (4, 6)},
    "cache_update": {"key": (5, 4), "cached": (3, 4), "out": (4, 3)},
    "sorted_features": {"up": (5, 4), "middle": (4, 6)},
    "largest_features": {"up": (5, 4), "middle": (4, 6)},
    "sequence_sort": {"up": (5, 4), "out": (4, 3)},
    "maxout": {"up": (5, 6), "out": (3, 3)},
    "einsums": {"left": (4, 3), "bilinear": (3, 4, 5), "out": (5, 5)},
    "divided_by_weights": {"stem": (5, 5), "up": (5, 8)},
    "kernel_of_features": {"left": (4, 3), "mix": (3, 8)},
    "shared_layer": {"in": (5, 4), "shared": (4, 4), "out": (4, 3)},
    "nnx_conv_net": {
        "conv1/kernel": (3, 3, 1, 4),
        "conv2/kernel": (1, 1, 4, 5),
        "norm1/mean": (5,),
        "head/kernel": (5, 5),
    },
    "nnx_transformer": {
        "attention/query/kernel": (8, 1, 2),
        "attention/out/kernel": (1, 2, 8),
        "up/kernel": (8, 6),
    },
    "nnx_recurrent": {"rnn/cell/dense_h/kernel": (4, 12), "head/kernel": (4, 3)},
}
# Loops of unknown length have no reverse derivative.
FORWARD_ONLY = {"while_loop"}


def cut_in_half(fn, variables, inputs, seed=0):
    """Removes half the units of each exact group: the masks and the cut."""
    couplings = agp.find_couplings(fn, variables, *inputs)
    rng = np.random.default_rng(seed)
    masks = couplings.masks(
        {
            group.name: np.sort(
                rng.permutation(group.num_units)[: group.num_units // 2]
            )
            for group in couplings.groups
            if group.exact
        }
    )
    return masks, agp.plan_cut(masks, couplings)


# Helpers compute in NumPy: JAX would compile each operation for each shape.
def apply_masks(variables, masks):
    return jax.tree.map(
        lambda x, kept: jnp.asarray(np.asarray(x) * np.asarray(kept)), variables, masks
    )


def outputs_and_gradients(fn, variables, inputs, differentiate):
    """What `fn` returns, and a generic derivative of it by the variables."""

    @jax.jit
    def run(variables):
        if not differentiate:
            return fn(variables, *inputs), None
        out, pullback = jax.vjp(lambda v: fn(v, *inputs), variables)
        rng = np.random.default_rng(7)
        return out, pullback(
            jax.tree.map(
                lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), out
            )
        )[0]

    return run(variables)


def assert_close(found, expected, tolerance):
    """Equal to `tolerance`, relative to the largest number in the tree."""
    paths, wanted, _ = flatten_with_paths(expected)
    found, wanted = (
        [np.asarray(x) for x in leaves] for leaves in (jax.tree.leaves(found), wanted)
    )
    largest = max(float(np.max(np.abs(x), initial=0)) for x in wanted)
    assert np.isfinite(largest)
    for path, x, y in zip(paths, found, wanted, strict=True):
        assert x.shape == y.shape, path
        error = float(np.max(np.abs(x - y), initial=0)) / largest
        assert error <= tolerance, f"{path} differs by {error:.2g}"


@pytest.mark.parametrize("name", ZOO)
def test_the_thinned_model_is_the_masked_one(name):
    fn, variables, inputs = ZOO[name]()
    masks, cut = cut_in_half(fn, variables, inputs)
    masked = apply_masks(variables, masks)
    thinned = agp.thin(masked, cut)

    paths, leaves, _ = flatten_with_paths(thinned)
    shapes = dict(zip(paths, map(np.shape, leaves), strict=True))
    for path, largest in AT_MOST[name].items():
        fits = all(a <= b for a, b in zip(shapes[path], largest, strict=True))
        assert fits, f"{path} is {shapes[path]}, hoped for {largest}"

    differentiate = name not in FORWARD_ONLY
    thin_fn = agp.thin_function(fn, variables, cut)
    with jax.default_matmul_precision("highest"):
        expected = outputs_and_gradients(fn, masked, inputs, differentiate)
        found = outputs_and_gradients(thin_fn, thinned, inputs, differentiate)
    assert_close(found[0], expected[0], 1e-6)
    if differentiate:
        assert_close(found[1], agp.thin(expected[1], cut), 1e-6)


def test_the_hand_made_expectations_cover_the_zoo():
    assert AT_MOST.keys() == ZOO.keys()
