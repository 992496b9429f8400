"""What is printed: sentences and tables that fit a console, or a file."""

import math
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from agp_jax.trees import name_together

_GAP = "  "


def say(console: Console, sentence: str) -> None:
    """Prints a sentence on as many lines as a terminal needs, and on one in a file.

    Lines break at spaces alone: paths and names stay whole.
    """
    lines = [sentence]
    if console.is_terminal:
        lines = textwrap.wrap(
            sentence,
            console.width,
            subsequent_indent=_GAP,
            break_long_words=False,
            break_on_hyphens=False,
        )
    for line in lines:
        _print_line(console, Text(line))


def print_table(
    console: Console,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    spare_last: bool = False,
) -> None:
    """Prints rows below their titles, the first column to the left, others right.

    No line ends in blanks, and names and numbers stay whole. Where rows are wider than
    a terminal, it does without the last column if it may `spare_last`; where that is
    not enough, names get lines of their own.
    """
    table = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    room = console.width if console.is_terminal else math.inf

    def is_too_wide(widths: Sequence[int]) -> bool:
        return sum(widths) + len(_GAP) * (len(widths) - 1) > room

    if spare_last and is_too_wide(widths) and not is_too_wide(widths[:-1]):
        table, widths = [row[:-1] for row in table], widths[:-1]
    apart = is_too_wide(widths)
    for number, row in enumerate(table):
        name, *cells = row
        first, *others = widths
        numbers = "".join(
            _GAP + cell.rjust(width) for cell, width in zip(cells, others, strict=True)
        )
        style = "" if number else "bold"
        for line in (name, numbers) if apart else (name.ljust(first) + numbers,):
            _print_line(console, Text(line, style))


def _print_line(console: Console, line: Text) -> None:
    line.rstrip()
    console.print(line, soft_wrap=True)


def group_rows(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows that differ in a number of their first cell alone, as one row.

    >>> group_rows([["block0/conv", "8"], ["block1/conv", "8"], ["head", "2"]])
    [['block[0-1]/conv', '8'], ['head', '2']]
    """
    entries = ((name, tuple(cells)) for name, *cells in rows)
    return [[name, *cells] for name, cells, _ in name_together(entries)]
