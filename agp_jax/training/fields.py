"""The fields of a config: their names on the command line, defaults and meanings."""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from agp_jax.training.config import Config


class Field(NamedTuple):
    """A value of a config, as `--config.<name>=...` sets it."""

    name: str  # "prune.final_sparsity"
    default: Any
    about: str


def list_fields(kind: Any = Config, prefix: str = "") -> list[Field]:
    """The fields of a config class and of those in it, as their docstrings tell them.

    >>> next(f for f in list_fields() if f.name == "prune.round_to")
    Field(name='prune.round_to', default=1, about='a cut leaves multiples of this many \
units.')
    """
    meanings, fields = _meanings(kind), []
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if dataclasses.is_dataclass(field.default_factory):
            fields += list_fields(field.default_factory, f"{name}.")
        else:
            fields.append(Field(name, field.default, meanings.get(field.name, "")))
    return fields


def _meanings(kind: Any) -> dict[str, str]:
    """What the section `Attributes` of a docstring says of each name."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    section = section.partition("\n\n")[0]
    meanings = {}
    for entry in re.split(r"^  (?=\w)", section, flags=re.M)[1:]:
        names, _, about = entry.partition(":")
        for name in names.split(","):
            meanings[name.strip()] = " ".join(about.split())
    return meanings


def nearest(name: str, names: Iterable[str]) -> str:
    """The three of `names` that are most like `name`, the likest first.

    A name without its group is like the one with it.

    >>> nearest("final_sparsty", ["steps", "prune.final_sparsity"])
    'prune.final_sparsity, steps'
    """

    def likeness(other: str) -> float:
        forms = {other, other.rpartition(".")[2]}
        return max(difflib.SequenceMatcher(None, name, x).ratio() for x in forms)

    return ", ".join(sorted(names, key=likeness, reverse=True)[:3])
