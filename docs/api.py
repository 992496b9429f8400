"""Writes docs/api.md: what `import agp_jax` brings, from the docstrings.

python docs/api.py
"""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import agp_jax as agp  # noqa: E402

PAGE = ROOT / "docs" / "api.md"

PARTS = {
    "Schedules": "polynomial_schedule one_shot schedule_within Schedule",
    "Structures": "element block n_of_m filters channels heads layers experts "
    "Structure",
    "Rules": "Rule dense match_rules",
    "Optimizer": "prune PruneState get_masks",
    "Masks": "make_masks apply_masks sparsity fingerprint",
    "Thinning": "find_couplings Couplings plan_cut Cut thin thin_opt_state "
    "thin_function check_cut without_experts",
    "Plans and cost": "plan PruningPlan measure_cost Cost",
}

HEAD = """# What `import agp_jax as agp` brings

Made from the docstrings by `python docs/api.py`. [method.md](method.md) has the exact
semantics, [thinning.md](thinning.md) explains cuts.
"""


def make_page() -> str:
    """The text of docs/api.md."""
    parts = [HEAD]
    for title, names in PARTS.items():
        parts.append(f"## {title}\n")
        parts += [describe(name) for name in names.split()]
    return "\n".join(parts)


def describe(name: str) -> str:
    """A public name: how it is called, and its docstring."""
    thing = getattr(agp, name)
    body = "\n".join(_markdown(inspect.getdoc(thing) or ""))
    lines = [f"### `{name}`\n", f"```\n{_call(name, thing)}\n```\n", f"{body}\n"]
    methods = [
        f"- `.{key}`: {(inspect.getdoc(value) or '').partition(chr(10))[0]}"
        for key, value in vars(thing).items()
        if isinstance(thing, type)
        and not key.startswith("_")
        and (callable(value) or isinstance(value, property | classmethod))
        and value.__doc__
        and not hasattr(tuple, key)
    ]
    return "\n".join([*lines, *methods, ""] if methods else lines)


def _call(name: str, thing: object) -> str:
    """The call with its defaults, without types, in lines of a page."""
    parameters = inspect.signature(thing).parameters.values()  # type: ignore
    given, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            given.append(f"*{parameter.name}")
            starred = True
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            given.append("*")
            starred = True
        default = parameter.default
        said = getattr(default, "__name__", repr(default))
        given.append(
            parameter.name if default is parameter.empty else f"{parameter.name}={said}"
        )
    line = f"{name}({', '.join(given)})"
    return line if len(line) <= 88 else f"{name}(\n    {', '.join(given)}\n)"


def _markdown(doc: str) -> Iterator[str]:
    """Sections as lists, examples as code; paragraphs are Markdown already."""
    section, in_example = "", False
    for line in doc.splitlines():
        if line.startswith(">>>") and not in_example:
            in_example = True
            yield "```pycon"
        if in_example:
            if not line.strip():
                in_example = False
                yield "```"
            yield line
        elif heading := re.fullmatch(r"(Args|Returns|Raises|Attributes):", line):
            section = heading[1]
            yield f"**{section}**\n"
        elif section and (entry := re.match(r"  (\w+(?:, \w+)*): (.*)", line)):
            yield f"- `{entry[1]}`: {entry[2]}"
        elif section and line.startswith("  "):
            yield line[2:]
        else:
            if line.strip():
                section = ""
            yield line
    if in_example:
        yield "```"


if __name__ == "__main__":
    PAGE.write_text(make_page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
