"""Thinning of optimizer states: what stays of moments, histories and masks."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agp_jax.packing import PackedMask
from agp_jax.thinning.cuts import Cut, expect_cut
from agp_jax.thinning.trees import is_packed, take_kept, thin, thin_leaf
from agp_jax.trees import (
    PyTree,
    Shape,
    abstract_arrays,
    flatten_with_paths,
    map_subtrees_like,
)


def thin_opt_state(opt_state: optax.OptState, params: PyTree, cut: Cut) -> PyTree:
    """What stays of any optax state: moments, masks of `prune`, moving averages.

    A subtree with the paths of the parameters belongs to them leaf by leaf, in the
    variables of `nnx.Optimizer.opt_state` too. A leaf of it may have its parameter's
    shape, that shape after other axes (a history), or one entry. The factored moments
    of `adafactor` are means over an axis; they become the means over what stays, if
    what goes has been zero. Of weights that had gradients before they were masked a
    rest stays in them, and fades. What belongs to a parameter that is gone is None.

    Args:
      opt_state: the state of an optimizer for `params`.
      params: the parameters before the cut; arrays or `jax.ShapeDtypeStruct`.
      cut: of a tree with the paths of `params`; `cut.subtree("params")` for those of a
        linen module.

    Raises:
      ValueError: if a leaf belongs to a cut parameter and has another shape, or seems
        to belong to one by its place or size, and it is not known how.

    >>> import numpy as np
    >>> params, cut = {"w": jnp.ones(3)}, Cut({"w": {0: np.array([0, 2])}}, {"w": (3,)})
    >>> state = optax.sgd(0.1, momentum=0.9).init(params)
    >>> thin_opt_state(state, params, cut)[0].trace
    {'w': Array([0., 0.], dtype=float32)}
    """
    expect_cut(cut)
    paths, leaves, _ = flatten_with_paths(params)
    thin(abstract_arrays(params), cut)  # has the cut these paths?

    def thin_mirror(leaf: Any, i: int) -> Any:
        return leaf if isinstance(leaf, _Done) else _Done(thin_moment(leaf, i))

    def thin_moment(leaf: Any, i: int) -> Any:
        if paths[i] in cut.gone:
            return None
        kept = cut.get(paths[i], {})
        if not kept:
            return leaf
        shape = cut.shapes[paths[i]]
        if isinstance(leaf, PackedMask):
            return thin_leaf(leaf, kept, shape, paths[i])
        extra = np.ndim(leaf) - len(shape)
        if extra >= 0 and np.shape(leaf)[extra:] == shape:
            return take_kept(leaf, _after(kept, extra, shape))
        if math.prod(np.shape(leaf)) == 1:
            return leaf
        raise ValueError(_explain_unknown(leaf, paths[i], shape))

    # Factored moments have other shapes and are done first, out of the way.
    state = jax.tree.map(
        lambda x: _Done(_thin_factored(x, params, cut)) if _is_factored(x) else x,
        opt_state,
        is_leaf=lambda x: _is_factored(x) or is_packed(x),
    )
    state = map_subtrees_like(thin_mirror, state, params, is_leaf=is_packed)
    shapes = {p: np.shape(x) for p, x in zip(paths, leaves, strict=True)}
    state = _thin_rest(state, shapes, cut)
    return jax.tree.map(
        lambda x: x.value if isinstance(x, _Done) else x, state, is_leaf=is_packed
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Done:
    """Part of a state that is thinned already: a leaf, as nothing knows its fields."""

    value: Any


def _thin_rest(state: PyTree, shapes: Mapping[str, Shape], cut: Cut) -> PyTree:
    """Thins what is in no subtree like the parameters, if it is known how.

    `nnx.state` drops what holds no arrays, and with it the places of dense parameters
    among masks; what is left has its parameter's shape and ends with its path. Moments
    that are rows and columns, as in sm3, or one long vector, are refused.
    """
    cut_paths = [path for path in shapes if cut.get(path) or path in cut.gone]
    by_size = {math.prod(cut.shapes[path]): path for path in reversed(cut_paths)}
    if cut_paths:
        by_size.setdefault(sum(map(math.prod, shapes.values())), "all parameters")

    def thin_one(place: str, leaf: Any) -> Any:
        shape = getattr(leaf, "shape", ())
        if isinstance(leaf, _Done) or math.prod(shape) == 1:
            return leaf
        ends = [path for path in shapes if f"/{place}".endswith(f"/{path}")]
        owner = max(ends, key=len, default=None)
        if owner is not None and shape == shapes[owner]:
            return None if owner in cut.gone else take_kept(leaf, cut.get(owner, {}))
        owner = next((p for p in cut_paths if p and f"/{p}/" in f"/{place}/"), None)
        if owner is None and jnp.issubdtype(leaf.dtype, jnp.inexact):
            owner = by_size.get(math.prod(shape))
        if owner is not None:
            raise ValueError(_explain_unknown(leaf, owner, cut.shapes.get(owner)))
        return leaf

    places, leaves, treedef = flatten_with_paths(state)
    return treedef.unflatten(map(thin_one, places, leaves))


def _explain_unknown(leaf: Any, path: str, shape: Shape | None) -> str:
    known = "" if shape is None else f", whose shape is {shape}"
    return (
        f"the optimizer keeps an array of shape {np.shape(leaf)} for {path}{known}, "
        f"and it is not known how that divides; make a new state with "
        f"optimizer.init(thin(params, cut))"
    )


def _is_factored(x: Any) -> bool:
    return isinstance(x, optax.FactoredState)


def _after(
    kept: Mapping[int, np.ndarray], extra: int, shape: Sequence[int]
) -> dict[int, np.ndarray]:
    """A cut's indices for an array with `extra` more axes in front."""
    if extra and any(indices.ndim == 2 for indices in kept.values()):
        raise ValueError(
            f"an optimizer's history of stacked layers of shape {tuple(shape)} that "
            f"are cut differently is not supported; make a new state"
        )
    return {axis + extra: indices for axis, indices in kept.items()}


def _thin_factored(
    state: optax.FactoredState, params: PyTree, cut: Cut
) -> optax.FactoredState:
    """Thins the moments of `adafactor`: means of squares over one of two axes.

    Which of the two is `v_row` depends on their sizes, hence may change.
    """
    paths, _, _ = flatten_with_paths(params)
    rows: dict[int, Any] = {}
    columns: dict[int, Any] = {}
    map_subtrees_like(lambda x, i: rows.setdefault(i, x), state.v_row, params)
    map_subtrees_like(lambda x, i: columns.setdefault(i, x), state.v_col, params)
    for i, row in rows.items():
        if paths[i] in cut.gone:
            rows[i] = columns[i] = None
            continue
        kept = cut.get(paths[i], {})
        if kept and math.prod(np.shape(row)) > 1:
            shape, new_shape = cut.shapes[paths[i]], cut.thin_shape(paths[i])
            *_, smaller, larger = np.argsort(shape).tolist()
            *_, new_smaller, new_larger = np.argsort(new_shape).tolist()
            if {smaller, larger} != {new_smaller, new_larger}:
                raise ValueError(
                    f"the factored moments of {paths[i]} are means over axes "
                    f"{smaller} and {larger}, but of the thinned shape {new_shape} the "
                    f"largest axes are others; make a new state"
                )
            means = (
                _thin_mean(row, kept, shape, larger),
                _thin_mean(columns[i], kept, shape, smaller),
            )
            rows[i], columns[i] = means if larger == new_larger else means[::-1]

    def thin_whole(leaf: Any, i: int) -> Any:
        if paths[i] in cut.gone:
            return None
        is_whole = np.shape(leaf) == cut.shapes[paths[i]]
        return take_kept(leaf, cut.get(paths[i], {})) if is_whole else leaf

    return state._replace(
        v_row=map_subtrees_like(lambda _, i: rows[i], state.v_row, params),
        v_col=map_subtrees_like(lambda _, i: columns[i], state.v_col, params),
        v=map_subtrees_like(thin_whole, state.v, params),
    )


def _thin_mean(
    mean: Any, kept: Mapping[int, np.ndarray], shape: Sequence[int], over: int
) -> Any:
    """Thins the mean of squares over axis `over`, of which what goes was zero."""
    if over == 0 and any(indices.ndim == 2 for indices in kept.values()):
        raise ValueError("factored moments over the layers of a stack are not thinned")
    rest = {axis - (axis > over): x for axis, x in kept.items() if axis != over}
    mean = take_kept(mean, rest)
    if over in kept and not isinstance(mean, jax.ShapeDtypeStruct):
        mean = mean * (shape[over] / kept[over].shape[-1])
    return mean
