"""What gradual pruning is good for, measured on text that comes with CPython.

    python -m benchmarks.evidence --suite=lstm
    python -m benchmarks.evidence --suite=decoder --seeds=3
    python -m benchmarks.evidence --suite=channels --scale=4

    lstm      a large sparse LSTM against dense ones of equal size at 80, 90 and 95 %
              (arXiv:1710.01878, section 4.2); the cubic curve against a linear one and
              against pruning at once; with and without distilling from its own start
    decoder   windows of pruning at 50 and 80 %, against dense decoders of equal average
              and of equal final size (arXiv:2501.12486)
    channels  MLP channels cut gradually in mid-run against at once, where the learning
              rate goes on or warms up again

Every run is a run of train.py in a directory of its own, so a suite that was stopped
goes on where it was. It prints a table with means and standard errors over the seeds
and leaves it, with a picture, in the directory of the suite. `--scale` multiplies the
steps of all runs.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console

import agp_jax as agp
from agp_jax.training.config import Config, Data, Distill, Model, Optimizer, Prune
from agp_jax.training.loop import run


class Arm(NamedTuple):
    """One of the things compared: runs that differ in their seeds alone."""

    series: str  # of one line in the picture
    name: str
    config: Config


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps")
    parser.add_argument("--out", default="runs/evidence", help="where runs are kept")
    options = parser.parse_args(arguments)
    arms = SUITES[options.suite](options.scale)
    home = Path(options.out) / f"{options.suite}_x{options.scale:g}"
    summaries = {
        arm.name: [run_once(home, arm, seed) for seed in range(options.seeds)]
        for arm in arms
    }
    table = make_table(arms, summaries)
    (home / "table.md").write_text(table, encoding="utf-8")
    draw(arms, summaries, home / "picture.png")
    print(table)


def run_once(home: Path, arm: Arm, seed: int) -> dict[str, Any]:
    """The summary of one run, which is made if it is not there."""
    workdir = home / arm.name / f"seed{seed}"
    path = workdir / "summary.json"
    config = dataclasses.replace(arm.config, seed=seed)
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    print(f"{arm.name}, seed {seed}", flush=True)
    workdir.mkdir(parents=True, exist_ok=True)
    run(config, workdir, Console(quiet=True))
    return json.loads(path.read_text(encoding="utf-8"))


def lstm_suite(scale: float) -> list[Arm]:
    steps = round(1000 * scale)

    def config(**prune: Any) -> Config:
        rules = (agp.Rule(r"layer\d/.*/kernel|embedding/embedding", agp.element()),)
        options: dict[str, Any] = {
            "rules": rules,
            "begin": 0.1,
            "end": 0.6,
            "frequency": max(steps // 100, 1),
        }
        return Config(
            steps=steps,
            batch_size=32,
            log_every=steps,
            checkpoint_every=steps,
            data=Data(name="pydoc_chars", bptt=48, eval_rows=32),
            model=Model(name="lstm", width=160, dropout=0.1),
            optimizer=Optimizer(
                name="adamw",
                learning_rate=0.005,
                warmup_steps=steps // 20,
                clip_norm=1.0,
            ),
            prune=Prune(**(options | prune)),
        )

    def distilled(level: float) -> Arm:
        distill = Distill(weight=0.5, temperature=2.0)
        sparse = dataclasses.replace(config(final_sparsity=level), distill=distill)
        return Arm("sparse, distilled", f"sparse-{100 * level:g}-distilled", sparse)

    arms = [Arm("dense", "dense-large", config(enabled=False))]
    for level in (0.8, 0.9, 0.95):
        percent = f"{100 * level:g}"
        sparse = {"final_sparsity": level}
        arms += [
            Arm("sparse, cubic", f"sparse-{percent}", config(**sparse)),
            Arm("dense", f"dense-as-{percent}", config(**sparse, twin="final")),
        ]
    sparse = {"final_sparsity": 0.9}
    at_once = {"begin": 0.1, "end": 0.1, "frequency": 1}
    return [
        *arms,
        Arm("sparse, linear", "sparse-90-linear", config(**sparse, power=1.0)),
        Arm("sparse, at once", "sparse-90-at-once", config(**sparse, **at_once)),
        *(distilled(level) for level in (0.9, 0.95)),
    ]


def _decoder(steps: int, **prune: Any) -> Config:
    options: dict[str, Any] = {
        "rules": (agp.Rule("blocks/.*/kernel", agp.element(), stacked_axes=1),),
        "frequency": max(steps // 100, 1),
    }
    return Config(
        steps=steps,
        batch_size=8,
        log_every=max(steps // 4, 1),
        checkpoint_every=4 * max(steps // 4, 1),
        data=Data(name="pydoc_chars", bptt=64, eval_rows=16),
        model=Model(name="gpt", width=128, depth=4, num_heads=4),
        optimizer=Optimizer(
            name="adamw",
            learning_rate=0.003,
            warmup_steps=max(steps // 10, 1),
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        prune=Prune(**(options | prune)),
    )


def decoder_suite(scale: float) -> list[Arm]:
    steps = 4 * round(90 * scale)
    arms = [Arm("dense", "dense", _decoder(steps, enabled=False))]
    for level in (0.5, 0.8):
        percent = f"{100 * level:g}"
        for begin in (0.0, 0.25, 0.5):
            for end in (0.5, 0.75, 1.0):
                if begin < end:
                    window = {"final_sparsity": level, "begin": begin, "end": end}
                    name = f"sparse-{percent}-from-{begin:g}-to-{end:g}"
                    series = f"sparse, {percent} %"
                    arms.append(Arm(series, name, _decoder(steps, **window)))
        middle = {"final_sparsity": level, "begin": 0.25, "end": 0.75}
        for size in ("average", "final"):
            twin = _decoder(steps, **middle, twin=size)
            arms.append(Arm("dense", f"dense-of-{size}-{percent}", twin))
    return arms


def channels_suite(scale: float) -> list[Arm]:
    quarter = round(125 * scale)
    steps = 4 * quarter
    rule = agp.Rule("blocks/mlp/(gate|up)/kernel", agp.filters(), stacked_axes=1)

    def config(begin: float, end: float, **prune: Any) -> Config:
        shared = {"final_sparsity": 0.5, "coupled": True, "rules": (rule,)}
        return _decoder(steps, begin=begin, end=end, **shared, **prune)

    half = 2 * quarter
    at_once = config(0.5, 0.5, frequency=1, cut_step=half)
    restarts = dataclasses.replace(at_once.optimizer, restart_at=(half,))
    return [
        Arm("dense", "dense", _decoder(steps, enabled=False)),
        Arm("gradually", "gradually", config(0.25, 0.5, cut_step=half)),
        Arm("at once", "at-once", at_once),
        Arm(
            "at once, warmed up again",
            "at-once-rewarmed",
            dataclasses.replace(at_once, optimizer=restarts),
        ),
        Arm("dense", "dense-as-cut", config(0.5, 0.5, frequency=1, twin="final")),
    ]


SUITES = {"lstm": lstm_suite, "decoder": decoder_suite, "channels": channels_suite}


def make_table(
    arms: Sequence[Arm], summaries: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """Markdown: a row for each arm, with means and standard errors."""
    lines = [
        "| run | weights left | on average | test perplexity |",
        "|---|---:|---:|---:|",
    ]
    for arm in arms:
        rows = summaries[arm.name]
        mean, error = mean_and_error([row["test_perplexity"] for row in rows])
        lines.append(
            f"| {arm.name} | {rows[0]['nonzero']:,} "
            f"| {rows[0]['average_weights']:,.0f} | {mean:.3f} ± {error:.3f} |"
        )
    return "\n".join(lines) + "\n"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; 0 of a single value."""
    if len(values) < 2:
        return values[0], 0.0
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def draw(
    arms: Sequence[Arm],
    summaries: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
) -> None:
    """Perplexity against average weights, a colour for each series."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for series in dict.fromkeys(arm.series for arm in arms):
        points = []
        for arm in arms:
            if arm.series == series:
                rows = summaries[arm.name]
                values = mean_and_error([row["test_perplexity"] for row in rows])
                points.append((rows[0]["average_weights"], *values))
        weights, means, errors = zip(*sorted(points), strict=True)
        style = "o-" if series == "dense" else "o"
        axes.errorbar(weights, means, errors, fmt=style, capsize=3, label=series)
    axes.set(xlabel="average weights in training", ylabel="test perplexity")
    axes.set_xscale("log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
