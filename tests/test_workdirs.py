"""A workdir holds one experiment; a foreign directory is refused and left alone."""

import json
from pathlib import Path

import numpy as np
import pytest

import agp_jax as agp
from agp_jax.rules import Rule
from agp_jax.training import workdirs
from agp_jax.training.config import Config, Prune, default_dict, to_dict
from agp_jax.training.workdirs import WorkdirError

CONFIG = {"model": "tiny", "prune": {"final_sparsity": 0.9, "rules": ["a", "b"]}}


def disk(directory):
    return {
        path.relative_to(directory): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def test_a_new_workdir_holds_its_config_before_any_step(tmp_path):
    workdir = tmp_path / "runs" / "first"
    assert workdirs.check_workdir(workdir, CONFIG) is False
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    assert workdirs.read_config(workdir) == CONFIG
    before = disk(workdir)
    assert workdirs.check_workdir(str(workdir), CONFIG) is True
    assert disk(workdir) == before


def test_a_config_may_hold_all_of_json(tmp_path):
    config = {"a": None, "b": (1, 2.5, {"c": True}), "d": {}, "e": [], "f": "é\n"}
    assert workdirs.check_workdir(tmp_path, config) is False
    assert workdirs.check_workdir(tmp_path, config) is True
    assert workdirs.read_config(tmp_path) == config | {"b": [1, 2.5, {"c": True}]}
    for bad in ({"a": float("nan")}, {"a": Path()}, {"a": np.float32(1)}):
        with pytest.raises(ValueError, match="plain JSON"):
            workdirs.check_workdir(tmp_path / "bad", bad)
    assert not (tmp_path / "bad").exists()


def test_a_changed_config_is_refused_field_by_field(tmp_path):
    workdirs.check_workdir(tmp_path, CONFIG | {"epochs": 3, "name": "x"})
    before = disk(tmp_path)
    asked = {
        "model": "tiny",
        "prune": {"final_sparsity": 0.95, "rules": ["a", "c", "d"]},
        "epochs": True,
        "seed": None,
    }
    with pytest.raises(WorkdirError) as error:
        workdirs.check_workdir(tmp_path, asked)
    assert str(error.value).splitlines() == [
        f"{tmp_path} belongs to a run with another config:",
        "  prune.final_sparsity: 0.9 in the workdir, 0.95 asked",
        "  prune.rules.1: 'b' in the workdir, 'c' asked",
        "  prune.rules.2: nothing in the workdir, 'd' asked",
        "  epochs: 3 in the workdir, True asked",
        "  seed: nothing in the workdir, None asked",
        "  name: 'x' in the workdir, nothing asked",
        "ask for the same to resume it, or give a new work directory",
    ]
    assert disk(tmp_path) == before


def test_a_field_of_a_later_version_resumes_at_its_default(tmp_path):
    schedule = agp.one_shot(0.5)
    rules = [Rule(name, agp.element(), schedule) for name in "ab"]
    config = to_dict(Config(prune=Prune(rules=tuple(rules))))
    earlier = json.loads(json.dumps(config))
    del earlier["distill"]["temperature"]
    for rule in earlier["prune"]["rules"]:
        del rule["units"], rule["scope"]
    workdirs.check_workdir(tmp_path, earlier)
    assert workdirs.check_workdir(tmp_path, config, default_dict()) is True
    rules[1] = Rule("b", agp.element(), schedule, scope="rule")
    other = to_dict(Config(prune=Prune(rules=tuple(rules))))
    with pytest.raises(WorkdirError, match=r"prune.rules.1.scope: nothing in"):
        workdirs.check_workdir(tmp_path, other, default_dict())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", "mine", r"something else \(notes.txt\)"),
        ("config.json", '{"model_type": "vit"}', "another program wrote"),
        ("config.json", '{"written_by": "agp_jax"}', "another program wrote"),
        ("config.json", "[1, 2]", "another program wrote"),
        ("config.json", '{"written_by": "agp', "cannot be read: JSONDecodeError"),
        ("config.json", "\xff", "another program wrote|cannot be read"),
    ],
)
def test_a_foreign_directory_is_refused_and_not_touched(
    tmp_path, name, content, message
):
    (tmp_path / name).write_text(content, encoding="latin-1")
    before = disk(tmp_path)
    with pytest.raises(WorkdirError, match=message):
        workdirs.check_workdir(tmp_path, CONFIG)
    with pytest.raises(WorkdirError):
        workdirs.read_config(tmp_path)
    assert disk(tmp_path) == before


def test_a_workdir_must_be_a_directory_that_can_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    impossible = [file, file / "below", Path("/proc/agp_jax"), "gs://bucket/run"]
    for workdir in impossible:
        with pytest.raises(WorkdirError, match=Path(workdir).name):
            workdirs.check_workdir(workdir, CONFIG)
    assert disk(tmp_path) == {Path("file"): b"mine"}


def test_a_config_half_written_when_killed_does_not_block_the_next_run(tmp_path):
    (tmp_path / ".config.json.tmp").write_text('{"written_')
    assert workdirs.check_workdir(tmp_path, CONFIG) is False
    assert workdirs.read_config(tmp_path) == CONFIG
    assert json.loads((tmp_path / "config.json").read_text())["config"] == CONFIG
