"""Writes the tables of docs/published.md: published figures beside ours.

    python docs/published.py

Each row is the plan of a config, as `train.py --plan` makes it.
"""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from agp_jax.training.config import Config  # noqa: E402
from agp_jax.training.experiment import set_up  # noqa: E402
from agp_jax.training.plans import Plan, make_plan  # noqa: E402
from agp_jax.training.published import Published, compare  # noqa: E402

PAGE = ROOT / "docs" / "published.md"
BEGIN, END = "<!-- python docs/published.py -->\n", "<!-- end of tables -->\n"
BEGIN_LANGUAGE = "<!-- python docs/published.py, language -->\n"

ROWS = (
    "alexnet_element_88",
    "alexnet_hybrid_2dreg",
    "mobilenet_element_52",
    "resnext101_element_75",
    "resnet18_element_60",
    "resnet50_element_26",
    "resnet50_element_80",
    "resnet50_element_85",
    "resnet50_block_1x1x8",
    "resnet50_filters_1",
    "resnet50_filters_2",
    "resnet50_filters_3",
    "resnet50_filters_fc",
    "resnet20_filters_1",
    "resnet20_filters_bnfold",
    "resnet20_filters_2",
    "resnet20_filters_3",
    "resnet20_filters_4",
)


LANGUAGE_ROWS = (
    "wikitext2_lstm_small",
    "wikitext2_lstm_medium",
    "wikitext2_lstm_large",
    "wikitext2_lstm_large_70",
    "wikitext2_lstm_large_70b",
    "wikitext2_lstm_large_73",
    "wikitext2_lstm_large_80",
    "wikitext2_lstm_large_90",
    "wikitext2_lstm_large_95",
    "wikitext2_lstm_large_base",
)


def load(name: str) -> Config:
    return importlib.import_module(f"configs.{name}").get_config()


def render(plans: Mapping[str, Plan]) -> str:
    """The tables and notes, as Markdown."""
    lines = [
        "| config | weights | after the cut | non-zero | sparsity | multiply-adds "
        "| after the cut |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, plan in plans.items():
        before, after = plan.before, plan.after
        cut = after.weight_params < before.weight_params
        params = f"{after.weight_params:,} ({_kept(after, before)})" if cut else "-"
        macs = f"{after.macs:,} ({after.macs / before.macs:.2%})" if cut else "-"
        lines.append(
            f"| `{name}` | {before.weight_params:,} | {params} | {plan.nonzero:,} "
            f"| {100 * plan.sparsity_left:.5f} % | {before.macs:,} | {macs} |"
        )
    lines += [
        "",
        "| config | published in | top-1 (dense) | figures | |",
        "|---|---|---|---|---|",
    ]
    for name, plan in plans.items():
        published = _published(name)
        rows = compare(published, plan.before, plan.after)
        same = ", ".join(
            f"{row.quantity} {row.published}" for row in rows if row.agrees
        )
        other = ", ".join(
            f"{row.quantity} {row.published}, here {row.here}"
            for row in rows
            if not row.agrees
        )
        lines.append(
            f"| `{name}` | {published.source} | {published.top1} "
            f"({published.base_top1}) | the same: {same} "
            f"| {f'differs: {other}' if other else ''} |"
        )
    lines += ["", "What is wrong in the published figures:", ""]
    for name in plans:
        lines += [f"- `{name}`: {erratum}." for erratum in _published(name).errata]
    return "\n".join(lines) + "\n"


def render_language(nonzero: Mapping[str, int]) -> str:
    """The table of language models, as Markdown, of their non-zero weights by name."""
    lines = [
        "| config | non-zero weights | published | perplexity: test (dense) |",
        "|---|---:|---:|---:|",
    ]
    for name, count in nonzero.items():
        published = _published(name)
        theirs = "-" if published.nonzero is None else f"{published.nonzero:,}"
        quality = published.perplexity or "-"
        if published.base_perplexity:
            quality += f" ({published.base_perplexity})"
        lines.append(f"| `{name}` | {count:,} | {theirs} | {quality} |")
    lines += ["", "What is wrong in the published figures:", ""]
    for name in nonzero:
        lines += [f"- `{name}`: {erratum}." for erratum in _published(name).errata]
    return "\n".join(lines) + "\n"


def _published(name: str) -> Published:
    published = load(name).published
    assert published is not None  # or it would be no row
    return published


def _kept(after, before) -> str:
    return f"{after.weight_params / before.weight_params:.2%}"


def main() -> None:
    plans = {}
    for name in ROWS:
        print(name, file=sys.stderr)
        plans[name] = make_plan(set_up(load(name)))
    _replace(BEGIN, render(plans))
    counts = {}
    for name in LANGUAGE_ROWS:
        print(name, file=sys.stderr)
        counts[name] = make_plan(set_up(load(name))).nonzero
    _replace(BEGIN_LANGUAGE, render_language(counts))


def _replace(begin: str, tables: str) -> None:
    before, rest = PAGE.read_text().split(begin)
    _, after = rest.split(END, maxsplit=1)
    PAGE.write_text(before + begin + tables + END + after)


if __name__ == "__main__":
    main()
