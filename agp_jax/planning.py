"""Plans: what rules will leave, told from shapes and schedules alone.

How many cells or units go is arithmetic; which ones go needs weights, and no count.
"""

import dataclasses
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.branches import Layers, rank_layers
from agp_jax.cells import Leaf
from agp_jax.contests import count_removed
from agp_jax.costs import Cost, aligned, measure_cost
from agp_jax.couplings import Couplings, Group
from agp_jax.rules import Rule, checked_rules, match_rules
from agp_jax.structures import num_cells
from agp_jax.thinning.cuts import Cut, cut_units
from agp_jax.thinning.replay import thin_function
from agp_jax.thinning.trees import thin
from agp_jax.trees import (
    PyTree,
    Shape,
    abstract_array,
    describe_shape,
    expect,
    flatten_with_paths,
    name_together,
)
from agp_jax.units import (
    RankedGroup,
    check_couplings,
    expect_couplings,
    rank_groups,
)


class PlannedTensor(NamedTuple):
    """A parameter, and what will be left of it.

    Attributes:
      path: of the parameter.
      shape: as it is.
      rule: the number of the rule that takes it, from 0; None where it is ranked by
        none, as what only loses the units that it shares with others.
      nonzero: how many entries stay. Where cells or units of several tensors are ranked
        together, each is taken to lose an equal part, and only the sum is certain.
    """

    path: str
    shape: Shape
    rule: int | None
    nonzero: Fraction

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        return 1 - float(self.nonzero / self.size) if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """What `plan` foretells. Print it for a table.

    Attributes:
      rules: those that were asked for.
      tensors: every parameter of floating point numbers.
      before: the cost of the function; None where none was given.
      after: its cost once the units that go have been cut out.

    >>> import agp_jax as agp
    >>> rules = [agp.Rule("up", agp.element(), agp.one_shot(0.75))]
    >>> made = agp.plan(rules, {"up": jax.ShapeDtypeStruct((4, 8), "float32")})
    >>> made.nonzero, made.size
    (8, 32)
    """

    rules: tuple[Rule, ...]
    tensors: tuple[PlannedTensor, ...]
    before: Cost | None
    after: Cost | None

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def nonzero(self) -> int:
        """How many parameters are not zero in the end."""
        return int(sum(tensor.nonzero for tensor in self.tensors))

    def __str__(self) -> str:
        """A line for each rule and tensor, equal tensors in one, and the sums."""
        lines = []
        for number, rule in enumerate(self.rules):
            taken = sum(tensor.rule == number for tensor in self.tensors)
            tensors = "1 tensor" if taken == 1 else f"{taken} tensors"
            if rule.structure is None:
                lines.append(f"rule {number} {rule.pattern!r} keeps {tensors} dense")
                continue
            together = ", ranked together" if rule.ranks_together else ""
            lines += [
                f"rule {number} {rule.pattern!r} by {rule.structure}: {tensors}"
                f"{together};",
                *textwrap.wrap(
                    str(rule.schedule),
                    78,
                    initial_indent="  ",
                    subsequent_indent="  ",
                ),
            ]
        rows = [("tensor", "shape", "non-zero", "sparsity", "rule")]
        rows += [_row(*group) for group in _equal_tensors(self.tensors)]
        sparsity = 1 - self.nonzero / max(self.size, 1)
        rows.append(("all", "", f"{self.nonzero:,}", f"{sparsity:.2%}", ""))
        lines += ["", *aligned(rows), "", f"parameters: {self.size:,}"]
        if self.before and self.after:
            first, last = self.before.macs, self.after.macs
            lines.append(f"multiply-adds: {first:,}")
            if last != first:
                lines[-1] += f", and {last:,} ({last / first:.2%}) after a cut"
        return "\n".join(lines)


def plan(
    rules: Sequence[Rule],
    params: PyTree,
    couplings: Couplings | None = None,
    fn: Callable[..., PyTree] | None = None,
    inputs: Sequence[PyTree] = (),
) -> PruningPlan:
    """What `rules` will leave of `params` after their last events.

    Nothing is computed and no mask is made, so `params` may be of
    `jax.ShapeDtypeStruct` and of any size.

    Args:
      rules: with schedules, as for `prune`.
      params: the parameters.
      couplings: of the parameters, as for `prune`: what rules with filters, channels
        or heads remove goes from every leaf that shares it.
      fn: called as `fn(params, *inputs)`; its multiply-adds are counted, and with
        couplings those after a cut of the units that go.
      inputs: of `fn`; arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: as `match_rules` and `prune` do.

    >>> import agp_jax as agp
    >>> import jax.numpy as jnp
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    >>> rules = [agp.Rule("up", agp.element(), agp.one_shot(0.75)), agp.dense("down")]
    >>> print(agp.plan(rules, params))
    rule 0 'up' by element(): 1 tensor;
      sparsity 0.75 from step 0 on
    rule 1 'down' keeps 1 tensor dense
    <BLANKLINE>
    tensor  shape  non-zero  sparsity  rule
    down    8x2          16     dense     1
    up      4x8           8    75.00%     0
    all                  24    50.00%
    <BLANKLINE>
    parameters: 48
    """
    rules = checked_rules(rules)
    if couplings is not None:
        expect(couplings, Couplings, "couplings from agp.find_couplings third")
        check_couplings(couplings, params)
    expect(inputs, tuple | list, "the inputs of fn as a tuple, such as (x,)")
    matched = match_rules(rules, params)
    paths, leaves, treedef = flatten_with_paths(params)
    taken = dict(zip(paths, treedef.flatten_up_to(matched), strict=True))
    shapes = {p: abstract_array(x) for p, x in zip(paths, leaves, strict=True)}
    pruned = {path: rule for path, rule in taken.items() if rule is not None}
    last = max((int(r.schedule.end_step) for r in rules if r.schedule), default=0)
    ranking = rank(shapes, pruned, couplings)
    counts = count_nonzero_at(last, ranking)
    numbers = [
        next((i for i, r in enumerate(rules) if re.fullmatch(r.pattern, path)), None)
        for path in paths
    ]
    before = after = None
    if fn is not None:
        before = after = measure_cost(fn, params, *inputs)
        if couplings is not None:
            cut = _cut_of_any(last, ranking, couplings)
            abstract = treedef.unflatten(shapes[path] for path in paths)
            smaller = jax.eval_shape(lambda tree: thin(tree, cut), abstract)
            after = measure_cost(thin_function(fn, params, cut), smaller, *inputs)
    return PruningPlan(
        rules,
        tuple(
            PlannedTensor(path, shapes[path].shape, number, counts[path])
            for path, number in zip(paths, numbers, strict=True)
            if jnp.issubdtype(shapes[path].dtype, jnp.inexact)
        ),
        before,
        after,
    )


class Ranking(NamedTuple):
    """What rules rank, by path; and with couplings what goes together.

    Attributes:
      shapes: abstract arrays of all parameters.
      rules: those of the parameters that are pruned.
      couplings: of the parameters where rules prune whole units, else None.
      groups: whose units the rules rank.
      layers: those of loops that the rules rank.
    """

    shapes: Mapping[str, Any]
    rules: Mapping[str, Rule]
    couplings: Couplings | None
    groups: Sequence[RankedGroup]
    layers: Sequence[Layers]


def rank(
    shapes: Mapping[str, Any], rules: Mapping[str, Rule], couplings: Couplings | None
) -> Ranking:
    """What rules rank, of parameters given by path.

    Raises:
      ValueError: if couplings do not let a rule remove what it names.
    """
    leaves = {
        path: Leaf(path, rule, shapes[path], None, None, None)
        for path, rule in rules.items()
    }
    expect_couplings(leaves.values(), couplings)
    if couplings is None:
        return Ranking(shapes, rules, None, (), ())
    groups = rank_groups(leaves, shapes, couplings)
    return Ranking(shapes, rules, couplings, groups, rank_layers(leaves, couplings))


def count_nonzero_at(step: int, ranking: Ranking) -> dict[str, Fraction]:
    """How many entries of each parameter are not zero at a step, as schedules have it.

    Whole numbers, but where cells or units of several tensors are ranked together:
    there each loses an equal part, and only the sum of cells is exact.
    """
    slices: dict[tuple[str, int], Fraction] = defaultdict(Fraction)
    for group, removed in _units_gone(step, ranking):
        for member in group.members:
            slices[member.path, member.axis] += removed * member.indices.shape[1]
    whole: dict[str, Fraction] = defaultdict(Fraction)
    for layers, removed in _layers_gone(step, ranking):
        for path in layers.members:
            whole[path] += Fraction(removed, layers.num_layers)
    counts = {}
    for path, array in ranking.shapes.items():
        kept = 1 - whole[path]
        for axis, size in enumerate(array.shape):
            kept *= size - slices[path, axis]
        rule = ranking.rules.get(path)
        if rule is not None and not (ranking.couplings and rule.prunes_units):
            kept *= 1 - _removed_part(rule, path, step, ranking)
        counts[path] = kept
    return counts


def _removed_part(rule: Rule, path: str, step: int, ranking: Ranking) -> Fraction:
    """The part of a parameter's cells that its rule has removed."""
    rows, cells = count_cells(rule, ranking.shapes[path].shape)
    if rule.ranks_together:
        peers = [p for p, other in ranking.rules.items() if other == rule]
        cells = sum(
            math.prod(count_cells(rule, ranking.shapes[p].shape)) for p in peers
        )
    return Fraction(count_removed(rule, cells, step), cells) if cells else Fraction(0)


def count_cells(rule: Rule, shape: Shape) -> tuple[int, int]:
    """The separately ranked rows of a parameter, and the cells of each."""
    assert rule.structure is not None  # it prunes
    rows, tensor = rule.divide(shape)
    return math.prod(rows), num_cells(rule.structure, tensor)


def _units_gone(step: int, ranking: Ranking) -> Iterator[tuple[Group, Fraction]]:
    """The groups that rules rank, and how many units of each have gone."""
    for group, rule, _ in ranking.groups:
        units = group.num_units
        if rule.ranks_together:
            peers = [other for other, r, _ in ranking.groups if r == rule]
            units = sum(math.prod(other.shape) for other in peers)
        gone = count_removed(rule, units, step)
        yield group, Fraction(gone * group.num_units, units)


def _layers_gone(step: int, ranking: Ranking) -> Iterator[tuple[Layers, int]]:
    """The layers of loops that rules rank, and how many of them have gone."""
    for layers in ranking.layers:
        yield layers, count_removed(layers.rule, layers.num_layers, step)


def _cut_of_any(step: int, ranking: Ranking, couplings: Couplings) -> Cut:
    """A cut of as many units and layers as will go, of each kind the last ones."""
    removed = {group.name: int(count) for group, count in _units_gone(step, ranking)}
    dead = []
    for group in couplings.groups:
        flags = np.zeros(group.shape, bool)
        flags[..., group.num_units - removed.get(group.name, 0) :] = True
        dead.append(flags)
    gone = {
        path: True
        for layers, count in _layers_gone(step, ranking)
        for path, number in layers.members.items()
        if number >= layers.num_layers - count
    }
    return cut_units(couplings, dead, gone)


def _row(name: str, tensors: Sequence[PlannedTensor]) -> tuple[str, ...]:
    """Equal tensors in a row of a table: what is left is that of all of them."""
    tensor = tensors[0]
    many = f"{len(tensors)} x " if len(tensors) > 1 else ""
    return (
        name,
        f"{many}{describe_shape(tensor.shape) or 'scalar'}",
        f"{int(len(tensors) * tensor.nonzero):,}",
        "dense" if tensor.nonzero == tensor.size else f"{tensor.sparsity:.2%}",
        "" if tensor.rule is None else f"{tensor.rule}",
    )


def _equal_tensors(
    tensors: Sequence[PlannedTensor],
) -> Iterator[tuple[str, list[PlannedTensor]]]:
    """Tensors of which all is equal but numbers in their paths, under one name."""
    by_path = {tensor.path: tensor for tensor in tensors}
    for name, _, paths in name_together((t.path, t[1:]) for t in tensors):
        yield name, [by_path[path] for path in paths]
