"""`prune`: an optax transformation that wraps an optimizer and keeps weights pruned."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agp_jax.couplings import Couplings
from agp_jax.masks import (
    apply_masks,
    make_masks,
    map_masked,
    masks_of_leaves,
    remake_masks,
)
from agp_jax.packing import PackedMask, pack, unpack
from agp_jax.rules import Rule, checked_rules, match_rules
from agp_jax.trees import (
    PyTree,
    abstract_arrays,
    describe,
    expect,
    flatten_with_paths,
    map_children,
    map_moments,
)
from agp_jax.units import check_couplings


class PruneState(NamedTuple):
    """The state of `prune`.

    Attributes:
      step: int32 scalar, how many updates are complete.
      masks: a tree like the parameters of bool arrays, or of `PackedMask` with
        `packed=True`, and `optax.MaskedNode()` where a parameter stays dense.
      inner_state: the state of the wrapped optimizer.

    >>> state = prune(optax.sgd(0.1), []).init({"w": jnp.ones(2)})
    >>> print(state.step, state.masks)
    0 {'w': MaskedNode()}
    """

    step: jax.Array
    masks: PyTree
    inner_state: optax.OptState


def prune(
    inner: optax.GradientTransformation,
    rules: Sequence[Rule],
    *,
    couplings: Couplings | None = None,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it prunes while it trains.

    After every update the masks are those of the rules' schedules at the number of
    updates done, and the parameters that `optax.apply_updates` gives are exactly zero
    where masked. Nothing else needs to be called. `update` may be jitted or not; leaves
    whose update is None, such as the functions of an Equinox model, are passed over.

    The wrapped optimizer sees gradients that are zero where masked. At an event the
    weights that `update` is given are ranked, and what goes also loses its entries in
    every array of the optimizer's state that has the parameter's shape, such as its
    momentum. `update` takes `scores=`, a tree like the parameters that
    replaces the rules' scores at events; other extra arguments go to `inner`.

    Wrap the whole optimizer: a transformation that comes after this one changes the
    updates that make the weights zero. Before the first forward pass, use
    `apply_masks(params, get_masks(state))` if a schedule prunes at step 0.

    Args:
      inner: any optax optimizer.
      rules: which parameters to prune, how and when; the first match wins.
      couplings: of the parameters, from `find_couplings`. With them rules with filters,
        channels, heads or experts rank the units of a group, by scores summed over all
        its parameters that the rules name, and mask every slice of a unit: the model
        computes what it will once these are cut. Without, such a rule masks the
        parameter that it names and nothing else.
      packed: store masks at one bit per weight instead of one byte. Not with
        `nnx.Optimizer`, which takes packed masks apart.

    Returns:
      A gradient transformation whose `update` needs `params`, and whose state is a
      `PruneState`.

    Raises:
      ValueError: when `init` or `update` is called or traced: as `match_rules` does,
        if `params` is missing or of another structure than the gradients, or if a rule
        ranks by gradients at step 0; by `init`, if the parameters hold what is no array
        and `inner` wants one; by `update`, if parameters, masks or couplings have been
        cut and others of them have not.

    >>> import agp_jax as agp
    >>> rules = [agp.Rule("kernel", agp.element(), agp.one_shot(0.5, step=1))]
    >>> tx = prune(optax.sgd(0.1), rules)
    >>> params = {"kernel": jnp.array([4.0, 1.0, 3.0, 2.0]), "bias": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> grads = {"kernel": jnp.ones(4), "bias": jnp.ones(2)}
    >>> updates, state = tx.update(grads, state, params)
    >>> optax.apply_updates(params, updates)["kernel"].round(1)
    Array([3.9, 0. , 2.9, 0. ], dtype=float32)
    """
    _check_arguments(inner, couplings, packed)
    rules = checked_rules(rules)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> PruneState:
        if _stands_for_parameters(params):
            masks = params
        else:
            masks = make_masks(params, rules, 0, couplings=couplings)
        return PruneState(
            step=jnp.zeros((), jnp.int32),
            masks=_packed(masks) if packed else masks,
            inner_state=_first_state(inner, params),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        scores: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PruneState]:
        if params is None:
            raise ValueError(
                "prune needs the parameters: call tx.update(grads, state, params)"
            )
        expect(state, PruneState, "the state that tx.init gave: update(grads, state)")
        params = _without_idle_leaves(params, updates)
        step, stored, inner_state = _follow_rules(
            params,
            updates if any(rule.scores_gradients for rule in rules) else None,
            scores,
            state.step,
            state.masks,
            state.inner_state,
            rules=rules,
            couplings=couplings,
            packed=packed,
        )
        masks = _unpacked(stored)
        new_updates, inner_state = inner.update(
            apply_masks(updates, masks),
            inner_state,
            apply_masks(params, masks),
            **extra_args,
        )
        return (
            map_masked(_stay_zero, masks, new_updates, params),
            PruneState(step, stored, inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _check_arguments(inner: Any, couplings: Any, packed: Any) -> None:
    if not isinstance(inner, optax.GradientTransformation):
        advice = ", which makes one when called" if callable(inner) else ""
        raise ValueError(
            f"expected an optax optimizer first, as in prune(optax.adam(1e-3), rules), "
            f"got {describe(inner)}{advice}"
        )
    if couplings is not None:
        expect(couplings, Couplings, "couplings from agp.find_couplings")
    expect(packed, bool, "packed=True or False")


# Inside of a jitted step nothing is left of this `jit`. In a loop without one it keeps
# the conditionals, whose branches are made anew at every call, from compiling anew.
@functools.partial(
    jax.jit, static_argnames=("rules", "couplings", "packed"), inline=True
)
def _follow_rules(
    params: PyTree,
    gradients: PyTree | None,
    scores: PyTree | None,
    step: jax.Array,
    stored: PyTree,
    inner_state: PyTree,
    *,
    rules: tuple[Rule, ...],
    couplings: Couplings | None,
    packed: bool,
) -> tuple[jax.Array, PyTree, PyTree]:
    """The next step, its masks as they are stored, and what the optimizer remembers."""
    if couplings is not None:  # first: of a model that was cut, rules may not fit
        check_couplings(couplings, params)
    matched = match_rules(rules, params)
    step = jnp.asarray(optax.safe_increment(step))
    is_event = _is_event(matched, step)

    def remake() -> PyTree:
        masks = remake_masks(
            params,
            matched,
            step,
            masks=_unpacked(stored),
            gradients=gradients,
            scores=scores,
            couplings=couplings,
        )
        return _in_the_form_of(stored, _packed(masks) if packed else masks)

    def forget() -> PyTree:
        return _mask_moments(inner_state, _unpacked(masks), params)

    # The masks come first, so that one fused pass can make the masked update. The
    # state goes apart, or XLA would choose again for it, from a copy of the masks.
    masks = jax.lax.cond(is_event, remake, lambda: stored)
    inner_state = jax.lax.cond(is_event, forget, lambda: inner_state)
    return step, masks, inner_state


def get_masks(opt_state: optax.OptState) -> PyTree:
    """The masks inside an optimizer state: bools and `optax.MaskedNode()`.

    Finds the state of `prune` wherever other transformations have put it. Where
    several prune parts of one model (`optax.partition`), their masks are united.

    Raises:
      ValueError: if there is no `PruneState`, or several for the same parameter.

    >>> import agp_jax as agp
    >>> rules = [agp.Rule("w", agp.element(), agp.one_shot(0.5))]
    >>> tx = optax.chain(optax.clip(1.0), prune(optax.adam(0.1), rules))
    >>> get_masks(tx.init({"w": jnp.array([1.0, 2.0])}))["w"]
    Array([False,  True], dtype=bool)
    """
    is_state = lambda x: isinstance(x, PruneState)  # noqa: E731
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
    if not found:
        raise ValueError(
            "found no PruneState: pass the state of an optimizer made with agp.prune"
        )
    return functools.reduce(_unite, [_unpacked(state.masks) for state in found])


def _unite(masks: PyTree, others: PyTree) -> PyTree:
    if isinstance(masks, optax.MaskedNode):
        return others
    if isinstance(others, optax.MaskedNode):
        return masks
    if jax.tree_util.all_leaves([masks]):
        raise ValueError(
            "found several PruneStates with masks for one parameter: pass the state of "
            "one optimizer"
        )
    return map_children(_unite, masks, others)


def _first_state(inner: optax.GradientTransformation, params: PyTree) -> PyTree:
    """The wrapped optimizer's own; what it cannot remember anything of is named."""
    try:
        return inner.init(params)
    except TypeError:
        abstract_arrays(params)
        raise


def _stands_for_parameters(params: PyTree) -> bool:
    """Whether it is a placeholder: a node of its own kind that holds nothing.

    `optax.tree_map_params` calls `init` with one, to learn which parts of a state are
    like the parameters.
    """
    structure = jax.tree.structure(params)
    is_container = params is None or isinstance(params, dict | list | tuple)
    return structure.num_nodes == 1 and not structure.num_leaves and not is_container


def _without_idle_leaves(params: PyTree, updates: PyTree) -> PyTree:
    """`params` with None where the update is: what is there does not train.

    Equinox' models hold functions, strings and counters beside the parameters.
    """
    is_none = lambda x: x is None  # noqa: E731
    try:
        return jax.tree.map(
            lambda update, x: None if update is None else x,
            updates,
            params,
            is_leaf=is_none,
        )
    except ValueError:
        found, own = (
            set(flatten_with_paths(tree, is_leaf=is_none)[0])
            for tree in (updates, params)
        )
        other = sorted(found ^ own)
        raise ValueError(
            "prune needs gradients in a tree like the parameters"
            + (f", but only one of them has {other[0]}" if other else "")
            + ". Pass gradients of all that `params` holds. Where an optimizer takes "
            "others, as optax.lookahead does, prune inside of it and mask its averages"
        ) from None


def _in_the_form_of(stored: PyTree, masks: PyTree) -> PyTree:
    """`masks` in the containers of those that the state holds.

    Where no mask is, `init` and `update` may have seen different things.
    """
    structure, leaves = jax.tree.structure(stored), jax.tree.leaves(masks)
    if structure.num_leaves != len(leaves):
        raise ValueError(
            f"the rules prune {len(leaves)} of these parameters, but the state has "
            f"masks of {structure.num_leaves}: call init with the parameters that "
            f"update is called with, and with all rules, also those that begin later"
        )
    return structure.unflatten(leaves)


def _packed(masks: PyTree) -> PyTree:
    return jax.tree.map(pack, masks)


def _unpacked(masks: PyTree) -> PyTree:
    def restore(mask: Any) -> jax.Array:
        if not isinstance(mask, PackedMask) and mask.dtype != bool:
            raise ValueError(
                "the packed masks in the optimizer state have been taken apart, as "
                "nnx.Optimizer does: use packed=False with it"
            )
        return unpack(mask)

    return jax.tree.map(restore, masks, is_leaf=lambda x: isinstance(x, PackedMask))


def _is_event(matched: PyTree, step: jax.Array) -> jax.Array:
    schedules = {rule.schedule for rule in jax.tree.leaves(matched)}
    happens = [schedule.is_event(step) for schedule in schedules]
    return jnp.any(jnp.stack(happens)) if happens else jnp.zeros((), bool)


def _stay_zero(mask: jax.Array, update: jax.Array, weights: jax.Array) -> jax.Array:
    """The update that leaves weights exactly zero where masked.

    It takes the weights' dtype where that is the wider one: rounded to a narrower
    one, -weights would leave a rest.
    """
    with jax.numpy_dtype_promotion("standard"):  # a wish of ours, not of the caller
        dtype = jnp.promote_types(update.dtype, weights.dtype)
    return jnp.where(mask, update.astype(dtype), -weights.astype(dtype))


def _mask_moments(inner_state: PyTree, masks: PyTree, params: PyTree) -> PyTree:
    """Zeroes what the optimizer remembers of masked weights, such as momentum."""

    def zero(leaf: jax.Array, mask: jax.Array | None) -> jax.Array:
        return leaf if mask is None else jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return map_moments(zero, inner_state, params, masks_of_leaves(masks, params))
