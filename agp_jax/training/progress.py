"""Progress: on a terminal a line that moves and fits, in a file a line now and then."""

import contextlib
import datetime
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

# What a line that is too long does without, the first first. What remains are the step,
# the time left and the loss.
_SPARED = ("bar", "speed", "train", "sparsity", "test")
_BAR_WIDTH, _DONE, _TO_DO = 20, "━", "╌"
_GAP = "  "


class Show(Protocol):
    """Shows how many steps are done.

    Args:
      step: how many.
      figures: what was measured, ready to print, by name: "loss", "train", "test",
        "sparsity", "speed"; without any the last ones stay.
      doing: what takes time now instead of a step; it is shown with its seconds.
    """

    def __call__(
        self, step: int, figures: Mapping[str, str] | None = None, *, doing: str = ""
    ) -> None: ...


@contextlib.contextmanager
def show_progress(console: Console, first_step: int, num_steps: int) -> Iterator[Show]:
    """Shows how far a run is: a line that moves, or in a file a line of new figures."""
    if not console.is_terminal:

        def print_line(
            step: int, figures: Mapping[str, str] | None = None, *, doing: str = ""
        ) -> None:
            if figures:
                line = _GAP.join([f"step {step}/{num_steps}", *figures.values()])
                console.print(line, soft_wrap=True)

        yield print_line
        return
    line = _Line(console)
    with Progress(line, console=console, refresh_per_second=4) as progress:
        task = progress.add_task("", total=num_steps, completed=first_step)

        def move(
            step: int, figures: Mapping[str, str] | None = None, *, doing: str = ""
        ) -> None:
            line.figures = figures or line.figures
            line.doing, line.since = doing, time.monotonic()
            progress.update(task, completed=step)

        yield move


@contextlib.contextmanager
def show_wait(console: Console, doing: str) -> Iterator[None]:
    """Shows on a terminal what takes its time, with its seconds, until it is done."""
    if not console.is_terminal:
        yield
        return
    columns = TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(doing, total=None)
        yield


class _Line(ProgressColumn):
    """All there is to see of a run, in one column as wide as the console."""

    max_refresh = None

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.figures: Mapping[str, str] = {}
        self.doing, self.since = "", time.monotonic()

    def render(self, task: Task) -> Text:
        seconds = int(time.monotonic() - self.since)
        if self.doing and seconds:
            when = f"{self.doing} {seconds} s"
        elif task.finished:
            when = f"took {_clock(task.elapsed)}"
        else:
            when = f"{_clock(task.time_remaining)} left"
        steps = int(task.completed), int(task.total or 0)
        line = progress_line(self.console.width, *steps, when, self.figures)
        if self.console.options.ascii_only:
            line = line.replace(_DONE, "#").replace(_TO_DO, ".")
        return Text(line)


def progress_line(
    width: int, step: int, num_steps: int, when: str, figures: Mapping[str, str]
) -> str:
    """A line of at most `width` characters, as long as what is never spared fits.

    >>> figures = {"loss": "loss 0.32", "train": "train 90%", "test": "test 94%"}
    >>> progress_line(48, 50, 800, "0:00:42 left", figures)
    ' 50/800  0:00:42 left  loss 0.32  test 94%'
    """
    done = round(_BAR_WIDTH * step / num_steps) if num_steps else 0
    parts = {
        "bar": _DONE * done + _TO_DO * (_BAR_WIDTH - done),
        "step": f"{step:>{len(str(num_steps))}}/{num_steps}",
        "when": when,
        **figures,
    }
    for name in _SPARED:
        if len(_GAP.join(parts.values())) <= width:
            break
        parts.pop(name, None)
    return _GAP.join(parts.values())


def _clock(seconds: float | None) -> str:
    """Hours, minutes and seconds; dashes where nobody knows yet."""
    if seconds is None:
        return "-:--:--"
    return str(datetime.timedelta(seconds=int(seconds)))
