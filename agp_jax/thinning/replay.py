"""Replay: running a traced function at the shapes a cut leaves.

Every equation is applied again, to smaller arrays. Few need more than that: those whose
parameters hold a size get the new one, and what was made from nothing, such as random
bits, is made whole and then cut, so that what stays is what it was.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.programs.analyses import Analysis, analyse
from agp_jax.programs.jaxprs import (
    REMAT,
    Equation,
    Program,
    Variable,
    bind,
    differentiable,
    scan_counts,
)
from agp_jax.thinning.cuts import Cut, expect_cut
from agp_jax.thinning.remains import (
    Remains,
    derivative_of,
    find_remains,
    is_inexact,
    kept_axes,
)
from agp_jax.thinning.removal import without_leaves
from agp_jax.thinning.resizing import RESIZED, take, thin_shape
from agp_jax.trees import (
    PyTree,
    Shape,
    abstract_array,
    expect_function,
    flatten_with_paths,
)


def thin_function(
    fn: Callable[..., PyTree], variables: PyTree, cut: Cut
) -> Callable[..., PyTree]:
    """`fn` as a function of thinned variables: the same program at smaller shapes.

    Works for any function of the variables, such as one that predicts or a loss, and
    the result can be transformed as `fn` can. It is traced anew for every new shape of
    its arguments, which may be any but along the axes that are cut: what the variables
    carry from batch to batch has as many rows as a batch, and for an export the size of
    a batch may be a symbol. Numbers that `fn` computed from widths when it was traced,
    such as the divisor of a mean over channels, stay as they are: the result is what
    `fn` gives for masked variables. What has the size of what was cut in the outputs,
    such as updated batch statistics, comes out thinned, or as None where the leaf of
    that path is gone.

    Args:
      fn: called as `fn(variables, *args, **kwargs)`; all arguments are arrays.
      variables: of the shapes before the cut; arrays or `jax.ShapeDtypeStruct`.
      cut: of these variables.

    Raises:
      ValueError: when called, if `fn` cannot run without what the cut removes: what
        ties it, and where.

    >>> import agp_jax as agp
    >>> def mlp(params, x):
    ...     return jnp.maximum(x @ params["up"], 0) @ params["down"]
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    >>> couplings = agp.find_couplings(mlp, params, jnp.ones((1, 4)))
    >>> cut = agp.plan_cut(couplings.masks({"up[1]": [0, 3]}), couplings)
    >>> smaller = thin_function(mlp, params, cut)
    >>> smaller(agp.thin(params, cut), jnp.ones((1, 4)))
    Array([[24., 24.]], dtype=float32)
    """
    expect_function(
        fn, "a function first, as in thin_function(predict, variables, cut)"
    )
    expect_cut(cut)
    paths, leaves, treedef = flatten_with_paths(variables)
    _check_paths(paths, list(map(abstract_array, leaves, paths)), cut)
    if cut.gone:
        return thin_function(*without_leaves(fn, variables, cut))

    def whole(variables: PyTree) -> PyTree:
        arrays = treedef.flatten_up_to(variables)
        return treedef.unflatten(
            jax.ShapeDtypeStruct(
                _whole_shape(path, np.shape(array), cut), jnp.result_type(array)
            )
            for path, array in zip(paths, arrays, strict=True)
        )

    return replayed(fn, whole, lambda analysis: find_remains(analysis, cut))


def replayed(
    fn: Callable[..., PyTree],
    whole: Callable[[PyTree], PyTree],
    find: Callable[[Analysis], Remains],
) -> Callable[..., PyTree]:
    """`fn`, read anew for every new shape of its arguments, and run as is found.

    Args:
      fn: called as `fn(variables, *args, **kwargs)`; all arguments are arrays.
      whole: the variables that `fn` is read with, as abstract arrays, of those that it
        is called with.
      find: what remains of a function, and what is done instead of its equations.
    """
    known: dict[Any, Remains] = {}

    def call(variables: PyTree, args: tuple[Any, ...], kwargs: Any) -> PyTree:
        return fn(variables, *args, **kwargs)

    def run(variables: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        shapes = whole(variables), *jax.tree.map(abstract_array, (args, kwargs))
        arrays = ((x.shape, x.dtype) for x in jax.tree.leaves(shapes))
        key = (jax.tree.structure(shapes), *arrays)
        if key not in known:
            known[key] = find(analyse(call, *shapes, freeze_outputs=False))
        remains = known[key]
        given = jax.tree.leaves((variables, args, kwargs))
        out = _run(remains, remains.analysis.program, given, None)
        return jax.tree.unflatten(jax.tree.structure(remains.analysis.out), out)

    return run


def _check_paths(
    paths: Sequence[str], leaves: Sequence[jax.ShapeDtypeStruct], cut: Cut
) -> None:
    for path, leaf in zip(paths, leaves, strict=True):
        if cut.shapes.get(path) != leaf.shape:
            raise ValueError(
                f"the variables have {path} of shape {leaf.shape}, but the cut is "
                f"of {cut.shapes.get(path, 'variables without it')}; pass the "
                f"variables before the cut, with the same paths (see Cut.subtree)"
            )


def _whole_shape(path: str, shape: Shape, cut: Cut) -> Shape:
    """What a thinned leaf of this shape was before: as it is but where it is cut."""
    expected, axes = cut.thin_shape(path), cut.get(path, {})
    settled = {*axes, *(0 for kept in axes.values() if kept.ndim == 2)}
    if len(shape) != len(expected) or any(shape[i] != expected[i] for i in settled):
        raise ValueError(
            f"the thinned function expects {path} of shape {expected}, got {shape}; "
            f"pass thin(variables, cut)"
        )
    return tuple(
        cut.shapes[path][i] if i in axes else size for i, size in enumerate(shape)
    )


def _run(
    remains: Remains, program: Program, arrays: Sequence[Any], layer: jax.Array | None
) -> list[Any]:
    """The outputs of `program` for thinned inputs, in layer `layer` of a stack."""
    known = dict(zip(program.inputs, arrays, strict=True))

    def read(variable: Variable) -> Any:
        if variable not in known:
            kept = kept_axes(remains, variable)
            if variable.is_uniform and variable.shape:
                shape = thin_shape(kept, variable.shape)
                return jnp.full(shape, variable.constant, variable.aval.dtype)
            return take(variable.constant, kept, layer)
        return known[variable]

    for equation in program.equations:
        inputs = [read(v) for v in equation.inputs]
        if equation in remains.edits:
            outputs = remains.edits[equation](read, inputs)
        else:
            outputs = _apply(remains, equation, inputs, layer)
        known.update(zip(equation.outputs, outputs, strict=True))
    return [read(v) for v in program.outputs]


def _apply(
    remains: Remains, equation: Equation, arrays: list[Any], layer: jax.Array | None
) -> list[Any]:
    if equation.bodies:
        if not _is_touched(remains, equation):
            return bind(equation, arrays)
        return _WITH_BODIES[equation.name](remains, equation, arrays, layer)
    ins = [kept_axes(remains, v) for v in equation.inputs]
    outs = [kept_axes(remains, v) for v in equation.outputs]
    ins_touched, outs_touched = (
        any(k is not None for kept in side for k in kept) for side in (ins, outs)
    )
    if not ins_touched and not outs_touched:
        return bind(equation, arrays)
    if equation.name in RESIZED:
        return RESIZED[equation.name](remains, equation, arrays, ins, outs, layer)
    made = bind(equation, arrays)
    if ins_touched:
        return made
    return [take(x, kept, layer) for x, kept in zip(made, outs, strict=True)]


def _is_touched(remains: Remains, equation: Equation) -> bool:
    variables = [*equation.inputs, *equation.outputs]
    programs = list(equation.bodies)
    while programs:
        program = programs.pop()
        if not remains.edits.keys().isdisjoint(program.equations):
            return True
        variables += program.inputs
        for inner in program.equations:
            variables += [*inner.inputs, *inner.outputs]
            programs += inner.bodies
    return any(k is not None for v in variables for k in kept_axes(remains, v))


def _scan(remains, equation, arrays, layer):
    num_consts, num_carry = scan_counts(equation)
    first = num_consts + num_carry
    (body,) = equation.bodies
    consts = arrays[:num_consts]

    def step(carry: list[Any], stepped: Any) -> tuple[list[Any], list[Any]]:
        inner, now = stepped
        # The layers of a stack are those of the outermost scan.
        inner = inner if layer is None else layer
        outs = _run(remains, body, [*consts, *carry, *now], inner)
        return outs[:num_carry], outs[num_carry:]

    p, stepped = equation.params, arrays[first:]
    length = np.shape(stepped[0])[0] if stepped else p["length"]
    carry, stacked = jax.lax.scan(
        step,
        arrays[num_consts:first],
        (jnp.arange(length), stepped),
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry, *stacked]


def _while(remains, equation, arrays, layer):
    condition, body = equation.bodies
    ends = np.cumsum([equation.params["cond_nconsts"], equation.params["body_nconsts"]])
    cond_consts, body_consts = arrays[: ends[0]], arrays[ends[0] : ends[1]]
    return jax.lax.while_loop(
        lambda carry: _run(remains, condition, [*cond_consts, *carry], layer)[0],
        lambda carry: _run(remains, body, [*body_consts, *carry], layer),
        arrays[ends[1] :],
    )


def _cond(remains, equation, arrays, layer):
    branches = [
        lambda *operands, body=body: _run(remains, body, operands, layer)
        for body in equation.bodies
    ]
    return jax.lax.switch(arrays[0], branches, *arrays[1:])


def _remat(remains, equation, arrays, layer):
    (body,) = equation.bodies
    run = jax.checkpoint(
        lambda *operands: _run(remains, body, operands, layer),
        policy=equation.params.get("policy"),
        prevent_cse=equation.params.get("prevent_cse", True),
    )
    return run(*arrays)


def _custom_jvp(remains, equation, arrays, layer):
    """The function keeps its own derivative, such as 0 for relu at 0."""
    places = differentiable(equation)
    (body,) = equation.bodies

    @jax.custom_jvp
    def function(*operands: Any) -> list[Any]:
        return _run(remains, body, operands, layer)

    @function.defjvp
    def _(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        (program,) = derivative_of(remains, equation)
        given = [*primals, *(tangents[i] for i in places)]
        made = _run(remains, program, given, layer)
        outs, rest = made[: len(body.outputs)], iter(made[len(body.outputs) :])
        return outs, [
            next(rest) if is_inexact(x) else np.zeros(np.shape(x), jax.dtypes.float0)
            for x in outs
        ]

    return function(*arrays)


def _custom_vjp(remains, equation, arrays, layer):
    """The function keeps its own pullback, run at the thinned shapes."""
    places = differentiable(equation)
    (body,) = equation.bodies

    @jax.custom_vjp
    def function(*operands: Any) -> list[Any]:
        return _run(remains, body, operands, layer)

    def forward(*operands: Any) -> tuple[list[Any], list[Any]]:
        program, _ = derivative_of(remains, equation)
        made = _run(remains, program, operands, layer)
        return made[: len(body.outputs)], made[len(body.outputs) :]

    def backward(residuals: list[Any], cotangents: list[Any]) -> tuple[Any, ...]:
        _, program = derivative_of(remains, equation)
        moving = [
            x
            for x, v in zip(cotangents, body.outputs, strict=True)
            if is_inexact(v.aval)
        ]
        made = _run(remains, program, [*residuals, *moving], layer)
        by_place = dict(zip(places, made, strict=True))
        return tuple(by_place.get(i) for i in range(len(arrays)))

    function.defvjp(forward, backward)
    return function(*arrays)


_WITH_BODIES: Mapping[str, Callable[..., list[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(REMAT, _remat),
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
}
