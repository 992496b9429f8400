"""Units: coupled slices of several parameters, which are ranked and masked as one.

With couplings, a rule with filters, channels, heads or experts ranks the units of the
groups that its slabs belong to, by scores summed over all the parameters that the rule
names. The masks then cover every slice of a unit, in parameters that no rule names too.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.boxes import any_in_boxes, sum_boxes
from agp_jax.cells import Leaf, cell_keys, keep_sharding, weight_scores
from agp_jax.couplings import Couplings, Group, Member
from agp_jax.rules import Rule
from agp_jax.selection import Entrant
from agp_jax.shardings import replicate
from agp_jax.trees import PyTree, Shape, flatten_with_paths


class RankedGroup(NamedTuple):
    """A group whose units a rule prunes.

    Attributes:
      group: the units.
      rule: when and how many of its units go.
      scored: the members whose slices the units are ranked by.
    """

    group: Group
    rule: Rule
    scored: tuple[Member, ...]


def check_couplings(couplings: Couplings, params: PyTree) -> None:
    """Raises a ValueError if the couplings are of other parameters, and says which."""
    own_paths, own_leaves, _ = flatten_with_paths(params)
    weights = dict(zip(own_paths, own_leaves, strict=True))
    paths, leaves, _ = flatten_with_paths(couplings.variables)
    for path, leaf in zip(paths, leaves, strict=True):
        if path not in weights:
            raise ValueError(
                f"the couplings have {path!r}, which is no parameter: pass those of "
                f"the parameters alone, such as couplings.subtree('params')"
            )
        if np.shape(weights[path]) != leaf.shape:
            raise ValueError(
                f"the couplings are of {path} with shape {leaf.shape}, but it has "
                f"shape {np.shape(weights[path])}. If it has been cut, make the "
                f"optimizer anew: agp.prune(inner, []), or with the rules that go on "
                f"and couplings=agp.find_couplings(thinned_function, thinned, *inputs)"
            )


def expect_couplings(leaves: Iterable[Leaf], couplings: Couplings | None) -> None:
    """Raises a ValueError if a rule prunes what only couplings know, without them."""
    for leaf in leaves:
        if couplings is None and leaf.rule.needs_couplings:
            raise ValueError(
                f"{leaf.rule} prunes {leaf.path} by {leaf.structure}, which only "
                f"couplings know: pass couplings=agp.find_couplings(fn, params, x)"
            )


def rank_groups(
    leaves: Mapping[str, Leaf],
    weights: Mapping[str, Any],
    couplings: Couplings,
) -> list[RankedGroup]:
    """The groups whose units the rules of `leaves` prune.

    Args:
      leaves: what the rules prune, by path.
      weights: all parameters.
      couplings: of all parameters.

    Raises:
      ValueError: if what a rule names cannot be removed; if two rules want different
        things of one group.
    """
    ranked: dict[str, RankedGroup] = {}
    for leaf in leaves.values():
        if not leaf.rule.prunes_units:
            continue
        if leaf.rule.prunes_layers:
            stack = stack_of(leaf, couplings)
            here = [] if stack is None else [stack]  # else it is of a loop
        else:
            here = _groups_of(leaf, couplings)
        for group, member in here:
            so_far = ranked.get(group.name, RankedGroup(group, leaf.rule, ()))
            if _wishes(so_far.rule) != _wishes(leaf.rule):
                raise ValueError(
                    f"{so_far.rule} and {leaf.rule} both prune the units of "
                    f"{group.name}: give them one schedule, score and scope, or name "
                    f"the parameters of the group in one rule"
                )
            ranked[group.name] = so_far._replace(scored=(*so_far.scored, member))
    for group, rule, _ in ranked.values():
        _check_choice(group, rule)
    return list(ranked.values())


def _check_choice(group: Group, rule: Rule) -> None:
    """Raises a ValueError if a rule leaves less than the function chooses at a time."""
    if not group.num_chosen:
        return
    assert rule.schedule is not None  # it prunes
    last = rule.schedule.exact_level(rule.schedule.num_events)
    most = group.num_units - group.num_chosen
    share = most / group.num_units
    if rule.scope == "rule" or int(last * group.num_units) > most:
        raise ValueError(
            f"{rule} prunes {group.name}, of whose {group.num_units} units the "
            f"function chooses {group.num_chosen} at a time, so {most} may go: "
            f"expected scope='tensor' and a final_sparsity of at most {share:.6g}, got "
            f"scope={rule.scope!r} and {float(last):g}"
        )


def all_units(group: Group) -> jax.Array:
    """What is kept of a group before its first event."""
    return jnp.ones(group.shape, bool)


def enter_group(ranked: RankedGroup, leaves: Mapping[str, Leaf]) -> Entrant:
    """The units of a group as they enter a contest, or one for each layer."""
    shape = ranked.group.shape
    num_rows = len(shape) - 1
    scored = [(leaves[member.path], member) for member in ranked.scored]
    scores = [_unit_scores(leaf, member, num_rows) for leaf, member in scored]
    alive = [_units_alive(leaf, member, num_rows) for leaf, member in scored]
    return Entrant(
        (functools.reduce(jnp.add, scores), functools.reduce(jnp.logical_or, alive)),
        cell_keys,
        shape=shape,
        num_row_axes=num_rows,
    )


def masks_of_members(
    groups: Sequence[Group],
    kept: Sequence[jax.Array],
    weights: Mapping[str, Any],
    masks: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """The masks of all members of the groups, by path, where these units are kept.

    Args:
      groups: the groups.
      kept: for each group bools of its shape.
      weights: all parameters.
      masks: what the parameters have not lost yet, where that is not everything.
    """
    flags: dict[str, list[jax.Array]] = defaultdict(list)
    for group, units in zip(groups, kept, strict=True):
        for member in group.members:
            shape = np.shape(weights[member.path])
            flags[member.path].append(_along_member(member, units, shape))
    return {
        path: keep_sharding(
            functools.reduce(jnp.logical_and, found), weights[path], masks.get(path)
        )
        for path, found in flags.items()
    }


def _groups_of(leaf: Leaf, couplings: Couplings) -> list[tuple[Group, Member]]:
    """The groups whose units consist of the slabs that a rule divides a leaf into."""
    rows, tensor = leaf.rule.axes_of(leaf.weights.shape)
    axis, width = leaf.structure.axis, 1
    if axis is not None:
        width = leaf.box[axis]
        axis = tensor[axis]
    homes = [
        (group, member)
        for group in couplings.groups
        for member in group.members
        if member.path == leaf.path
    ]
    named = leaf.rule.units
    here = [
        (group, member)
        for group, member in homes
        if (group.num_chosen if axis is None else member.axis == axis)
        and _has_runs(member, width)
        and (named is None or re.fullmatch(named, group.name))
    ]
    subject = f"{leaf.rule} prunes {leaf.path} by {leaf.structure}, but"
    advice = f"put agp.dense({leaf.path!r}) before it"
    if not here:
        which = "such parts" if named is None else f"units named {named!r}"
        if axis is None:
            where, axes = "chosen between", tuple(range(leaf.weights.ndim))
        else:
            where, axes = f"cut from its axis {axis}", (axis,)
        runs = [couplings.frozen.get((leaf.path, k)) for k in axes]
        reasons = "; ".join(run[0][2] for run in runs if run)
        reason = f" ({reasons})" if reasons else ""
        raise ValueError(
            f"{subject} no {which} can be {where}{reason}. It has "
            f"{_describe_homes(leaf, homes)}. Choose of these, or {advice}"
        )
    for group, _ in here:
        if not group.exact:
            if group.num_chosen:
                advice = f"wrap the function in agp.without_experts, or {advice}"
            raise ValueError(
                f"{subject} a model without units of {group.name} is another one than "
                f"one with zeros ({group.inexact}). To go on, {advice}"
            )
        if rows != tuple(range(len(rows))) and not group.num_layers:
            raise ValueError(
                f"{subject} the layers along its axis {rows[0]} lose the same units of "
                f"{group.name}, so they cannot be ranked apart. Leave stacked_axes "
                f"out, and count all axes of {leaf.path} in the structure"
            )
    along = np.concatenate([m.indices.reshape(-1) for _, m in here])
    if axis is not None and np.bincount(along).max() > 1:
        raise ValueError(
            f"{subject} units of several kinds lie along its axis {axis}: "
            f"{_describe_homes(leaf, here)}. Choose one of them by name, as in "
            f"Rule(..., units={re.escape(here[-1][0].name)!r})"
        )
    return here


def stack_of(leaf: Leaf, couplings: Couplings) -> tuple[Group, Member] | None:
    """The layers that a leaf holds stacked for a scan; None if it does not.

    Raises:
      ValueError: if they cannot be removed exactly.
    """
    found = [
        (group, member)
        for group in couplings.groups
        for member in group.members
        if member.path == leaf.path and member.role == "layer"
    ]
    if not found:
        return None
    group, member = min(found, key=lambda home: home[1].axis)  # of the outermost scan
    if not group.exact:
        raise ValueError(
            f"{leaf.rule} prunes {leaf.path} by {leaf.structure}, but a model without "
            f"these layers is another one than one with zeros ({group.inexact})"
        )
    return group, member


def _describe_homes(leaf: Leaf, homes: Sequence[tuple[Group, Member]]) -> str:
    """Which units live where in a leaf, and what structure has them, in a line."""
    return (
        "; ".join(
            f"along axis {member.axis} {group.num_units} units of {group.name}"
            + (f", {n} slices each" if (n := member.indices.shape[1]) > 1 else "")
            + ("" if group.exact else " (not exact)")
            + _structure_of(leaf, group, member)
            for group, member in sorted(homes, key=lambda home: home[1].axis)
        )
        or "nothing"
    )


def _structure_of(leaf: Leaf, group: Group, member: Member) -> str:
    """The structure whose slabs are these units, as one writes it; "" for none."""
    if group.is_stack:
        return ": agp.layers()"
    if group.num_chosen:
        return ": agp.experts()"
    _, tensor = leaf.rule.axes_of(leaf.weights.shape)
    num_slices = member.indices.shape[1]
    if member.axis not in tensor or not _has_runs(member, num_slices):
        return ""
    axis = tensor.index(member.axis)
    if num_slices > 1:
        return f": agp.heads({group.num_units}, axis={axis})"
    return f": agp.{'channels' if member.role == 'in' else 'filters'}(axis={axis})"


def _has_runs(member: Member, width: int) -> bool:
    """Whether each unit of the member consists of whole runs of `width` slices."""
    runs = np.sort(member.indices // width, axis=1)
    units, slices = runs.shape
    if slices % width:
        return False
    by_run = runs.reshape(units, slices // width, width)
    return bool((by_run == by_run[..., :1]).all())


def _wishes(rule: Rule) -> tuple:
    return rule.schedule, rule.score, rule.scope


def _unit_scores(leaf: Leaf, member: Member, num_rows: int) -> jax.Array:
    """float32 (*rows, units): the sum of the scores of a unit's weights."""
    scores = weight_scores(leaf)
    if leaf.mask is not None:
        scores = jnp.where(leaf.mask, scores, 0.0)
    box = _slice_box(leaf, member, num_rows)
    by_unit = _per_unit(sum_boxes(scores, box), member, num_rows)
    return sum_boxes(by_unit, (*[1] * (num_rows + 1), by_unit.shape[-1]))[..., 0]


def _units_alive(leaf: Leaf, member: Member, num_rows: int) -> jax.Array:
    """bool (*rows, units): whether any weight of a unit is left."""
    mask = jnp.ones_like(leaf.weights, bool) if leaf.mask is None else leaf.mask
    box = _slice_box(leaf, member, num_rows)
    return _per_unit(any_in_boxes(mask, box), member, num_rows).any(axis=-1)


def _slice_box(leaf: Leaf, member: Member, num_rows: int) -> Shape:
    """The box of one slice along the member's axis, in one row."""
    apart = (*range(num_rows), member.axis)
    return tuple(1 if i in apart else n for i, n in enumerate(leaf.weights.shape))


def _per_unit(slices: jax.Array, member: Member, num_rows: int) -> jax.Array:
    """(*rows, units, slices) of values for each slice, that are few."""
    flat = slices.reshape(*slices.shape[:num_rows], -1)
    return replicate(flat)[..., member.indices]


def _along_member(member: Member, kept: jax.Array, shape: Shape) -> jax.Array:
    """Which slices of a member the kept units leave, to broadcast to its shape."""
    size = shape[member.axis]
    unit = np.full(size, -1)
    unit[member.indices] = np.arange(len(member.indices))[:, None]
    flags = jnp.where(unit >= 0, kept[..., np.maximum(unit, 0)], True)
    flat = [1] * len(shape)
    flat[member.axis] = size
    if flags.ndim == 2:
        flat[0] = flags.shape[0]
    return flags.reshape(flat)
