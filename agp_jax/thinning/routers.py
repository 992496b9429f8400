"""Routers: functions in which an expert that is masked is never chosen.

Masks write zeros. A router whose weights for an expert are zero gives it a logit of
zero, which may well be the largest; an expert that is not there has one of minus
infinity.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.programs.analyses import Analysis
from agp_jax.programs.jaxprs import REMAT, Equation, Program, Variable, bind
from agp_jax.programs.numbers import along_of
from agp_jax.programs.propagation import value_of
from agp_jax.thinning.cuts import Cut
from agp_jax.thinning.remains import Edit, Remains
from agp_jax.thinning.replay import replayed
from agp_jax.trees import PyTree, abstract_array

# Equations whose bodies are looked into. A function with a derivative of its own is
# left as it is, or its derivative would be that of another.
_ENTERED = REMAT | {"scan", "while", "cond"}


def without_experts(fn: Callable[..., PyTree], routers: str) -> Callable[..., PyTree]:
    """`fn` where experts whose router weights are all zero are never chosen.

    Their logits, the products with the router's kernel, are minus infinity, and so is
    what `top_k` and `argmax` choose by. A loss that is wrapped so before training
    teaches a model that is pruned by `experts()` what it will compute when it is cut.

    >>> def best_of_three(params, x):
    ...     return jnp.argmax(x @ params["router"], axis=-1)
    >>> params = {"router": jnp.array([[-1.0, -2.0, 0.0]])}
    >>> without_experts(best_of_three, "router")(params, jnp.ones((1, 1)))
    Array([0], dtype=int32)

    Args:
      fn: called as `fn(variables, *args, **kwargs)`; all arguments are arrays.
      routers: a regular expression for the whole paths of the routers' kernels. A
        kernel has one axis for what it sums over or more, and one of experts.

    Raises:
      ValueError: when called, if nothing that `routers` matches is multiplied so.
    """
    shapes = functools.partial(jax.tree.map, abstract_array)
    run = replayed(fn, shapes, lambda analysis: _find_routers(analysis, routers))
    return functools.wraps(fn)(run)


def _find_routers(analysis: Analysis, pattern: str) -> Remains:
    """Nothing is cut, but routers and choices are edited."""
    leaves = {i for i, p in enumerate(analysis.paths) if re.fullmatch(pattern, p)}
    axes: dict[int, int] = {}
    edits = dict(_edits(analysis, analysis.program, leaves, axes))
    if not edits:
        raise ValueError(
            f"{pattern!r} matches no router, a kernel whose product with an input has "
            f"one axis of it, of experts; it matches "
            f"{', '.join(analysis.paths[i] for i in sorted(leaves)) or 'no path'} of: "
            f"{', '.join(analysis.paths)}"
        )
    gone = np.zeros((1, analysis.flow.atoms.size), bool)
    return Remains(analysis, Cut({}, {}), gone, edits=edits)


def _edits(
    analysis: Analysis, program: Program, leaves: set[int], axes: dict[int, int]
) -> Iterator[tuple[Equation, Edit]]:
    """The edits of a program; `axes` are those of the experts in each router so far."""
    flow, present = analysis.flow, []
    for equation in program.equations:
        if equation.name in _ENTERED:
            for body in equation.bodies:
                yield from _edits(analysis, body, leaves, axes)
        elif equation.name == "dot_general":
            for side in (0, 1):
                axis = _expert_axis(analysis, equation, side, leaves, axes)
                if axis is not None:
                    kernel = equation.inputs[side]
                    atoms = flow.atoms.find(value_of(flow, kernel).axes[axis].atoms)
                    present.append((atoms, kernel, axis))
                    yield equation, _lower_product(equation, side, axis)
        elif equation.name in ("top_k", "argmax"):
            along = along_of(equation)
            chosen = value_of(flow, equation.inputs[0]).axes[along].atoms
            for atoms, kernel, axis in present:
                if np.array_equal(atoms, flow.atoms.find(chosen)):
                    yield equation, _lower_choice(equation, kernel, axis, along)


def _expert_axis(
    analysis: Analysis,
    equation: Equation,
    side: int,
    leaves: set[int],
    axes: dict[int, int],
) -> int | None:
    """The axis of experts, if that operand of a product is a router's kernel."""
    one, other = (value_of(analysis.flow, v) for v in equation.inputs)
    if side:
        one, other = other, one
    contracted, batch = equation.params["dimension_numbers"]
    free = [i for i in range(len(one.axes)) if i not in contracted[side]]
    if not one.is_weight or other.is_weight or batch[side] or len(free) != 1:
        return None
    for leaf, axis in one.axes[free[0]].leaves:
        # Its first product is the router; a later one may be that of a derivative.
        if leaf in leaves and axes.setdefault(leaf, axis) == axis:
            return free[0]
    return None


def _lower_product(equation: Equation, side: int, axis: int) -> Edit:
    def edit(read: Callable[[Variable], Any], inputs: list[Any]) -> list[Any]:
        (logits,) = bind(equation, inputs)
        # The axes of the first operand come first, of which a router has one.
        along = logits.ndim - 1 if side else 0
        return [_lowered(logits, inputs[side], axis, along)]

    return edit


def _lower_choice(equation: Equation, kernel: Variable, axis: int, along: int) -> Edit:
    def edit(read: Callable[[Variable], Any], inputs: list[Any]) -> list[Any]:
        return bind(equation, [_lowered(inputs[0], read(kernel), axis, along)])

    return edit


def _lowered(values: jax.Array, kernel: jax.Array, axis: int, along: int) -> jax.Array:
    """`values`, minus infinity along an axis where the kernel is zero along its own."""
    others = [i for i in range(kernel.ndim) if i != axis]
    present = jnp.any(kernel != 0, axis=others)
    shape = [-1 if i == along else 1 for i in range(values.ndim)]
    return jnp.where(present.reshape(shape), values, -jnp.inf)
