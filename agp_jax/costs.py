"""What a model costs: its parameters, those that are not zero, and multiply-adds.

The multiply-adds (MACs) are counted in the program that JAX traces from a function, so
any model can be measured, also an abstract one that nobody could hold in memory.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from agp_jax.boxes import count_nonzero
from agp_jax.programs.jaxprs import (
    Equation,
    Program,
    equations,
    program_of,
    scan_counts,
    source_line,
    trace,
)
from agp_jax.trees import (
    PyTree,
    Shape,
    describe_shape,
    expect_function,
    flatten_with_paths,
)


class _Part(NamedTuple):
    """A leaf that a value is made of."""

    number: int
    size: int


# What a value is made of: nothing for a constant; None if it depends on the inputs.
_Origin = tuple[_Part, ...] | None
# Multiply-adds by the number of the kernel's leaf, or None where there is no kernel.
_Macs = Counter[int | None]


@dataclasses.dataclass(frozen=True)
class LeafCost:
    """The cost of one leaf of the variables.

    Attributes:
      path: where it is in the tree.
      shape: its shape.
      nonzero: how many of its numbers are not zero; None where only shapes are known.
      macs: the multiply-adds of the convolutions and products of which it is the
        kernel; 0 for a table that rows are only looked up in; None for what is neither.
    """

    path: str
    shape: tuple[int, ...]
    nonzero: int | None
    macs: int | None

    @property
    def params(self) -> int:
        return math.prod(self.shape)

    @property
    def is_weight(self) -> bool:
        """Whether it is the kernel of a convolution or product, or a table of rows."""
        return self.macs is not None


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a model for one call with the given inputs, whole batch included.

    Attributes:
      leaves: the cost of every leaf of floating point numbers, in the tree's order.
      other_macs: the multiply-adds of products without any parameter, as of queries
        and keys in attention.
      notes: what could not be counted exactly, and why.

    >>> variables = {"up": jnp.eye(4)}
    >>> cost = measure_cost(lambda v, x: x @ v["up"], variables, jnp.ones((2, 4)))
    >>> print(cost.table())
    layer               shape  params  nonzero  MACs
    up                  4x4        16        4    32
    weights                        16        4
    other parameters                0        0
    without parameters                             0
    total                          16        4    32
    """

    leaves: tuple[LeafCost, ...]
    other_macs: int
    notes: tuple[str, ...]

    @property
    def params(self) -> int:
        """All numbers in the variables; batch statistics too, if they are there."""
        return sum(leaf.params for leaf in self.leaves)

    @property
    def nonzero(self) -> int | None:
        """How many of `params` are not zero; None where only shapes are known."""
        return _sum_known(self.leaves)

    @property
    def weights(self) -> tuple[LeafCost, ...]:
        """Kernels and tables alone, which published results count: no bias, no norm."""
        return tuple(leaf for leaf in self.leaves if leaf.is_weight)

    @property
    def weight_params(self) -> int:
        return sum(leaf.params for leaf in self.weights)

    @property
    def nonzero_weights(self) -> int | None:
        return _sum_known(self.weights)

    @property
    def macs(self) -> int:
        return sum(leaf.macs or 0 for leaf in self.leaves) + self.other_macs

    def subtree(self, key: str) -> "Cost":
        """The cost without the leaves outside of `key`, as in `subtree("params")`."""
        start = f"{key}/"
        return dataclasses.replace(
            self,
            leaves=tuple(
                dataclasses.replace(leaf, path=leaf.path.removeprefix(start))
                for leaf in self.leaves
                if leaf.path.startswith(start)
            ),
        )

    def table(self) -> str:
        """A line per kernel or table of rows, one for all else, and the sums."""
        rest = [leaf for leaf in self.leaves if not leaf.is_weight]
        num_rest = sum(leaf.params for leaf in rest)
        rows = [
            ("layer", "shape", "params", "nonzero", "MACs"),
            *(
                (
                    x.path,
                    describe_shape(x.shape),
                    _grouped(x.params),
                    _grouped(x.nonzero),
                    _grouped(x.macs),
                )
                for x in self.weights
            ),
            (
                "weights",
                "",
                _grouped(self.weight_params),
                _grouped(self.nonzero_weights),
                "",
            ),
            (
                "other parameters",
                "",
                _grouped(num_rest),
                _grouped(_sum_known(rest)),
                "",
            ),
            ("without parameters", "", "", "", _grouped(self.other_macs)),
            (
                "total",
                "",
                _grouped(self.params),
                _grouped(self.nonzero),
                _grouped(self.macs),
            ),
        ]
        return "\n".join([*aligned(rows), *(f"note: {note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.table()


def measure_cost(fn: Callable[..., Any], variables: PyTree, *inputs: Any) -> Cost:
    """Counts the parameters, non-zeros and multiply-adds of `fn(variables, *inputs)`.

    Arrays may be `jax.ShapeDtypeStruct`: the function is traced, never run. Non-zeros
    are then unknown.

    A convolution counts its output positions times the kernel elements that make one,
    padding included, and a matrix product the usual m * k * n, as published tables do;
    additions, biases, normalisation and activations count nothing. In a transposed
    convolution the zeros between the inputs are not multiplied: it counts its input
    positions times the kernel. Loops count every iteration, and a conditional its
    dearest branch.

    A leaf is a weight if it is the kernel of a convolution or product, or a table of
    which whole rows are picked by what depends on the inputs, as tokens pick rows of
    an embedding. A lookup multiplies nothing: a table has 0 MACs, or those of the
    product that it is the kernel of, too. What several rows are sliced from, what is
    picked at places known when tracing, as positions are, or number by number is no
    table.

    >>> def dense(variables, x):
    ...     return x @ variables["kernel"] + variables["bias"]
    >>> variables = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones((1, 4))}
    >>> cost = measure_cost(dense, variables, jnp.ones((2, 8)))
    >>> cost.params, cost.weight_params, cost.macs
    (36, 32, 64)
    """
    expect_function(fn, "a function first, as in measure_cost(predict, variables, x)")
    paths, leaves, _ = flatten_with_paths(variables)
    program, _ = trace(fn, variables, *inputs)
    origins: list[_Origin] = [
        (_Part(i, math.prod(np.shape(leaf))),) if _is(leaf, jnp.number) else ()
        for i, leaf in enumerate(leaves)
    ]
    origins += [None] * (len(program.inputs) - len(leaves))
    notes: dict[str, None] = {}
    macs, _ = _count(program, origins, notes)
    nonzeros = _count_nonzeros(leaves)
    return Cost(
        tuple(
            LeafCost(path, np.shape(leaf), nonzero, macs[i] if i in macs else None)
            for i, (path, leaf, nonzero) in enumerate(
                zip(paths, leaves, nonzeros, strict=True)
            )
            if i in macs or _is(leaf, jnp.inexact)
        ),
        macs[None],
        tuple(notes),
    )


def _count(
    program: Program, origins: Sequence[_Origin], notes: dict[str, None]
) -> tuple[_Macs, list[_Origin]]:
    """The multiply-adds of a program, and what its outputs are made of.

    Args:
      program: the program.
      origins: what its inputs are made of.
      notes: takes what cannot be counted.
    """
    known = dict(zip(program.inputs, origins, strict=True))
    total: _Macs = Counter()
    for equation in program.equations:
        inputs = [known.get(x, ()) for x in equation.inputs]  # else a constant
        macs, outputs = _count_equation(equation, inputs, notes)
        _add(total, macs)
        known.update(zip(equation.outputs, outputs, strict=True))
    return total, [known.get(x, ()) for x in program.outputs]


def _count_equation(
    equation: Equation, origins: Sequence[_Origin], notes: dict[str, None]
) -> tuple[_Macs, Sequence[_Origin]]:
    name = equation.name
    if name in _PICKS and None in origins[1:] and _picks_rows(equation):
        return Counter({leaf.number: 0 for leaf in origins[0] or ()}), [None]
    if name in _PRODUCTS:
        lhs, rhs = equation.inputs[:2]
        (out,) = equation.outputs
        macs = _PRODUCTS[name](lhs.shape, rhs.shape, out.shape, equation.params)
        return _attribute(macs, *origins[:2]), [_origin_of_all(name, origins)]
    if name in _NESTED:
        return _NESTED[name](equation, origins, notes)
    if equation.bodies:
        (called,) = equation.bodies
        return _count(called, origins, notes)
    if any(map(_has_products, core.jaxprs_in_params(equation.params))):
        notes[f"{_name_and_line(equation)} is not counted"] = None
    return Counter(), [_origin_of_all(name, origins)] * len(equation.outputs)


def _attribute(macs: int, lhs: _Origin, rhs: _Origin) -> _Macs:
    """Gives `macs` to the leaves of the kernel: of `rhs`, or else of `lhs`.

    Leaves that were concatenated into one kernel share by size.
    """
    found: _Macs = Counter()
    for leaf in (*(lhs or ()), *(rhs or ())):
        found[leaf.number] = 0
    kernel = rhs or lhs
    if not kernel:
        found[None] = macs
        return found
    whole = sum(leaf.size for leaf in kernel)
    for leaf in kernel[1:]:
        found[leaf.number] += macs * leaf.size // whole
    found[kernel[0].number] += macs - found.total()
    return found


_PICKS = ("gather", "dynamic_slice")  # the latter is `table[i]` of a single row


def _picks_rows(equation: Equation) -> bool:
    """Whether it takes single entries along some axes and all along others."""
    shape, sizes = equation.inputs[0].shape, equation.params["slice_sizes"]
    picked = [size for size, whole in zip(sizes, shape, strict=True) if size < whole]
    return set(picked) == {1} and len(picked) < len(shape)


def _origin_of_all(name: str, origins: Sequence[_Origin]) -> _Origin:
    """What a value computed from values of these origins is made of.

    Weights may be cast, masked, standardised or scaled before they are used, so the
    largest operand gives the leaf; concatenation keeps all.
    """
    known = [origin for origin in origins if origin is not None]
    if len(known) < len(origins):
        return None
    if name in ("concatenate", "stack"):
        return tuple(dict.fromkeys(leaf for origin in known for leaf in origin))
    return max(known, key=lambda x: sum(leaf.size for leaf in x), default=())


def _dot_macs(lhs: Shape, rhs: Shape, out: Shape, params: Mapping[str, Any]) -> int:
    (_, contracted), (_, batch) = params["dimension_numbers"]
    return math.prod(lhs) * _prod_without(rhs, (*contracted, *batch))


def _ragged_dot_macs(
    lhs: Shape, rhs: Shape, out: Shape, params: Mapping[str, Any]
) -> int:
    """Every row of `lhs` meets one group of `rhs`."""
    numbers = params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    return math.prod(lhs) * _prod_without(rhs, (*contracted, *batch, *groups))


def _conv_macs(lhs: Shape, rhs: Shape, out: Shape, params: Mapping[str, Any]) -> int:
    numbers = params["dimension_numbers"]
    if math.prod(params["lhs_dilation"]) > 1:  # transposed: where the inputs are
        batch_axis, _, *spatial = numbers.lhs_spec
        positions = lhs[batch_axis] * math.prod(lhs[axis] for axis in spatial)
        return positions * math.prod(rhs)
    return math.prod(out) * _prod_without(rhs, numbers.rhs_spec[:1])


_PRODUCTS = {
    "dot_general": _dot_macs,
    "ragged_dot_general": _ragged_dot_macs,
    "conv_general_dilated": _conv_macs,
}


def _count_scan(
    equation: Equation, origins: Sequence[_Origin], notes: dict[str, None]
) -> tuple[_Macs, list[_Origin]]:
    num_constants, num_carried = scan_counts(equation)
    end = num_constants + num_carried
    (body,) = equation.bodies
    carried = _carried(body, origins, num_constants, end)
    inputs = [*origins[:num_constants], *carried, *origins[end:]]
    macs, outputs = _count(body, inputs, notes)
    return _times(macs, equation.params["length"]), outputs


def _count_while(
    equation: Equation, origins: Sequence[_Origin], notes: dict[str, None]
) -> tuple[_Macs, list[_Origin]]:
    test, body = equation.bodies
    start = equation.params["cond_nconsts"]
    test_constants, origins = origins[:start], origins[start:]
    start = equation.params["body_nconsts"]
    carried = _carried(body, origins, start, len(origins))
    macs, outputs = _count(body, [*origins[:start], *carried], notes)
    _add(macs, _count(test, [*test_constants, *carried], notes)[0])
    if any(macs.values()):
        name = _name_and_line(equation)
        notes[f"{name} is counted once, as its length is not known"] = None
    return macs, outputs


def _carried(
    body: Program, origins: Sequence[_Origin], start: int, end: int
) -> list[_Origin]:
    """What a loop carries: values of the last iteration, or what never changes."""
    results = body.outputs[: end - start]
    return [
        origin if variable is result else None
        for variable, result, origin in zip(
            body.inputs[start:end], results, origins[start:end], strict=True
        )
    ]


def _count_cond(
    equation: Equation, origins: Sequence[_Origin], notes: dict[str, None]
) -> tuple[_Macs, list[_Origin]]:
    branches = [_count(branch, origins[1:], notes) for branch in equation.bodies]
    macs = max((macs for macs, _ in branches), key=Counter.total)
    for others, _ in branches:
        _add(macs, dict.fromkeys(others, 0))  # kernels all the same
    outputs = zip(*(outputs for _, outputs in branches), strict=True)
    return macs, [_origin_of_all("cond", [origins[0], *x]) for x in outputs]


_NESTED = {"scan": _count_scan, "while": _count_while, "cond": _count_cond}


def _has_products(jaxpr: core.Jaxpr) -> bool:
    return any(x.name in _PRODUCTS for x, _ in equations(program_of(jaxpr)))


def _name_and_line(equation: Equation) -> str:
    line = source_line(equation)
    return f"{equation.name} ({line})" if line else equation.name


def _add(total: _Macs, macs: Mapping[int | None, int]) -> None:
    """Adds in place; unlike `Counter`'s own sum it keeps kernels with count 0."""
    for leaf, count in macs.items():
        total[leaf] += count


def _times(macs: _Macs, factor: int) -> _Macs:
    return Counter({leaf: count * factor for leaf, count in macs.items()})


def _prod_without(shape: Shape, axes: Sequence[int]) -> int:
    return math.prod(size for axis, size in enumerate(shape) if axis not in axes)


def _is(leaf: Any, kind: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), kind)


def _count_nonzeros(leaves: Sequence[Any]) -> list[int | None]:
    """The non-zeros of each leaf; None for abstract ones and those without numbers."""
    known = [
        _is(x, jnp.number) and not isinstance(x, jax.ShapeDtypeStruct) for x in leaves
    ]
    counts = iter(count_nonzero([*itertools.compress(leaves, known)]))
    return [next(counts) if is_known else None for is_known in known]


def _sum_known(leaves: Sequence[LeafCost]) -> int | None:
    counts = [leaf.nonzero for leaf in leaves if leaf.nonzero is not None]
    return sum(counts) if len(counts) == len(leaves) else None


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows with columns as wide as they need: names left, numbers right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _grouped(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
