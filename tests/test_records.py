"""Metrics and summaries come back from disk as they were written."""

import json

import pytest

from agp_jax.training.records import (
    append_metrics,
    read_dense_summary,
    read_metrics,
    rewind_metrics,
    write_summary,
)
from agp_jax.training.workdirs import WorkdirError


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


def test_the_dense_run_of_the_same_experiment_is_found_beside_a_run(tmp_path):
    def config(seed, enabled):
        return {"seed": seed, "prune": {"enabled": enabled}, "distill": {}}

    def write(name, summary):
        (tmp_path / name).mkdir()
        write_summary(tmp_path / name, summary)

    pruned = tmp_path / "pruned"
    write("pruned", {"config": config(0, True), "test_accuracy": 0.7})
    write("other seed", {"config": config(1, False), "test_accuracy": 0.8})
    write("foreign", {"config": "none of ours"})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    assert read_dense_summary(pruned, config(0, True)) is None
    write("dense", {"config": config(0, False), "test_accuracy": 0.9})
    assert read_dense_summary(pruned, config(0, True))["test_accuracy"] == 0.9
