"""What a run shows: a table, a picture and its progress."""

import numpy as np
from PIL import Image
from rich.console import Console

from agp_jax.training import reports
from agp_jax.training.counts import TensorCount
from agp_jax.training.tasks import Quality

ACCURACY = Quality("accuracy", ".2%", higher_is_better=True)


def test_the_table_has_a_line_per_tensor_and_the_totals():
    counts = [
        TensorCount("conv/kernel", (1, 4), 2, 0.8, "rule"),
        TensorCount("head/kernel", (3, 2), 6, None, "tensor"),
    ]
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))
    with console.file:
        reports.print_table(console, counts)
        lines = [line.split() for line in console.export_text().splitlines()]
    assert ["conv/kernel", "1x4", "4", "2", "50.00%", "80.00%", "of", "all"] in lines
    assert ["head/kernel", "3x2", "6", "6", "0.00%", "dense"] in lines
    assert ["total", "10", "8", "20.00%", "32.00%"] in lines


def test_the_picture_is_a_png_that_shows_the_curves(tmp_path):
    records = [
        {"step": i, "sparsity": i / 9, "sparsity_target": i / 9, "test_accuracy": 0.5}
        for i in range(9)
    ]
    drawn = np.asarray(Image.open(reports.plot_metrics(tmp_path, records, ACCURACY)))
    empty = np.asarray(Image.open(reports.plot_metrics(tmp_path, [], ACCURACY)))
    assert drawn.shape == empty.shape and drawn.std() > empty.std() > 0


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    with reports.show_progress(Console(), 0, 100) as show:
        show(1, "")
        show(50, "loss 0.5")
        show(51, "")
    assert capsys.readouterr().out.splitlines() == ["step 50/100  loss 0.5"]


def test_progress_is_a_live_line_on_a_terminal(capsys):
    console = Console(force_terminal=True, width=80)
    with reports.show_progress(console, 20, 100) as show:
        show(50, "loss 0.5")
        show(60, "")
    output = capsys.readouterr().out
    assert "60/100" in output and "loss 0.5" in output
    assert output.count("\n") == 1  # one line that changes
