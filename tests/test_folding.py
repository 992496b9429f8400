"""Folded kernels against convolution and normalisation in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from agp_jax.models import make_model
from agp_jax.models.folding import fold_norms
from agp_jax.trees import flatten_with_paths


def random_variables(name):
    model = make_model(name, 10, 8)
    variables = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False),
        jax.random.key(0),
    )
    rng = np.random.default_rng(0)
    draw = lambda x: (rng.random(x.shape) + 0.5).astype(np.float32)  # noqa: E731
    return model, jax.tree.map(draw, variables)


@pytest.mark.parametrize("name", ["resnet20_projection", "mobilenet", "resnet18"])
def test_folded_kernels_do_what_convolution_and_norm_do(name):
    """The outputs of each normalisation, from folded kernels and a shift alone."""
    model, variables = random_variables(name)
    params, stats = variables["params"], variables["batch_stats"]
    folded = fold_norms(params, stats)

    def plain(norm, stat):
        gain = norm["scale"] / np.sqrt(stat["var"] + 1e-5)
        shift = norm["bias"] - stat["mean"] * gain
        return {"scale": np.ones_like(gain) * np.sqrt(1 + 1e-5), "bias": shift}

    def replace(tree, stats):
        if "mean" in stats:
            return plain(tree, stats), {
                "mean": np.zeros_like(stats["mean"]),
                "var": np.ones_like(stats["var"]),
            }
        pairs = {k: replace(tree[k], v) for k, v in stats.items()}
        return (
            {**tree, **{k: v[0] for k, v in pairs.items()}},
            {k: v[1] for k, v in pairs.items()},
        )

    new_params, new_stats = replace(folded, stats)
    image = np.random.default_rng(1).random((2, 32, 32, 3)).astype(np.float32)
    apply = jax.jit(lambda variables: model.apply(variables, image, train=False))
    expected = apply(variables)
    found = apply({"params": new_params, "batch_stats": new_stats})
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    changed = [
        path
        for (path, a, b) in zip(
            flatten_with_paths(params)[0],
            jax.tree.leaves(params),
            jax.tree.leaves(folded),
            strict=True,
        )
        if not np.array_equal(a, b)
    ]
    kernels = [p for p in flatten_with_paths(params)[0] if p.endswith("/kernel")]
    assert changed == [path for path in kernels if path != "head/kernel"]


def test_kernels_without_norms_stay_as_they_are():
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert fold_norms({"head": params}, {}) == {"head": params}
