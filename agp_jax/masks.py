"""Masks: which weights a set of rules keeps at a step, as a tree like the parameters.

A mask is a bool array shaped like its parameter, True where the weight is kept.
`optax.MaskedNode()`, a tree without leaves, stands where a parameter is not pruned: in
the place of the parameter, and of the box that holds nothing else, such as an NNX
variable.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agp_jax.boxes import count_nonzero
from agp_jax.branches import Layers, enter_layers, masks_of_layers, rank_layers
from agp_jax.cells import Leaf, check_scores, enter, mask_of_cells
from agp_jax.contests import hold_contests, keep_n_of_m
from agp_jax.couplings import Couplings, Group
from agp_jax.rules import Rule, match_rules
from agp_jax.selection import Entrant
from agp_jax.shardings import indices_along, varying_axes
from agp_jax.trees import (
    PyTree,
    Shape,
    describe,
    expect,
    flatten_with_paths,
    leaves_of,
    unflatten_around,
)
from agp_jax.units import (
    all_units,
    check_couplings,
    enter_group,
    expect_couplings,
    masks_of_members,
    rank_groups,
)


def make_masks(
    params: PyTree,
    rules: Sequence[Rule],
    step: int | jax.Array,
    masks: PyTree | None = None,
    *,
    gradients: PyTree | None = None,
    scores: PyTree | None = None,
    couplings: Couplings | None = None,
) -> PyTree:
    """The masks that `rules` ask for at `step`.

    A tensor of n cells loses exactly floor(s * n) at sparsity s, and at least one cell
    stays. The lowest scores go, and of equal scores those that come last in memory
    (row-major). With `scope="rule"` n counts the cells of all the rule's tensors, and
    ties go by the order of the leaves first.

    Cells that `masks` has removed stay removed and count as removed. A tensor that
    holds a NaN or an infinity among its kept weights or their scores, and with
    `scope="rule"` all tensors ranked with it, loses nothing: its mask stays as it is.

    Args:
      params: the parameters, a tree of arrays.
      rules: see `Rule`; they are matched to the paths of `params`.
      step: how many updates are complete, an int or a traced int32 scalar.
      masks: the masks so far; None where nothing was removed yet.
      gradients: a tree like `params`, for rules whose score takes gradients.
      scores: a tree like `params` whose arrays replace the rules' own scores, each of
        its parameter's shape; None or `optax.MaskedNode()` where the rule's score
        should be used.
      couplings: of `params`. With them rules with filters, channels, heads or experts
        rank the units of a group by scores summed over all its parameters that the
        rules name, and the masks cover every slice of a unit, in dense parameters too.

    Returns:
      A tree like `params` of bool arrays and `optax.MaskedNode()`.

    Raises:
      ValueError: as `match_rules` does; if gradients are needed and missing; if a score
        or mask has not its parameter's shape; if the couplings are of other parameters,
        or do not let a rule remove what it names; if `shard_map` has divided what is
        ranked.

    >>> import agp_jax as agp
    >>> rules = [agp.Rule("kernel", agp.element(), agp.one_shot(0.5))]
    >>> params = {"kernel": jnp.array([4.0, -1.0, 3.0, 2.0])}
    >>> make_masks(params, rules, step=0)["kernel"]
    Array([ True, False,  True, False], dtype=bool)
    """
    if couplings is not None:
        expect(couplings, Couplings, "couplings from agp.find_couplings")
        check_couplings(couplings, params)
    _check_step(step)
    matched = match_rules(rules, params)
    return remake_masks(
        params,
        matched,
        step,
        masks=masks,
        gradients=gradients,
        scores=scores,
        couplings=couplings,
    )


class _Entry(NamedTuple):
    """Cells or units that compete, and what is done with those that stay."""

    entrant: Entrant
    rule: Rule
    keep: Callable[[jax.Array], None]


def remake_masks(
    params: PyTree,
    matched: PyTree,
    step: int | jax.Array,
    *,
    masks: PyTree | None,
    gradients: PyTree | None,
    scores: PyTree | None,
    couplings: Couplings | None,
) -> PyTree:
    """`make_masks` with the rules that `match_rules` has matched to `params`."""
    paths, arrays, treedef = flatten_with_paths(params)
    weights = dict(zip(paths, arrays, strict=True))
    rules = dict(zip(paths, treedef.flatten_up_to(matched), strict=True))
    new_masks = _by_path(masks, paths, "the masks")  # those of earlier rules stay
    leaves = _pruned_leaves(
        weights,
        rules,
        masks=new_masks,
        gradients=_by_path(gradients, paths, "the gradients"),
        scores=_by_path(scores, paths, "the scores"),
    )
    expect_couplings(leaves.values(), couplings)
    idle = frozenset(x for x in set(rules.values()) if x and not _may_prune(x, step))
    by_units = lambda leaf: couplings is not None and leaf.rule.prunes_units  # noqa: E731
    unchanged = {
        leaf.path: _unchanged(leaf)
        for leaf in leaves.values()
        if not by_units(leaf) and (leaf.rule in idle or leaf.weights.size == 0)
    }
    ranked = [leaf for path, leaf in leaves.items() if path not in unchanged]
    new_masks |= unchanged
    if ranked:
        coupled = (
            () if couplings is None else flatten_with_paths(couplings.variables)[0]
        )
        new_masks |= _rank(
            [leaf[2:] for leaf in ranked],
            {path: weights[path] for path in coupled if path in weights},
            {path: new_masks[path] for path in coupled if path in new_masks},
            _as_array(step),
            names=tuple(leaf[:2] for leaf in ranked),
            idle=idle,
            couplings=couplings,
        )
    masks_of_all = [new_masks.get(path) for path in paths]
    return unflatten_around(treedef, masks_of_all, optax.MaskedNode())


# Compiled once for each set of rules and shapes, in a loop without `jit` too; inside of
# a jitted function nothing is left of this one.
@functools.partial(jax.jit, static_argnames=("names", "idle", "couplings"), inline=True)
def _rank(
    arrays: Sequence[tuple[jax.Array | None, ...]],
    weights: Mapping[str, Any],
    masks: Mapping[str, jax.Array],
    step: jax.Array,
    *,
    names: tuple[tuple[str, Rule], ...],
    idle: frozenset[Rule],
    couplings: Couplings | None,
) -> dict[str, jax.Array]:
    """The masks of leaves that are ranked, and of what is coupled to them.

    Args:
      arrays: of each leaf; `names` are its path and rule.
      weights: of all that is coupled, by path.
      masks: what these have lost so far.
      step: see `make_masks`.
      names: of the leaves.
      idle: the rules that remove nothing at this step, as far as that is known.
      couplings: see `make_masks`.
    """
    leaves = {
        path: Leaf(path, rule, *rest)  # pyrefly: ignore[bad-argument-type]
        for (path, rule), rest in zip(names, arrays, strict=True)
    }
    ranked_groups, ranked_layers = [], []
    if couplings is not None:
        ranked_groups = rank_groups(leaves, weights, couplings)
        ranked_layers = rank_layers(leaves, couplings)
    made: dict[str, jax.Array] = {}
    units: dict[str, jax.Array] = {}

    def keep_cells(leaf: Leaf, kept: jax.Array) -> None:
        made[leaf.path] = mask_of_cells(leaf, kept)

    def keep_units(group: Group, kept: jax.Array) -> None:
        units[group.name] = kept

    def keep_layers(layers: Layers, kept: jax.Array) -> None:
        made.update(masks_of_layers(layers, kept, weights, {**masks, **made}))

    entries: list[_Entry] = []
    for leaf in leaves.values():
        if couplings is not None and leaf.rule.prunes_units:
            continue  # it is masked with the groups below
        if leaf.structure.keep_n_of_m:
            made[leaf.path] = keep_n_of_m(leaf, step)
        else:
            keep = functools.partial(keep_cells, leaf)
            entries.append(_Entry(enter(leaf), leaf.rule, keep))
    for ranked in ranked_groups:
        keep = functools.partial(keep_units, ranked.group)
        if ranked.rule in idle:
            keep(all_units(ranked.group))
        else:
            entries.append(_Entry(enter_group(ranked, leaves), ranked.rule, keep))
    for layers in ranked_layers:
        keep = functools.partial(keep_layers, layers)
        if layers.rule in idle:
            keep(jnp.ones(layers.num_layers, bool))
        else:
            entries.append(_Entry(enter_layers(layers, leaves), layers.rule, keep))
    kept_of_each = hold_contests(
        [entry.entrant for entry in entries], [entry.rule for entry in entries], step
    )
    for entry, kept in zip(entries, kept_of_each, strict=True):
        entry.keep(kept)
    # A leaf may belong to several groups, so their masks are made at once.
    groups = [ranked.group for ranked in ranked_groups]
    kept = [units[group.name] for group in groups]
    return made | masks_of_members(groups, kept, weights, {**masks, **made})


def _pruned_leaves(
    weights: Mapping[str, Any],
    rules: Mapping[str, Rule | None],
    *,
    masks: Mapping[str, jax.Array],
    gradients: Mapping[str, jax.Array],
    scores: Mapping[str, jax.Array],
) -> dict[str, Leaf]:
    """What the rules prune, by path; all arguments are by path, too."""
    leaves = {}
    for path, rule in rules.items():
        if rule is None:
            continue
        mask = masks.get(path)
        array = jnp.asarray(weights[path])
        if mask is not None:
            _check_mask(path, mask, array.shape)
        gradient = gradients.get(path) if rule.scores_gradients else None
        score = scores.get(path)
        if score is not None:
            check_scores(path, score, array.shape)
        for values in (array, gradient, score):
            if values is not None and (axes := varying_axes(jnp.asarray(values))):
                raise ValueError(
                    f"inside of shard_map, devices along {', '.join(sorted(axes))} "
                    f"hold different parts of {path} or of its scores, and none can "
                    f"rank them all: call tx.update outside of shard_map, under jit, "
                    f"where arrays may be divided in any way"
                )
        if gradient is not None and np.shape(gradient) != array.shape:
            raise ValueError(
                f"the gradient of {path} must have its shape {array.shape}, got "
                f"{np.shape(gradient)}"
            )
        leaves[path] = Leaf(path, rule, array, mask, gradient, score)
    return leaves


def _by_path(tree: PyTree, paths: Sequence[str], what: str) -> dict[str, Any]:
    """The leaves of `tree` by path, without those that it has not."""
    leaves = zip(paths, leaves_of(tree, paths, what), strict=True)
    return {path: leaf for path, leaf in leaves if leaf is not None}


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """`params` with exact zeros where a mask is False, NaN and infinity included.

    Args:
      params: any tree like the parameters, such as gradients.
      masks: bool arrays of the shapes of its leaves; a leaf stays as it is where they
        have `optax.MaskedNode()`.

    Returns:
      A tree like `params`, of the same dtypes. Works inside `jit`.

    >>> masks = {"kernel": jnp.array([True, False]), "bias": optax.MaskedNode()}
    >>> print(apply_masks({"kernel": jnp.ones(2), "bias": jnp.ones(1)}, masks))
    {'bias': Array([1.], dtype=float32), 'kernel': Array([1., 0.], dtype=float32)}
    """
    expect_masks(masks)
    return map_masked(
        lambda mask, x: jnp.where(mask, x, jnp.zeros((), jnp.result_type(x))),
        masks,
        params,
    )


def expect_masks(masks: PyTree) -> None:
    """Raises a ValueError if there are none at all, as of a forgotten state."""
    if masks is None:
        raise ValueError("expected masks, got None: pass get_masks(opt_state)")


def _check_mask(path: str, mask: Any, shape: Shape | None) -> None:
    """Raises a ValueError unless the mask of `path` is a bool array of this shape."""
    if getattr(mask, "dtype", None) != np.dtype(bool):
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise ValueError(
            f"expected bool masks, got {kind} at {path}: pass get_masks(opt_state)"
        )
    if shape is not None and mask.shape != shape:
        raise ValueError(
            f"{path} has shape {shape}, but its mask has shape {mask.shape}. If one of "
            f"them has been cut, cut the other: thin_opt_state(opt_state, params, cut) "
            f"for the state of an optimizer, thin(tree, cut) for other trees"
        )


def _check_step(step: Any) -> None:
    """Raises a ValueError unless it is a number of updates, known or traced."""
    is_whole = isinstance(step, int | np.integer) and not isinstance(step, bool)
    if isinstance(step, jax.Array | np.ndarray):
        is_whole = step.ndim == 0 and jnp.issubdtype(step.dtype, jnp.integer)
    if not is_whole or (isinstance(step, int) and step < 0):
        raise ValueError(
            f"step is the number of updates that are complete, a whole number, got "
            f"{describe(step)}"
        )


def map_masked(
    function: Callable[..., Any], masks: PyTree, tree: PyTree, *rest: PyTree
) -> PyTree:
    """Applies `function(mask, leaf, *rest)` where there is a mask.

    Elsewhere the leaves of `tree` stay as they are.
    """
    leaves, treedef = jax.tree.flatten(tree)
    others = [treedef.flatten_up_to(other) for other in rest]
    return treedef.unflatten(
        x if mask is None else function(mask, x, *more)
        for mask, x, *more in zip(
            masks_of_leaves(masks, tree), leaves, *others, strict=True
        )
    )


def masks_of_leaves(masks: PyTree, tree: PyTree) -> list[jax.Array | None]:
    """The mask of each leaf of `tree`, matched by path; None where there is none.

    Raises:
      ValueError: if a mask has not the shape of its leaf.
    """
    paths, leaves, _ = flatten_with_paths(tree)
    found = leaves_of(masks, paths, "the masks")
    for path, leaf, mask in zip(paths, leaves, found, strict=True):
        if mask is not None:
            _check_mask(path, mask, np.shape(leaf))
    return found


def sparsity(masks: PyTree) -> dict[str, float]:
    """The fraction of weights that each mask removes, by path, and their "total".

    The total is over the masked tensors alone: a dense tensor has no mask to count.

    Args:
      masks: bool arrays and `optax.MaskedNode()`, as `get_masks` gives them.

    Returns:
      Floats in [0, 1].

    Raises:
      ValueError: if a leaf is no bool array.

    >>> sparsity({"up": jnp.array([True, False]), "down": jnp.ones(6, bool)})
    {'down': 0.0, 'up': 0.5, 'total': 0.125}
    """
    paths, leaves, _ = flatten_with_paths(masks)
    for path, mask in zip(paths, leaves, strict=True):
        _check_mask(path, mask, None)
    if "total" in paths:
        raise ValueError(
            "a parameter at the path 'total' has the name of the sum: put the masks "
            "under a key, as in sparsity({'params': masks})"
        )
    kept = count_nonzero(leaves)
    sizes = [mask.size for mask in leaves]
    result = {
        path: 1.0 - count / size if size else 0.0
        for path, count, size in zip(paths, kept, sizes, strict=True)
    }
    result["total"] = 1.0 - sum(kept) / sum(sizes) if sum(sizes) else 0.0
    return result


def fingerprint(masks: PyTree) -> jax.Array:
    """A uint32 that is the same for equal masks, and for others almost surely not.

    It has the same value on any mesh, so processes and runs can compare theirs. Works
    inside `jit`; costs one read of the masks.

    >>> kept = {"kernel": jnp.array([[True, False], [True, True]])}
    >>> int(fingerprint(kept)) == int(fingerprint({"kernel": jnp.ones((2, 2), bool)}))
    False
    """
    expect_masks(masks)
    paths, leaves, _ = flatten_with_paths(masks)
    total = jnp.zeros((), jnp.uint32)
    for number, (path, mask) in enumerate(zip(paths, leaves, strict=True), start=1):
        _check_mask(path, mask, None)
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(mask.shape):
            along = indices_along(mask, axis, jnp.uint32)
            place = place * jnp.uint32(size) + along
        place = place + jnp.uint32(number) * jnp.uint32(0x9E3779B9)
        # A sum of integers does not depend on its order, hence not on the devices.
        total += jnp.sum(jnp.where(mask, _scramble(place), 0), dtype=jnp.uint32)
    return total


def _scramble(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: a bijection of uint32 that mixes all bits."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _unchanged(leaf: Leaf) -> jax.Array:
    if leaf.mask is None:
        return jnp.ones_like(leaf.weights, dtype=bool)
    return leaf.mask


def _as_array(step: int | jax.Array) -> jax.Array | np.int32:
    """A step as jitted functions take it; all beyond int32 are alike."""
    lowest, highest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    is_int = isinstance(step, int)
    return np.int32(min(max(step, lowest), highest)) if is_int else step


def _may_prune(rule: Rule, step: int | jax.Array) -> bool:
    """Whether `rule` may remove cells by `step`; True where step is traced."""
    assert rule.schedule is not None
    return not isinstance(step, int) or rule.schedule.sparsity_at(step) > 0
