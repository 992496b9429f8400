"""Branches: layers of a Python loop, which are ranked and masked as one.

A layer is what it adds to a stream: the residual branches that a rule's pattern gives
one name. Its score is the sum of the scores of what the rule names of it, and its mask
covers all that is of use for its branches alone.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agp_jax.boxes import sum_boxes
from agp_jax.cells import Leaf, cell_keys, keep_sharding, weight_scores
from agp_jax.couplings import Branch, Couplings
from agp_jax.rules import Rule
from agp_jax.selection import Entrant
from agp_jax.units import stack_of


class Layers(NamedTuple):
    """The layers of a loop that a rule prunes, by number.

    Attributes:
      rule: when and how many of them go.
      scored: the layer of each parameter that they are ranked by.
      members: the layer of each parameter that goes with one.
    """

    rule: Rule
    scored: Mapping[str, int]
    members: Mapping[str, int]

    @property
    def num_layers(self) -> int:
        return 1 + max(self.scored.values())


def rank_layers(leaves: Mapping[str, Leaf], couplings: Couplings) -> list[Layers]:
    """The layers of loops that the rules of `leaves` prune, for each rule.

    Args:
      leaves: what the rules prune, by path.
      couplings: of all parameters.

    Raises:
      ValueError: if a rule names what is part of no residual branch, or of one that
        belongs to several layers; if two rules prune one layer.
    """
    by_rule: dict[Rule, list[str]] = defaultdict(list)
    for leaf in leaves.values():
        if leaf.rule.prunes_layers and stack_of(leaf, couplings) is None:
            by_rule[leaf.rule].append(leaf.path)
    ranked = [_find_layers(rule, paths, couplings) for rule, paths in by_rule.items()]
    owners: dict[str, Rule] = {}
    for layers in ranked:
        for path in layers.members:
            if owners.setdefault(path, layers.rule) != layers.rule:
                raise ValueError(
                    f"{owners[path]} and {layers.rule} both prune the layer of {path}: "
                    f"name its parameters in one rule"
                )
    return ranked


def enter_layers(layers: Layers, leaves: Mapping[str, Leaf]) -> Entrant:
    """The layers as they enter a contest."""
    scores = [jnp.zeros((), jnp.float32)] * layers.num_layers
    alive = [jnp.zeros((), bool)] * layers.num_layers
    for path, number in layers.scored.items():
        score, is_alive = _score_whole(leaves[path])
        scores[number] += score
        alive[number] |= is_alive
    arrays = (jnp.stack(scores), jnp.stack(alive))
    return Entrant(arrays, cell_keys, shape=(layers.num_layers,))


def masks_of_layers(
    layers: Layers,
    kept: jax.Array,
    weights: Mapping[str, Any],
    masks: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """The masks of all that goes with the layers, by path, where these are kept."""
    return {
        path: keep_sharding(kept[number], weights[path], masks.get(path))
        for path, number in layers.members.items()
    }


def _score_whole(leaf: Leaf) -> tuple[jax.Array, jax.Array]:
    """The sum of the scores of a whole parameter, and whether any of it is left."""
    scores = weight_scores(leaf)
    if leaf.mask is None:
        return sum_boxes(scores, scores.shape).reshape(()), jnp.ones((), bool)
    scores = jnp.where(leaf.mask, scores, 0.0)
    return sum_boxes(scores, scores.shape).reshape(()), leaf.mask.any()


def _find_layers(rule: Rule, paths: list[str], couplings: Couplings) -> Layers:
    names = {path: _name_of_layer(rule, path, couplings) for path in paths}
    of_one: dict[str, list[Branch]] = defaultdict(list)
    of_several: list[tuple[Branch, list[str]]] = []
    for branch in couplings.branches:
        found = sorted({names[path] for path in branch.leaves if path in names})
        if len(found) == 1:
            of_one[found[0]].append(branch)
        elif found:
            of_several.append((branch, found))
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names.values()))}
    members: dict[str, int] = {}
    for name, branches in of_one.items():
        for branch in branches:
            if branch.inexact:
                raise ValueError(
                    f"{rule} prunes the layer {name!r}, but a model without "
                    f"{branch.name} is another one than one with zeros: "
                    f"{branch.inexact}"
                )
            members |= dict.fromkeys(branch.leaves, numbers[name])
    for path in paths:
        if path not in members:
            raise ValueError(
                _explain_no_layer(rule, path, names, of_several, couplings)
            )
    return Layers(rule, {path: numbers[names[path]] for path in paths}, members)


def _name_of_layer(rule: Rule, path: str, couplings: Couplings) -> str:
    """What the pattern's parentheses capture; without, the path up to a number."""
    match = re.fullmatch(rule.pattern, path)
    assert match is not None
    if match.re.groups:
        return "/".join(filter(None, match.groups()))
    names = path.split("/")
    end = next((i for i, name in enumerate(names) if re.search(r"\d", name)), None)
    if end is None:
        raise ValueError(
            f"{rule} prunes {path} by {rule.structure}, but it is of no stack of layers"
            f"{_why_fixed(path, couplings)}, and no name in it has a number, by which "
            f"layers of a loop go. Put what names the layer in parentheses, as in "
            f"Rule(r'(h_\\d+)/.*', agp.layers(), ...)"
        )
    return "/".join(names[: end + 1])


def _explain_no_layer(
    rule: Rule,
    path: str,
    names: Mapping[str, str],
    of_several: list[tuple[Branch, list[str]]],
    couplings: Couplings,
) -> str:
    """Why a parameter is part of no layer that can be removed."""
    start = f"{rule} prunes {path} by {rule.structure}, but it is part of "
    for branch, found in of_several:
        if path in branch.leaves:
            return (
                f"{start}a residual branch of several layers: {', '.join(found)}. Put "
                f"what names the layer in parentheses, as in Rule(r'(stage1)/.*', ...)"
            )
    others = [branch.name for branch in couplings.branches]
    return (
        f"{start}no residual branch, nor of a stack of layers"
        f"{_why_fixed(path, couplings)}. Leave it out of "
        f"the pattern, or put agp.dense(...) before it. "
        f"Branches are made by {', '.join(others[:3]) or 'nothing here'}"
        + (", ..." if len(others) > 3 else "")
    )


def _why_fixed(path: str, couplings: Couplings) -> str:
    fixed = couplings.frozen.get((path, 0), ())
    return f" (along axis 0: {fixed[0][2]})" if fixed else ""
