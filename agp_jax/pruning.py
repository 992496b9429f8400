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
from agp_jax.rules import Rule, match_rules
from agp_jax.trees import PyTree, map_children, map_moments


class PruneState(NamedTuple):
    """The state of `prune`.

    Attributes:
      step: int32 scalar, how many updates are complete.
      masks: a tree like the parameters of bool arrays, or of `PackedMask` with
        `packed=True`, and `optax.MaskedNode()` where a parameter stays dense.
      inner_state: the state of the wrapped optimizer.
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
    where masked. Nothing else needs to be called.

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
        channels or heads rank the units of a group, by scores summed over all its
        parameters that the rules name, and mask every slice of a unit: the model
        computes what it will once these are cut. Without, such a rule masks the
        parameter that it names and nothing else.
      packed: store masks at one bit per weight instead of one byte. Not with
        `nnx.Optimizer`, which takes packed masks apart.

    Returns:
      A gradient transformation whose `update` needs `params`, and whose state is a
      `PruneState`.

    Raises:
      ValueError: when `init` or `update` is called or traced: as `match_rules` does,
        if `params` is missing, or if a rule ranks by gradients at step 0.

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
    inner = optax.with_extra_args_support(inner)

    def store(masks: PyTree) -> PyTree:
        return jax.tree.map(pack, masks) if packed else masks

    def init(params: optax.Params) -> PruneState:
        return PruneState(
            step=jnp.zeros((), jnp.int32),
            masks=store(make_masks(params, rules, 0, couplings=couplings)),
            inner_state=inner.init(params),
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
        matched = match_rules(rules, params)
        step = jnp.asarray(optax.safe_increment(state.step))
        is_event = _is_event(matched, step)

        def remake() -> PyTree:
            masks = remake_masks(
                params,
                matched,
                step,
                masks=_unpacked(state.masks),
                gradients=updates,
                scores=scores,
                couplings=couplings,
            )
            return store(masks)

        def forget() -> PyTree:
            return _mask_moments(state.inner_state, _unpacked(stored), params)

        # The masks come first, so that one fused pass can make the masked update. The
        # state goes apart, or XLA would choose again for it, from a copy of the masks.
        stored = jax.lax.cond(is_event, remake, lambda: state.masks)
        inner_state = jax.lax.cond(is_event, forget, lambda: state.inner_state)
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


def get_masks(opt_state: optax.OptState) -> PyTree:
    """The masks inside an optimizer state: bools and `optax.MaskedNode()`.

    Finds the state of `prune` wherever other transformations have put it. Where
    several prune parts of one model (`optax.partition`), their masks are united.

    Raises:
      ValueError: if there is no `PruneState`, or several for the same parameter.
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
