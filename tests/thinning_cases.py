"""A small model with statistics, stacked layers, and cuts of both."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import agp_jax as agp
from agp_jax.trees import flatten_with_paths


def normalise(x, params, stats):
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale = lax.rsqrt(stats["var"] + 1e-5) * params["scale"]
    shift = params["bias"] - stats["mean"] * scale
    return x * scale.reshape(shape) + shift.reshape(shape)


def network(variables, x):
    """5 features, 6 hidden units that are normalised, 3 logits."""
    params, stats = variables["params"], variables["batch_stats"]["norm"]
    hidden = jax.nn.relu(normalise(x @ params["up"], params["norm"], stats))
    return hidden @ params["down"]


def draw(shapes, seed=0):
    """Random numbers, none of them zero, in a tree of shapes."""
    rng = np.random.default_rng(seed)

    def draw_leaf(shape):
        return jnp.asarray((0.5 + rng.random(shape)) * rng.choice([-1, 1], shape))

    return jax.tree.map(draw_leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def make_variables(seed=0):
    variables = draw(
        {
            "params": {
                "up": (5, 6),
                "norm": {"scale": (6,), "bias": (6,)},
                "down": (6, 3),
            },
            "batch_stats": {"norm": {"mean": (6,), "var": (6,)}},
        },
        seed,
    )
    stats = variables["batch_stats"]["norm"]
    stats["var"] = jnp.abs(stats["var"])
    return variables


VARIABLES = make_variables()
X = jnp.float32(np.random.default_rng(9).normal(size=(4, 5)))
COUPLINGS = agp.find_couplings(network, VARIABLES, X)
UNITS = "params/up[1]"


def masks_without(*units, of=COUPLINGS):
    """Masks of the parameters alone, as training has them."""
    return {"params": of.masks({UNITS: list(units)})["params"]}


def masked(variables, masks):
    return jax.tree.map(
        lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), variables, masks
    )


def cut_of(*units):
    return agp.plan_cut(masks_without(*units), COUPLINGS)


def kept_units(cut):
    """Which of the six units stay: along every leaf the same."""
    homes = {"params/up": 1, "params/down": 0}
    homes |= {f"params/norm/{name}": 0 for name in ("scale", "bias")}
    homes |= {f"batch_stats/norm/{name}": 0 for name in ("mean", "var")}
    if not cut:
        return list(range(6))
    assert {path: list(axes) for path, axes in cut.items()} == {
        path: [axis] for path, axis in homes.items()
    }
    (kept,) = {tuple(cut[path][axis].tolist()) for path, axis in homes.items()}
    return list(kept)


def assert_trees_equal(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    paths, leaves, _ = flatten_with_paths(found)
    for path, x, y in zip(paths, leaves, jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype, path
        if tolerance:
            np.testing.assert_allclose(x, y, err_msg=path, **tolerance)
        else:
            np.testing.assert_array_equal(x, y, err_msg=path)


def stacked(params, x):
    def layer(x, weights):
        return x + jax.nn.relu(x @ weights["up"]) @ weights["down"], None

    x, _ = lax.scan(layer, x, params["layers"])
    return x


STACKED = draw({"layers": {"up": (3, 5, 4), "down": (3, 4, 5)}}, seed=3)


def stacked_cut():
    couplings = agp.find_couplings(stacked, STACKED, X)
    group = couplings["layers/up[2]"]
    removed = {group.name: np.array([[0, 1], [1, 3], [2, 3]])}
    return agp.plan_cut(couplings.masks(removed), couplings)
