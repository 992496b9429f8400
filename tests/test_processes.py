"""Training in 1, 2 and 4 processes over loopback is the same training."""

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from runs import (
    Stop,
    StopAt,
    lstm_config,
    state_on_disk,
    tiny_config,
    without_times,
)

import agp_jax as agp
from agp_jax.training import checkpoint, loop, processes, workdirs
from agp_jax.training.config import Devices, Prune
from agp_jax.training.evaluation import agreed_fingerprint
from agp_jax.training.experiment import init_state, set_up
from agp_jax.training.processes import ProcessError
from agp_jax.training.records import read_metrics

ROOT = Path(__file__).parents[1]
_MAX_SECONDS = 300


def small_config(data_dir, fsdp=1, **changes):
    """Events at steps 4, 6 and 8; checkpoints at 4, 8 and 12."""
    prune = Prune(
        final_sparsity=0.8,
        begin_step=4,
        end_step=8,
        frequency=2,
        rules=(agp.Rule(".*/kernel", agp.element()),),
    )
    options = dict(steps=12, log_every=4, checkpoint_every=4, prune=prune)
    return tiny_config(data_dir, devices=Devices(fsdp=fsdp), **(options | changes))


_CONFIG_FILE = """
from test_processes import small_config

def get_config():
    return small_config({data_dir!r})
"""


# --- starting processes


def start(num_processes, num_devices, function, directory, *arguments):
    """Starts `function(address, directory, *arguments)` of this module in processes.

    They have `num_devices` each and leave their output in `directory`. A fresh Python
    imports everything once and then forks, which saves seconds for each of them.
    """
    script = "import sys, test_processes as t; t.fork_processes(*sys.argv[1:])"
    directory.mkdir(parents=True, exist_ok=True)
    reserved = socket.socket()
    # The port stays ours until the coordinator, which shares ports, has it.
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(("", 0))
    port = reserved.getsockname()[1]
    group = subprocess.Popen(
        [sys.executable, "-c", script, str(num_processes), str(num_devices)]
        + [str(port), function.__name__, directory, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        start_new_session=True,
    )
    return SimpleNamespace(
        group=group, reserved=reserved, directory=directory, size=num_processes
    )


def fork_processes(num_processes, num_devices, port, function, directory, *arguments):
    children, codes = {}, {}
    began = time.monotonic()
    signal.alarm(_MAX_SECONDS)  # the end, should nobody wait for this process any more
    for index in range(int(num_processes)):
        child = os.fork()
        if child == 0:
            signal.alarm(_MAX_SECONDS)
            log = os.open(f"{directory}/{index}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)  # of the libraries beneath Python, which gloo writes to
            os.dup2(log, 2)
            sys.stdout = sys.stderr = open(f"{directory}/{index}.txt", "w")
            jax.config.update("jax_num_cpu_devices", int(num_devices))
            address = (f"127.0.0.1:{port}", int(num_processes), index)
            globals()[function](address, Path(directory), *arguments)
            return
        children[child] = index
    while children:
        child, status = os.wait()
        seconds = time.monotonic() - began
        codes[children.pop(child)] = (os.waitstatus_to_exitcode(status), seconds)
    Path(directory, "codes.json").write_text(json.dumps(codes, sort_keys=True))


def finish(started, timeout=_MAX_SECONDS):
    """What each process printed, its exit code, and the seconds it lived."""
    try:
        started.group.wait(timeout)
    finally:
        started.reserved.close()
        if started.group.poll() is None:
            os.killpg(started.group.pid, signal.SIGKILL)
            started.group.wait()
    outputs = [
        (started.directory / f"{i}.txt").read_text() for i in range(started.size)
    ]
    codes = json.loads((started.directory / "codes.json").read_text())
    return [(output, *codes[str(i)]) for i, output in enumerate(outputs)]


def finish_well(started):
    results = finish(started)
    for i, (output, code, _) in enumerate(results):
        assert code == 0, output + (started.directory / f"{i}.log").read_text()
    return [output for output, _, _ in results]


# --- what runs in them


def run_train_py(address, directory, *arguments, own=None):
    host, count, index = address
    flags = [f"--coordinator_address={host}", f"--num_processes={count}"]
    sys.argv = ["train.py", *flags, f"--process_id={index}", *arguments]
    if own and index == 1:
        sys.argv.append(own)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def restore_and_train(address, directory, data_dir, stopped, workdir, fsdp):
    """Looks at what a run that one process began looks like here, and trains."""
    processes.connect(*address)
    expected = np.load(f"{stopped}.npz")
    _, items = state_on_disk(stopped, small_config(data_dir, 4))
    for name, leaf in zip(expected, jax.tree.leaves(items), strict=True):
        assert len(leaf.sharding.device_set) == 4 and not leaf.is_fully_addressable
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[name][shard.index])
    loop.run(small_config(data_dir, int(fsdp)), workdir)


def text_config(fsdp):
    """An LSTM wide enough to be divided; it is taught by itself, and cut."""
    config = lstm_config()
    config.model.width = 24
    config.devices.fsdp = int(fsdp)
    return config


def train_on_text(address, directory, workdir, fsdp):
    processes.connect(*address)
    loop.run(text_config(fsdp), workdir)


def start_with_one_own_config(address, directory, *arguments):
    run_train_py(address, directory, *arguments, own="--config.devices.fsdp=2")


class FailAt(Console):
    """A console on which showing a certain step fails."""

    def print(self, *lines, **options):
        if str(lines[0]).startswith("step 4/"):  # while no checkpoint is being saved
            raise OSError("no space left")


def fail_alone(address, directory, data_dir):
    processes.connect(*address)
    own = FailAt if jax.process_index() == 1 else Console
    try:
        loop.run(small_config(data_dir), directory / "run", own(quiet=True))
    except Exception as error:
        processes.leave(f"error: {error}")


def disagree(address, directory, data_dir):
    """Everything that processes may find out about each other."""
    with pytest.raises(ProcessError, match="must be HOST:PORT, got 'localhost'"):
        processes.connect("localhost", 2, 0)
    processes.connect(*address)
    index = jax.process_index()
    with pytest.raises(OSError if index else ProcessError) as failure:
        with processes.failing_together():
            if index == 1:
                raise OSError("mine")
    assert str(failure.value) == (
        "mine" if index else "process 1 cannot go on and says why"
    )
    processes.check_same([7, 7], "unequal numbers")
    with pytest.raises(ProcessError) as failure:
        processes.check_same([255, index], "unequal numbers")
    assert str(failure.value).splitlines() == [
        "unequal numbers:",
        "  process 0: 00000000 and 000000ff",
        "  process 1: 00000001 and 000000ff",
    ]
    with pytest.raises(workdirs.WorkdirError if index else ProcessError, match="1 "):
        workdirs._SECONDS_BEHIND = 1
        workdirs.check_workdir(directory / f"not_shared{index}", {})

    experiment = set_up(small_config(data_dir))
    state = init_state(experiment)
    fingerprint = agreed_fingerprint(experiment, state)
    masks = state.opt_state.masks
    masks["head"]["kernel"] = jax.make_array_from_callback(
        masks["head"]["kernel"].shape,
        NamedSharding(experiment.mesh, PartitionSpec()),  # a copy each, it says
        lambda part: (np.arange(160).reshape(16, 10) > index)[part],
    )
    with pytest.raises(ProcessError, match="do not all have the same masks") as failure:
        agreed_fingerprint(experiment, state)
    *_, first, second = str(failure.value).splitlines()
    assert first.startswith("  process 0: ") and second.startswith("  process 1: ")
    assert first[-8:] != second[-8:] and fingerprint not in (first, second)


# --- the runs


@pytest.fixture(scope="module")
def runs(digits_dir, tmp_path_factory):
    """Directories of runs on 1, 2 and 4 processes, fresh and resumed."""
    root = tmp_path_factory.mktemp("runs")
    config_file = root / "small.py"
    config_file.write_text(_CONFIG_FILE.format(data_dir=digits_dir))
    fresh_two = start(
        *(2, 2, run_train_py, root / "output_two", f"--config={config_file}"),
        *("--config.devices.fsdp=2", f"--workdir={root / 'two'}"),
    )

    config = small_config(digits_dir)
    with pytest.raises(Stop):
        loop.run(config, root / "one", StopAt(12))
    _, items = state_on_disk(root / "one", config)
    shutil.copytree(root / "one", root / "resumed")
    np.savez(root / "resumed.npz", *jax.tree.leaves(items))
    loop.run(config, root / "one", Console(quiet=True))

    output_two = finish_well(fresh_two)
    arguments = (digits_dir, root / "resumed")
    train = restore_and_train
    finish_well(start(4, 1, train, root / "output_four", *arguments, root / "four", 2))
    finish_well(
        start(2, 2, train, root / "output_resumed", *arguments, root / "resumed", 4)
    )
    return SimpleNamespace(
        one=root / "one",
        two=root / "two",
        four=root / "four",
        resumed=root / "resumed",
        output_two=output_two,
        config_file=config_file,
    )


def metrics(workdir):
    return [without_times(r) for r in read_metrics(workdir)]


def test_the_run_is_the_same_in_any_number_of_processes(runs):
    expected = metrics(runs.one)
    assert [r["step"] for r in expected] == [4, 8, 12]
    assert len({r["mask_fingerprint"] for r in expected}) == 2  # the last event is at 8
    for workdir in (runs.two, runs.four, runs.resumed):
        records = metrics(workdir)
        assert [r.keys() for r in records] == [r.keys() for r in expected]
        for record, reference in zip(records, expected, strict=True):
            for name in ("step", "sparsity", "sparsity_target", "learning_rate"):
                assert record[name] == reference[name]
            # Sums over devices come in another order; the batches are the same.
            np.testing.assert_allclose(record["loss"], reference["loss"], rtol=1e-5)


def test_processes_of_one_layout_give_the_same_bits(runs, digits_dir):
    assert metrics(runs.two) == metrics(runs.four)
    config = small_config(digits_dir)
    two, four = (state_on_disk(workdir, config) for workdir in (runs.two, runs.four))
    assert two[0] == four[0] == 12
    for a, b in zip(jax.tree.leaves(two[1]), jax.tree.leaves(four[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    summaries = [(d / "summary.json").read_text() for d in (runs.two, runs.four)]
    assert summaries[0] == summaries[1]


def test_one_process_restores_what_several_saved(runs, digits_dir):
    wanted = checkpoint.restore_variables(runs.four, step="latest")
    for fsdp in (1, 2, 8):
        _, items = state_on_disk(runs.four, small_config(digits_dir, fsdp))
        params = items["variables"]["params"]
        jax.tree.map(np.testing.assert_array_equal, params, wanted["params"])
        masks = agp.get_masks(items["training"]["opt_state"])
        for mask, weights in zip(
            jax.tree.leaves(masks),
            [params[m]["kernel"] for m in sorted(masks)],
            strict=True,
        ):
            np.testing.assert_array_equal(mask, weights != 0)


def test_one_process_writes_and_the_others_are_quiet(runs):
    first, second = runs.output_two
    assert second == ""
    lines = first.splitlines()
    assert "4 devices (data 2 x fsdp 2) of 2 processes" in lines
    assert sum(line.startswith("step ") for line in lines) == 3
    assert lines[-1].startswith("wrote ")
    for workdir in (runs.two, runs.four):
        names = {path.name for path in workdir.iterdir()}
        assert names == {path.name for path in runs.one.iterdir()}
        assert len(read_metrics(workdir)) == 3


def test_an_error_ends_all_processes(runs, tmp_path):
    config = f"--config={runs.config_file}"
    bad = [config, "--config.optimizer.name=x", f"--workdir={tmp_path / 'bad'}"]
    started = [
        start(2, 1, run_train_py, tmp_path / "all", *bad),
        start(2, 2, start_with_one_own_config, tmp_path / "one", *bad[::2]),
    ]
    for group, message in zip(
        started, ["must be one of sgd, adamw", "different configs"], strict=True
    ):
        for output, code, seconds in finish(group, timeout=90):
            assert code == 1, output
            assert output.startswith("error: ") and message in output
            assert seconds < 60
    assert not (tmp_path / "bad").exists()


def test_an_error_of_one_process_ends_the_others(digits_dir, tmp_path):
    results = finish(start(2, 1, fail_alone, tmp_path, digits_dir), timeout=90)
    assert [code for _, code, _ in results] == [1, 1]
    assert "error: no space left" in results[1][0]
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [4]


def test_processes_find_out_what_sets_them_apart(digits_dir, tmp_path):
    finish_well(start(2, 2, disagree, tmp_path, digits_dir))


def test_processes_go_on_with_a_text_and_cut_the_same_out(tmp_path):
    for workdir in (tmp_path / "one", tmp_path / "two"):  # stopped, and then finished
        if workdir.name == "two":
            shutil.copytree(tmp_path / "one", workdir)
        else:
            with pytest.raises(Stop):
                loop.run(text_config(1), workdir, StopAt(15))
    started = start(2, 2, train_on_text, tmp_path, tmp_path / "two", 4)
    loop.run(text_config(1), tmp_path / "one", Console(quiet=True))
    output, other = finish_well(started)
    assert "resumes after step 10" in output and "cut after step 15: " in output
    assert not other
    first, second = (metrics(tmp_path / name) for name in ("one", "two"))
    for ours, theirs in zip(first, second, strict=True):
        assert ours["sparsity"] == theirs["sparsity"]
        for name in ("loss", "test_perplexity", "validation_perplexity"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4)
    one, two = (
        json.loads((tmp_path / x / "summary.json").read_text()) for x in ("one", "two")
    )
    assert one["cut"]["after"]["weights"] == two["cut"]["after"]["weights"]
