import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import agp_jax as agp
from agp_jax.training import reports
from agp_jax.training.counts import count_weights, total_sparsity, total_target
from agp_jax.training.records import (
    append_metrics,
    read_metrics,
    rewind_metrics,
    write_summary,
)
from agp_jax.training.workdirs import WorkdirError

SCHEDULE = agp.polynomial_schedule(0.8, begin_step=10, end_step=20, frequency=5)
PARAMS = {
    "conv": {"kernel": jnp.array([[0.0, 1.0, 0.0, -2.0]]), "bias": jnp.zeros(4)},
    "head": {"kernel": jnp.ones((3, 2))},
}


def count(step):
    rules = [agp.Rule("conv/kernel", agp.element(), SCHEDULE, scope="rule")]
    matched = agp.match_rules(rules, PARAMS)
    return count_weights(PARAMS, matched, step, original=PARAMS, coupled=False)


def test_kernels_are_counted_and_biases_are_not():
    conv, head = count(20)
    assert (conv.path, conv.shape, conv.weights) == ("conv/kernel", (1, 4), 4)
    assert (conv.nonzero, conv.sparsity, conv.target) == (2, 0.5, 0.8)
    assert (head.path, head.weights, head.nonzero, head.target) == (
        "head/kernel",
        6,
        6,
        None,
    )
    assert total_sparsity([conv, head]) == 1 - 8 / 10
    np.testing.assert_allclose(total_target([conv, head]), 0.8 * 4 / 10)


def test_targets_follow_the_schedule():
    targets = [count(step)[0].target for step in (9, 10, 14, 15, 19, 20, 99)]
    np.testing.assert_allclose(targets, [0, 0, 0, 0.7, 0.7, 0.8, 0.8])


def test_what_was_cut_out_counts_as_zero_and_units_have_no_total_target():
    whole = {"conv": {"kernel": jnp.ones((1, 8)), "bias": jnp.ones(8)}}
    whole["head"] = {"kernel": jnp.ones((6, 2))}
    rules = [agp.Rule("conv/kernel", agp.filters(), SCHEDULE)]
    conv, head = count_weights(
        PARAMS, agp.match_rules(rules, PARAMS), 20, original=whole, coupled=True
    )
    assert (conv.shape, conv.nonzero, conv.sparsity) == ((1, 8), 2, 0.75)
    assert (head.weights, head.nonzero) == (12, 6)
    assert conv.target == 0.8 and conv.target_of == "units"
    assert total_target([conv, head]) is None


def test_the_table_has_a_line_per_tensor_and_the_totals():
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))
    with console.file:
        reports.print_table(console, count(20))
        lines = [line.split() for line in console.export_text().splitlines()]
    assert ["conv/kernel", "1x4", "4", "2", "50.00%", "80.00%", "of", "all"] in lines
    assert ["head/kernel", "3x2", "6", "6", "0.00%", "dense"] in lines
    assert ["total", "10", "8", "20.00%", "32.00%"] in lines


def test_metrics_come_back_without_what_came_after_a_step(tmp_path):
    assert read_metrics(tmp_path) == []
    records = [{"step": step, "loss": 1 / step} for step in (10, 20, 30)]
    for record in records:
        append_metrics(tmp_path, record)
    assert read_metrics(tmp_path) == records
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # cut short by a kill
    assert read_metrics(tmp_path) == records
    rewind_metrics(tmp_path, 20)
    append_metrics(tmp_path, records[2])
    assert read_metrics(tmp_path) == records


@pytest.mark.parametrize("content", ["", '{"step": 10}\n', "no json\n"])
def test_metrics_that_do_not_reach_the_step_are_refused(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(WorkdirError, match="metrics.jsonl"):
        rewind_metrics(tmp_path, 20)
    assert path.read_text() == content


def test_the_summary_is_json(tmp_path):
    path = write_summary(tmp_path, {"sparsity": 0.9})
    assert json.loads(path.read_text()) == {"sparsity": 0.9}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_picture_is_a_png_that_shows_the_curves(tmp_path):
    records = [
        {"step": i, "sparsity": i / 9, "sparsity_target": i / 9, "test_accuracy": 0.5}
        for i in range(9)
    ]
    drawn = np.asarray(Image.open(reports.plot_metrics(tmp_path, records)))
    empty = np.asarray(Image.open(reports.plot_metrics(tmp_path, [])))
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
