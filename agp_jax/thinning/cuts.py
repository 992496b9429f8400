"""Cuts: which slices stay, as plain values that a checkpoint can hold."""

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.couplings import Branch, Couplings, Group, Member, slice_flags
from agp_jax.masks import expect_masks
from agp_jax.trees import PyTree, Shape, describe, expect, flatten_with_paths


@dataclasses.dataclass(frozen=True, eq=False)
class Cut(Mapping[str, Mapping[int, np.ndarray]]):
    """The indices that stay, as `{path: {axis: indices}}`.

    Indices are increasing, in a vector; or, for the stacked weights of layers, in an
    array (layers, kept) with a row for each entry that stays of the leaf's first axis.

    Attributes:
      kept: what stays along the axes that are cut; all else stays as it is.
      shapes: of all leaves, before the cut.
      gone: leaves of which nothing stays, in whose place a tree has None; and whether
        they were all zero.

    >>> cut = Cut({"bias": {0: np.array([0, 2])}}, {"bias": (3,), "scale": (3,)})
    >>> print(cut)
    bias: (3,) -> (2,)
    >>> cut.to_dict()["kept"]
    {'bias': {'0': [0, 2]}}
    """

    kept: Mapping[str, Mapping[int, np.ndarray]]
    shapes: Mapping[str, Shape]
    gone: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    def __getitem__(self, path: str) -> Mapping[int, np.ndarray]:
        return self.kept[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __bool__(self) -> bool:
        return bool(self.kept or self.gone)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cut) and self.to_dict() == other.to_dict()

    def __str__(self) -> str:
        lines = [
            f"{path}: {self.shapes[path]} -> {self.thin_shape(path)}" for path in self
        ]
        lines += [f"{path}: {self.shapes[path]} -> gone" for path in self.gone]
        return "\n".join(lines) or "nothing is cut"

    def thin_shape(self, path: str) -> Shape:
        """The shape of a leaf after the cut.

        Raises:
          ValueError: if nothing of the leaf stays.
        """
        if path in self.gone:
            raise ValueError(f"nothing of {path} stays, so it has no shape")
        axes = self.kept.get(path, {})
        return tuple(
            axes[i].shape[-1] if i in axes else size
            for i, size in enumerate(self.shapes[path])
        )

    def subtree(self, prefix: str) -> "Cut":
        """The cut of the variables under `prefix` alone, by their paths there."""
        start = prefix + "/"
        inner = lambda tree: {  # noqa: E731
            path.removeprefix(start): value
            for path, value in tree.items()
            if path.startswith(start)
        }
        shapes = inner(self.shapes)
        if not shapes:
            raise ValueError(f"nothing is under {prefix!r}; paths: {list(self.shapes)}")
        return Cut(inner(self.kept), shapes, inner(self.gone))

    def then(self, later: "Cut") -> "Cut":
        """This cut and a later one of what it leaves, as one cut."""
        expect_cut(later)
        for path, shape in later.shapes.items():
            if path not in self.shapes:
                left = "has no such path"
            elif path in self.gone:
                left = "leaves nothing of it"
            else:
                left = f"leaves {self.thin_shape(path)}"
            if left != f"leaves {shape}":
                raise ValueError(
                    f"the later cut is of {path} with shape {shape}, but this cut "
                    f"{left}"
                )
        kept = {p: dict(axes) for p, axes in self.kept.items() if p not in later.gone}
        for path, axes in later.kept.items():
            mine = kept.setdefault(path, {})
            if 0 in axes:
                mine.update({k: x[axes[0]] for k, x in mine.items() if x.ndim == 2})
            for axis, indices in axes.items():
                mine[axis] = _pick(mine[axis], indices) if axis in mine else indices
        return Cut(kept, self.shapes, {**self.gone, **later.gone})

    def to_dict(self) -> dict[str, Any]:
        """The cut as dicts, lists and numbers that JSON takes."""
        return {
            "kept": {
                path: {str(axis): indices.tolist() for axis, indices in axes.items()}
                for path, axes in self.kept.items()
            },
            "shapes": {path: list(shape) for path, shape in self.shapes.items()},
            "gone": dict(self.gone),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Cut":
        """The cut that `to_dict` has saved.

        Raises:
          ValueError: if it is none: something is missing, or an index is not along the
            axis that it should be of.
        """
        try:
            cut = cls._read(saved)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"expected a cut as Cut.to_dict() saves it, got {describe(saved)} "
                f"({type(error).__name__}: {error})"
            ) from None
        for path, axes in cut.kept.items():
            for axis, kept in axes.items():
                shape = cut.shapes.get(path, ())
                size = shape[axis] if 0 <= axis < len(shape) else 0
                steps = np.diff(kept, axis=-1)
                if (
                    kept.dtype.kind != "i"
                    or kept.ndim not in (1, 2)
                    or not (
                        0 <= kept.min(initial=0) <= kept.max(initial=0) < size
                        and (steps > 0).all()
                    )
                ):
                    raise ValueError(
                        f"the cut keeps {kept.tolist()} of the {size} indices along "
                        f"axis {axis} of {path}: expected increasing numbers of these"
                    )
        return cut

    @classmethod
    def _read(cls, saved: Mapping[str, Any]) -> "Cut":
        return cls(
            {
                path: {int(axis): np.array(indices) for axis, indices in axes.items()}
                for path, axes in saved["kept"].items()
            },
            {path: tuple(shape) for path, shape in saved["shapes"].items()},
            saved.get("gone", {}),  # older ones have none
        )


def plan_cut(
    masks: PyTree,
    couplings: Couplings,
    *,
    close: bool = False,
    round_to: int = 1,
    inexact: bool = False,
) -> Cut:
    """The cut that removes every unit whose slices are all masked.

    A unit is dead if every slice of it that has a mask is masked, and every leaf whose
    zeros make its removal exact has one. Leaves without masks, such as batch
    statistics, follow. At least one unit of a group stays, and as many as the function
    chooses at a time; no axis of a value inside the function becomes empty. A layer of
    a stack goes if all of it is masked, and one stays; each that stays loses as many
    units as the one that loses least. A residual branch goes if all of it is masked,
    and takes its leaves along.

    Args:
      masks: bool arrays with the paths of the couplings: `{"params": masks}` for the
        masks of linen parameters. `optax.MaskedNode()` or nothing where there is none.
      couplings: of the function that will be thinned.
      close: a unit is dead as soon as what makes it is masked: its slices in the leaves
        of role "out" that have a mask. `check_cut` tells what this changes.
      round_to: as many units stay that their number is a multiple of this, or all;
        layers are not rounded.
      inexact: also cut groups that are not `exact`: what is summed or normalised over
        the removed units changes.

    >>> import agp_jax as agp
    >>> def mlp(params, x):
    ...     return jnp.maximum(x @ params["up"], 0) @ params["down"]
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    >>> couplings = agp.find_couplings(mlp, params, jnp.ones((1, 4)))
    >>> masks = couplings.masks({"up[1]": [0, 3]})
    >>> print(plan_cut(masks, couplings))
    down: (8, 2) -> (6, 2)
    up: (4, 8) -> (4, 6)
    """
    expect(couplings, Couplings, "couplings from agp.find_couplings second")
    expect_masks(masks)
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to must be a whole number from 1 on, got {round_to!r}")
    shapes = _shapes(couplings.variables)
    known = _checked_masks(masks, shapes)
    dead = [
        _dead_units(group, known, close)
        if group.exact or inexact
        else np.zeros(group.shape, bool)
        for group in couplings.groups
    ]
    for axis in couplings.axes:
        _keep_one(axis, dead)
    for group, flags in zip(couplings.groups, dead, strict=True):
        if group.is_stack:
            _keep_multiple(flags, 1)
    stays = _layers_that_stay(couplings, dead)
    for group, flags in zip(couplings.groups, dead, strict=True):
        if not group.is_stack:
            here = stays.get(group.members[0].path) if group.num_layers else None
            _keep_multiple(flags, round_to, here, max(group.num_chosen, 1))
    gone = {
        path: path in known
        for branch in couplings.branches
        if _is_dead(branch, known) and (inexact or branch.inexact is None)
        for path in branch.leaves
    }
    cut = cut_units(couplings, dead, gone)
    if not cut and (why := _why_nothing(couplings, known)):
        warnings.warn(f"nothing is cut: {why}", stacklevel=2)
    return cut


def _why_nothing(couplings: Couplings, masks: Mapping[str, Any]) -> str | None:
    """What keeps units whose makers are masked, and what to do; None if none are."""
    for group in couplings.groups:
        made = _dead_units(group, masks, close=True)
        if not made.any() or made.all():
            continue
        subject = f"the masks remove {int(made.sum())} units of {group.name}, "
        if not group.exact:
            return (
                f"{subject}but a model without them is another one "
                f"({group.inexact}); plan_cut(inexact=True) cuts them nevertheless"
            )
        keeper = next(
            (
                member.path
                for member in group.members
                if (member.is_needed or member.path in masks)
                and not (made & _dead_units(_alone(group, member), masks, False)).any()
            ),
            None,
        )
        if keeper:
            return (
                f"{subject}but {keeper} keeps its part of them. Prune with "
                f"couplings=, so that masks cover whole units, or "
                f"plan_cut(close=True) cuts them; check_cut tells what that changes"
            )
    return None


def _alone(group: Group, member: Member) -> Group:
    """The group as if its units lived in one leaf."""
    return dataclasses.replace(group, members=(member,))


def _is_dead(branch: Branch, masks: Mapping[str, Any]) -> bool:
    """Whether the masks remove all of a branch, and all that makes it zero."""
    own = [masks[path] for path in branch.leaves if path in masks]
    return branch.needed <= masks.keys() and not any(np.any(mask) for mask in own)


def expect_cut(cut: Any) -> None:
    """Raises a ValueError unless it is a cut."""
    expect(cut, Cut, "a cut from agp.plan_cut")


def _layers_that_stay(
    couplings: Couplings, dead: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """For leaves with a first axis of layers, some of which go, the ones that stay."""
    shapes = _shapes(couplings.variables)
    return {
        member.path: np.flatnonzero(~slice_flags(member, flags, shapes[member.path]))
        for group, flags in zip(couplings.groups, dead, strict=True)
        if group.is_stack and flags.ndim == 1 and flags.any()
        for member in group.members
        if member.axis == 0
    }


def cut_units(
    couplings: Couplings,
    dead: Sequence[np.ndarray],
    gone: Mapping[str, bool] | None = None,
) -> Cut:
    """The cut that removes the flagged units of each group, and whole leaves."""
    shapes = _shapes(couplings.variables)
    whole = {path: gone[path] for path in shapes if gone and path in gone}
    slices: dict[tuple[str, int], np.ndarray] = {}
    for group, flags in zip(couplings.groups, dead, strict=True):
        if flags.any():
            for member in group.members:
                home = (member.path, member.axis)
                removed = slice_flags(member, flags, shapes[member.path])
                slices[home] = slices.get(home, False) | removed
    kept: dict[str, dict[int, np.ndarray]] = {}
    for (path, axis), removed in sorted(slices.items(), key=lambda item: item[0]):
        if path in whole:
            continue
        axes = kept.setdefault(path, {})  # the first axis comes first
        if removed.ndim == 2 and 0 in axes:
            removed = removed[axes[0]]
        axes[axis] = _indices(~removed)
    return Cut(kept, shapes, whole)


def _indices(flags: np.ndarray) -> np.ndarray:
    """The places of True, in each row of a matrix."""
    if flags.ndim == 1:
        return np.flatnonzero(flags)
    counts = flags.sum(axis=1)
    assert (counts == counts[0]).all(), "stacked layers must keep equally many"
    return np.nonzero(flags)[1].reshape(len(flags), -1)


def _pick(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Indices into indices, where either may have a row for each layer."""
    if first.ndim == second.ndim == 1:
        return first[second]
    layers = len(first) if first.ndim == 2 else len(second)
    rows = [np.broadcast_to(x, (layers, x.shape[-1])) for x in (first, second)]
    return np.take_along_axis(*rows, axis=1)


def _shapes(variables: PyTree) -> dict[str, Shape]:
    paths, leaves, _ = flatten_with_paths(variables)
    return {path: tuple(x.shape) for path, x in zip(paths, leaves, strict=True)}


def _checked_masks(masks: PyTree, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The masks by path, on the host where they are not divided over devices."""
    known = {}
    paths, leaves, _ = flatten_with_paths(masks)
    for path, mask in zip(paths, leaves, strict=True):
        if path not in shapes:
            hint = next((p for p in shapes if p.endswith(f"/{path}")), None)
            raise ValueError(
                f"the masks have {path!r}, which the couplings have not"
                + (
                    f"; did you mean {hint!r}? Give the masks its prefix"
                    if hint
                    else ""
                )
            )
        if tuple(mask.shape) != shapes[path] or mask.dtype != bool:
            raise ValueError(
                f"the mask of {path} must be bool of shape {shapes[path]}, got "
                f"{mask.dtype} of shape {tuple(mask.shape)}"
            )
        known[path] = mask if isinstance(mask, np.ndarray) else _on_host(mask)
    return known


def _on_host(mask: jax.Array) -> np.ndarray | jax.Array:
    """The mask as a NumPy array, unless it is divided over devices."""
    whole = len(mask.sharding.device_set) == 1
    return np.asarray(mask) if whole else mask


def _dead_units(group: Group, masks: Mapping[str, Any], close: bool) -> np.ndarray:
    """Which units of a group the masks remove: bools of the group's shape."""
    members = [m for m in group.members if m.path in masks]
    close = close and not group.is_stack  # nothing makes a layer
    if close:
        members = [m for m in members if m.role == "out"]
    needs_more = any(m.is_needed and m.path not in masks for m in group.members)
    if not members or (needs_more and not close):
        return np.zeros(group.shape, bool)
    dead = np.ones(group.shape, bool)
    for member in members:
        live = _live_along(masks[member.path], member, bool(group.num_layers))
        dead &= ~live[..., member.indices].any(axis=-1)
    return dead


def _live_along(mask: Any, member: Member, by_layer: bool) -> np.ndarray:
    """Which slices along the member's axis hold a kept weight, in each layer."""
    stay = (0, member.axis) if by_layer else (member.axis,)
    others = tuple(i for i in range(mask.ndim) if i not in stay)
    if isinstance(mask, np.ndarray):
        return np.any(mask, axis=others, keepdims=False)
    return np.asarray(jax.device_get(jnp.any(mask, axis=others)))


def _keep_one(axis: np.ndarray, dead: Sequence[np.ndarray]) -> None:
    """Revives units, in place, until some index of an axis stays in every layer."""
    columns = [
        [(int(group), int(unit)) for group, unit in row if group >= 0] for row in axis
    ]
    removed = [[dead[group][..., unit] for group, unit in row] for row in columns]
    gone = functools.reduce(
        np.logical_and, (functools.reduce(np.logical_or, row) for row in removed)
    )
    if np.any(gone):
        for group, unit in columns[0]:
            flags = dead[group]
            flags[..., unit] &= ~gone if flags.ndim == np.ndim(gone) + 1 else False


def _keep_multiple(
    dead: np.ndarray, multiple: int, layers: np.ndarray | None = None, least: int = 1
) -> None:
    """Revives units, in place, until equally many stay in all layers, and `least`.

    Only `layers` count, if they are given: those that stay.
    """
    num_units = dead.shape[-1]
    rows = dead.reshape(-1, num_units)
    chosen = rows if layers is None else rows[layers]
    most = max(least, int((~chosen).sum(axis=1).max()))
    wanted = min(num_units, -(-most // multiple) * multiple)
    for row in rows:
        revived = np.flatnonzero(row)[: max(wanted - int((~row).sum()), 0)]
        row[revived] = False
