"""Real training on the digits, stopped, resumed and compared bit for bit."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from runs import (
    Stop,
    StopAt,
    assert_same_bits,
    assert_same_run,
    cut_config,
    run_quietly,
    state_on_disk,
    tiny_config,
)

import agp_jax as agp
from agp_jax.models.torch_weights import WeightsError, published_names
from agp_jax.training import checkpoint, loop
from agp_jax.training.config import (
    Config,
    ConfigError,
    Data,
    Devices,
    Model,
    Prune,
)
from agp_jax.training.experiment import as_variables, init_state, read_weights, set_up
from agp_jax.training.records import read_metrics
from agp_jax.training.workdirs import WorkdirError
from agp_jax.trees import flatten_with_paths

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(digits_dir):
    return tiny_config(digits_dir)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run_quietly(config, workdir)
    return workdir


LEFT = ["summary.json", "sparsity_and_accuracy.png"]


def test_a_run_leaves_what_it_learned(uninterrupted, config):
    records = read_metrics(uninterrupted)
    assert [r["step"] for r in records] == [5, 10, 15, 20, 25, 30]
    levels = {0: 0.0, 5: 0.0, 10: 0.8 * 19 / 27, 15: 0.8 * 26 / 27, 20: 0.8}
    sizes = [64 * 32, 32 * 16, 16 * 10]
    for record in records:
        level = levels[min(record["step"], 20)]
        gone = sum(int(level * size) for size in sizes)
        np.testing.assert_allclose(record["sparsity"], gone / sum(sizes))
        np.testing.assert_allclose(record["sparsity_target"], level)
    assert records[0].keys() >= {
        "loss",
        "train_accuracy",
        "test_accuracy",
        "learning_rate",
        "seconds_per_step",
        "images_per_second",
    }
    fingerprints = [record["mask_fingerprint"] for record in records]
    assert len(set(fingerprints)) == 4 and len(set(fingerprints[3:])) == 1
    assert all(len(text) == 8 for text in fingerprints)
    assert records[-1]["loss"] < records[0]["loss"]

    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["step"] == 30 and summary["weights"] == sum(sizes)
    assert summary["nonzero"] == sum(size - int(0.8 * size) for size in sizes)
    assert summary["sparsity"] == 1 - summary["nonzero"] / summary["weights"]
    assert summary["all_params"] == sum(sizes) + 32 + 16 + 10
    assert summary["test_accuracy"] == records[-1]["test_accuracy"]
    assert summary["config"]["prune"]["final_sparsity"] == 0.8
    assert (uninterrupted / "sparsity_and_accuracy.png").stat().st_size > 1000


def test_the_best_checkpoint_is_one_at_target_sparsity(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    accuracies = {r["step"]: r["test_accuracy"] for r in read_metrics(uninterrupted)}
    at_target = {step: a for step, a in accuracies.items() if step >= 20}
    assert summary["best_step"] in at_target
    assert summary["best_test_accuracy"] == max(at_target.values())


def test_the_weights_alone_can_be_had(uninterrupted, config):
    variables = checkpoint.restore_variables(uninterrupted, step="latest")
    kernel = variables["params"]["hidden0"]["kernel"]
    assert (kernel == 0).sum() == int(0.8 * kernel.size)
    _, state = state_on_disk(uninterrupted, config)
    np.testing.assert_array_equal(
        kernel, state["variables"]["params"]["hidden0"]["kernel"]
    )


def test_the_same_command_again_changes_nothing(uninterrupted, config):
    before = read_metrics(uninterrupted)
    summary = (uninterrupted / "summary.json").read_text()
    console = Console(file=io.StringIO())
    loop.run(config, uninterrupted, console)
    told = console.file.getvalue()
    assert "already finished, with step 30" in told and "step 30/30" not in told
    assert "test accuracy" in told.splitlines()[-3]
    assert [f"wrote {uninterrupted / name}" for name in LEFT] == told.splitlines()[-2:]
    assert read_metrics(uninterrupted) == before
    assert (uninterrupted / "summary.json").read_text() == summary


@pytest.mark.parametrize("step", [5, 15, 20, 25])
def test_a_run_stopped_at_an_event_ends_as_if_it_had_not_been(
    uninterrupted, config, tmp_path, step
):
    # Stopped when a step is shown, before it is saved: resumes at the one before.
    workdir = tmp_path / "run"
    with pytest.raises(Stop):
        loop.run(config, workdir, StopAt(step))
    run_quietly(config, workdir)
    assert_same_run(workdir, uninterrupted, config)


def test_checkpoints_between_events_resume_to_the_same_end(digits_dir, tmp_path):
    config = tiny_config(digits_dir, log_every=4, checkpoint_every=8)
    run_quietly(config, tmp_path / "reference")
    with pytest.raises(Stop):
        loop.run(config, tmp_path / "run", StopAt(20))
    run_quietly(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "reference", config)


@pytest.mark.parametrize(("first", "then"), [(8, 4), (2, 1)])
def test_a_run_resumes_on_another_layout(
    uninterrupted, digits_dir, tmp_path, first, then
):
    configs = {
        fsdp: tiny_config(digits_dir, devices=Devices(fsdp=fsdp))
        for fsdp in (1, 2, 4, 8)
    }
    with pytest.raises(Stop):
        loop.run(configs[first], tmp_path, StopAt(20))
    states = [state_on_disk(tmp_path, config) for config in configs.values()]
    for step, state in states:
        assert step == 15
        assert_same_bits(state, states[0][1])
    run_quietly(configs[then], tmp_path)
    for record, expected in zip(
        read_metrics(tmp_path), read_metrics(uninterrupted), strict=True
    ):
        assert record["sparsity"] == expected["sparsity"]
        np.testing.assert_allclose(record["loss"], expected["loss"], rtol=1e-5)


def test_a_changed_config_is_refused_and_the_run_left_as_it_is(
    uninterrupted, digits_dir
):
    def contents():
        return {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()}

    before = contents()
    changed = tiny_config(digits_dir, seed=1)
    with pytest.raises(WorkdirError, match="seed: 0 in the workdir, 1 asked"):
        run_quietly(changed, uninterrupted)
    assert contents() == before


def test_rules_that_match_nothing_are_found_before_any_work(digits_dir, tmp_path):
    config = tiny_config(digits_dir)
    config.prune.rules = (agp.Rule("hiden0/kernel", agp.element()),)
    with pytest.raises(ConfigError, match="nearest: hidden0/kernel"):
        run_quietly(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_must_divide_among_the_devices(digits_dir):
    with pytest.raises(ConfigError, match="multiple of the 8 devices, got 12"):
        set_up(tiny_config(digits_dir, batch_size=12))
    with pytest.raises(ConfigError, match="divide the number of devices.* 8, got 3"):
        set_up(tiny_config(digits_dir, devices=Devices(fsdp=3)))


def test_without_pruning_the_model_stays_dense(digits_dir, tmp_path):
    config = tiny_config(digits_dir, steps=5)
    config.prune.enabled = False
    summary = run_quietly(config, tmp_path / "run")
    assert summary["sparsity"] == 0.0 and summary["best_step"] == 5


def test_seeds_give_other_weights(digits_dir):
    first, second = (
        init_state(set_up(tiny_config(digits_dir, seed=seed))).params for seed in (0, 1)
    )
    assert (first["head"]["kernel"] != second["head"]["kernel"]).any()


_TINY_CONFIG = """
from runs import tiny_config

def get_config():
    return tiny_config({data_dir!r}, steps=400, log_every=20, checkpoint_every=20)
"""


def start(config_file, workdir):
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", f"--config={config_file}"]
        + [f"--workdir={workdir}"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(digits_dir, tmp_path):
    config_file = tmp_path / "tiny.py"
    config_file.write_text(_TINY_CONFIG.format(data_dir=digits_dir))
    reference = start(config_file, tmp_path / "reference")
    rng = np.random.default_rng(0)
    num_kills = 0
    for lines in (1, 6, 12):  # of metrics after which the run is killed
        process = start(config_file, tmp_path / "run")
        while process.poll() is None:
            if len(read_metrics(tmp_path / "run")) >= lines:
                time.sleep(rng.uniform(0, 0.05))  # to hit training, saving and logging
                process.send_signal(signal.SIGKILL)
                num_kills += process.wait() == -signal.SIGKILL
        process.communicate()
    assert num_kills > 0
    for process in (start(config_file, tmp_path / "run"), reference):
        output, _ = process.communicate()
        assert process.returncode == 0, output
    runs = [tmp_path / "run", tmp_path / "reference"]
    config = tiny_config(digits_dir, steps=400, log_every=20, checkpoint_every=20)
    assert_same_run(*runs, config)


def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    (tmp_path / "broken.py").write_text("def get_config(:")
    cases = {
        "--config.prune.final_sparsty=0.5": "nearest: prune.final_sparsity, ",
        "--config.sed=1": "a config has no field 'sed'; nearest: seed, ",
        "--steps=5": "there is no option --steps; nearest: --config.steps, ",
        "--config.seed=x": "invalid literal for int",
        "--config=nowhere.py": "no config file nowhere.py; nearest: ",
        f"--config={tmp_path / 'broken.py'}": "SyntaxError",
        f"--workdir={tmp_path / 'foreign'}": "thesis.tex",
        "surplus": "unexpected argument 'surplus'",
        "--config.prune.final_sparsity=1": "must be a fraction in",
        f"--config.data.name=cifar10 --config.data.dir={tmp_path}": "prepare cifar10",
    }
    processes = {
        arguments: subprocess.Popen(
            [sys.executable, ROOT / "train.py", *arguments.split()],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for arguments in cases
    }
    for arguments, message in cases.items():
        output, _ = processes[arguments].communicate()
        assert processes[arguments].returncode == 1, output
        lines = output.splitlines()
        assert len(lines) == 1, output
        assert lines[0].startswith("error: ") and message in lines[0]
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "runs").exists()


def test_units_are_cut_out_and_a_smaller_model_trains_on(digits_dir, tmp_path):
    summary = run_quietly(cut_config(digits_dir), tmp_path)
    before, after = summary["cut"]["before"], summary["cut"]["after"]
    assert before["weights"] == before["macs"] == 64 * 32 + 32 * 16 + 16 * 10
    assert after["weights"] == after["macs"] == 64 * 16 + 16 * 8 + 8 * 10
    assert before["all_params"] == before["weights"] + 32 + 16 + 10
    assert after["all_params"] == after["weights"] + 16 + 8 + 10
    assert after["test_accuracy"] == before["test_accuracy"]
    for name in ("weights", "all_params", "macs"):
        assert summary[name] == before[name]  # of which its sparsity is a fraction
    assert summary["nonzero"] == after["weights"]
    assert summary["sparsity"] == 1 - after["weights"] / before["weights"]
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(5, 31, 5))
    assert [r["step"] for r in records if "masked_test_accuracy" in r] == [20]
    assert records[-1]["loss"] < records[3]["loss"]
    variables = checkpoint.restore_variables(tmp_path, step="latest")
    shapes = {x.shape for x in jax.tree.leaves(variables["params"])}
    assert {(64, 16), (16, 8), (8, 10)} < shapes


def test_steps_are_timed_without_what_was_compiled(digits_dir, tmp_path):
    config = cut_config(digits_dir, steps=9, log_every=1, checkpoint_every=9)
    config.prune.end_step = config.prune.cut_step = 5
    summary = run_quietly(config, tmp_path)
    records = read_metrics(tmp_path)
    for name in ("seconds_per_step", "images_per_second"):
        # A step that compiled, at the start and after the cut, is no measure of one.
        assert [r["step"] for r in records if r[name] is None] == [1, 6]
    for when, steps in (("before", range(2, 6)), ("after", range(7, 10))):
        seconds = [r["seconds_per_step"] for r in records if r["step"] in steps]
        assert summary["cut"][when]["seconds_per_step"] == np.median(seconds)


@pytest.mark.parametrize("stopped_at", [15, 25])
def test_a_run_resumes_before_and_after_its_cut(digits_dir, tmp_path, stopped_at):
    config = cut_config(digits_dir)
    whole = run_quietly(config, tmp_path / "whole")
    with pytest.raises(Stop):
        loop.run(config, tmp_path / "stopped", StopAt(stopped_at))
    resumed = run_quietly(config, tmp_path / "stopped")
    for directory in ("whole", "stopped"):
        assert read_metrics(tmp_path / directory)[-1]["step"] == 30
    assert resumed["test_accuracy"] == whole["test_accuracy"]
    variables = [
        checkpoint.restore_variables(tmp_path / directory, step="latest")
        for directory in ("whole", "stopped")
    ]
    jax.tree.map(np.testing.assert_array_equal, *variables)


def test_a_divided_state_is_cut_where_it_lies(digits_dir, tmp_path):
    config = cut_config(digits_dir, devices=Devices(fsdp=4))
    assert run_quietly(config, tmp_path)["nonzero"] == 64 * 16 + 16 * 8 + 8 * 10


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(cut_step=10),
            "or a multiple of log_every .5. from the last event .step",
        ),
        (dict(cut_step=22), "or a multiple of log_every"),
        (
            dict(rules=(agp.Rule(".*/kernel", agp.element()),)),
            "no rule of config.prune.rules prunes any",
        ),
        (dict(rules=(agp.Rule(".*/kernel", agp.filters()),)), "prunes head/kernel"),
        (dict(round_to=0), "config.prune.round_to must be at least 1"),
    ],
)
def test_a_cut_that_cannot_be_is_refused_first(digits_dir, tmp_path, changes, message):
    config = cut_config(digits_dir)
    for name, value in changes.items():
        setattr(config.prune, name, value)
    with pytest.raises(ConfigError, match=message):
        run_quietly(config, tmp_path)


def test_rules_take_turns_at_the_cut(digits_dir, tmp_path):
    config = cut_config(digits_dir, steps=40)
    later = agp.polynomial_schedule(0.75, begin_step=25, end_step=35, frequency=5)
    config.prune.rules += (agp.Rule("hidden1/kernel", agp.element(), later),)
    with pytest.raises(ConfigError, match="an earlier rule takes"):
        set_up(config)  # what filters leave must be said before them, or it is a slip
    config.prune.rules = (
        agp.dense("head/kernel"),
        agp.Rule("hidden.*/kernel", agp.filters()),
        agp.Rule("hidden1/.*", agp.element(), later),
    )
    summary = run_quietly(config, tmp_path)
    assert summary["cut"]["after"]["weights"] == 64 * 16 + 16 * 8 + 8 * 10
    variables = checkpoint.restore_variables(tmp_path, step="latest")
    kernel = np.asarray(variables["params"]["hidden1"]["kernel"])
    assert kernel.shape == (16, 8) and (kernel != 0).sum() == 16 * 8 // 4


def test_without_couplings_a_cut_takes_what_masked_filters_added(digits_dir, tmp_path):
    config = cut_config(digits_dir)
    config.prune.coupled = False
    summary = run_quietly(config, tmp_path)
    before, after = summary["cut"]["before"], summary["cut"]["after"]
    assert after["weights"] == 64 * 16 + 16 * 8 + 8 * 10
    # The biases of masked features still acted before the cut.
    records = read_metrics(tmp_path)
    (at_cut,) = (r for r in records if "masked_test_accuracy" in r)
    assert before["test_accuracy"] == at_cut["masked_test_accuracy"]


def test_the_best_checkpoint_is_chosen_by_what_was_held_out(digits_dir, tmp_path):
    config = tiny_config(digits_dir)
    config.data.hold_out = 0.25
    assert config.steps_per_epoch == 16  # 1,347 - 336 images by 64
    summary = run_quietly(config, tmp_path)
    records = read_metrics(tmp_path)
    judged = {r["step"]: r["validation_accuracy"] for r in records if r["step"] >= 20}
    assert judged[summary["best_step"]] == max(judged.values())
    assert all(0 < r["validation_loss"] < 5 > r["test_loss"] for r in records)


@pytest.mark.filterwarnings("ignore:.*results are not comparable")  # tiny CIFAR-10
def test_a_run_starts_from_published_weights(cifar_dir, tmp_path):
    config = Config(
        data=Data(name="cifar10", dir=cifar_dir),
        model=Model(name="resnet20_projection", width=8),
        prune=Prune(enabled=False),
    )
    variables = init_state(set_up(config))
    paths, leaves, _ = flatten_with_paths(as_variables(variables))
    names = published_names("resnet20_projection", as_variables(variables))
    swap = {2: (1, 0), 4: (3, 2, 0, 1)}
    arrays = {
        names[path]: np.asarray(leaf).transpose(swap.get(leaf.ndim)) + 1
        for path, leaf in zip(paths, leaves, strict=True)
    }
    np.savez(tmp_path / "weights.npz", **arrays)
    config.model.weights = str(tmp_path / "weights.npz")
    experiment = set_up(config)
    started = as_variables(init_state(experiment, read_weights(experiment)))
    expected = jax.tree.map(lambda x: x + 1, as_variables(variables))
    assert_same_bits(started, expected)

    config.model.weights = str(tmp_path / "nowhere.npz")
    with pytest.raises(WeightsError, match="nowhere.npz is no file.*--config.model.w"):
        run_quietly(config, tmp_path / "run")
    config.model.weights = str(tmp_path / "weights.npz")
    config.model.width = 16
    with pytest.raises(WeightsError, match="does not fit.*misshapen"):
        run_quietly(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
