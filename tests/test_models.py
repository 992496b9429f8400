import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agp_jax.models import make_model
from agp_jax.models.resnet_cifar import CifarResNet
from agp_jax.trees import flatten_with_paths


def shapes_of(model, image_shape):
    init = lambda key: model.init(key, jnp.zeros((1, *image_shape)), train=False)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0))


def count_kernels(variables):
    return sum(x.size for x in jax.tree.leaves(variables["params"]) if x.ndim > 1)


def test_resnet20_with_projections_has_the_published_number_of_weights():
    # 432 + 6 * 2,304 + (4,608 + 5 * 9,216) + (18,432 + 5 * 36,864) + 640, and the 1x1
    # convolutions 16 * 32 + 32 * 64 of the published 270,896.
    padded = shapes_of(CifarResNet(10), (32, 32, 3))
    projected = shapes_of(CifarResNet(10, shortcut="conv"), (32, 32, 3))
    assert count_kernels(padded) == 268_336
    assert count_kernels(projected) == 270_896


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


@pytest.mark.parametrize("name", ["mlp", "resnet20"])
def test_models_give_a_logit_per_class_at_any_width(name):
    for width, image_shape in ((0, (8, 8, 1)), (8, (16, 16, 3))):
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
