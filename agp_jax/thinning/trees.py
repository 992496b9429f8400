"""Thinning of trees: parameters, statistics, masks, gradients, moving averages."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.packing import PackedMask, pack, unpack
from agp_jax.shardings import bring_together
from agp_jax.thinning.cuts import Cut, expect_cut
from agp_jax.trees import (
    PyTree,
    abstract_array,
    flatten_with_paths,
    unflatten_around,
)


def thin(tree: PyTree, cut: Cut) -> PyTree:
    """What stays of any tree with the cut's paths.

    Parameters, batch statistics, masks, gradients, moving averages; also parts of
    them. Works inside `jit`. Of arrays on many devices nothing comes to the host, and
    the axes that are not cut stay divided. None stands in the place of a leaf that is
    gone, and of the box that holds nothing else.

    Raises:
      ValueError: if a leaf has a path or shape that the cut does not know.

    >>> import numpy as np
    >>> cut = Cut({"bias": {0: np.array([0, 2])}}, {"bias": (3,)})
    >>> thin({"bias": jnp.array([1.0, 2.0, 3.0])}, cut)
    {'bias': Array([1., 3.], dtype=float32)}
    """
    expect_cut(cut)
    entries, treedef = jax.tree.flatten(tree, is_leaf=is_packed)
    numbered = treedef.unflatten(range(len(entries)))
    paths, _, _ = flatten_with_paths(numbered)
    leaves = []
    for path, leaf in zip(paths, entries, strict=True):
        if path not in cut.shapes:
            if not is_packed(leaf):
                abstract_array(leaf, path)  # says so if it is no array
            raise ValueError(
                f"the cut has no {path!r}; it has {', '.join(list(cut.shapes)[:3])}, "
                f"... For a part of the variables use cut.subtree(...)"
            )
        thinned = thin_leaf(leaf, cut.get(path, {}), cut.shapes[path], path)
        leaves.append(None if path in cut.gone else thinned)
    return unflatten_around(treedef, leaves, None)


def thin_leaf(
    leaf: Any, kept: Mapping[int, np.ndarray], shape: tuple[int, ...], path: str
) -> Any:
    if isinstance(leaf, PackedMask):
        return pack(thin_leaf(unpack(leaf), kept, shape, path)) if kept else leaf
    if np.shape(leaf) != shape:
        raise ValueError(
            f"{path} has shape {np.shape(leaf)}, but the cut is of {shape}; has it "
            f"been thinned already?"
        )
    return take_kept(leaf, kept)


def take_kept(leaf: Any, kept: Mapping[int, np.ndarray]) -> Any:
    """The kept indices of an array, where it is: on the host, a device or many."""
    if not kept:
        return leaf
    shape = list(np.shape(leaf))
    for axis, indices in kept.items():
        shape[axis] = indices.shape[-1]
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
    if isinstance(leaf, np.ndarray):
        return _take_all(leaf, kept, np.take_along_axis)
    if isinstance(leaf, jax.core.Tracer) or len(leaf.sharding.device_set) > 1:
        return _take_all(leaf, kept, _take_on_devices)
    # On one device NumPy is much faster than compiling a gather for every shape.
    taken = _take_all(np.asarray(leaf), kept, np.take_along_axis)
    return jax.device_put(taken, leaf.sharding)


def _take_all(
    leaf: Any, kept: Mapping[int, np.ndarray], take: Callable[..., Any]
) -> Any:
    for axis, indices in sorted(kept.items()):  # rows are of the layers that stay
        rows = indices.ndim == 2
        shape = [1] * leaf.ndim
        shape[axis] = indices.shape[-1]
        if rows:
            shape[0] = len(indices)
        leaf = take(leaf, indices.reshape(shape), axis)
    return leaf


def _take_on_devices(leaf: jax.Array, indices: np.ndarray, axis: int) -> jax.Array:
    leaf = bring_together(leaf, axis)
    if indices.size == indices.shape[axis]:
        return jnp.take(leaf, indices.reshape(-1), axis, mode="clip")
    return jnp.take_along_axis(leaf, indices, axis, mode="clip")


def is_packed(x: Any) -> bool:
    return isinstance(x, PackedMask)
