"""Constants: values that are known when tracing, such as tables of indices."""

import jax
import numpy as np

from agp_jax.programs.elementwise import ELEMENTWISE
from agp_jax.programs.jaxprs import Equation, Variable, bind
from agp_jax.programs.labels import Flow

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


def known_picks(flow: Flow, equation: Equation) -> np.ndarray | None:
    """What a gather picks of the axes that it collapses, if known when tracing.

    Places in these axes, flattened: an array shaped like the output's axes that the
    indices make.
    """
    numbers, sizes = (
        equation.params["dimension_numbers"],
        equation.params["slice_sizes"],
    )
    operand, axes = equation.inputs[0].shape, numbers.collapsed_slice_dims
    if not axes or tuple(sorted(numbers.start_index_map)) != tuple(axes):
        return None
    one = tuple(1 if i in axes else size for i, size in enumerate(operand))
    if tuple(sizes) != one or numbers.operand_batching_dims:
        return None
    indices = known_value(flow, equation.inputs[1])
    if indices is None or indices.ndim < 2 or indices.size == 0:
        return None
    columns = [indices[..., numbers.start_index_map.index(axis)] for axis in axes]
    shape = [operand[axis] for axis in axes]
    if any(c.min() < 0 or c.max() >= n for c, n in zip(columns, shape, strict=True)):
        return None
    return np.ravel_multi_index(columns, shape)


def known_value(flow: Flow, variable: Variable) -> np.ndarray | None:
    """The value of an integer variable that depends on constants alone, else None."""
    variable = flow.origin(variable)
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
