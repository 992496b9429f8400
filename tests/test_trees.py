"""Paths: one name for a leaf, whatever the model is made of."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from agp_jax.trees import (
    abstract_arrays,
    flatten_with_paths,
    leaves_of,
    map_children,
    map_moments,
    name_together,
    path_string,
    unflatten_around,
)

PATHS = ["encoder/bias", "encoder/kernel", "head/0/bias", "head/0/kernel"]


def make_dict():
    layer = lambda rows: {"bias": jnp.zeros(4), "kernel": jnp.ones((rows, 4))}  # noqa: E731
    return {"encoder": layer(3), "head": [layer(4)]}


class Layer(NamedTuple):
    bias: jax.Array
    kernel: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Network:
    encoder: Layer
    head: tuple


class Module(eqx.Module):
    encoder: eqx.Module | Layer
    head: list
    width: int = eqx.field(static=True)


class NnxNetwork(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.encoder = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.List([nnx.Linear(4, 4, rngs=rngs)])


class LinenHead(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, name="0")(x)


class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, x):
        return LinenHead(name="head")(linen.Dense(4, name="encoder")(x))


def make_linen():
    variables = LinenNetwork().init(jax.random.key(0), jnp.ones((1, 3)))
    return variables["params"]


def named_layers():
    return [Layer(jnp.zeros(4), jnp.ones((rows, 4))) for rows in (3, 4)]


MODELS = {
    "dicts and lists": make_dict,
    "dataclass of NamedTuples": lambda: Network(
        named_layers()[0], tuple(named_layers()[1:])
    ),
    "equinox": lambda: Module(named_layers()[0], named_layers()[1:], 4),
    "linen": make_linen,
    "nnx.State": lambda: nnx.state(NnxNetwork(), nnx.Param),
    "nnx.split": lambda: nnx.split(NnxNetwork())[1],
    "nnx pure dict": lambda: nnx.to_pure_dict(nnx.state(NnxNetwork())),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_one_model_has_the_same_paths_in_every_framework(make):
    paths, leaves, treedef = flatten_with_paths(make())
    assert paths == PATHS
    assert [x.shape for x in leaves] == [(4,), (3, 4), (4,), (4, 4)]
    abstract = jax.eval_shape(make)
    assert flatten_with_paths(abstract)[0] == PATHS
    assert treedef == jax.tree.structure(make())


def test_the_nnx_state_really_ends_in_value():
    keys, _ = jax.tree_util.tree_flatten_with_path(MODELS["nnx.State"]())[0][0]
    assert keys[-1] == GetAttrKey("value")


def test_linen_variables_keep_the_name_of_their_collection():
    variables = {"params": make_linen(), "batch_stats": {"mean": jnp.zeros(4)}}
    paths = flatten_with_paths(variables)[0]
    assert paths == ["batch_stats/mean", *(f"params/{path}" for path in PATHS)]


@pytest.mark.parametrize(
    "keys, path",
    [
        ((), ""),
        ((DictKey("a"), SequenceKey(1), GetAttrKey("w")), "a/1/w"),
        ((FlattenedIndexKey(3), DictKey(7)), "3/7"),
        ((DictKey("a"), GetAttrKey("value")), "a/value"),
        (("something else",), "something else"),
    ],
)
def test_keys_are_joined_by_slashes(keys, path):
    assert path_string(keys) == path


@flax.struct.dataclass
class Box:
    value: Any
    names: tuple = flax.struct.field(pytree_node=False, default=())


@flax.struct.dataclass
class Attention:
    query: Any
    key: Any
    value: Any


class Pair(NamedTuple):
    value: Any
    scale: Any = None


BOXED = {
    "a box": ({"a": Box(1)}, ["a"]),
    "a box of Flax": ({"a": linen.Partitioned(1, names=(None,))}, ["a"]),
    "a variable": ({"a": nnx.Param(jnp.ones(1))}, ["a"]),
    "boxes in boxes": ({"a": Box(Box(1))}, ["a/value"]),
    "a box of trees": ({"a": Box({"b": 1, "c": 2})}, ["a/value/b", "a/value/c"]),
    "a box alone": (Box(1), ["value"]),
    "one of three": (
        {"a": Attention(1, 2, 3)},
        ["a/query", "a/key", "a/value"],
    ),
    "the only one of three": ({"a": Attention(None, {}, 3)}, ["a/value"]),
    "of boxes": (
        [Attention(Box(1), Box(2), Box(3))],
        ["0/query", "0/key", "0/value"],
    ),
    "a named tuple": ({"a": Pair(1, 2)}, ["a/value", "a/scale"]),
    "one without a scale": ({"a": Pair(1)}, ["a/value"]),
    "a key": ({"a": {"value": 1}}, ["a/value"]),
}


@pytest.mark.parametrize("tree, paths", BOXED.values(), ids=BOXED)
def test_a_last_value_is_no_name_where_it_is_all_that_a_box_holds(tree, paths):
    assert flatten_with_paths(tree)[0] == paths
    is_leaf = lambda x: isinstance(x, list) and not x  # noqa: E731
    empty = jax.tree.map(lambda x: [], tree)
    assert flatten_with_paths(empty, is_leaf)[0] == paths


def test_what_is_absent_takes_the_place_of_its_box():
    tree = {
        "box": [Box(1), Box(2), nnx.Param(jnp.ones(2)), linen.Partitioned(3, names=())],
        "pair": Pair(4),
        "dict": {"kernel": 5},
        "attention": Attention(Box(6), 7, 8),
    }
    _, leaves, treedef = flatten_with_paths(tree)
    assert jax.tree.structure(unflatten_around(treedef, leaves, ())) == treedef
    assert unflatten_around(treedef, [None] * len(leaves), "-") == {
        "box": ["-"] * 4,
        "pair": Pair("-"),
        "dict": {"kernel": "-"},
        "attention": Attention("-", "-", "-"),
    }


def test_flattening_keeps_the_order_of_jax_and_skips_none():
    tree = {"b": (jnp.zeros(1), None, jnp.ones(2)), "a": [None, jnp.ones(3)]}
    paths, leaves, treedef = flatten_with_paths(tree)
    assert paths == ["a/1", "b/0", "b/2"]
    for ours, theirs in zip(leaves, jax.tree.leaves(tree), strict=True):
        assert ours is theirs
    assert treedef.unflatten(paths) == {"b": ("b/0", None, "b/2"), "a": [None, "a/1"]}


def test_a_bare_array_has_the_empty_path_and_an_empty_tree_none():
    assert flatten_with_paths(jnp.ones(2))[0] == [""]
    assert flatten_with_paths({})[0] == []


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="several leaves have the path 'a/b'; rename"):
        flatten_with_paths({"a/b": jnp.ones(2), "a": {"b": jnp.ones(3), "c": 1}})


def test_abstract_arrays_have_shapes_and_dtypes_and_what_is_no_array_is_named():
    tree = {"a": [jnp.ones((2, 3)), None, 1.0], "b": jax.ShapeDtypeStruct((4,), int)}
    found = abstract_arrays(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    shapes = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(found)]
    assert shapes == [((2, 3), "float32"), ((), "float32"), ((4,), "int32")]
    model = {"pool": eqx.nn.MaxPool2d(2), "name": "float32"}
    with pytest.raises(ValueError, match="pool/operation is no array.*eqx.partition"):
        abstract_arrays({"pool": model["pool"]})
    with pytest.raises(ValueError, match="name is no array but 'float32'"):
        abstract_arrays(model)
    with pytest.raises(ValueError, match="a leaf is no array"):
        abstract_arrays(max)


def mirrored(params, state):
    """For each leaf of the state the path of the parameter it mirrors, or None."""
    paths = flatten_with_paths(params)[0]
    result = map_moments(lambda leaf, path: path, state, params, paths)
    assert jax.tree.structure(result) == jax.tree.structure(state)
    return [x if isinstance(x, str) else None for x in jax.tree.leaves(result)]


def adam_state(params):
    return optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_moments_mirror_their_parameters_in_every_framework(make):
    params = make()
    assert mirrored(params, adam_state(params)) == [None, *PATHS, *PATHS]


def kernels_of(params):
    return jax.tree.map(lambda x: x.ndim == 2, params)


def labels_of(params):
    return jax.tree.map(lambda x: "adam" if x.ndim == 2 else "sgd", params)


SGD = optax.sgd(0.1, momentum=0.9)
OPTIMIZERS = {  # how many leaves of the state mirror each bias and each kernel
    "sgd": (optax.sgd(0.1), 0, 0),
    "momentum": (SGD, 1, 1),
    "adamw": (optax.adamw(1e-3), 2, 2),
    "chain": (optax.chain(optax.ema(0.9), SGD), 2, 2),
    "MultiSteps": (optax.MultiSteps(optax.adam(1e-3), 2), 3, 3),
    "apply_if_finite": (optax.apply_if_finite(SGD, 3), 1, 1),
    "inject_hyperparams": (optax.inject_hyperparams(optax.adam)(1e-3), 2, 2),
    "masked": (optax.masked(optax.adam(1e-3), kernels_of), 0, 2),
    "partition": (
        optax.partition({"adam": optax.adam(1e-3), "sgd": SGD}, labels_of),
        *(1, 2),
    ),
    "adafactor": (
        optax.adafactor(1e-3, min_dim_size_to_factor=2, momentum=0.9),
        *(2, 1),  # biases are too small to factor
    ),
}


@pytest.mark.parametrize("tx, biases, kernels", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_mirrors_are_found_wherever_an_optimizer_keeps_them(tx, biases, kernels):
    params = make_dict()
    found = mirrored(params, tx.init(params))
    for path in PATHS:
        assert found.count(path) == (biases if path.endswith("bias") else kernels)


def test_only_trees_like_the_parameters_mirror_them():
    params = {"a": {"kernel": jnp.ones(3)}, "kernel": jnp.ones(3)}
    others = [
        {"a": {"kernel": jnp.ones(3)}},
        {"a": {"kernel": jnp.ones(3)}, "b": jnp.ones(3)},
        {"a": jnp.ones(3), "kernel": jnp.ones(3)},
        {"a": {"kernel": [jnp.ones(3)]}, "kernel": jnp.ones(3)},
        (jnp.ones(3), jnp.ones(3)),
    ]
    for other in others:
        assert set(mirrored(params, {"mu": other})) == {None}
    assert mirrored(params, [others, (params,)])[-2:] == ["a/kernel", "kernel"]


def test_masked_nodes_may_stand_for_any_part_of_a_mirror():
    params = {"a": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "b": jnp.ones(3)}
    masked = optax.MaskedNode()
    state = {
        "branch": {"a": masked, "b": jnp.ones(3)},
        "leaf": {"a": {"kernel": masked, "bias": jnp.ones(3)}, "b": masked},
        "all": masked,
    }
    assert mirrored(params, state) == ["b", "a/bias"]


def test_what_has_another_shape_or_holds_no_floats_is_no_mirror():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(4)}
    state = [
        {"a": jnp.ones(3), "b": jnp.ones(4)},
        {"a": jnp.ones((4, 3)), "b": 1.0},
        {"a": jnp.ones((3, 4), jnp.int32), "b": jnp.ones(4, bool)},
        {"a": jnp.ones((3, 4), jnp.bfloat16), "b": jax.random.key(0)},
    ]
    found = mirrored(params, state)
    assert found == [None, "b", None, None, None, None, "a", None]


def test_leaves_that_mirror_nothing_come_back_untouched():
    params = {"a": jnp.ones(2)}
    state = {"count": jnp.int32(3), "mu": params, "note": "text", "none": None}
    result = map_moments(lambda leaf, add: leaf + add, state, params, [5.0])
    assert result["count"] is state["count"]
    assert result["note"] is state["note"] and result["none"] is None
    assert result["mu"]["a"].tolist() == [6.0, 6.0]


def test_a_bare_array_is_mirrored_by_its_shape():
    params = jnp.ones((2, 3))
    assert mirrored(params, adam_state(params)) == [None, "", ""]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_leaves_are_found_by_their_paths_in_every_framework(make):
    tree = make()
    for other in MODELS.values():
        found = leaves_of(tree, flatten_with_paths(other())[0], "masks")
        for ours, theirs in zip(found, jax.tree.leaves(tree), strict=True):
            assert ours is theirs


def test_leaves_may_be_absent_but_not_unknown():
    paths = ["a/bias", "a/kernel", "b"]
    tree = {"a": {"kernel": 1, "bias": None}, "b": optax.MaskedNode()}
    assert leaves_of(tree, paths, "masks") == [None, 1, None]
    assert leaves_of({"b": 2}, paths, "masks") == [None, None, 2]
    assert leaves_of(None, paths, "masks") == [None, None, None]
    with pytest.raises(ValueError, match="the scores have 'a/kernels', which is no"):
        leaves_of({"a": {"kernels": 1}}, paths, "the scores")


def test_children_are_what_a_node_holds_directly():
    node = {"a": (1, 2), "b": [3], "c": None}
    assert map_children(lambda x: [x], node) == {"a": [(1, 2)], "b": [[3]], "c": [None]}
    pairs = map_children(lambda x, y: (x, y), Layer(1, (2,)), Layer(3, "four"))
    assert pairs == Layer((1, 3), ((2,), "four"))
    leaf = jnp.ones(2)
    assert map_children(lambda x: None, leaf) is leaf
    assert map_children(lambda x: 1, ()) == ()


def test_names_are_shared_by_whole_products_alone():
    paths = ["a1/b1", "a1/b2", "a2/b1", "a3/b1", "c"]
    named = list(name_together((path, None) for path in paths))
    assert [name for name, _, _ in named] == ["a1/b[1-2]", "a2/b1", "a3/b1", "c"]
    assert sorted(path for _, _, held in named for path in held) == paths
    entries = [("w2", 1), ("w10", 1), ("w3", 2), ("w4", 1)]
    assert list(name_together(entries)) == [
        ("w[2,4,10]", 1, ["w2", "w10", "w4"]),
        ("w3", 2, ["w3"]),
    ]
