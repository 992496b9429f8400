"""The picture of a run: its quality and its sparsity over its steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agp_jax.training.tasks import Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_QUALITY_COLOR, _SPARSITY_COLOR = "tab:blue", "tab:orange"
_MAX_TICKS = 30  # events that are drawn one by one


class Baseline(NamedTuple):
    """The quality of the dense model; `label` says whose: "dense, published"."""

    label: str
    quality: float


def plot_metrics(
    workdir: Path,
    records: Sequence[Mapping[str, Any]],
    quality: Quality,
    *,
    events: Sequence[int] = (),
    cut_step: int | None = None,
    baseline: Baseline | None = None,
) -> Path:
    """Draws the model's quality and, below it, the sparsity of its weights.

    An evaluation at the very step of an event shows a model that has lost weights and
    not made up for it yet. Such points are hollow, and the line passes them by if
    there are others between the first event and the last.

    Args:
      workdir: where the picture is written; its name is the title.
      records: the metrics of the run, a record for each evaluation.
      quality: what is drawn.
      events: the steps at which weights are pruned; empty for a dense run, which has
        no second panel.
      cut_step: the step after which units were cut out; None if none were.
      baseline: the dense model's quality, where it is known.

    Returns:
      The path of the picture, `sparsity_and_<quality>.png`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5 if len(events) else 3.2), layout="constrained")
    figure.suptitle(workdir.resolve().name, fontsize="medium")
    panels = figure.subplots(
        2 if len(events) else 1, sharex=True, squeeze=False
    ).flatten()
    _draw_quality(panels[0], records, quality, events, baseline)
    if len(events):
        _draw_sparsity(panels[1], records)
        for panel, prefix in zip(panels, ("_", ""), strict=True):  # "_": in no legend
            _mark_events(panel, events, f"{prefix}events")
            if cut_step is not None:
                style = {"color": "black", "linestyle": ":", "label": f"{prefix}cut"}
                panel.axvline(cut_step, **style)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(frameon=False)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    path = workdir / f"sparsity_and_{quality.name}.png"
    figure.savefig(path, dpi=150)
    return path


def split_at_events(
    records: Sequence[Mapping[str, Any]], events: Sequence[int]
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The records that a line is drawn through, and those taken just after an event."""
    at_events = [r for r in records if r["step"] in set(events)]
    others = [r for r in records if r["step"] not in set(events)]
    between = [r for r in others if min(events) < r["step"] < max(events)]
    return (others if between else list(records)), at_events


def _draw_quality(
    panel: "Axes",
    records: Sequence[Mapping[str, Any]],
    quality: Quality,
    events: Sequence[int],
    baseline: Baseline | None,
) -> None:
    from matplotlib.ticker import LogLocator

    in_percent = quality.form.endswith("%")
    scale = 100 if in_percent else 1
    name = f"test {quality.name}"
    panel.set_ylabel(f"{name} (%)" if in_percent else name)
    through, apart = split_at_events(records, events) if len(events) else (records, [])
    steps, values = _curve(through, f"test_{quality.name}", scale)
    panel.plot(steps, values, color=_QUALITY_COLOR, marker=".")
    if apart:
        points = _curve(apart, f"test_{quality.name}", scale)
        style = {"marker": "o", "markersize": 5, "markerfacecolor": "white"}
        label = "just after an event"
        panel.plot(*points, linestyle="", color=_QUALITY_COLOR, label=label, **style)
    if baseline is not None:
        panel.axhline(
            scale * baseline.quality,
            color="grey",
            linestyle="--",
            linewidth=1,
            label=f"{baseline.label}: {quality.format(baseline.quality)}",
        )
    lowest, highest = min(values, default=1), max(values, default=1)
    if not quality.higher_is_better and highest > 10 * lowest > 0:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
    if values:
        _write_at_end(panel, steps, values, quality.format(values[-1] / scale))


def _draw_sparsity(panel: "Axes", records: Sequence[Mapping[str, Any]]) -> None:
    panel.set(ylabel="sparsity of weights (%)", ylim=(0, 100))
    steps, values = _curve(records, "sparsity", 100)
    panel.plot(steps, values, color=_SPARSITY_COLOR, marker=".", label="reached")
    asked = [r for r in records if r["sparsity_target"] is not None]
    if asked:
        curve = _curve(asked, "sparsity_target", 100)
        style = {"linewidth": 5, "alpha": 0.3, "label": "asked for"}
        panel.plot(*curve, color=_SPARSITY_COLOR, **style)
    if values:
        _write_at_end(panel, steps, values, f"{values[-1]:.2f}%")


def _curve(
    records: Sequence[Mapping[str, Any]], name: str, scale: float
) -> tuple[list[int], list[float]]:
    return [r["step"] for r in records], [scale * r[name] for r in records]


def _write_at_end(
    panel: "Axes", steps: Sequence[int], values: Sequence[float], text: str
) -> None:
    panel.annotate(
        text,
        (steps[-1], values[-1]),
        (6, 0),
        textcoords="offset points",
        verticalalignment="center",
        annotation_clip=False,
    )


def _mark_events(panel: "Axes", events: Sequence[int], label: str) -> None:
    """A tick at each event, or a band where they are many."""
    style = {"color": "grey", "linewidth": 1, "label": label}
    if len(events) > _MAX_TICKS:
        panel.axvspan(min(events), max(events), alpha=0.1, **style)
        return
    frame = panel.get_xaxis_transform()  # heights as fractions of the panel
    panel.vlines(events, 0, 0.04, transform=frame, **style)
