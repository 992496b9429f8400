"""Checkpoints and work directories: what is saved comes back bit for bit on any mesh,
and what is missing, damaged or of another run is named."""

import contextlib
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from agp_jax.training import checkpoint, workdirs
from agp_jax.training.checkpoint import CheckpointError
from agp_jax.training.processes import ProcessError
from agp_jax.training.workdirs import WorkdirError

CONFIG = {"model": "tiny", "prune": {"final_sparsity": 0.9, "rules": ["a", "b"]}}


class PruneState(NamedTuple):
    step: jax.Array
    masks: Any
    inner_state: Any


def make_items(seed=0, size=16):
    """Every kind of leaf a run has, with values that only survive bit by bit."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (size, 8), dtype=np.uint32)  # NaNs, subnormals too
    params = {
        "conv": {"kernel": jnp.asarray(bits.view(np.float32)), "bias": None},
        "dense": {"kernel": jnp.asarray(rng.normal(size=(8, size)), jnp.bfloat16)},
    }
    masks = {
        "conv": {"kernel": jnp.asarray(bits % 2 == 0), "bias": optax.MaskedNode()},
        "dense": {"kernel": optax.MaskedNode()},
    }
    moments = optax.ScaleByAdamState(
        count=jnp.int32(seed), mu=params, nu=jax.tree.map(jnp.square, params)
    )
    opt_state = (PruneState(jnp.int32(seed), masks, (moments, optax.EmptyState())),)
    return {
        "variables": {"params": params, "batch_stats": {"mean": jnp.arange(size)}},
        "training": {
            "step": jnp.int32(seed),
            "opt_state": opt_state,
            "key": jax.random.key(seed),
            "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
            "seed": jax.random.PRNGKey(seed),
        },
    }


def small_items(value=0.0):
    return {
        "variables": {"params": {"w": jnp.full(4, float(value))}, "batch_stats": {}},
        "training": {"step": jnp.int32(value)},
    }


def with_shardings(tree, sharding_of):
    return jax.tree.map(lambda x: jax.device_put(x, sharding_of(x)), tree)


def targets_of(tree, sharding_of=lambda x: x.sharding):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), tree
    )


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def on_mesh(shape, axes, spec, axis_type):
    def sharding_of(leaf):
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = jax.make_mesh(shape, axes, (axis_type,) * len(axes), devices=devices)
        fits = leaf.ndim == 2 and leaf.shape[0] % 8 == leaf.shape[1] % 8 == 0
        return NamedSharding(mesh, spec if fits else PartitionSpec())

    return sharding_of


def on_one_device(leaf):
    return SingleDeviceSharding(jax.devices()[-1])


ON_EIGHT = ((8,), ("data",), PartitionSpec("data"), AxisType.Auto)


def disk(directory):
    return {
        path.relative_to(directory): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def saved_run(workdir, steps=(1, 2), score=None):
    workdirs.check_workdir(workdir, CONFIG)
    with checkpoint.open_checkpoints(workdir, keep=len(steps)) as manager:
        for step in steps:
            checkpoint.save(manager, step, make_items(step), score=score)
    return workdir


def start_process(function, *arguments):
    """Calls `function` of this module with string arguments in a fresh Python."""
    call = f"import sys, {__name__} as m; m.{function.__name__}(*sys.argv[1:])"
    here = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", call, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes it started
        raise
    assert process.returncode == 0, output


# --- saving and restoring


@pytest.mark.parametrize(
    "sharding_of",
    [
        pytest.param(on_mesh(*ON_EIGHT), id="same 8"),
        pytest.param(
            on_mesh((2, 4), ("x", "y"), PartitionSpec("y", "x"), AxisType.Auto),
            id="2x4",
        ),
        pytest.param(
            on_mesh((2, 2), ("x", "y"), PartitionSpec(None, "x"), AxisType.Explicit),
            id="2x2",
        ),
        pytest.param(on_one_device, id="1"),
    ],
)
def test_every_kind_of_leaf_survives_bit_for_bit_on_other_devices(
    tmp_path, sharding_of
):
    items = with_shardings(make_items(3), on_mesh(*ON_EIGHT))
    targets = targets_of(items, sharding_of)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, 3, items)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        step, restored = checkpoint.restore(manager, targets)

    assert step == 3
    assert_same_bits(restored, items)
    for got, want in zip(
        jax.tree.leaves(restored), jax.tree.leaves(targets), strict=True
    ):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


def test_arrays_serve_as_targets_and_any_saved_step_can_be_asked_for(tmp_path):
    saved_run(tmp_path, steps=(1, 5, 7))
    with checkpoint.open_checkpoints(tmp_path) as manager:
        step, restored = checkpoint.restore(manager, make_items(), step=5)
        assert step == 5
        assert_same_bits(restored, make_items(5))
        with pytest.raises(CheckpointError, match="no step 6; there is 1, 5, 7"):
            checkpoint.restore(manager, make_items(), step=6)


def test_a_state_donated_right_after_save_is_stored_as_it_was(tmp_path):
    overwrite = jax.jit(lambda x: -x, donate_argnums=0)
    weights = jnp.arange(2**20, dtype=jnp.float32)
    target = {"variables": {"w": weights.copy()}}
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, 1, {"variables": {"w": weights}})
        for _ in range(5):
            weights = overwrite(weights)
        assert checkpoint.latest_step(manager) == 1
        _, restored = checkpoint.restore(manager, target)
    np.testing.assert_array_equal(restored["variables"]["w"], np.arange(2**20))


def test_weights_are_stored_once_and_without_the_rest(tmp_path):
    saved_run(tmp_path, score=0.5)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "training")
    variables = checkpoint.restore_variables(tmp_path)

    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(variables))
    assert_same_bits(variables, make_items(2)["variables"])


def test_variables_are_read_without_touching_a_run_in_progress(tmp_path):
    saved_run(tmp_path)
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    before = disk(tmp_path)
    latest = checkpoint.restore_variables(tmp_path, step="latest")
    first = checkpoint.restore_variables(tmp_path, step=1)
    with pytest.raises(CheckpointError, match="no step 3; there is 1, 2"):
        checkpoint.restore_variables(tmp_path, step=3)

    assert_same_bits(latest, make_items(2)["variables"])
    assert_same_bits(first, make_items(1)["variables"])
    assert disk(tmp_path) == before


def test_a_thinned_run_resumes_from_the_shapes_on_disk(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, 1, make_items(1, size=16))
        checkpoint.save(manager, 2, make_items(2, size=12))
        shapes = checkpoint.read_shapes(manager, "variables")
        _, restored = checkpoint.restore(
            manager, {"variables": targets_of(shapes, on_one_device)}
        )
    assert shapes["params"]["conv"]["kernel"].shape == (12, 8)
    assert_same_bits(restored["variables"], make_items(2, size=12)["variables"])


def test_only_later_steps_of_jax_arrays_are_saved(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, jnp.int32(4), small_items(), score=jnp.float32(0.5))
        for step in (3, 4):
            with pytest.raises(
                ValueError, match=f"{step} cannot be saved after step 4"
            ):
                checkpoint.save(manager, step, small_items())
        with pytest.raises(ValueError, match="variables/params/w is a ndarray"):
            checkpoint.save(manager, 5, {"variables": {"params": {"w": np.ones(2)}}})
    with pytest.raises(ValueError, match="at least 1"):
        checkpoint.open_checkpoints(tmp_path, keep=0).__enter__()


def test_a_target_says_where_it_goes(tmp_path):
    saved_run(tmp_path)
    nowhere = jax.eval_shape(make_items)
    uneven = targets_of(
        {"step": jnp.zeros((3, 3))},
        lambda _: on_mesh(*ON_EIGHT)(jnp.zeros((8, 8))),
    )
    with checkpoint.open_checkpoints(tmp_path) as manager:
        with pytest.raises(ValueError, match="needs a sharding"):
            checkpoint.restore(manager, nowhere)
        with pytest.raises(ValueError, match="partitioned 8 times"):
            checkpoint.restore(manager, {"training": uneven})


def test_an_empty_workdir_has_nothing_to_restore(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as manager:
        assert checkpoint.latest_step(manager) is None
        assert checkpoint.best_step(manager) is None
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            checkpoint.restore(manager, small_items())
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.restore_variables(tmp_path / "nowhere", step="latest")
    assert not (tmp_path / "nowhere").exists()


def test_saving_and_restoring_log_nothing_of_orbax(tmp_path, caplog):
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO)  # as under absl's app.run
    try:
        with caplog.at_level(logging.INFO, logger="absl"):
            saved_run(tmp_path)
            with checkpoint.open_checkpoints(tmp_path) as manager:
                checkpoint.restore(manager, make_items())
                checkpoint.best_step(manager)
            checkpoint.restore_variables(tmp_path, step="latest")
            absl.logging.info("ours")
    finally:
        absl.logging.set_verbosity(verbosity)
    assert [r.message for r in caplog.records if r.name == "absl"] == ["ours"]


# --- which steps stay, and which is best


def scores_saved(workdir, scores, keep=2):
    with checkpoint.open_checkpoints(workdir, keep=keep) as manager:
        for step, score in enumerate(scores, start=1):
            checkpoint.save(manager, step, small_items(step), score=score)
        checkpoint.wait(manager)
        return sorted(manager.all_steps()), checkpoint.best_step(manager)


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([None, None, None, None], [3, 4], None),
        ([None, 0.5, None, None, None], [2, 4, 5], 2),
        ([0.9, 0.8, 0.7, 0.6], [1, 3, 4], 1),  # the latest stays though it is worst
        ([0.1, 0.2, 0.3, 0.4], [3, 4], 4),
        ([0.5, 0.5, 0.1, 0.1], [2, 3, 4], 2),
        ([0.0, None, None, -1.0], [1, 3, 4], 1),
        ([float("nan"), 0.1, float("nan"), float("nan")], [2, 3, 4], 2),
        ([np.float32(0.5), np.float64(0.25), 0], [1, 2, 3], 1),
    ],
)
def test_the_latest_steps_and_the_best_scored_one_stay(tmp_path, scores, kept, best):
    assert scores_saved(tmp_path, scores) == (kept, best)
    with checkpoint.open_checkpoints(tmp_path) as manager:  # and after a restart
        assert (sorted(manager.all_steps()), checkpoint.best_step(manager)) == (
            kept,
            best,
        )
    if best is None:
        with pytest.raises(CheckpointError, match='step="latest" is 4'):
            checkpoint.restore_variables(tmp_path)
    else:
        variables = checkpoint.restore_variables(tmp_path)
        np.testing.assert_array_equal(variables["params"]["w"], np.full(4, best))


def test_a_restarted_run_still_keeps_the_best_step_of_before(tmp_path):
    scores_saved(tmp_path, [0.2, 0.9, 0.3])
    with checkpoint.open_checkpoints(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 4, small_items(4), score=0.4)
        checkpoint.save(manager, 5, small_items(5))
        checkpoint.wait(manager)
        assert sorted(manager.all_steps()) == [2, 5]
        assert checkpoint.best_step(manager) == 2


# --- the wrong checkpoint, a broken one, no room, a killed run


def test_checkpoints_need_a_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="file"):
        checkpoint.open_checkpoints(file).__enter__()


def test_another_model_is_refused_leaf_by_leaf(tmp_path):
    saved_run(tmp_path)
    targets = jax.tree.map(jnp.copy, make_items())
    params = targets["variables"]["params"]
    params["conv"]["kernel"] = jnp.zeros((16, 4))
    params["dense"]["kernel"] = params["dense"]["kernel"].astype(jnp.float32)
    params["head"] = {"kernel": jnp.zeros(3)}
    del targets["training"]["seed"]
    before = disk(tmp_path / "checkpoints")
    with checkpoint.open_checkpoints(tmp_path) as manager:
        with pytest.raises(CheckpointError) as error:
            checkpoint.restore(manager, targets)
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'checkpoints' / '2'} holds another model:",
        "  variables/params/conv/kernel: float32[16, 8] in the checkpoint, "
        "float32[16, 4] in the model",
        "  variables/params/dense/kernel: bfloat16[8, 16] in the checkpoint, "
        "float32[8, 16] in the model",
        "  variables/params/head/kernel: nothing in the checkpoint, "
        "float32[3] in the model",
        "  training/seed: uint32[2] in the checkpoint, nothing in the model",
        "resume it with the model it was saved from, or give a new work directory",
    ]
    assert disk(tmp_path / "checkpoints") == before


def test_many_differences_are_counted(tmp_path):
    names = [f"w{i:02}" for i in range(20)]
    with checkpoint.open_checkpoints(tmp_path) as manager:
        saved = {"variables": {name: jnp.zeros(2) for name in names}}
        checkpoint.save(manager, 1, saved)
        with pytest.raises(CheckpointError, match="w07: .*\n  and 12 more\n"):
            checkpoint.restore(manager, jax.tree.map(lambda x: x[1:], saved))


@pytest.mark.parametrize(
    ("saved", "asked"),
    [("key<rbg>", "key<urbg>"), ("key<fry>", "uint32"), ("uint32", "key<fry>")],
)
def test_a_key_of_another_kind_is_another_model(tmp_path, saved, asked):
    keys = {
        "key<rbg>": jax.random.key(0, impl="rbg"),
        "key<urbg>": jax.random.key(0, impl="unsafe_rbg"),
        "key<fry>": jax.random.key(0),
        "uint32": jax.random.PRNGKey(0),
    }
    message = rf"training/key: {saved}\[.*\] in the checkpoint, {asked}\["
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, 1, {"training": {"key": keys[saved]}})
        with pytest.raises(CheckpointError, match=message):
            checkpoint.restore(manager, {"training": {"key": keys[asked]}})


def damage_file(path, how):
    data = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])


def small_saved_run(workdir):
    with checkpoint.open_checkpoints(workdir) as manager:
        for step in (1, 2):
            checkpoint.save(manager, step, small_items(step), score=step)
    return sorted(p for p in (workdir / "checkpoints" / "2").rglob("*") if p.is_file())


def damage_every_file(workdir, how):
    workdir = Path(workdir)
    directory = workdir / "checkpoints" / "2"
    num_refused = 0
    for file in small_saved_run(workdir):
        intact = file.read_bytes()
        damage_file(file, how)
        before = disk(workdir)
        try:
            with checkpoint.open_checkpoints(workdir) as manager:
                step, restored = checkpoint.restore(manager, small_items())
        except CheckpointError as error:
            num_refused += 1
            assert str(error).startswith(f"{directory} cannot be read: ")
            assert str(error).endswith("delete that directory to resume from step 1")
        else:
            assert step == 2
            assert_same_bits(restored, small_items(2))
        assert disk(workdir) == before
        file.write_bytes(intact)
    assert num_refused >= 4
    shutil.rmtree(directory)  # what the message says
    with checkpoint.open_checkpoints(workdir) as manager:
        step, restored = checkpoint.restore(manager, small_items())
    assert step == 1
    assert_same_bits(restored, small_items(1))


@pytest.mark.parametrize("how", ["gone", "truncated"])
def test_a_damaged_file_leads_to_an_error_or_does_not_matter(tmp_path, how):
    # In its own process: the reads that Orbax gives up on complain when collected.
    finish(start_process(damage_every_file, tmp_path, how))


def test_a_missing_item_is_damage_too(tmp_path):
    small_saved_run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "training")
    with checkpoint.open_checkpoints(tmp_path) as manager:
        with pytest.raises(CheckpointError, match="training.*\n.* to start again"):
            checkpoint.restore(manager, small_items())


@contextlib.contextmanager
def largest_file(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def noise(step):
    values = np.random.default_rng(step).normal(size=2**20)  # does not compress
    return {"variables": {"w": jnp.asarray(values, jnp.float32)}}


def test_a_failed_save_is_reported_and_costs_no_earlier_step(tmp_path):
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        with checkpoint.open_checkpoints(tmp_path, keep=1) as manager:
            checkpoint.save(manager, 1, noise(1))
            checkpoint.wait(manager)
            with largest_file(2**20):
                checkpoint.save(manager, 2, noise(2))
                checkpoint.save(manager, 3, noise(3))  # raises for step 2
    with checkpoint.open_checkpoints(tmp_path, keep=1) as manager:
        step, restored = checkpoint.restore(manager, noise(0))
        assert step == 1
        assert_same_bits(restored, noise(1))
        checkpoint.save(manager, 2, noise(2))


def test_a_failed_last_save_is_reported_on_leaving(tmp_path):
    with largest_file(2**20):
        with pytest.raises(CheckpointError, match="step 1 could not be saved"):
            with checkpoint.open_checkpoints(tmp_path) as manager:
                checkpoint.save(manager, 1, noise(1))


def large_noise(step):
    values = np.random.default_rng(step).normal(size=2**22)
    return {"variables": {"w": jnp.asarray(values, jnp.float32)}}


def resume_check_and_save_for_ever(workdir, ready):
    with checkpoint.open_checkpoints(workdir) as manager:
        step = 0
        if checkpoint.latest_step(manager) is not None:
            step, restored = checkpoint.restore(manager, large_noise(0))
            assert_same_bits(restored, large_noise(step))
        checkpoint.save(manager, step + 1, large_noise(step + 1))
        checkpoint.wait(manager)
        os.write(ready, b"1")
        while True:
            step = checkpoint.latest_step(manager) + 1
            checkpoint.save(manager, step, large_noise(step))


def live_five_times(workdir):
    seconds = np.random.default_rng(0).uniform(0.0, 1.0, 5)
    num_interrupted = 0
    for wait in seconds:
        saved, ready = os.pipe()
        child = os.fork()  # JAX has started no threads yet
        if child == 0:
            resume_check_and_save_for_ever(workdir, ready)
        os.close(ready)
        os.read(saved, 1)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        names = os.listdir(Path(workdir, "checkpoints"))
        num_interrupted += any("tmp" in name for name in names)
    assert num_interrupted  # or nothing was tested


def test_a_run_killed_while_saving_resumes_from_its_last_complete_step(tmp_path):
    finish(start_process(live_five_times, tmp_path))
    with checkpoint.open_checkpoints(tmp_path) as manager:
        step, restored = checkpoint.restore(manager, large_noise(0))
        checkpoint.save(manager, step + 1, small_items())
    assert step >= 5
    assert_same_bits(restored, large_noise(step))
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {str(step), str(step + 1)}  # no remains


# --- several processes


def rows_of(mesh_devices):
    return NamedSharding(
        jax.make_mesh((mesh_devices,), ("data",), (AxisType.Auto,)),
        PartitionSpec("data"),
    )


def one_of_two(index, port, workdir, foreign, answers):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
    with pytest.raises(ProcessError if int(index) else WorkdirError) as refusal:
        workdirs.check_workdir(foreign, CONFIG)
    assert workdirs.check_workdir(workdir, CONFIG) is True

    items = jax.jit(square_weights, out_shardings=rows_of(4))()
    with checkpoint.open_checkpoints(workdir) as manager:
        step, restored = checkpoint.restore(manager, items)
        assert step == 1
        assert all(jax.tree.leaves(jax.tree.map(is_negative_of, restored, items)))
        checkpoint.save(manager, 2, items, score=0.5)
    variables = checkpoint.restore_variables(workdir)
    np.testing.assert_array_equal(variables["w"], np.arange(64.0).reshape(8, 8))
    Path(answers).write_text(str(refusal.value))


def square_weights():
    return {"variables": {"w": jnp.arange(64.0).reshape(8, 8)}}


def is_negative_of(a, b):
    return bool((a == -b).all())


def test_two_processes_share_one_workdir(tmp_path):
    workdir, foreign = tmp_path / "run", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").touch()
    workdirs.check_workdir(workdir, CONFIG)
    with checkpoint.open_checkpoints(workdir) as manager:
        negative = jax.tree.map(jnp.negative, square_weights())
        checkpoint.save(manager, 1, jax.device_put(negative, rows_of(8)))

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = [tmp_path / f"{i}.txt" for i in range(2)]
    processes = [
        start_process(one_of_two, i, port, workdir, foreign, answers[i])
        for i in range(2)
    ]
    for process in processes:
        finish(process)

    assert "notes.txt" in answers[0].read_text()
    assert "process 0 cannot go on" in answers[1].read_text()
    with checkpoint.open_checkpoints(workdir) as manager:
        step, restored = checkpoint.restore(manager, square_weights())
    assert step == 2
    assert_same_bits(restored, square_weights())
