"""Numbers: integer values whose entries count the indices of an axis.

`top_k` and `argmax` pick out of an axis and tell where; a ramp counts its own axis. A
thinned program keeps the numbers that indices had before the cut, so that numbers are
sorted and compared as they were; only where they index a cut axis they become places
in what stays.
"""

from collections.abc import Callable, Sequence

import numpy as np

from agp_jax.programs.atoms import Atoms
from agp_jax.programs.jaxprs import Equation, Variable
from agp_jax.programs.labels import Axis, Flow, Numbers, Value, are_numbers

_Made = Sequence[Numbers | None]


def numbers_of(
    flow: Flow, equation: Equation, ins: Sequence[Value], axes: Sequence[list[Axis]]
) -> _Made:
    """What the outputs of an equation, which have these axes, count; None: nothing."""
    count = _COUNTS.get(equation.name)
    if count is None:
        return [None] * len(equation.outputs)
    return count(flow, equation, ins, axes)


def picks_of(flow: Flow, indices: Variable, axes: Sequence[Axis]) -> _Made:
    """What each column of a gather's or scatter's `indices` picks out of its axis.

    Args:
      flow: the labels so far.
      indices: (..., columns).
      axes: that of each column.
    """
    maker = flow.makers.get(indices)
    parts = [indices] * len(axes)
    last = len(indices.shape) - 1
    if maker is not None and maker.name == "concatenate":
        if maker.params["dimension"] == last and len(maker.inputs) == len(axes):
            parts = list(maker.inputs)
    found = [flow.values[v].numbers if v in flow.values else None for v in parts]
    return [
        numbers if picks(numbers, axis) else None
        for numbers, axis in zip(found, axes, strict=True)
    ]


def picks(numbers: Numbers | None, axis: Axis) -> bool:
    """Whether numbers may pick out of an axis, as it is as long as theirs."""
    return numbers is not None and numbers.chosen and _are_inside(numbers, axis)


def _are_inside(numbers: Numbers | None, axis: Axis) -> bool:
    return numbers is not None and len(numbers.atoms) == axis.size > 1


def along_of(equation: Equation) -> int:
    """The axis that a `top_k` or an `argmax` picks from."""
    p, rank = equation.params, len(equation.inputs[0].shape)
    if "axes" in p:
        return p["axes"][0] % rank
    names = ("axis", "dimension", "reduction_dimension")
    return next((p[name] for name in names if name in p), -1) % rank


def _iota(flow, equation, ins, axes):
    along = axes[0][equation.params["dimension"]]
    is_known = are_numbers(along.size) and along.size > 1
    return [Numbers(along.atoms) if is_known else None]


def _top_k(flow, equation, ins, axes):
    return [None, _chosen(equation, ins)]


def _argmax(flow, equation, ins, axes):
    return [_chosen(equation, ins)]


def _chosen(equation: Equation, ins: Sequence[Value]) -> Numbers | None:
    axis = ins[0].axes[along_of(equation)]
    if not are_numbers(axis.size):
        return None
    return Numbers(axis.atoms, True, axis.holding(-np.inf))


def _first(flow, equation, ins, axes):
    return [ins[0].numbers for _ in equation.outputs]


def _each(flow, equation, ins, axes):
    return [value.numbers for value in ins]


def _cast(flow, equation, ins, axes):
    is_integer = np.dtype(equation.outputs[0].aval.dtype).kind in "iu"
    return [ins[0].numbers if is_integer else None]


def _joined(flow, equation, ins, axes):
    return [_common(flow.atoms, [value.numbers for value in ins])]


def _select(flow, equation, ins, axes):
    """Indices are written as `where(i < 0, i + size, i)`, and no number is negative."""
    _, case, *rest = equation.inputs
    test = flow.makers.get(equation.inputs[0])
    if test is not None and test.name == "lt" and len(rest) == 1:
        tested, bound = test.inputs
        if tested is case and bound.is_uniform and bound.constant <= 0:
            return [ins[1].numbers]
    return [_common(flow.atoms, [value.numbers for value in ins[1:]])]


def _bounded(flow, equation, ins, axes):
    """A bound that no number is beyond leaves them as they are."""
    of_ins = zip(equation.inputs, ins, strict=True)
    places = range(len(ins))
    if equation.name == "clamp":
        bounds = {0: "max", 2: "min"}
    else:
        bounds = {k: equation.name for k in places if equation.inputs[k].is_uniform}
    rest = [value for k, (_, value) in enumerate(of_ins) if k not in bounds]
    if len(rest) != 1 or rest[0].numbers is None:
        return [None]
    last = len(rest[0].numbers.atoms) - 1
    for k, bound in bounds.items():
        limit = flow.origin(equation.inputs[k])
        if not limit.is_uniform:
            return [None]
        if limit.constant > 0 if bound == "max" else limit.constant < last:
            return [None]
    return [rest[0].numbers]


def _gather(flow, equation, ins, axes):
    """Numbers, picked by indices that are promised, or known, to be inside."""
    numbers, operand = equation.params["dimension_numbers"], ins[0].axes
    picked = [operand[i] for i in numbers.start_index_map]
    found = ins[1].numbers
    is_inside = len(picked) == 1 and _are_inside(found, picked[0])
    if is_inside or "PROMISE" in str(equation.params["mode"]):
        return [ins[0].numbers]
    return [None]


def _common(atoms: Atoms, several: Sequence[Numbers | None]) -> Numbers | None:
    """What all of several values count, if they were chosen from one axis."""
    known = [numbers for numbers in several if numbers is not None and numbers.chosen]
    if len(known) < len(several) or not known:
        return None
    first = atoms.find(known[0].atoms)
    if not all(np.array_equal(atoms.find(x.atoms), first) for x in known):
        return None
    proofs = [numbers.never for numbers in known]
    never = None if None in proofs else frozenset().union(*filter(None, proofs))
    return Numbers(known[0].atoms, True, never)


_COUNTS: dict[str, Callable[..., _Made]] = {
    "iota": _iota,
    "top_k": _top_k,
    "argmax": _argmax,
    **dict.fromkeys(
        (
            "broadcast_in_dim copy device_put dynamic_slice pvary reduce_max "
            "reduce_min reshape reshard rev sharding_constraint slice split squeeze "
            "stop_gradient tile transpose unstack"
        ).split(),
        _first,
    ),
    **dict.fromkeys(("optimization_barrier", "sort"), _each),
    **dict.fromkeys(("concatenate", "stack"), _joined),
    **dict.fromkeys(("clamp", "max", "min"), _bounded),
    "convert_element_type": _cast,
    "gather": _gather,
    "select_n": _select,
}
