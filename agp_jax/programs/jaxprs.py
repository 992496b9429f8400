"""Programs: traced functions as plain values, in one form for all JAX versions.

Calls of jitted functions are inlined. Every call site gets variables of its own, as JAX
shares the inner jaxpr of a jitted function between its callers. Loops, branches, remat
and functions with derivatives of their own stay equations, whose bodies are
programs in turn.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.extend import source_info_util

from agp_jax.trees import PyTree

# Calls that vanish, and the parameter that holds what they call.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
# What makes an array of one number over and over of such an array or number.
_KEEP_UNIFORM = {
    "broadcast_in_dim",
    "convert_element_type",
    "dynamic_slice",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "transpose",
}
# Constants with more entries than this are not looked through for being uniform.
_MAX_LOOKED_AT = 2**20
# Equations whose body is computed again for the gradient, by their names so far.
REMAT = {"checkpoint", "remat", "remat2"}
# Equations with bodies, and the parameters that hold them, one or several each.
_BODIES = {
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    **dict.fromkeys(REMAT, ("jaxpr",)),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """One value of a program, of a known shape and type.

    Attributes:
      aval: its abstract value, with `shape` and `dtype`.
      constant: what it is, if that is known when tracing; else None. An array of one
        number over and over is that number, and a variable of its own at each use.
    """

    aval: Any
    constant: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.aval, "shape", ()))

    @property
    def is_uniform(self) -> bool:
        """Whether it is known to be one number over and over, or a known number."""
        return _is_number(self.constant)

    @property
    def is_zero(self) -> bool:
        """Whether it is known to be 0, everywhere."""
        return self.is_uniform and bool(self.constant == 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One primitive, applied.

    Attributes:
      primitive: JAX's own object.
      params: its static parameters.
      inputs: the variables it reads; literals are variables with a constant.
      outputs: the variables it makes.
      bodies: the programs inside it, of this call site alone.
      calls: where it was applied and then, outwards, the calls that this happened
        inside of; see `source_line`.
    """

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    bodies: tuple["Program", ...]
    calls: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.primitive.name


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function: equations in order, from `inputs` to `outputs`."""

    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    equations: tuple[Equation, ...]


def trace(fn: Callable[..., PyTree], *args: PyTree) -> tuple[Program, PyTree]:
    """The program of `fn(*args)`, and what `fn` returns as a tree of abstract arrays.

    `args` are trees of arrays or `jax.ShapeDtypeStruct`; nothing is computed.
    """
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    return program_of(closed), out


def program_of(jaxpr: Any, calls: tuple[Any, ...] = ()) -> Program:
    """Reads a jaxpr, open or closed, that is inside of `calls`."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    inputs = tuple(Variable(var.aval) for var in inner.invars)
    equations: list[Equation] = []
    outputs = _inline(jaxpr, inputs, equations, calls)
    return Program(inputs, outputs, tuple(equations))


def equations(program: Program) -> Iterator[tuple[Equation, int]]:
    """All equations in order, those in bodies too, and how often each is run.

    A scan runs its body once per step; for a while loop, whose count is not known, one
    is taken, and of a `cond` every branch counts.
    """
    for equation in program.equations:
        yield equation, 1
        times = equation.params["length"] if equation.name == "scan" else 1
        for body in equation.bodies:
            for inner, count in equations(body):
                yield inner, count * times


def source_line(equation: Equation) -> str:
    """The line of the user's code that an equation comes from; "" if not known.

    What JAX itself has jitted knows no such line; then it is that of the call.
    """
    lines = map(source_info_util.summarize, equation.calls)
    return next(filter(None, lines), "")


def bind(equation: Equation, arrays: Sequence[Any], **changed: Any) -> list[Any]:
    """Applies the primitive to other arrays, with some parameters changed."""
    params = equation.primitive.get_bind_params({**equation.params, **changed})
    subfuns, params = params if isinstance(params, tuple) else ((), params)
    out = equation.primitive.bind(*subfuns, *arrays, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def scan_counts(equation: Equation) -> tuple[int, int]:
    """How many of a scan's inputs are constants and how many are its carry."""
    if "num_carry" in equation.params:
        return equation.params["num_consts"], equation.params["num_carry"]
    consts, carry, _ = equation.params["ft_in"].unpack()  # JAX 0.11 and later
    return len(list(consts)), len(list(carry))


def jvp_program(equation: Equation) -> Program:
    """The derivative of a `custom_jvp` function, as it was traced.

    From all primals and the tangents of those that have one (`differentiable`) to the
    primal outputs and the tangents of the floating point ones.
    """
    places = differentiable(equation)
    floats = [i for i, v in enumerate(equation.outputs) if _is_float(v.aval)]

    def push(primals: list[Any], tangents: list[Any]) -> tuple[list[Any], list[Any]]:
        function = _function_of(equation, places, primals)
        out, out_tangents = jax.jvp(function, [primals[i] for i in places], tangents)
        return out, [out_tangents[i] for i in floats]

    primals = [_abstract(v) for v in equation.inputs]
    program, _ = trace(push, primals, [primals[i] for i in places])
    return program


def vjp_programs(equation: Equation) -> tuple[Program, Program]:
    """The derivative of a `custom_vjp` function: forward and backward.

    Forward goes from the primals to the outputs and the residuals; backward from the
    residuals and the cotangents of the floating point outputs to the cotangents of
    the inputs that have one (`differentiable`).
    """
    places = differentiable(equation)
    floats = [i for i, v in enumerate(equation.outputs) if _is_float(v.aval)]

    def forward(*primals: Any) -> tuple[list[Any], PyTree]:
        everything = _function_of(equation, places, primals)

        def function(*moving: Any) -> tuple[list[Any], list[Any]]:
            out = everything(*moving)
            return [out[i] for i in floats], out

        _, pullback, out = jax.vjp(
            function, *(primals[i] for i in places), has_aux=True
        )
        return out, pullback

    program, (out, pullback) = trace(forward, *map(_abstract, equation.inputs))
    treedef = jax.tree.structure(pullback)

    def backward(residuals: list[Any], cotangents: list[Any]) -> Any:
        return treedef.unflatten(residuals)(cotangents)

    back, _ = trace(backward, jax.tree.leaves(pullback), [out[i] for i in floats])
    return program, back


def differentiable(equation: Equation) -> list[int]:
    """The inputs by which a function with a derivative of its own has one."""
    first = equation.params.get("num_consts", 0)
    inputs = enumerate(equation.inputs)
    return [i for i, v in inputs if i >= first and _is_float(v.aval)]


def _function_of(
    equation: Equation, places: Sequence[int], primals: Sequence[Any]
) -> Callable[..., list[Any]]:
    """The equation as a function of its inputs at `places` alone."""

    def function(*moving: Any) -> list[Any]:
        arrays = list(primals)
        for place, array in zip(places, moving, strict=True):
            arrays[place] = array
        return bind(equation, arrays)

    return function


def _inline(
    jaxpr: Any,
    inputs: Sequence[Variable],
    equations: list[Equation],
    calls: tuple[Any, ...],
) -> tuple[Variable, ...]:
    """Appends the equations of `jaxpr` and returns the variables of its outputs."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    known: dict[Any, Variable] = dict(zip(inner.invars, inputs, strict=True))
    for var, value in zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=True):
        known[var] = Variable(var.aval, _number_of(value))

    def read(var: Any) -> Variable:
        if isinstance(var, jex.Literal):
            return Variable(var.aval, var.val)
        variable = known[var]
        return dataclasses.replace(variable) if variable.is_uniform else variable

    for eqn in inner.eqns:
        ins = tuple(map(read, eqn.invars))
        called = _INLINED.get(eqn.primitive.name)
        here = (eqn.source_info, *calls)
        if called is not None:
            outs = _inline(eqn.params[called], ins, equations, here)
        elif _stays_uniform(eqn, ins):
            (made,) = (var.aval for var in eqn.outvars)
            number = np.asarray(ins[0].constant).astype(made.dtype)[()]
            outs = (Variable(made, number),)
        else:
            outs = tuple(Variable(var.aval) for var in eqn.outvars)
            bodies = tuple(program_of(body, here) for body in _inner_jaxprs(eqn))
            equations.append(
                Equation(eqn.primitive, eqn.params, ins, outs, bodies, here)
            )
        known.update(zip(eqn.outvars, outs, strict=True))
    return tuple(map(read, inner.outvars))


def _is_number(constant: Any) -> bool:
    if constant is None or np.ndim(constant):
        return False
    return not jnp.issubdtype(jnp.result_type(constant), jax.dtypes.extended)


def _number_of(constant: Any) -> Any:
    """The number that an array is full of; the array, if it is of several."""
    is_here = getattr(constant, "is_fully_addressable", True)
    is_numeric = not jnp.issubdtype(jnp.result_type(constant), jax.dtypes.extended)
    if not is_here or not is_numeric or not 0 < np.size(constant) <= _MAX_LOOKED_AT:
        return constant
    flat = np.asarray(constant).reshape(-1)
    return flat[0] if (flat == flat[0]).all() else constant


def _stays_uniform(eqn: Any, inputs: Sequence[Variable]) -> bool:
    return (
        eqn.primitive.name in _KEEP_UNIFORM
        and inputs[0].is_uniform
        and eqn.params.get("sharding") is None
    )


def _inner_jaxprs(eqn: Any) -> Iterator[Any]:
    for name in _BODIES.get(eqn.primitive.name, ()):
        inner = eqn.params[name]
        yield from inner if isinstance(inner, (tuple, list)) else (inner,)


def _abstract(variable: Variable) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.shape, variable.aval.dtype)


def _is_float(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", np.dtype(bool))
    return jnp.issubdtype(dtype, jnp.inexact)
