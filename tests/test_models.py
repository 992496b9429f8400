"""Models have the published counts and paths, and run variables that a cut made."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from thinning_zoo import images, linen

import agp_jax as agp
from agp_jax.models import MODELS, make_model
from agp_jax.models.alexnet import AlexNet
from agp_jax.models.mobilenet import MobileNet
from agp_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from agp_jax.models.resnet_cifar import CifarResNet
from agp_jax.models.vit import VisionTransformer
from agp_jax.trees import flatten_with_paths


def shapes_of(model, image_shape):
    init = lambda key: model.init(key, jnp.zeros((1, *image_shape)), train=False)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0))


def cost_of(model, size):
    variables = shapes_of(model, (size, size, 3))
    predict = partial(model.apply, train=False)
    return agp.measure_cost(predict, variables, jnp.zeros((1, size, size, 3)))


# The total weights and MACs of convolutions and dense layers that Distiller's pruning
# examples start from, and each layer by hand: a pattern of kernels, how many there are,
# the weights of each, and the pixels along a side of its output.
BY_HAND = {
    "alexnet": (
        61_090_496,
        714_188_480,
        ("conv1", 1, 3 * 64 * 121, 55),
        ("conv2", 1, 64 * 192 * 25, 27),
        ("conv3", 1, 192 * 384 * 9, 13),
        ("conv4", 1, 384 * 256 * 9, 13),
        ("conv5", 1, 256 * 256 * 9, 13),
        ("dense1", 1, 9216 * 4096, 1),
        ("dense2", 1, 4096 * 4096, 1),
        ("head", 1, 4096 * 1000, 1),
    ),
    "mobilenet": (
        4_209_088,
        568_740_352,
        ("conv", 1, 3 * 32 * 9, 112),
        ("block0/depthwise", 1, 32 * 9, 112),
        ("block0/pointwise", 1, 32 * 64, 112),
        ("block1/depthwise", 1, 64 * 9, 56),
        ("block1/pointwise", 1, 64 * 128, 56),
        ("block2/depthwise", 1, 128 * 9, 56),
        ("block2/pointwise", 1, 128 * 128, 56),
        ("block3/depthwise", 1, 128 * 9, 28),
        ("block3/pointwise", 1, 128 * 256, 28),
        ("block4/depthwise", 1, 256 * 9, 28),
        ("block4/pointwise", 1, 256 * 256, 28),
        ("block5/depthwise", 1, 256 * 9, 14),
        ("block5/pointwise", 1, 256 * 512, 14),
        ("block([6-9]|10)/depthwise", 5, 512 * 9, 14),
        ("block([6-9]|10)/pointwise", 5, 512 * 512, 14),
        ("block11/depthwise", 1, 512 * 9, 7),
        ("block11/pointwise", 1, 512 * 1024, 7),
        ("block12/depthwise", 1, 1024 * 9, 7),
        ("block12/pointwise", 1, 1024 * 1024, 7),
        ("head", 1, 1024 * 1000, 1),
    ),
    "resnet18": (
        11_678_912,
        1_814_073_344,
        ("conv", 1, 3 * 64 * 49, 112),
        ("stage1/.*", 4, 64 * 64 * 9, 56),
        ("stage2/block0/conv1", 1, 64 * 128 * 9, 28),
        ("stage2/block0/shortcut_conv", 1, 64 * 128, 28),
        ("stage2/(block0/conv2|block1/.*)", 3, 128 * 128 * 9, 28),
        ("stage3/block0/conv1", 1, 128 * 256 * 9, 14),
        ("stage3/block0/shortcut_conv", 1, 128 * 256, 14),
        ("stage3/(block0/conv2|block1/.*)", 3, 256 * 256 * 9, 14),
        ("stage4/block0/conv1", 1, 256 * 512 * 9, 7),
        ("stage4/block0/shortcut_conv", 1, 256 * 512, 7),
        ("stage4/(block0/conv2|block1/.*)", 3, 512 * 512 * 9, 7),
        ("head", 1, 512 * 1000, 1),
    ),
    "resnet50": (
        25_502_912,
        4_089_184_256,
        ("conv", 1, 3 * 64 * 49, 112),
        ("stage1/block0/conv1", 1, 64 * 64, 56),
        ("stage1/block0/shortcut_conv", 1, 64 * 256, 56),
        ("stage1/block[1-9]/conv1", 2, 256 * 64, 56),
        ("stage1/.*/conv2", 3, 64 * 64 * 9, 56),
        ("stage1/.*/conv3", 3, 64 * 256, 56),
        ("stage2/block0/conv1", 1, 256 * 128, 56),
        ("stage2/block0/shortcut_conv", 1, 256 * 512, 28),
        ("stage2/block[1-9]/conv1", 3, 512 * 128, 28),
        ("stage2/.*/conv2", 4, 128 * 128 * 9, 28),
        ("stage2/.*/conv3", 4, 128 * 512, 28),
        ("stage3/block0/conv1", 1, 512 * 256, 28),
        ("stage3/block0/shortcut_conv", 1, 512 * 1024, 14),
        ("stage3/block[1-9]/conv1", 5, 1024 * 256, 14),
        ("stage3/.*/conv2", 6, 256 * 256 * 9, 14),
        ("stage3/.*/conv3", 6, 256 * 1024, 14),
        ("stage4/block0/conv1", 1, 1024 * 512, 14),
        ("stage4/block0/shortcut_conv", 1, 1024 * 2048, 7),
        ("stage4/block[1-9]/conv1", 2, 2048 * 512, 7),
        ("stage4/.*/conv2", 3, 512 * 512 * 9, 7),
        ("stage4/.*/conv3", 3, 512 * 2048, 7),
        ("head", 1, 2048 * 1000, 1),
    ),
    "resnext101": (
        44_038_848,
        7_969_996_800,
        ("conv", 1, 3 * 64 * 49, 112),
        ("stage1/block0/conv1", 1, 64 * 128, 56),
        ("stage1/block0/shortcut_conv", 1, 64 * 256, 56),
        ("stage1/block[1-9]/conv1", 2, 256 * 128, 56),
        ("stage1/.*/conv2", 3, 4 * 128 * 9, 56),
        ("stage1/.*/conv3", 3, 128 * 256, 56),
        ("stage2/block0/conv1", 1, 256 * 256, 56),
        ("stage2/block0/shortcut_conv", 1, 256 * 512, 28),
        ("stage2/block[1-9]/conv1", 3, 512 * 256, 28),
        ("stage2/.*/conv2", 4, 8 * 256 * 9, 28),
        ("stage2/.*/conv3", 4, 256 * 512, 28),
        ("stage3/block0/conv1", 1, 512 * 512, 28),
        ("stage3/block0/shortcut_conv", 1, 512 * 1024, 14),
        ("stage3/block([1-9]|1.|2.)/conv1", 22, 1024 * 512, 14),
        ("stage3/.*/conv2", 23, 16 * 512 * 9, 14),
        ("stage3/.*/conv3", 23, 512 * 1024, 14),
        ("stage4/block0/conv1", 1, 1024 * 1024, 14),
        ("stage4/block0/shortcut_conv", 1, 1024 * 2048, 7),
        ("stage4/block[1-9]/conv1", 2, 2048 * 1024, 7),
        ("stage4/.*/conv2", 3, 32 * 1024 * 9, 7),
        ("stage4/.*/conv3", 3, 1024 * 2048, 7),
        ("head", 1, 2048 * 1000, 1),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_layer_has_the_weights_and_macs_of_the_published_model(name):
    weights, macs, *layers = BY_HAND[name]
    cost = cost_of(make_model(name, 1000), 224)
    assert (cost.weight_params, cost.macs, cost.notes) == (weights, macs, ())
    left = {x.path: (x.params, x.macs) for x in cost.weights}
    for pattern, count, size, side in layers:
        found = [x for x in left if re.fullmatch(f"params/{pattern}/kernel", x)]
        assert len(found) == count, pattern
        for path in found:
            assert left.pop(path) == (size, size * side**2), path
    assert not left


def test_vit_b16_has_the_published_number_of_parameters():
    assert cost_of(make_model("vit_b16", 1000), 224).params == 86_567_656


def test_vit_b16_counts_no_token_position_or_bias_as_a_weight():
    cost = cost_of(make_model("vit_b16", 1000), 224).subtree("params")
    layer = 4 * 768 * 768 + 2 * 768 * 3072
    kernels = 16 * 16 * 3 * 768 + 12 * layer + 768 * 1000
    assert cost.weight_params == kernels == 86_292_480
    rest = {x.path: x.shape for x in cost.leaves if not x.is_weight}
    assert rest["class_token"] == (1, 1, 768)
    assert rest["positions"] == (1, 197, 768)
    assert rest["layer0/attention/query/bias"] == (12, 64)
    assert not [path for path in rest if path.endswith("kernel")]


def test_resnet20_has_the_published_weights_and_macs():
    # 432 + 6 * 2,304 + (4,608 + 5 * 9,216) + (18,432 + 5 * 36,864) + 640, and the 1x1
    # convolutions 16 * 32 + 32 * 64 of the published 270,896.
    padded = cost_of(CifarResNet(10), 32)
    projected = cost_of(make_model("resnet20_projection", 10), 32)
    assert padded.weight_params == 268_336
    assert (projected.weight_params, projected.macs) == (270_896, 40_813_184)


def test_paths_tell_stage_block_and_layer():
    paths, _, _ = flatten_with_paths(shapes_of(CifarResNet(10), (32, 32, 3))["params"])
    kernels = [path for path in paths if path.endswith("kernel")]
    assert len(kernels) == 20
    assert {"conv/kernel", "stage1/block0/conv1/kernel", "head/kernel"} < set(kernels)


def test_a_padded_shortcut_keeps_every_other_pixel_among_zero_channels():
    model = CifarResNet(10, depth=8, width=4)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    variables = model.init(jax.random.key(0), images, train=False)
    # With a scale of zero the residual branch vanishes and the shortcut remains.
    silenced = jax.tree_util.tree_map_with_path(
        lambda keys, x: 0 * x if "norm2" in str(keys) and "scale" in str(keys) else x,
        variables,
    )
    _, seen = model.apply(
        silenced, images, train=False, capture_intermediates=True, mutable=True
    )
    outputs = seen["intermediates"]
    before = np.asarray(outputs["stage1"]["__call__"][0])
    after = np.asarray(outputs["stage2"]["__call__"][0])
    np.testing.assert_array_equal(after[..., 2:6], before[:, ::2, ::2])
    assert not after[..., :2].any() and not after[..., 6:].any()


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_strided_filters_stand_on_the_pixels_that_shortcuts_keep(shortcut):
    model = CifarResNet(5, depth=8, width=4, shortcut=shortcut)
    images = jax.random.normal(jax.random.key(1), (1, 8, 8, 1))
    variables = jax.tree.map(
        lambda x: jnp.ones(x.shape), shapes_of(model, images.shape[1:])
    )
    copies = jnp.zeros((3, 3, 4, 8)).at[1, 1].set(jnp.eye(4, 8))
    variables["params"]["stage2"]["block0"]["conv1"]["kernel"] = copies
    apply = partial(model.apply, capture_intermediates=True, mutable=True, train=False)
    outputs = jax.jit(apply)(variables, images)[1]["intermediates"]
    before = outputs["stage1"]["__call__"][0]
    after = outputs["stage2"]["block0"]["conv1"]["__call__"][0]
    np.testing.assert_array_equal(after[..., :4], before[:, ::2, ::2])


@pytest.mark.parametrize("name", MODELS)
def test_models_give_a_logit_per_class_at_any_width(name):
    for width, image_shape in ((0, (64, 64, 1)), (24, (80, 80, 3))):
        model = make_model(name, 7, width)
        images = jnp.ones((3, *image_shape))
        variables = jax.eval_shape(
            lambda k, m=model, x=images: m.init(k, x, train=False), jax.random.key(0)
        )
        logits = jax.eval_shape(
            lambda v, m=model, x=images: m.apply(v, x, train=False), variables
        )
        assert logits.shape == (3, 7)


def test_a_depth_that_is_not_6n_plus_2_is_refused():
    with pytest.raises(ValueError, match="6n \\+ 2"):
        shapes_of(CifarResNet(10, depth=21), (8, 8, 1))


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple of the 12 heads, got 20"):
        shapes_of(make_model("vit_b16", 10, 20), (32, 32, 3))


# Name: a model, the size of its images, and a pattern of what makes the units to cut.
TINY = {
    "mlp": (make_model("mlp", 5, 8), 8, ".*"),
    "resnet20": (CifarResNet(5, depth=8, width=4), 8, ".*/conv1/kernel"),
    "projected": (CifarResNet(5, depth=8, width=4, shortcut="conv"), 8, ".*"),
    "alexnet": (AlexNet(5, width=2), 64, ".*"),
    "mobilenet": (MobileNet(5, width=2), 16, ".*"),
    "resnet18": (ResNet(5, (1, 2), BasicBlock, width=4), 16, ".*"),
    "resnet50": (ResNet(5, (2, 1), Bottleneck, width=4), 16, ".*"),
    "resnet50_inside": (
        ResNet(5, (2, 1), Bottleneck, width=4),
        16,
        ".*/conv[12]/kernel",
    ),
    "resnext101": (
        ResNet(5, (1, 2), partial(Bottleneck, groups=4, inner=2), width=8),
        16,
        ".*",
    ),
    "vit_b16": (
        VisionTransformer(5, width=24, depth=2, num_heads=4, patch=8),
        16,
        ".*",
    ),
}


def plan_half(couplings, pattern):
    """The cut of half the units of each exact group that `pattern` names a maker of."""
    removed = {
        group.name: np.arange(group.num_units // 2)
        for group in couplings.groups
        if group.exact
        and any(
            m.role == "out" and re.fullmatch(pattern, m.path) for m in group.members
        )
    }
    assert removed
    return agp.plan_cut(couplings.masks(removed), couplings)


def check_thinned(fn, variables, inputs, cut):
    thinned = agp.thin(variables, cut)
    expected = jax.jit(agp.thin_function(fn, variables, cut))(thinned, *inputs)
    found = jax.jit(fn)(thinned, *inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(found - fn(variables, *inputs)).max() > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_a_model_runs_thinned_variables_as_its_thinned_function_does(name):
    model, size, pattern = TINY[name]
    fn, variables, inputs = linen(model, images(size), train=False)
    couplings = agp.find_couplings(fn, variables, *inputs)
    check_thinned(fn, variables, inputs, plan_half(couplings, pattern))


def test_a_shortcut_stays_a_convolution_where_a_cut_makes_its_ends_equal():
    model = ResNet(5, (1,), Bottleneck, width=4)
    fn, variables, inputs = linen(model, images(16), train=False)
    couplings = agp.find_couplings(fn, variables, *inputs)
    removed = {"params/stage1/block0/conv3/kernel[3]": np.arange(12)}
    cut = agp.plan_cut(couplings.masks(removed), couplings)
    shortcut = cut.thin_shape("params/stage1/block0/shortcut_conv/kernel")
    assert shortcut == (1, 1, 4, 4)
    check_thinned(fn, variables, inputs, cut)


def test_padded_shortcuts_do_not_run_without_channels_of_the_streams():
    fn, variables, inputs = linen(TINY["resnet20"][0], images(8), train=False)
    couplings = agp.find_couplings(fn, variables, *inputs)
    cut = plan_half(couplings, ".*/conv2/kernel")
    with pytest.raises(TypeError, match="incompatible shapes"):
        jax.eval_shape(fn, agp.thin(variables, cut), *inputs)


def test_alexnet_drops_features_in_training_alone():
    fn, variables, inputs = linen(AlexNet(5, width=2), images(64), train=False)
    keys = {"dropout": jax.random.key(0)}
    dropped = AlexNet(5, width=2).apply(variables, *inputs, train=True, rngs=keys)
    kept = AlexNet(5, width=2, dropout=0.0).apply(variables, *inputs, train=True)
    expected = fn(variables, *inputs)
    assert np.abs(dropped - expected).max() > 1e-3
    np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-6)
