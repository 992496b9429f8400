"""Evidence: every arm can start, runs resume, and tables say what the summaries do."""

import json

import numpy as np
import pytest
from runs import tiny_config

from agp_jax.training.config import validate
from benchmarks import evidence
from benchmarks.evidence import Arm


@pytest.mark.parametrize("suite", evidence.SUITES)
def test_every_arm_can_start_at_any_scale(suite):
    for scale in (0.1, 1.0, 4.0):
        arms = evidence.SUITES[suite](scale)
        for arm in arms:
            validate(arm.config)
        assert len({arm.name for arm in arms}) == len(arms)
        assert len({arm.config.steps for arm in arms}) == 1  # or nothing is compared


def test_the_error_is_that_of_the_mean():
    values = [3.0, 5.0, 4.0, 8.0]
    expected = np.mean(values), np.std(values, ddof=1) / 2
    assert evidence.mean_and_error(values) == pytest.approx(expected)
    assert evidence.mean_and_error([3.0]) == (3.0, 0.0)


def test_a_suite_goes_on_where_it_stopped(digits_dir, tmp_path, monkeypatch, capsys):
    def perceptrons(scale):
        config = tiny_config(digits_dir, steps=round(30 * scale))
        return [Arm("sparse", "pruned", config)]

    monkeypatch.setitem(evidence.SUITES, "lstm", perceptrons)
    monkeypatch.setattr(evidence, "make_table", lambda arms, summaries: str(summaries))
    monkeypatch.setattr(evidence, "draw", lambda arms, summaries, path: None)
    options = ["--suite=lstm", f"--out={tmp_path}"]
    evidence.main([*options, "--seeds=1"])
    first = tmp_path / "lstm_x1" / "pruned" / "seed0" / "summary.json"
    written = first.stat().st_mtime_ns
    assert json.loads(first.read_text())["config"]["seed"] == 0
    capsys.readouterr()
    evidence.main([*options, "--seeds=2"])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "pruned, seed 1"  # alone
    assert first.stat().st_mtime_ns == written


def test_the_table_and_the_picture_are_of_the_summaries(tmp_path):
    config = tiny_config("")
    arms = [Arm("dense", "big", config), Arm("sparse", "small", config)]
    summaries = {
        "big": [
            {"nonzero": 1000, "average_weights": 1000.0, "test_perplexity": x}
            for x in (4.0, 6.0)
        ],
        "small": [{"nonzero": 100, "average_weights": 512.25, "test_perplexity": 7.0}],
    }
    *_, big, small = evidence.make_table(arms, summaries).splitlines()
    assert big == "| big | 1,000 | 1,000 | 5.000 ± 1.000 |"
    assert small == "| small | 100 | 512 | 7.000 ± 0.000 |"
    evidence.draw(arms, summaries, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
