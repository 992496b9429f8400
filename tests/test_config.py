"""Configs: what passes gives the rules of a run, what cannot run names its field."""

import dataclasses
import json

import numpy as np
import pytest

import agp_jax as agp
from agp_jax.training.config import (
    Config,
    ConfigError,
    Optimizer,
    Prune,
    list_events,
    make_rules,
    to_dict,
    validate,
)
from agp_jax.training.optimizers import make_learning_rate


def good_config(**changes):
    config = Config(
        steps=100,
        log_every=10,
        checkpoint_every=20,
        prune=Prune(
            begin_step=0,
            end_step=50,
            frequency=10,
            rules=(agp.dense("head/kernel"), agp.Rule(".*/kernel", agp.element())),
        ),
    )
    return dataclasses.replace(config, **changes)


def change(config, name, value):
    *parents, field = name.split(".")
    holder = config
    for parent in parents:
        holder = getattr(holder, parent)
    setattr(holder, field, value)
    return config


def test_a_good_config_passes_with_the_rules_of_its_run():
    config = good_config()
    dense, pruning = validate(config)
    assert (dense.pattern, dense.schedule) == ("head/kernel", None)
    assert pruning.schedule == agp.polynomial_schedule(
        0.9, begin_step=0, end_step=50, frequency=10
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "config.steps must be at least 1, got 0"),
        ("steps", 1.5, "config.steps must be of type int, got 1.5"),
        ("steps", 40, "ends at step 50, after the run's last step 40"),
        ("seed", -1, "config.seed must be in"),
        ("checkpoint_every", 15, "a multiple of log_every, which is 10, got 15"),
        ("data.name", "mnist", "config.data.name must be one of digits"),
        ("data.augment", "flip", "config.data.augment must be one of none"),
        ("model.name", "vgg", "config.model.name must be one of mlp, resnet20"),
        ("model.width", -1, "config.model.width"),
        ("optimizer.name", "adma", "must be one of sgd, adamw, got 'adma'"),
        ("optimizer.decay", "exp", "must be one of cosine, steps, expo"),
        ("optimizer.learning_rate", 0.0, "config.optimizer.learning_rate"),
        ("optimizer.learning_rate", float("nan"), "config.optimizer.learning_rate"),
        ("optimizer.momentum", 1.0, "config.optimizer.momentum"),
        ("optimizer.weight_decay", -1e-4, "config.optimizer.weight_decay"),
        ("optimizer.warmup_steps", 100, "config.optimizer.warmup_steps"),
        ("optimizer.restart_at", (50, 40), "restart_at must be increasing steps"),
        ("optimizer.restart_at", (100,), "restart_at must be increasing steps"),
        ("devices.fsdp", 0, "config.devices.fsdp must be at least 1, got 0"),
        ("devices", {"fsdp": 2}, "config.devices must be of type Devices"),
        ("prune.enabled", None, "config.prune.enabled must be of type bool, got None"),
        ("prune.final_sparsity", 90, "a sparsity of 80 % is 0.8"),
        ("prune.initial_sparsity", 0.95, "sparsity can only rise"),
        ("prune.frequency", 60, "frequency must be between 1 and .* 50"),
        ("prune.begin_step", 60, "begin_step=60, end_step=50"),
        ("prune.rules", (), "prune nothing"),
        ("prune.rules", (agp.dense("head/kernel"),), "prune nothing"),
        ("prune.rules", ("kernel",), "must be agp.Rules, got 'kernel'"),
        ("prune", None, "config.prune must be of type Prune"),
    ],
)
def test_a_bad_value_is_named_with_what_it_may_be(name, value, message):
    with pytest.raises(ConfigError, match=message):
        validate(change(good_config(), name, value))


def test_what_is_no_config_is_refused():
    with pytest.raises(ConfigError, match="must return a Config, got 3"):
        validate(3)


def test_rules_without_a_schedule_take_the_shared_one():
    own = agp.one_shot(0.5, step=7)
    config = good_config()
    config.prune.rules = (
        agp.dense("a"),
        agp.Rule("b", agp.filters(), own),
        agp.Rule("c", agp.element()),
    )
    dense, with_own, with_shared = make_rules(config)
    assert dense.schedule is None and with_own.schedule == own
    assert with_shared.schedule == agp.polynomial_schedule(
        0.9, begin_step=0, end_step=50, frequency=10
    )
    config.prune.enabled = False
    assert make_rules(config) == ()


def test_the_saved_config_is_json_and_tells_every_difference():
    config = to_dict(good_config())
    assert json.loads(json.dumps(config)) == config
    other = good_config()
    other.prune.rules = (
        agp.Rule(".*/kernel", agp.element(), score=lambda w: w**2),
        agp.Rule("x", agp.block((1, 8)), scope="rule"),
    )
    assert to_dict(other) != config
    assert to_dict(other)["prune"]["rules"][1]["structure"] == "block((1, 8))"
    assert config["prune"]["rules"][1]["score"] == "abs"


@pytest.mark.parametrize(
    ("name", "value"), [("data.dir", "/elsewhere"), ("devices.fsdp", 8)]
)
def test_where_it_runs_is_not_part_of_the_experiment(name, value):
    assert to_dict(change(good_config(), name, value)) == to_dict(good_config())


def test_learning_rates_follow_their_formulas():
    steps = np.arange(100)

    def rates(**options):
        config = good_config(optimizer=Optimizer(learning_rate=0.2, **options))
        return [float(make_learning_rate(config)(step)) for step in steps]

    cosine = 0.1 * (1 + np.cos(np.pi * steps / 100))
    np.testing.assert_allclose(rates(), cosine, rtol=1e-5, atol=1e-7)
    warm = rates(warmup_steps=20)
    np.testing.assert_allclose(warm[:20], 0.01 * steps[:20], rtol=1e-5)
    rest = 0.1 * (1 + np.cos(np.pi * (steps[20:] - 20) / 80))
    np.testing.assert_allclose(warm[20:], rest, rtol=1e-5, atol=1e-7)
    stepped = rates(decay="steps", decay_at=(30, 60), decay_factor=0.5)
    expected = np.where(steps < 30, 0.2, np.where(steps < 60, 0.1, 0.05))
    np.testing.assert_allclose(stepped, expected, rtol=1e-6)
    np.testing.assert_allclose(rates(decay="none"), 0.2)


def test_events_are_steps_at_which_weights_go():
    rules = [
        agp.dense("head/kernel"),
        agp.Rule(
            "a",
            agp.element(),
            agp.polynomial_schedule(0.5, begin_step=10, end_step=20, frequency=5),
        ),
        agp.Rule("b", agp.element(), agp.one_shot(0.5, step=12)),
    ]
    assert list_events(rules) == [12, 15, 20]  # the first of the curve removes none
    assert list_events([]) == []
