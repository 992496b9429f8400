"""Every tree with a cut's paths is cut as NumPy would index it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from thinning_cases import (
    COUPLINGS,
    STACKED,
    UNITS,
    VARIABLES,
    assert_trees_equal,
    cut_of,
    draw,
    make_variables,
    stacked_cut,
)

import agp_jax as agp


def test_every_tree_with_the_paths_is_cut_alike():
    cut, stays = cut_of(1, 4), [0, 2, 3, 5]

    def by_numpy(tree):
        params, stats = tree["params"], tree["batch_stats"]
        pick = lambda x: np.asarray(x)[stays]  # noqa: E731
        return {
            "params": {
                "up": np.asarray(params["up"])[:, stays],
                "norm": jax.tree.map(pick, params["norm"]),
                "down": pick(params["down"]),
            },
            "batch_stats": jax.tree.map(pick, stats),
        }

    masks = COUPLINGS.masks({UNITS: [1, 2]})
    averages = jax.tree.map(lambda x: (x * 0.9).astype(jnp.bfloat16), VARIABLES)
    for tree in (VARIABLES, masks, averages, make_variables(5)):
        assert_trees_equal(agp.thin(tree, cut), by_numpy(tree))
        assert_trees_equal(jax.jit(lambda t: agp.thin(t, cut))(tree), by_numpy(tree))
        on_host = jax.tree.map(np.asarray, tree)
        found = agp.thin(on_host, cut)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))
        assert_trees_equal(found, by_numpy(tree))
        shapes = agp.thin(jax.eval_shape(lambda t=tree: t), cut)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
            lambda x: (x.shape, x.dtype), by_numpy(tree)
        )


def test_parts_of_a_tree_are_cut_and_missing_leaves_stay_missing():
    cut = cut_of(1, 4)
    part = {"params": {"up": VARIABLES["params"]["up"], "down": optax.MaskedNode()}}
    found = agp.thin(part, cut)
    np.testing.assert_array_equal(
        found["params"]["up"], part["params"]["up"][:, np.array([0, 2, 3, 5])]
    )
    assert found["params"]["down"] == optax.MaskedNode()


def test_each_stacked_layer_keeps_its_own_units():
    found = agp.thin(STACKED, stacked_cut())["layers"]
    kept = [[2, 3], [0, 2], [0, 1]]
    up, down = STACKED["layers"]["up"], STACKED["layers"]["down"]
    for layer, units in enumerate(kept):
        np.testing.assert_array_equal(found["up"][layer], up[layer][:, np.array(units)])
        np.testing.assert_array_equal(
            found["down"][layer], down[layer][np.array(units)]
        )


def test_trees_of_other_paths_and_shapes_raise():
    cut = cut_of(1, 4)
    with pytest.raises(ValueError, match=r"the cut has no 'up'.*cut.subtree"):
        agp.thin({"up": VARIABLES["params"]["up"]}, cut)
    with pytest.raises(
        ValueError, match=r"norm/mean has shape \(4,\), but.* of \(6,\); has it"
    ):
        agp.thin(agp.thin(VARIABLES, cut), cut)
    with pytest.raises(ValueError, match="act is no array.*eqx.partition"):
        agp.thin({"act": max}, cut)
    with pytest.raises(ValueError, match="act is no array.*eqx.partition"):
        agp.thin_opt_state((), {**VARIABLES, "act": max}, cut)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axes", [("a", None), (None, "a"), ("b", "a"), ("a", "b")])
def test_arrays_on_many_devices_are_cut_where_they_are(kind, axes):
    mesh = jax.make_mesh((4, 2), ("a", "b"), (kind, kind))
    shapes = {"up": (16, 32), "down": (32, 16)}
    params = draw(shapes)

    def fn(params, x):
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    couplings = agp.find_couplings(fn, params, jnp.ones((1, 16)))
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    masks = jax.device_put(couplings.masks({"up[1]": np.arange(0, 32, 2)}), sharding)
    placed = jax.device_put(params, sharding)
    cut = agp.plan_cut(masks, couplings)
    found = agp.thin(placed, cut)
    np.testing.assert_array_equal(found["up"], params["up"][:, 1::2])
    np.testing.assert_array_equal(found["down"], params["down"][1::2])
    # JAX remembers the copy of an array that it has brought to the host.
    assert all(x._npy_value is None for x in jax.tree.leaves((masks, placed)))
    for name, whole in {"up": 0, "down": 1}.items():
        assert len(found[name].sharding.device_set) == 8
        before, after = placed[name], found[name]
        blocks = [x.sharding.shard_shape(x.shape)[whole] for x in (before, after)]
        assert blocks[0] == blocks[1]
