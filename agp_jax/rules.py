"""Which parameters are pruned, how, and when: patterns on paths."""

import dataclasses
import difflib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.schedules import Schedule, in_parts
from agp_jax.structures import Structure, num_cells
from agp_jax.trees import PyTree, Shape, expect, flatten_with_paths

_MAX_CELLS = 2**31 - 1
_MAX_CELL_SIZE = 2**28


@dataclasses.dataclass(frozen=True)
class Rule:
    """Prunes the parameters whose path matches `pattern`.

    Attributes:
      pattern: a regular expression for the whole path (`re.fullmatch`).
      structure: how those tensors divide into cells; None keeps them dense, as
        `dense` says in a word.
      schedule: when they lose how much.
      score: what makes a cell worth keeping, summed over its weights in float32:
        called with the weights, or with weights and gradients if it takes two
        arguments. `jnp.abs` ranks cells by L1 norm, `jnp.square` by L2.
      scope: "tensor" ranks each tensor by itself, "rule" all tensors together, as
        layers always are.
      stacked_axes: so many leading axes index separate tensors of the same shape,
        as in layers stacked by `scan`; each is ranked by itself. A tuple of their
        numbers says which axes these are, where they are others: `(1,)`. The structure
        counts the axes of one tensor.
      units: with couplings, a regular expression for the whole names of the groups
        whose units go, where those of several kinds lie along one axis: the queries of
        a kernel go with their head of keys, or as many of each head. None for the only
        kind there is.

    Raises:
      ValueError: for a pattern that is no regular expression and for options of the
        wrong kind.

    >>> import agp_jax as agp
    >>> curve = agp.polynomial_schedule(0.8, begin_step=0, end_step=400, frequency=20)
    >>> agp.Rule(".*/kernel", agp.element(), curve, scope="rule")
    Rule('.*/kernel', element(), \
polynomial_schedule(0.8, begin_step=0, end_step=400, frequency=20), scope='rule')
    """

    pattern: str
    structure: Structure | None
    schedule: Schedule | None = None
    _: dataclasses.KW_ONLY
    score: Callable[..., jax.Array] = jnp.abs
    scope: str = "tensor"
    stacked_axes: int | tuple[int, ...] = 0
    units: str | None = None

    def __post_init__(self):
        _check_expression("rule pattern", self.pattern)
        for name, kind, made_by in (
            ("structure", Structure, "agp.element() or another structure function"),
            ("schedule", Schedule, "agp.polynomial_schedule or agp.one_shot"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(
                    f"{self}: expected a {name} made by {made_by}, got {value!r}"
                )
        if self.schedule and not self.structure:
            raise ValueError(f"{self} has a schedule but no structure to prune by")
        if not callable(self.score):
            raise ValueError(f"{self}: score must be a function, got {self.score!r}")
        if self.scope not in ("tensor", "rule"):
            raise ValueError(
                f"{self}: scope must be 'tensor' or 'rule', got {self.scope!r}"
            )
        stacked = self.stacked_axes
        is_valid = (
            all(map(_is_whole, stacked))
            if isinstance(stacked, tuple)
            else _is_whole(stacked) and stacked >= 0
        )
        if not is_valid:
            raise ValueError(
                f"{self}: stacked_axes must be a number of leading axes, or a tuple of "
                f"the numbers of axes, got {stacked!r}"
            )
        if self.units is not None:
            _check_expression(f"{self}: units", self.units)
            if not self.prunes_units:
                raise ValueError(
                    f"{self}: units names groups of filters, channels, heads or "
                    f"experts, which its structure is not: {self.structure}"
                )
        if self.prunes_layers and (self.units is not None or stacked):
            raise ValueError(
                f"{self}: {self.structure} finds the layers by itself; leave units and "
                f"stacked_axes out"
            )
        if self.structure and self.structure.keep_n_of_m:
            self._check_n_of_m(*self.structure.keep_n_of_m)

    def _check_n_of_m(self, n: int, m: int, axis: int | None):
        if self.scope == "rule":
            raise ValueError(
                f"{self}: {self.structure} ranks within groups of {m}, so "
                f"scope must be 'tensor'"
            )
        end = 1 - Fraction(n, m)
        if self.schedule and in_parts(self.schedule.final_sparsity, m) != end:
            raise ValueError(
                f"{self}: {self.structure} ends at a sparsity of {float(end)}, but the "
                f"schedule's final_sparsity is {self.schedule.final_sparsity}"
            )

    @property
    def scores_gradients(self) -> bool:
        """Whether `score` needs the gradients: whether it needs two arguments."""
        if isinstance(self.score, jnp.ufunc):
            return self.score.nin > 1
        try:
            parameters = inspect.signature(self.score).parameters.values()
        except ValueError:  # a builtin that does not tell
            return False
        positional = (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        required = [p for p in parameters if p.default is p.empty]
        return sum(p.kind in positional for p in required) > 1

    def axes_of(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes that index separate tensors, and those of one such tensor.

        Raises:
          ValueError: if the shape has not the axes that are stacked.
        """
        stacked, ndim = self.stacked_axes, len(shape)
        named = stacked if isinstance(stacked, tuple) else range(stacked)
        rows = sorted({axis % ndim for axis in named if -ndim <= axis < ndim})
        if len(rows) < len(named):
            which = f"{stacked} axes" if named is not stacked else f"axes {stacked}"
            raise ValueError(f"{self} stacks {which}")
        return tuple(rows), tuple(axis for axis in range(ndim) if axis not in rows)

    def divide(self, shape: Shape) -> tuple[Shape, Shape]:
        """The shape of the stack that `shape` is, and that of one tensor in it."""
        rows, tensor = self.axes_of(shape)
        return tuple(shape[a] for a in rows), tuple(shape[a] for a in tensor)

    @property
    def prunes_units(self) -> bool:
        """Whether its cells are slabs, such as filters, which other parameters share.

        With couplings such a rule ranks and masks whole units; layers are units, too.
        """
        has_slabs = self.structure is not None and self.structure.axis is not None
        return has_slabs or self.needs_couplings

    @property
    def needs_couplings(self) -> bool:
        """Whether only couplings tell where its cells are: layers and experts."""
        if self.structure is None:
            return False
        return self.structure.is_of_layers or self.structure.chosen

    @property
    def prunes_layers(self) -> bool:
        """Whether its cells are whole layers."""
        return self.structure is not None and self.structure.is_of_layers

    @property
    def ranks_together(self) -> bool:
        """Whether all its cells compete with each other."""
        return self.scope == "rule" or self.prunes_layers

    def __str__(self) -> str:
        return f"rule {self.pattern!r}"

    def __repr__(self) -> str:
        if self.structure is None:
            return f"dense({self.pattern!r})"
        given = [repr(self.pattern), repr(self.structure)]
        if self.schedule:
            given.append(repr(self.schedule))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.kw_only and value != field.default:
                # A function has a name, which reads better than its address.
                said = getattr(value, "__name__", repr(value))
                given.append(f"{field.name}={said}")
        return f"Rule({', '.join(given)})"


def dense(pattern: str) -> Rule:
    """Keeps the parameters whose path matches `pattern` dense, whatever comes later.

    >>> dense("stem/.*")
    dense('stem/.*')
    """
    return Rule(pattern, None)


def _check_expression(what: str, value: Any):
    problem = "" if isinstance(value, str) else "it must be a str"
    try:
        re.compile(value if isinstance(value, str) else "")
    except re.error as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{what} {value!r} is not a regular expression: {problem}")


def match_rules(rules: Sequence[Rule], params: PyTree) -> PyTree:
    """The rule that prunes each parameter, in a tree like `params`.

    The first rule that matches a path wins. None stands where a parameter stays dense:
    where no rule matches, where the matching rule has no structure, and at leaves that
    are not real floating point numbers.

    Args:
      rules: the rules, in order of precedence.
      params: a tree of arrays or of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: if a rule matches no parameter (the message names the nearest paths)
        or only such that earlier rules or their type take away from it; if its
        structure does not fit a tensor or lacks a schedule; if two parameters have the
        same path.

    >>> import agp_jax as agp
    >>> rules = [agp.dense("stem/.*"), agp.Rule(".*", agp.element(), agp.one_shot(0.5))]
    >>> match_rules(rules, {"stem": {"kernel": 1.0}, "head": {"kernel": 1.0}})
    {'head': {'kernel': Rule('.*', element(), one_shot(0.5, step=0))}, \
'stem': {'kernel': None}}
    """
    rules = checked_rules(rules)
    paths, leaves, treedef = flatten_with_paths(params)
    prunable = [_is_real(x) for x in leaves]
    winner: list[int | None] = [
        next((i for i, r in enumerate(rules) if re.fullmatch(r.pattern, path)), None)
        for path in paths
    ]
    for i, rule in enumerate(rules):
        if not any(prunable[k] for k, won in enumerate(winner) if won == i):
            raise ValueError(_explain_idle(rule, i, rules, paths, winner))
    matched: list[Rule | None] = []
    ranked_together: Counter[Rule] = Counter()
    for path, leaf, won, floating in zip(paths, leaves, winner, prunable, strict=True):
        rule = None if won is None or not floating else rules[won]
        if rule is None or rule.structure is None:
            matched.append(None)
        else:
            cells = _count_cells(rule, rule.structure, path, np.shape(leaf))
            ranked_together[rule] += cells if rule.scope == "rule" else 0
            matched.append(rule)
    for rule, cells in ranked_together.items():
        if cells > _MAX_CELLS:
            raise ValueError(
                f"{rule} ranks {cells} cells together, more than {_MAX_CELLS}; split "
                f"it into several rules"
            )
    return treedef.unflatten(matched)


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_real(x: Any) -> bool:
    """Whether a leaf is of real floating point numbers; it may be anything."""
    dtype = getattr(x, "dtype", None)
    return (
        isinstance(x, float) if dtype is None else jnp.issubdtype(dtype, jnp.floating)
    )


def checked_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules, if they are some: a ValueError tells what they are instead."""
    if isinstance(rules, Rule):
        raise ValueError(f"expected a list of rules, got one: [{rules!r}]")
    expect(rules, Iterable, "a list of agp.Rule")
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ValueError(f"expected a list of agp.Rule, got {rule!r} in it")
        if rule.structure and not rule.schedule:
            raise ValueError(f"{rule} has a structure but no schedule to follow")
    return rules


def _explain_idle(
    rule: Rule,
    index: int,
    rules: Sequence[Rule],
    paths: Sequence[str],
    winner: Sequence[int | None],
) -> str:
    """Why `rule` prunes nothing."""
    matches = [i for i, path in enumerate(paths) if re.fullmatch(rule.pattern, path)]
    for i in matches:
        won = winner[i]
        if won is not None and won != index:
            return (
                f"{rule} has no effect: an earlier rule takes what it matches, such as "
                f"{paths[i]} by {rules[won]}"
            )
    if matches:
        return (
            f"{rule} matches no floating point parameter, only "
            f"{', '.join(paths[i] for i in matches[:3])}"
        )
    if not paths:
        return f"{rule} matches no parameter, for there are none"
    parts = [path for path in paths if re.search(rule.pattern, path)]
    if parts:
        pattern = f".*{rule.pattern}.*"
        whole = pattern if re.fullmatch(pattern, parts[0]) else parts[0]
        return (
            f"{rule} matches a part of {parts[0]}, but a pattern must match the whole "
            f"path, as {whole!r} does"
        )
    nearest = difflib.get_close_matches(rule.pattern, paths, n=3, cutoff=0.0)
    return f"{rule} matches no parameter; nearest: {', '.join(nearest)}"


def _count_cells(
    rule: Rule, structure: Structure, path: str, shape: tuple[int, ...]
) -> int:
    """How many cells a parameter has; raises ValueError if the rule does not fit it."""
    try:
        rows, tensor = rule.divide(shape)
    except ValueError as error:
        raise ValueError(f"{error}, but {path} has shape {shape}") from None
    if structure.chosen:
        return 0  # couplings tell
    try:
        cells = num_cells(structure, tensor)
    except ValueError as error:
        raise ValueError(f"{rule} cannot prune {path}: {error}") from None
    if cells > _MAX_CELLS:
        raise ValueError(
            f"{rule} cannot prune {path}: a tensor of shape {tensor} has more than "
            f"{_MAX_CELLS} cells; rank its leading axes apart with stacked_axes"
        )
    cell_size = math.prod(tensor) // max(cells, 1)
    if cell_size > _MAX_CELL_SIZE and not rule.prunes_layers:  # of one or of many
        raise ValueError(
            f"{rule} cannot prune {path}: a cell of {cell_size} weights is more than "
            f"{_MAX_CELL_SIZE}, up to which sums are exact"
        )
    return math.prod(rows) * cells
