"""The loop runs a task that it has never heard of: a recurrent one, of neither images
nor tokens, which carries state from batch to batch and is judged by an error."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from runs import Stop, StopAt, assert_same_run, run_quietly

import agp_jax as agp
from agp_jax.training import checkpoint, loop
from agp_jax.training.config import Config, ConfigError, Model, Optimizer, Prune
from agp_jax.training.experiment import init_state, set_up
from agp_jax.training.plans import make_plan
from agp_jax.training.records import read_metrics
from agp_jax.training.steps import make_train_step
from agp_jax.training.tasks import Quality, Splits, Task

ROWS, LENGTH, HIDDEN, STEPS_PER_EPOCH = 8, 6, 10, 12


class Echo(nn.Module):
    """A recurrent network whose hidden state goes on from one batch to the next."""

    @nn.compact
    def __call__(self, signal, starts, train):
        draw = nn.initializers.normal(0.5)
        into = self.param("into", draw, (1, HIDDEN))
        recurrent = self.param("recurrent", draw, (HIDDEN, HIDDEN))
        readout = self.param("readout", draw, (HIDDEN, 1))
        carry = self.variable("carry", "hidden", jnp.zeros, (ROWS, HIDDEN))

        def step(hidden, now):
            hidden = jnp.tanh(now[:, None] @ into + hidden @ recurrent)
            return hidden, hidden @ readout

        first = jnp.where(starts[:, None], 0.0, carry.value)
        last, outputs = jax.lax.scan(step, first, signal.T)
        if not self.is_initializing():
            carry.value = last
        return outputs[..., 0].T  # (rows, length)


def make_stream(seed, length):
    """White noise, and the fading echo of it that is to be predicted."""
    signal = np.random.default_rng(seed).standard_normal((ROWS, length))
    echo = np.zeros_like(signal)
    for t in range(1, length):
        echo[:, t] = 0.6 * echo[:, t - 1] + 0.4 * signal[:, t - 1]
    return {"signal": np.float32(signal), "echo": np.float32(echo)}


def batch_at(stream, place):
    part = {k: x[:, place * LENGTH : (place + 1) * LENGTH] for k, x in stream.items()}
    return part | {"starts": np.full(ROWS, place == 0)}


def load():
    def train(start_step):
        stream = make_stream(0, STEPS_PER_EPOCH * LENGTH)
        step = start_step
        while True:
            yield batch_at(stream, step % STEPS_PER_EPOCH)
            step += 1

    def test():
        stream = make_stream(1, 4 * LENGTH)
        for place in range(4):  # the last row of the last batch is padding
            weight = np.ones((ROWS, LENGTH), np.float32)
            weight[-1] = place < 3
            yield batch_at(stream, place) | {"weight": weight}

    return Splits(train, test)


def measure(outputs, batch):
    weight = batch.get("weight", np.ones(outputs.shape, np.float32))
    squares = jnp.sum(weight * (outputs - batch["echo"]) ** 2)
    return {"count": jnp.sum(weight), "loss": squares}


def make_echo(config, load=load):
    return Task(
        model=Echo(),
        example=batch_at(make_stream(0, LENGTH), 0),
        num_items=ROWS * LENGTH,
        item="sample",
        inputs=lambda batch: (batch["signal"], batch["starts"]),
        measure=measure,
        describe=lambda means: means | {"error": means["loss"] ** 0.5},
        quality=Quality("error", ".3f", higher_is_better=False),
        load=load,
    )


def make_config(**changes):
    options = dict(
        steps=30,
        batch_size=ROWS,
        log_every=5,
        checkpoint_every=5,
        optimizer=Optimizer(name="adamw", learning_rate=0.03),
        prune=Prune(
            final_sparsity=0.4,
            begin_step=5,
            end_step=20,
            frequency=5,
            rules=(agp.Rule("into|recurrent", agp.filters()),),
            coupled=True,
            cut_step=20,
        ),
        task=make_echo,
    )
    return Config(**(options | changes))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run_quietly(make_config(), workdir)
    return workdir


def test_it_is_pruned_cut_and_told_in_its_own_words(uninterrupted, capsys):
    records = read_metrics(uninterrupted)
    assert [r["step"] for r in records] == [5, 10, 15, 20, 25, 30]
    assert {"train_error", "test_error", "samples_per_second"} <= records[0].keys()
    assert records[-1]["test_error"] < records[0]["test_error"]
    for r in records:
        np.testing.assert_allclose(r["test_error"], r["test_loss"] ** 0.5)

    summary = json.loads((uninterrupted / "summary.json").read_text())
    before, after = summary["cut"]["before"], summary["cut"]["after"]
    assert before["weights"] == 10 + 10 * 10 + 10
    assert after["weights"] == 6 + 6 * 6 + 6
    assert (before["macs"], after["macs"]) == (120, 48)  # for one sample
    np.testing.assert_allclose(before["test_error"], after["test_error"], rtol=1e-5)
    errors = {r["step"]: r["test_error"] for r in records if r["step"] >= 20}
    assert summary["best_test_error"] == min(errors.values())
    assert errors[summary["best_step"]] == min(errors.values())

    loop.run(make_config(), uninterrupted, Console(width=200))  # only reports
    told = capsys.readouterr().out
    assert f"test error {summary['test_error']:.3f}" in told
    assert "multiply-adds per sample" in told
    assert "image" not in told and "accuracy" not in told
    assert (uninterrupted / "sparsity_and_error.png").exists()


def test_what_is_carried_is_kept_and_cut_with_its_units(uninterrupted):
    variables = checkpoint.restore_variables(uninterrupted, step="latest")
    assert variables["carry"]["hidden"].shape == (ROWS, 6)
    assert variables["params"]["recurrent"].shape == (6, 6)
    assert np.abs(variables["carry"]["hidden"]).min(axis=0).max() > 0


def test_a_step_goes_on_from_the_state_that_the_last_one_left():
    config = make_config(prune=Prune(enabled=False))
    experiment = set_up(config)
    state, train_step = init_state(experiment), make_train_step(experiment)
    batches, hidden = experiment.task.load().train(0), np.zeros((ROWS, HIDDEN))
    for _ in range(STEPS_PER_EPOCH + 2):  # and from nothing in the next epoch
        batch = next(batches)
        params = {k: np.float64(x) for k, x in state.params.items()}
        hidden = np.where(batch["starts"][:, None], 0, hidden)
        for now in batch["signal"].T:
            hidden = np.tanh(
                now[:, None] @ params["into"] + hidden @ params["recurrent"]
            )
        state, _ = train_step(state, batch)
        np.testing.assert_allclose(
            state.collections["carry"]["hidden"], hidden, rtol=1e-4, atol=1e-5
        )


def test_it_resumes_bit_for_bit_before_at_and_after_the_cut(uninterrupted, tmp_path):
    for step in (15, 20, 25):
        with pytest.raises(Stop):
            loop.run(make_config(), tmp_path, StopAt(step))
    run_quietly(make_config(), tmp_path)
    assert_same_run(tmp_path, uninterrupted, make_config())


def test_a_plan_reads_no_data_and_agrees_with_the_run(uninterrupted):
    def no_data():
        raise AssertionError("a plan needs no data")

    def make_task(config):
        return make_echo(config, load=no_data)

    plan = make_plan(set_up(make_config(task=make_task)))
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert plan.after.weight_params == summary["cut"]["after"]["weights"]
    assert plan.nonzero == summary["nonzero"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(task=lambda config: Echo()), "config.task must be a function that makes"),
        (dict(task="echo"), "config.task must be"),
        (dict(model=Model(weights="w.npz")), "config.model.weights must be empty"),
    ],
)
def test_what_is_no_task_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        set_up(make_config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(measure=lambda o, b: {"loss": 0.0}), "measure must give count and loss"),
        (dict(describe=lambda means: means), "describe must give loss and error"),
    ],
)
def test_a_task_that_misses_something_is_refused_before_it_runs(changes, message):
    def make_task(config):
        return make_echo(config)._replace(**changes)

    with pytest.raises(ConfigError, match=message):
        set_up(make_config(task=make_task))
