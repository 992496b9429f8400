"""Checks of a cut: how the thinned function differs from the masked one."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from agp_jax.couplings import Couplings, Group
from agp_jax.masks import apply_masks
from agp_jax.programs.grouping import find_couplings
from agp_jax.thinning.cuts import Cut, cut_units
from agp_jax.thinning.replay import thin_function
from agp_jax.thinning.trees import thin
from agp_jax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class CutReport:
    """How the thinned function differs from the masked one.

    Attributes:
      error: the largest difference of an output, relative to its largest entry.
      groups: the error that each group or branch makes by itself, where it is above
        `tolerance`.
      tolerance: up to here a difference counts as rounding.
    """

    error: float
    groups: Mapping[str, float]
    tolerance: float

    def __str__(self) -> str:
        is_equal = self.error <= self.tolerance
        verdict = "equals the masked one" if is_equal else "differs from the masked one"
        within = "within" if is_equal else "by more than"
        lines = [
            f"the thinned function {verdict} {within} {self.tolerance:g}: "
            f"the error is {self.error:.1e}"
        ]
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

    Returns:
      A `CutReport`: `error`, the largest relative difference, and `groups`, who made
      it. Print it for a sentence.

    >>> import agp_jax as agp
    >>> import jax.numpy as jnp
    >>> def mlp(params, x):
    ...     return jnp.maximum(x @ params["up"], 0) @ params["down"]
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    >>> couplings = agp.find_couplings(mlp, params, jnp.ones((1, 4)))
    >>> masks = couplings.masks({"up[1]": [0, 3]})
    >>> cut = agp.plan_cut(masks, couplings)
    >>> print(check_cut(mlp, params, masks, cut, jnp.ones((1, 4))))
    the thinned function equals the masked one within 1e-05: the error is 0.0e+00
    """
    masked = apply_masks(variables, masks)
    expected = jax.jit(fn)(masked, *inputs)

    def error_of(cut: Cut) -> float:
        thinned = jax.jit(thin_function(fn, variables, cut))
        return _relative_error(expected, thinned(thin(masked, cut), *inputs))

    error = error_of(cut)
    groups: dict[str, float] = {}
    if not error <= tolerance:
        for name, part in _parts_of(cut, find_couplings(fn, variables, *inputs)):
            alone = error_of(part)
            if not alone <= tolerance:
                groups[name] = alone
    return CutReport(error, groups, tolerance)


def _parts_of(cut: Cut, couplings: Couplings) -> Iterator[tuple[str, Cut]]:
    """What a cut removes of each group and branch, by name, as cuts of their own."""
    none = [np.zeros(group.shape, bool) for group in couplings.groups]
    for i, group in enumerate(couplings.groups):
        dead = _units_in(cut, group)
        if dead.any():
            yield group.name, cut_units(couplings, [*none[:i], dead, *none[i + 1 :]])
    for branch in couplings.branches:
        if cut.gone.keys() >= {*branch.leaves}:
            gone = {path: cut.gone[path] for path in branch.leaves}
            yield branch.name, cut_units(couplings, none, gone)


def _units_in(cut: Cut, group: Group) -> np.ndarray:
    """Which units of a group a cut removes: bools of the group's shape."""
    *layers, _ = group.shape
    members = [m for m in group.members if m.path not in cut.gone]
    gone = np.full(group.shape, bool(members))
    for member in members:
        flags = np.zeros((*layers, cut.shapes[member.path][member.axis]), bool)
        kept = cut.get(member.path, {}).get(member.axis)
        if kept is None:
            return np.zeros(group.shape, bool)
        if kept.ndim == 2 and 0 in cut[member.path]:  # as the first in those that go
            rows = np.broadcast_to(kept[:1], (*layers, kept.shape[-1])).copy()
            rows[cut[member.path][0]] = kept
            kept = rows
        rows = np.broadcast_to(kept, (*layers, kept.shape[-1]))
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
