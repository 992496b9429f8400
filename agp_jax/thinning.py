"""Thinning: trees, optimizer states and functions without what a cut removes."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agp_jax.couplings import Group, find_couplings
from agp_jax.cuts import Cut, cut_units
from agp_jax.masks import apply_masks
from agp_jax.packing import PackedMask, pack, unpack
from agp_jax.programs.analyses import abstract_array
from agp_jax.replay import thin_function
from agp_jax.shardings import bring_together
from agp_jax.trees import PyTree, flatten_with_paths, map_mirrored


def thin(tree: PyTree, cut: Cut) -> PyTree:
    """What stays of any tree with the cut's paths.

    Parameters, batch statistics, masks, gradients, moving averages; also parts of
    them. Works inside `jit`. Of arrays on many devices nothing comes to the host, and
    the axes that are not cut stay divided.

    Raises:
      ValueError: if a leaf has a path or shape that the cut does not know.
    """
    entries, treedef = jax.tree.flatten(tree, is_leaf=_is_packed)
    numbered = treedef.unflatten(range(len(entries)))
    paths, _, _ = flatten_with_paths(numbered)
    leaves = []
    for path, leaf in zip(paths, entries, strict=True):
        if path not in cut.shapes:
            raise ValueError(
                f"the cut has no {path!r}; it has {', '.join(list(cut.shapes)[:3])}, "
                f"... For a part of the variables use cut.subtree(...)"
            )
        leaves.append(_thin_leaf(leaf, cut.get(path, {}), cut.shapes[path], path))
    return treedef.unflatten(leaves)


def _thin_leaf(
    leaf: Any, kept: Mapping[int, np.ndarray], shape: tuple[int, ...], path: str
) -> Any:
    if isinstance(leaf, PackedMask):
        return pack(_thin_leaf(unpack(leaf), kept, shape, path)) if kept else leaf
    if jnp.shape(leaf) != shape:
        raise ValueError(
            f"{path} has shape {jnp.shape(leaf)}, but the cut was planned for {shape}; "
            f"has it been thinned already?"
        )
    return _take(leaf, kept)


def _take(leaf: Any, kept: Mapping[int, np.ndarray]) -> Any:
    """The kept indices of an array, where it is: on the host, a device or many."""
    if not kept:
        return leaf
    shape = list(jnp.shape(leaf))
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
    for axis, indices in kept.items():
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


def thin_opt_state(opt_state: optax.OptState, params: PyTree, cut: Cut) -> PyTree:
    """What stays of any optax state: moments, masks of `prune`, moving averages.

    A subtree with the structure of the parameters belongs to them leaf by leaf. A leaf
    of it may have its parameter's shape, that shape after other axes (a history), or
    one entry. The factored moments of `adafactor` are means over an axis; they become
    the means over what stays, if what goes has been zero. Of weights that had gradients
    before they were masked a rest stays in them, and fades.

    Args:
      opt_state: the state of an optimizer for `params`.
      params: the parameters before the cut; arrays or `jax.ShapeDtypeStruct`.
      cut: of a tree with the paths of `params`; `cut.subtree("params")` for those of a
        linen module.

    Raises:
      ValueError: if a leaf belongs to a cut parameter and has another shape.
    """
    paths, leaves, _ = flatten_with_paths(params)
    thin(jax.tree.map(abstract_array, params), cut)  # has the cut these paths?

    def thin_mirror(leaf: Any, i: int) -> Any:
        kept = cut.get(paths[i], {})
        if not kept or isinstance(leaf, _Done):
            return leaf
        shape = cut.shapes[paths[i]]
        if isinstance(leaf, PackedMask):
            return _thin_leaf(leaf, kept, shape, paths[i])
        extra = jnp.ndim(leaf) - len(shape)
        if extra >= 0 and jnp.shape(leaf)[extra:] == shape:
            return _take(leaf, _after(kept, extra, shape))
        if math.prod(jnp.shape(leaf)) == 1:
            return leaf
        raise ValueError(
            f"the optimizer keeps an array of shape {jnp.shape(leaf)} for "
            f"{paths[i]}, whose shape is {shape}, and it is not known how that "
            f"divides; make a new state with optimizer.init(thin(params, cut))"
        )

    # Factored moments have other shapes and are done first, out of the way.
    state = jax.tree.map(
        lambda x: _Done(_thin_factored(x, params, cut)) if _is_factored(x) else x,
        opt_state,
        is_leaf=lambda x: _is_factored(x) or _is_packed(x),
    )
    state = map_mirrored(thin_mirror, state, params, is_leaf=_is_packed)
    return jax.tree.map(
        lambda x: x.value if isinstance(x, _Done) else x, state, is_leaf=_is_packed
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Done:
    """Part of a state that is thinned already: a leaf, as nothing knows its fields."""

    value: Any


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedMask)


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
    map_mirrored(lambda x, i: rows.setdefault(i, x), state.v_row, params)
    map_mirrored(lambda x, i: columns.setdefault(i, x), state.v_col, params)
    for i, row in rows.items():
        kept = cut.get(paths[i], {})
        if kept and math.prod(jnp.shape(row)) > 1:
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
        is_whole = jnp.shape(leaf) == cut.shapes[paths[i]]
        return _take(leaf, cut.get(paths[i], {})) if is_whole else leaf

    return state._replace(
        v_row=map_mirrored(lambda _, i: rows[i], state.v_row, params),
        v_col=map_mirrored(lambda _, i: columns[i], state.v_col, params),
        v=map_mirrored(thin_whole, state.v, params),
    )


def _thin_mean(
    mean: Any, kept: Mapping[int, np.ndarray], shape: Sequence[int], over: int
) -> Any:
    """Thins the mean of squares over axis `over`, of which what goes was zero."""
    if over == 0 and any(indices.ndim == 2 for indices in kept.values()):
        raise ValueError("factored moments over the layers of a stack are not thinned")
    rest = {axis - (axis > over): x for axis, x in kept.items() if axis != over}
    mean = _take(mean, rest)
    if over in kept and not isinstance(mean, jax.ShapeDtypeStruct):
        mean = mean * (shape[over] / kept[over].shape[-1])
    return mean


@dataclasses.dataclass(frozen=True)
class CutReport:
    """How the thinned function differs from the masked one.

    Attributes:
      error: the largest difference of an output, relative to its largest entry.
      groups: the error that each group makes by itself, where it is above `tolerance`.
      tolerance: up to here a difference counts as rounding.
    """

    error: float
    groups: Mapping[str, float]
    tolerance: float

    def __str__(self) -> str:
        lines = [f"relative error {self.error:.1e}"]
        lines += [f"    {error:.1e} from {name}" for name, error in self.groups.items()]
        return "\n".join(lines)


def check_cut(
    fn: Callable[..., PyTree],
    variables: PyTree,
    masks: PyTree,
    cut: Cut,
    *inputs: PyTree,
    tolerance: float = 1e-5,
) -> CutReport:
    """Compares the thinned function with the masked one on `inputs`.

    Where they differ, each group is cut by itself to tell which ones break equality:
    groups that are not exact, or whose masks do not cover all slices, such as the bias
    of a normalisation after a masked filter.

    Args:
      fn: called as `fn(variables, *inputs)`; its outputs are arrays.
      variables: before the cut, masked or not.
      masks: bool arrays at the paths of variables, as for `plan_cut`.
      cut: of the variables.
      inputs: arrays to compare on.
      tolerance: relative difference up to which the functions count as equal.
    """
    masked = apply_masks(variables, masks)
    expected = jax.jit(fn)(masked, *inputs)

    def error_of(cut: Cut) -> float:
        thinned = jax.jit(thin_function(fn, variables, cut))
        return _relative_error(expected, thinned(thin(masked, cut), *inputs))

    error = error_of(cut)
    groups: dict[str, float] = {}
    if not error <= tolerance:
        couplings = find_couplings(fn, variables, *inputs)
        for i, group in enumerate(couplings.groups):
            dead = [np.zeros(group.units, bool) for group in couplings.groups]
            dead[i] = _units_in(cut, group)
            if dead[i].any():
                alone = error_of(cut_units(couplings, dead))
                if not alone <= tolerance:
                    groups[group.name] = alone
    return CutReport(error, groups, tolerance)


def _units_in(cut: Cut, group: Group) -> np.ndarray:
    """Which units of a group a cut removes: (units,) or (layers, units)."""
    shape = (group.layers, group.units) if group.layers else (group.units,)
    gone = np.ones(shape, bool)
    for member in group.members:
        flags = np.zeros((*shape[:-1], cut.shapes[member.path][member.axis]), bool)
        kept = cut.get(member.path, {}).get(member.axis)
        if kept is None:
            return np.zeros(shape, bool)
        rows = np.broadcast_to(kept, (*shape[:-1], kept.shape[-1]))
        np.put_along_axis(flags, rows, True, axis=-1)
        gone &= ~flags[..., member.indices].any(axis=-1)
    return gone


def _relative_error(expected: PyTree, found: PyTree) -> float:
    """The largest difference over floating point outputs; NaN where either has one."""
    errors = [0.0]
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape == b.shape and np.issubdtype(a.dtype, np.inexact) and a.size:
            errors.append(float(np.abs(a - b).max() / (np.abs(a).max() or 1.0)))
    return float(np.max(errors))
