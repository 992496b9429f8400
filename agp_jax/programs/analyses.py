"""Analyses: the labels of a function of variables, and which layers are stacked.

Layers that a `scan` steps through have their weights stacked along a leading axis. What
is coupled within the body alone may be removed in each layer for itself, as many units
in one layer as in another.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from agp_jax.programs.atoms import FROZEN
from agp_jax.programs.jaxprs import Equation, Program, Variable, scan_counts, trace
from agp_jax.programs.labels import Axis, Flow, Value, are_numbers
from agp_jax.programs.propagation import propagate
from agp_jax.trees import PyTree, abstract_arrays, flatten_with_paths


class Analysis(NamedTuple):
    """What is known about `fn(variables, *inputs)`.

    Attributes:
      program: the traced function; its inputs are the leaves in order.
      flow: the labels of all its values.
      paths: of the leaves of the variables.
      leaves: the axes of each leaf of the variables.
      out: what the function returns, as a tree of abstract arrays.
    """

    program: Program
    flow: Flow
    paths: list[str]
    leaves: list[tuple[Axis, ...]]
    out: PyTree


def analyse(
    fn: Callable[..., PyTree],
    variables: PyTree,
    *inputs: PyTree,
    freeze_outputs: bool,
) -> Analysis:
    """Labels a function's values; nothing is computed.

    Raises:
      ValueError: if a leaf is no array, by its path.
    """
    abstract, *examples = map(abstract_arrays, (variables, *inputs))
    paths, arrays, _ = flatten_with_paths(abstract)
    input_paths, _, _ = flatten_with_paths(examples)
    program, out = trace(fn, abstract, *examples)
    flow = Flow()
    leaves = [
        tuple(
            flow.fresh(size).relabel(frozenset({(i, k)}), frozenset({i}))
            for k, size in enumerate(x.shape)
        )
        for i, x in enumerate(arrays)
    ]
    values = [Value(axes, True, i) for i, axes in enumerate(leaves)]
    for variable, path in zip(program.inputs[len(leaves) :], input_paths, strict=True):
        reason = f"input {path}, whose shape is given"
        axes = (flow.fixed_because(size, reason) for size in variable.shape)
        values.append(Value(tuple(axes)))
    outputs = propagate(flow, program, values)
    if freeze_outputs:
        for path, value in zip(flatten_with_paths(out)[0], outputs, strict=True):
            with flow.at(f"output {path}".rstrip() + ", whose shape must stay"):
                flow.freeze(*value.axes)
    return Analysis(program, flow, paths, leaves, out)


def stacked_atoms(analysis: Analysis) -> tuple[np.ndarray, np.ndarray]:
    """Which atoms may be removed in each layer of a stack for itself.

    Returns:
      For each atom the number of the stack it belongs to, counted from 1, and 0 if it
      belongs to none; and for each stack how many layers it has, 0 for stack 0.
    """
    flow = analysis.flow
    stacks = np.zeros(flow.atoms.size, np.int32)
    num_layers = [0]
    for equation in analysis.program.equations:
        if equation.name == "scan" and are_numbers(equation.params["length"]):
            members = _stacked_leaves(analysis, equation)
            inside = _atoms_of(flow, (analysis.leaves[i][1:] for i in members))
            outside = _atoms_of(flow, _axes_outside(analysis, equation, members))
            own = inside & ~outside
            own[FROZEN] = False
            num_layers.append(equation.params["length"])
            stacks[own] = len(num_layers) - 1
    return stacks, np.array(num_layers)


def even_parts(analysis: Analysis, stacks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divides stacked atoms into parts of which each layer may lose others, as many.

    A value inside may hold some of the atoms only, as where a part of the channels is
    shifted, and has one size in all layers. So atoms are of one part if they lie alike
    in every axis. Where pairs of atoms are picked, as many of each do not settle how
    many pairs there are; these atoms go in all layers or none.

    Args:
      analysis: of a function.
      stacks: for each atom the number of its stack, as `stacked_atoms` gives it.

    Returns:
      `stacks`, 0 for what cannot differ between layers; and for each atom the number of
      its part, 0 where the stack is.
    """
    flow, stacks = analysis.flow, stacks.copy()
    values = (*analysis.leaves, *(value.axes for value in flow.values.values()))
    axes = {id(axis.atoms): axis.atoms for several in values for axis in several}
    factors = [flow.atoms.factors(atoms) for atoms in axes.values()]
    while True:
        factors = [columns for columns in factors if stacks[columns].any()]
        parts = _parts(stacks, factors)
        uneven = [columns for columns in factors if not _is_even(columns, parts)]
        if not uneven:
            return stacks, np.where(stacks > 0, 1 + parts, 0)
        stacks[np.concatenate([columns.ravel() for columns in uneven])] = 0


def _parts(stacks: np.ndarray, factors: list[np.ndarray]) -> np.ndarray:
    """A number for each atom: that of its part, or its own if it is of no stack."""
    # Sums of random numbers, one for each axis, tell where an atom occurs, how often.
    rng = np.random.default_rng(0)
    places = stacks.astype(np.uint64)
    for column in (column for columns in factors for column in columns.T):
        atoms, counts = np.unique(column, return_counts=True)
        draw = rng.integers(2**63, dtype=np.uint64)
        places[atoms] += draw * counts.astype(np.uint64)
    places = np.where(stacks > 0, places, np.arange(len(stacks), dtype=np.uint64))
    return np.unique(places, return_inverse=True)[1].reshape(-1)


def _is_even(columns: np.ndarray, parts: np.ndarray) -> bool:
    """Whether as many of each part leave as many indices of an axis.

    They do if it has every combination of the atoms of the parts that it combines.
    """
    if columns.shape[1] == 1:
        return True
    sizes = np.bincount(parts)
    kinds, kind = np.unique(parts[columns], axis=0, return_inverse=True)
    order = np.argsort(kind.reshape(-1), kind="stable")
    ends = np.cumsum(np.bincount(kind.reshape(-1)))[:-1]
    for combined, rows in zip(kinds, np.split(columns[order], ends), strict=True):
        rows, counts = np.unique(rows, axis=0, return_counts=True)
        if len(rows) != np.prod(sizes[combined]) or (counts != counts[0]).any():
            return False
    return True


def _stacked_leaves(analysis: Analysis, scan: Equation) -> set[int]:
    """The leaves that are used as the weights of the layers of `scan`, and only so."""
    values = analysis.flow.values
    first = sum(scan_counts(scan))
    known = [values[v].leaf for v in scan.inputs[first:] if v in values]
    stacked = {leaf for leaf in known if leaf is not None}
    misused: set[int | None] = set()
    for equation in analysis.program.equations:
        read = equation.inputs[:first] if equation is scan else equation.inputs
        for variable in read:
            leaf = values[variable].leaf if variable in values else None
            copies = all(values[v].leaf == leaf for v in equation.outputs)
            if not copies and not equation.name.startswith("reduce_"):
                misused.add(leaf)
    return stacked - misused


def _axes_outside(
    analysis: Analysis, scan: Equation, members: set[int]
) -> Iterator[tuple[Axis, ...]]:
    """The axes of everything but the body of `scan` and its stacked weights."""
    values = analysis.flow.values
    inner = set(_variables_of(analysis.flow, scan.bodies))
    for i, axes in enumerate(analysis.leaves):
        if i not in members:
            yield axes
    for variable, value in values.items():
        # What is one number over and over is that in any layer, of any size.
        elsewhere = variable not in inner and not variable.is_uniform
        if elsewhere and value.leaf not in members:
            yield value.axes


def _variables_of(flow: Flow, programs: tuple[Program, ...]) -> Iterator[Variable]:
    """All variables inside, those of labelled derivatives too."""
    for program in programs:
        yield from program.inputs
        for equation in program.equations:
            yield from equation.inputs
            yield from equation.outputs
            yield from _variables_of(flow, equation.bodies)
            yield from _variables_of(flow, flow.derivatives.get(equation, ()))


def _atoms_of(flow: Flow, axes: Iterator[tuple[Axis, ...]]) -> np.ndarray:
    """Which atoms occur as factors of some axis, as a bool per atom."""
    found = np.zeros(flow.atoms.size, bool)
    seen: set[int] = set()
    for axis in (axis for several in axes for axis in several):
        if id(axis.atoms) not in seen:
            seen.add(id(axis.atoms))
            found[flow.atoms.factors(axis.atoms)] = True
    return found
