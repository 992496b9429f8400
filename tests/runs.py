"""Small runs for tests, on digits and on text: their configs, how they stop and end."""

import io
import json
import os

import jax
import numpy as np
from rich.console import Console

import agp_jax as agp
from agp_jax.thinning.cuts import Cut
from agp_jax.training import checkpoint, loop
from agp_jax.training.config import Config, Data, Distill, Model, Optimizer, Prune
from agp_jax.training.experiment import cut_experiment, set_up
from agp_jax.training.records import read_metrics


def tiny_config(data_dir, **changes):
    prune = Prune(
        final_sparsity=0.8,
        begin_step=5,
        end_step=20,
        frequency=5,
        rules=(agp.Rule(".*/kernel", agp.element()),),
    )
    options = dict(
        steps=30,
        batch_size=64,
        log_every=5,
        checkpoint_every=5,
        data=Data(dir=data_dir, augment="shift"),
        model=Model(name="mlp", width=32),
        optimizer=Optimizer(name="adamw", learning_rate=0.01),
        prune=prune,
    )
    return Config(**(options | changes))


def cut_config(data_dir, **changes):
    """Half of the hidden features of a perceptron 64-32-16-10, cut after step 20."""
    config = tiny_config(data_dir, **changes)
    config.prune.final_sparsity = 0.5
    config.prune.rules = (
        agp.dense("head/kernel"),
        agp.Rule(".*/kernel", agp.filters()),
    )
    config.prune.coupled = True
    config.prune.cut_step = 20
    return config


def lstm_config(**changes):
    """Half of the first layer's units goes, cut after step 15, and of the embedding.

    The teacher is the model after step 5.
    """
    options = dict(
        steps=20,
        batch_size=8,
        log_every=5,
        checkpoint_every=5,
        data=Data(name="pydoc_bytes", bptt=12, eval_rows=128),
        model=Model(name="lstm", width=12, dropout=0.2),
        optimizer=Optimizer(learning_rate=2.0, momentum=0.0, clip_norm=0.25),
        distill=Distill(weight=0.5, temperature=3.0),
        prune=Prune(
            final_sparsity=0.5,
            begin_step=6,
            end_step=11,
            frequency=5,
            rules=(
                agp.Rule("layer0/(input|hidden)/kernel", agp.filters()),
                agp.Rule("embedding/embedding", agp.element()),
            ),
            coupled=True,
            cut_step=15,
        ),
    )
    return Config(**(options | changes))


def run_quietly(config, workdir):
    return loop.run(config, workdir, Console(quiet=True))


class Stop(Exception):
    pass


class StopAt(Console):
    """A console that ends the run when it shows a certain step."""

    def __init__(self, step):
        super().__init__(file=open(os.devnull, "w"))
        self.stop_at = f"step {step}/"

    def print(self, *lines, **options):
        if str(lines[0]).startswith(self.stop_at):
            self.file.close()
            raise Stop


def state_on_disk(workdir, config):
    experiment = set_up(config)
    with checkpoint.open_checkpoints(workdir) as manager:
        if cut := checkpoint.read_value(manager, "cut"):
            experiment = cut_experiment(experiment, Cut.from_dict(cut))
        return checkpoint.restore(manager, loop.as_items(experiment.shapes))


def assert_same_bits(state, expected):
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, a), b in zip(paths, jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def without_times(record):
    """Metrics or a summary, without what the clock said."""
    if not isinstance(record, dict):
        return record
    return {k: without_times(v) for k, v in record.items() if "second" not in k}


def assert_same_run(workdir, reference, config):
    (step, state), (expected_step, expected) = (
        state_on_disk(directory, config) for directory in (workdir, reference)
    )
    assert step == expected_step
    assert_same_bits(state, expected)
    metrics, expected_metrics = (
        [without_times(r) for r in read_metrics(directory)]
        for directory in (workdir, reference)
    )
    assert metrics == expected_metrics
    summary, expected_summary = (
        without_times(json.loads((directory / "summary.json").read_text()))
        for directory in (workdir, reference)
    )
    assert summary == expected_summary


def printed_lines(print_it, width=None):
    """The lines that a terminal of a width gets from `print_it`, or a file."""
    console = Console(
        file=io.StringIO(),
        force_terminal=width is not None,
        width=width,
        color_system=None,
    )
    print_it(console)
    lines = console.file.getvalue().splitlines()
    assert all(line == line.rstrip() for line in lines)
    return lines
