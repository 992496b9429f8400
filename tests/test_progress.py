"""Progress: what a line keeps at which width, and what a file gets."""

import io
import time

import pytest
from rich.console import Console

from agp_jax.training.progress import progress_line, show_progress, show_wait

FIGURES = {
    "loss": "loss 0.3284",
    "train": "train 90.38%",
    "test": "test 94.22%",
    "sparsity": "sparsity 52.03%",
    "speed": "3,621 images/s",
}


def terminal(width):
    return Console(force_terminal=True, width=width, file=io.StringIO())


@pytest.mark.parametrize(
    ("width", "has_bar", "kept"),
    [
        (140, True, "loss train test sparsity speed"),
        (110, False, "loss train test sparsity speed"),
        (80, False, "loss train test sparsity"),
        (77, False, "loss test sparsity"),
        (60, False, "loss test"),
        (45, False, "loss"),
        (10, False, "loss"),
    ],
)
def test_a_line_gives_up_what_matters_least(width, has_bar, kept):
    line = progress_line(width, 100, 800, "0:00:42 left", FIGURES)
    bar = ["━━" + "╌" * 18] * has_bar
    figures = [FIGURES[name] for name in kept.split()]
    assert line == "  ".join([*bar, "100/800", "0:00:42 left", *figures])
    assert len(line) <= width or kept == "loss"


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    with show_progress(Console(), 0, 100) as show:
        show(1, doing="compiling")
        show(50, {"loss": "loss 0.5", "speed": "9 images/s"})
        show(51)
    assert capsys.readouterr().out == "step 50/100  loss 0.5  9 images/s\n"


@pytest.mark.parametrize("width", [80, 120])
def test_progress_is_one_line_that_moves_on_a_terminal(width):
    console = terminal(width)
    with show_progress(console, 20, 100) as show:
        show(50, FIGURES)
        show(60)
    output = console.file.getvalue()
    assert "60/100" in output and "loss 0.3284" in output and "left" in output
    assert output.count("\n") == 1


def test_what_takes_long_is_shown_with_its_seconds():
    console = terminal(80)
    with show_progress(console, 0, 100) as show:
        show(0, doing="compiling")
        time.sleep(1.5)
        show(1)
    output = console.file.getvalue()
    assert "compiling 1 s" in output
    assert "compiling" not in output.rpartition("1/100")[2]


def test_waiting_shows_on_a_terminal_alone_and_leaves_nothing(capsys):
    with show_wait(Console(), "setting up"):
        pass
    assert capsys.readouterr().out == ""
    console = terminal(80)
    with show_wait(console, "setting up"):
        time.sleep(0.2)
    output = console.file.getvalue()
    assert "setting up" in output and output.endswith("\x1b[2K")


def test_a_console_without_unicode_gets_a_plain_bar():
    console = Console(
        force_terminal=True,
        width=140,
        file=io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True),
    )
    with show_progress(console, 0, 100) as show:
        show(50, FIGURES)
    assert b"##########.........." in console.file.buffer.getvalue()
