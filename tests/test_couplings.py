"""Couplings as values: printed, made into masks, and of a subtree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from coupling_cases import (
    ATTENTION,
    IMAGES,
    PERCEPTRON,
    RESIDUAL,
    STACKED,
    attention,
    perceptron,
    residual,
    shaped,
    stacked,
)
from flax import nnx

import agp_jax as agp
from agp_jax.trees import flatten_with_paths

# Printing


def test_printing_shows_groups_and_what_is_fixed():
    couplings = agp.find_couplings(perceptron, PERCEPTRON, shaped(1, 3))
    lines = couplings.table().splitlines()
    assert lines[:4] == [
        "up[1]: 5 units, exact",
        "    each bias[0]",
        "    in   down[0]",
        "    out  up[1]",
    ]
    assert [line.split(":")[0] for line in lines[4:]] == [
        "fixed down[1] 0",
        "fixed up[0] 0",
    ]
    heads = agp.find_couplings(attention, ATTENTION, shaped(2, 5, 6)).groups[0]
    assert "    out  qkv[1] x 12" in str(heads).splitlines()


def test_printing_couplings_names_what_units_are_and_joins_equal_blocks():
    def network(params, x):
        for block in params.values():
            queries, keys, values = jnp.einsum("td,cdhf->cthf", x, block["qkv"])
            scores = jax.nn.softmax(jnp.einsum("qhf,khf->hqk", queries, keys))
            x += jnp.einsum("hqk,khf,hfd->qd", scores, values, block["out"])
            x += jnp.maximum(x @ block["up"], 0) @ block["down"]
        return x @ jnp.ones((8, 2))

    shapes = dict(qkv=(3, 8, 4, 2), out=(4, 2, 8), up=(8, 16), down=(16, 8))
    block = {name: shaped(*shape) for name, shape in shapes.items()}
    params = {f"block{i}": block for i in range(3)}
    text = str(agp.find_couplings(network, params, shaped(5, 8)))
    lines = text.splitlines()
    assert "block[0-2]/qkv[2]: 4 heads, in 2 leaves, exact" in lines
    assert "block[0-2]/qkv[3]: 2 features of heads, in 2 leaves, exact" in lines
    assert "block[0-2]/up[1]: 16 hidden units, in 2 leaves, exact" in lines
    assert len(lines) < 12


# Masks


def test_masks_are_false_on_the_removed_slices_alone():
    couplings = agp.find_couplings(residual, RESIDUAL, IMAGES)
    removed = {"params/conv0[3]": [2], "params/conv1[3]": [5, 0]}
    expected = jax.tree.map(lambda x: np.ones(x.shape, bool), RESIDUAL)
    params, stats = expected["params"], expected["batch_stats"]
    params["conv0"][..., 2] = params["conv2"][..., 2] = params["head"][2] = False
    params["conv1"][:, :, 2] = False
    params["conv1"][..., [0, 5]] = params["conv2"][:, :, [0, 5]] = False
    for name, gone in {"norm0": [2], "norm1": [0, 5], "norm2": [2]}.items():
        for leaf in (*params[name].values(), *stats[name].values()):
            leaf[gone] = False
    masks = couplings.masks(removed)
    jax.tree.map(np.testing.assert_array_equal, masks, expected)
    assert all(x.dtype == bool for x in jax.tree.leaves(masks))


def test_masks_of_nothing_keep_everything():
    couplings = agp.find_couplings(perceptron, PERCEPTRON, shaped(1, 3))
    for removed in ({}, {"up[1]": []}):
        masks = couplings.masks(removed)
        assert all(bool(mask.all()) for mask in jax.tree.leaves(masks))


def test_each_stacked_layer_may_lose_other_units():
    couplings = agp.find_couplings(stacked, STACKED, shaped(2, 3))
    removed = np.array([[0, 1], [2, 4], [1, 3]])
    masks = couplings.masks({"layers/up[2]": removed})
    expected = np.ones((3, 5), bool)
    for layer in range(3):
        expected[layer, removed[layer]] = False
    up, down = masks["layers"]["up"], masks["layers"]["down"]
    np.testing.assert_array_equal(up, np.tile(expected[:, None], (1, 4, 1)))
    np.testing.assert_array_equal(down, np.tile(expected[..., None], (1, 1, 4)))
    same = couplings.masks({"layers/up[2]": [1, 3]})["layers"]["up"]
    assert not same[:, :, [1, 3]].any() and same[:, :, [0, 2, 4]].all()


@pytest.mark.parametrize("box", [lambda key: key, nnx.RngKey])
def test_keys_of_random_numbers_have_no_mask(box):
    def fn(variables, x):
        (key,) = jax.tree.leaves(variables["key"])
        noise = jax.random.normal(key, (5,))
        return (x @ variables["up"] + noise[None]) @ variables["down"]

    variables = {"key": box(jax.random.key(0)), "up": jnp.ones((3, 5))}
    variables["down"] = jnp.ones((5, 2))
    couplings = agp.find_couplings(fn, variables, shaped(1, 3))
    masks = couplings.masks({"up[1]": [1]})
    assert masks["key"] == optax.MaskedNode()
    assert masks["up"].tolist() == [[True, False, True, True, True]] * 3


@pytest.mark.parametrize(
    "removed, message",
    [
        ({"middle[1]": [0]}, r"no group 'middle\[1\]'; the groups are: layers/down"),
        ({"layers/up[2]": [5]}, "units 0 to 4, got 5 to 5"),
        ({"layers/up[2]": [-1]}, "units 0 to 4, got -1"),
        ({"layers/up[2]": [[0], [1]]}, r"3 rows.*got an array of shape \(2, 1\)"),
        ({"layers/down[2]": [[0], [1], [2]]}, r"got an array of shape \(3, 1\)"),
        ({"layers/up[2]": 3}, r"got an array of shape \(\)"),
    ],
)
def test_wrong_names_and_numbers_raise(removed, message):
    couplings = agp.find_couplings(stacked, STACKED, shaped(2, 3))
    with pytest.raises(ValueError, match=message):
        couplings.masks(removed)


# Subtrees


def test_a_subtree_has_the_groups_of_its_leaves_by_their_paths_there():
    whole = agp.find_couplings(residual, RESIDUAL, IMAGES)
    part = whole.subtree("params")
    assert part.variables == RESIDUAL["params"]
    assert all(group.exact for group in part.groups)
    paths = {m.path for group in part.groups for m in group.members}
    assert paths == set(flatten_with_paths(RESIDUAL["params"])[0])
    removed = {group.name: [1, 3] for group in whole.groups}
    masks = part.masks({group.name: [1, 3] for group in part.groups})
    jax.tree.map(np.testing.assert_array_equal, masks, whole.masks(removed)["params"])
    assert part.frozen.keys() == {
        (path.removeprefix("params/"), axis) for path, axis in whole.frozen
    }


def test_a_subtree_without_what_must_be_zero_is_not_exact():
    """Without a masked reader a removed unit would still give sigmoid(0)."""

    def fn(variables, x):
        hidden = jax.nn.sigmoid(x @ variables["first"]["kernel"])
        return hidden @ variables["second"]["kernel"]

    variables = {"first": {"kernel": shaped(3, 4)}, "second": {"kernel": shaped(4, 2)}}
    whole = agp.find_couplings(fn, variables, shaped(1, 3))
    assert whole.groups[0].exact
    (first,) = whole.subtree("first").groups
    assert first.inexact == "second/kernel must be zero"
    (second,) = whole.subtree("second").groups
    assert second.exact and second.members[0].role == "in"


def test_a_subtree_that_is_not_there_raises():
    couplings = agp.find_couplings(residual, RESIDUAL, IMAGES)
    with pytest.raises(ValueError, match="nothing is under 'parameters'"):
        couplings.subtree("parameters")
