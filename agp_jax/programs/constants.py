"""Constants: values that are known when tracing, such as tables of indices."""

from typing import NamedTuple

import jax
import numpy as np

from agp_jax.programs.elementwise import ELEMENTWISE
from agp_jax.programs.jaxprs import Equation, Variable, bind
from agp_jax.programs.labels import Flow, are_numbers

# Indices are worked out when tracing if they have at most this many entries.
_MAX_KNOWN = 2**20

# Primitives whose value is worked out when all they read is known.
_KNOWABLE = ELEMENTWISE | {
    "bitcast_convert_type",
    "iota",
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "transpose",
    "rev",
    "concatenate",
    "slice",
    "tile",
    "stack",
}


class Picks(NamedTuple):
    """What a gather takes of its operand, where that is known when tracing.

    Attributes:
      places: in the axes that it collapses, flattened: an array shaped like the
        output's axes that the indices make.
      starts: where its window begins along axes that it does not collapse; along those
        that are not among them it is the whole axis.
    """

    places: np.ndarray
    starts: dict[int, int]


def known_picks(flow: Flow, equation: Equation) -> Picks | None:
    """What a gather takes, if its indices are known and all windows begin at one."""
    numbers, sizes = (
        equation.params["dimension_numbers"],
        equation.params["slice_sizes"],
    )
    operand, axes = equation.inputs[0].shape, numbers.collapsed_slice_dims
    looked_up = numbers.start_index_map
    if not set(axes) <= set(looked_up) or numbers.operand_batching_dims:
        return None
    if not are_numbers(*(size for i in looked_up for size in (operand[i], sizes[i]))):
        return None
    rest = [i for i in range(len(operand)) if i not in looked_up]
    if any(sizes[i] != operand[i] for i in rest) or any(sizes[i] != 1 for i in axes):
        return None
    indices = known_value(flow, equation.inputs[1])
    if indices is None or indices.size == 0:
        return None
    of_axis = {axis: indices[..., k] for k, axis in enumerate(looked_up)}
    for axis, found in of_axis.items():
        if found.min() < 0 or found.max() + sizes[axis] > operand[axis]:
            return None
        if axis not in axes and found.min() < found.max():
            return None
    starts = {i: int(x.flat[0]) for i, x in of_axis.items() if i not in axes}
    if not axes:
        return Picks(np.zeros(indices.shape[:-1], int), starts)
    shape = [operand[axis] for axis in axes]
    return Picks(np.ravel_multi_index([of_axis[axis] for axis in axes], shape), starts)


def known_value(flow: Flow, variable: Variable) -> np.ndarray | None:
    """The value of an integer variable that depends on constants alone, else None."""
    variable = flow.origin(variable)
    if not are_numbers(*variable.shape):
        return None
    if variable.constant is not None:
        return np.broadcast_to(variable.constant, variable.shape)
    maker = flow.makers.get(variable)
    is_index = np.dtype(variable.aval.dtype).kind in "iub"
    if maker is None or not is_index or len(maker.outputs) > 1 or maker.bodies:
        return None
    if np.prod(variable.shape, dtype=np.int64) > _MAX_KNOWN:
        return None
    if maker.name not in _KNOWABLE:
        return None
    inputs = [known_value(flow, v) for v in maker.inputs]
    if any(x is None for x in inputs):
        return None
    with jax.ensure_compile_time_eval():
        return np.asarray(bind(maker, inputs)[0])
