"""Names for the leaves of any pytree.

The core sees a model as a tree of arrays whose leaves have path strings such as
`"stage1/block0/conv1/kernel"`: the same for dicts, linen variables, NNX states and
dataclasses.
"""

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import (
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    KeyPath,
    PyTreeDef,
    SequenceKey,
)

PyTree = Any
Shape = tuple[int, ...]


def path_string(keys: KeyPath) -> str:
    """The keys of a leaf, joined by slashes.

    >>> path_string((DictKey("layers"), SequenceKey(0), GetAttrKey("kernel")))
    'layers/0/kernel'
    """
    return "/".join(_key_name(key) for key in keys)


def flatten_with_paths(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[str], list[Any], PyTreeDef]:
    """The paths, the leaves and the structure of `tree`, in one order.

    A path is that of the keys. NNX stores an array in the attribute `value` of its
    variable, which holds nothing else; that last key is dropped, so a parameter has one
    name inside and outside of NNX. A `value` beside a `query` and a `key` has its name.

    Raises:
      ValueError: if two leaves have the same path, as in `{"a/b": 1, "a": {"b": 2}}`.
    """
    paths, leaves, treedef = _flatten(tree, is_leaf)
    if len(set(paths)) < len(paths):
        shared = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise ValueError(f"several leaves have the path {shared!r}; rename one")
    return paths, leaves, treedef


def abstract_array(x: Any, path: str = "") -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, without its numbers.

    Raises:
      ValueError: if it is none, such as a function or a string; `path` names it.
    """
    if not hasattr(x, "dtype") and not isinstance(x, bool | int | float | complex):
        raise ValueError(
            f"{path or 'a leaf'} is no array but {x!r}: give arrays alone; of an "
            f"Equinox model those of eqx.partition(model, eqx.is_inexact_array)"
        )
    return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))


def describe_shape(shape: Shape) -> str:
    """A shape as tables show it: `3x3x16`, and nothing for a scalar."""
    return "x".join(map(str, shape))


def expect(value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raises a ValueError that says what was expected, unless it is of this kind."""
    if not isinstance(value, kind):
        raise ValueError(f"expected {what}, got {describe(value)}")


def expect_function(value: Any, what: str) -> None:
    """Raises a ValueError, unless `value` can be called."""
    if not callable(value):
        raise ValueError(f"expected {what}, got {describe(value)}")


def expect_whole(value: Any, what: str) -> int:
    """The whole number that `value` is; else a ValueError says what it should be."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what}, got {value!r}") from None


def describe(value: Any) -> str:
    """What a value is, in a few words."""
    text = repr(value)
    short = text if len(text) <= 60 and "\n" not in text else "..."
    return f"{type(value).__name__} {short}"


def abstract_arrays(tree: PyTree) -> PyTree:
    """`tree` of the shapes and dtypes of its arrays.

    Raises:
      ValueError: names the path of a leaf that is no array.
    """
    paths, leaves, treedef = flatten_with_paths(tree)
    return treedef.unflatten(map(abstract_array, leaves, paths))


def unflatten_around(
    treedef: PyTreeDef, leaves: Sequence[Any], absent: PyTree
) -> PyTree:
    """The tree of `leaves`, with `absent` where one is None.

    Where a box holds a leaf and nothing else, as NNX variables and Flax's boxes of
    metadata do, `absent` stands in the place of the box: who finds a box in a tree may
    rely on an array in it.
    """
    tree = treedef.unflatten(range(len(leaves)))
    is_box = lambda x: not isinstance(x, tuple) and _box_key(x) is not None  # noqa: E731
    places, outer = jax.tree.flatten(tree, is_leaf=is_box)
    return outer.unflatten(
        absent
        if leaf is None
        else jax.tree.unflatten(jax.tree.structure(place), [leaf])
        for place, leaf in zip(places, leaves, strict=True)
    )


def name_together(
    entries: Iterable[tuple[str, Any]],
) -> Iterator[tuple[str, Any, list[str]]]:
    """One name for entries of equal facts whose own names differ in numbers alone.

    Args:
      entries: names, each with what else there is to tell, which can be hashed.

    Yields:
      A name, the facts, and the names of all entries that it stands for.

    >>> list(name_together([("a1/b0", 8), ("a1/b1", 8), ("a2/b0", 8), ("a2/b1", 8)]))
    [('a[1-2]/b[0-1]', 8, ['a1/b0', 'a1/b1', 'a2/b0', 'a2/b1'])]
    """
    alike: dict[tuple[str, Any], list[str]] = {}
    for name, facts in entries:
        alike.setdefault((re.sub(r"\d+", "#", name), facts), []).append(name)
    for (_, facts), names in alike.items():
        for shared, held in _name_products(names):
            yield shared, facts, held


def _name_products(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Names that have all combinations of their numbers, together; else in parts."""
    numbers = [re.findall(r"\d+", name) for name in names]
    columns = [sorted({*column}, key=int) for column in zip(*numbers, strict=True)]
    if math.prod(map(len, columns)) == len(names):
        spelled = iter([_spell(column) for column in columns])
        yield re.sub(r"\d+", lambda _: next(spelled), names[0]), names
        return
    place = next(i for i, column in enumerate(columns) if len(column) > 1)
    for value in columns[place]:
        part = [x for x, n in zip(names, numbers, strict=True) if n[place] == value]
        yield from _name_products(part)


def _spell(numbers: Sequence[str]) -> str:
    """A number, a range or a list of them."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return first
    if int(last) - int(first) == len(numbers) - 1:
        return f"[{first}-{last}]"
    return f"[{','.join(numbers)}]"


def leaves_of(tree: PyTree | None, paths: Sequence[str], what: str) -> list[Any]:
    """The leaves of `tree` at `paths`, None where it has none.

    Trees are matched by their paths, so that it does not matter whether a container is
    a dict or an NNX state, and parts of the tree may be absent or `optax.MaskedNode()`.

    Raises:
      ValueError: if `tree` has other leaves too; `what` names it.
    """
    own_paths, leaves, _ = flatten_with_paths(tree)
    unknown = set(own_paths) - set(paths)
    if unknown:
        raise ValueError(f"{what} have {min(unknown)!r}, which is no parameter")
    by_path = dict(zip(own_paths, leaves, strict=True))
    return [by_path.get(path) for path in paths]


def map_moments(
    function: Callable[[Any, Any], Any],
    tree: PyTree,
    params: PyTree,
    values: Sequence[Any],
) -> PyTree:
    """Applies `function(leaf, value)` to the leaves of `tree` that mirror a parameter.

    An optimizer keeps moments in trees like the parameters, somewhere in its state. A
    subtree mirrors the parameters if it has their paths, where `optax.MaskedNode()` may
    stand in the place of any part, and a leaf of it mirrors its parameter if it has
    floating point numbers and the parameter's shape. Containers may be others, such as
    the variables in which `nnx.Optimizer` keeps moments.

    Args:
      function: of a leaf of `tree` and of the entry of `values` for its parameter.
      tree: the optimizer's state.
      params: the parameters.
      values: one for each leaf of `params`.
    """
    shapes = [np.shape(x) for x in jax.tree.leaves(params)]

    def map_leaf(leaf: Any, i: int) -> Any:
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        mirrors = is_float and np.shape(leaf) == shapes[i]
        return function(leaf, values[i]) if mirrors else leaf

    return map_subtrees_like(map_leaf, tree, params)


def map_subtrees_like(
    function: Callable[[Any, int], Any],
    tree: PyTree,
    params: PyTree,
    *,
    is_leaf: Callable[[Any], bool] = lambda x: False,
) -> PyTree:
    """Applies `function(leaf, number of its parameter)` to all subtrees like `params`.

    Such subtrees as `map_moments` looks for, but every leaf of them, whatever its type
    and shape; `is_leaf` says what counts as one.
    """
    paths, _, _ = flatten_with_paths(params)
    numbers = {path: i for i, path in enumerate(paths)}

    def map_mirror(subtree: PyTree) -> PyTree | None:
        """None for a subtree that does not mirror the parameters."""
        found, leaves, structure = _flatten(
            subtree, lambda x: _is_masked_node(x) or is_leaf(x)
        )
        pairs = list(zip(found, leaves, strict=True))
        own = {path for path, x in pairs if not _is_masked_node(x)}
        hidden = [path for path, x in pairs if _is_masked_node(x)]
        rest = numbers.keys() - own
        if not own <= numbers.keys() or not all(_is_under(hidden, x) for x in rest):
            return None
        return structure.unflatten(
            x if _is_masked_node(x) else function(x, numbers[path]) for path, x in pairs
        )

    def visit(node: PyTree) -> PyTree:
        mirror = map_mirror(node)
        return map_children(visit, node) if mirror is None else mirror

    return visit(tree)


def map_children(function: Callable[..., Any], node: PyTree, *rest: PyTree) -> PyTree:
    """Applies `function` to what `node`, and others like it, hold directly.

    A leaf holds nothing and comes back as it is.
    """
    top = jax.tree.structure(node, is_leaf=lambda x: x is not node)
    if jax.tree_util.treedef_is_leaf(top):
        return node
    children = [top.flatten_up_to(other) for other in (node, *rest)]
    return top.unflatten(map(function, *children))


def subtree_at(tree: PyTree, prefix: str) -> PyTree:
    """The part of `tree` whose paths start with `prefix`, by their paths in it.

    >>> subtree_at({"a": {"b": 1, "c": 2}}, "a/c")
    2
    """
    node, at = tree, ""
    while at != prefix:
        children, _ = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x, node=node: x is not node
        )
        for keys, child in children:
            path = f"{at}/{path_string(keys)}" if at else path_string(keys)
            if keys and f"{prefix}/".startswith(f"{path}/"):
                node, at = child, path
                break
        else:
            paths, _, _ = flatten_with_paths(tree)
            raise ValueError(f"nothing is under {prefix!r}; there are {paths}")
    return node


def _flatten(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None
) -> tuple[list[str], list[Any], PyTreeDef]:
    """`flatten_with_paths` of any tree, with whatever paths."""
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    keys_of = [keys for keys, _ in entries]
    if any(keys and _is_value(keys[-1]) for keys in keys_of):
        tree = treedef.unflatten(range(len(entries)))
        held, _ = jax.tree_util.tree_flatten_with_path(
            tree, lambda x: x is not tree and _is_value(_box_key(x))
        )
        keys_of = [keys for keys, _ in held]  # of boxes, and of what is in none
    paths = [path_string(keys) for keys in keys_of]
    return paths, [x for _, x in entries], treedef


def _is_masked_node(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_under(nodes: Sequence[str], path: str) -> bool:
    return any(not node or f"{path}/".startswith(f"{node}/") for node in nodes)


def _box_key(node: PyTree) -> Any:
    """The key of the attribute in which `node` holds a leaf, if it holds nothing else.

    None for other nodes, and for leaves.
    """
    children, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    if len(children) != 1 or not jax.tree_util.all_leaves([children[0][1]]):
        return None
    match children[0][0]:
        case (GetAttrKey() | FlattenedIndexKey() as key,):
            return key
    return None


def _is_value(key: Any) -> bool:
    return isinstance(key, GetAttrKey) and key.name == "value"


def _key_name(key: Any) -> str:
    match key:
        case DictKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index) | FlattenedIndexKey(key=index):
            return str(index)
    return str(key)
