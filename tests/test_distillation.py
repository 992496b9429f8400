"""A pruned model learns from what it was before: the term, and who may teach.

The life of a teacher in a run is in test_language.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from runs import lstm_config, tiny_config

from agp_jax.training.config import ConfigError, Distill, Optimizer, validate
from agp_jax.training.distillation import divergence
from agp_jax.training.experiment import (
    appoint_teacher,
    init_state,
    place_state,
    set_up,
    with_teacher,
)
from agp_jax.training.plans import make_plan
from agp_jax.training.steps import make_train_step


def test_the_divergence_is_that_of_tempered_distributions():
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=(2, 2, 3, 5)).astype(np.float32) * 4
    weight = np.array([[1, 1, 0], [1, 0, 1]], np.float32)

    def tempered(x):
        powers = np.exp(np.float64(x) / 3.0)
        return powers / powers.sum(-1, keepdims=True)

    p, q = tempered(teacher), tempered(logits)
    expected = 9.0 * (p * np.log(p / q)).sum(-1)
    found = divergence(logits, teacher, {}, 3.0)
    np.testing.assert_allclose(found, expected.sum(), rtol=1e-5)
    found = divergence(logits, teacher, {"weight": weight}, 3.0)
    np.testing.assert_allclose(found, (expected * weight).sum(), rtol=1e-5)
    gradient = jax.grad(divergence)(logits, teacher, {}, 3.0)
    np.testing.assert_allclose(gradient, 3.0 * (q - p), atol=1e-5)


def test_a_step_follows_both_terms(digits_dir):
    config = tiny_config(
        digits_dir,
        optimizer=Optimizer(
            learning_rate=0.5, momentum=0.0, decay="none", weight_decay=0.0
        ),
        distill=Distill(weight=0.3, temperature=2.0),
    )
    experiment = set_up(config)
    teacher = init_state(experiment)
    student = init_state(set_up(dataclasses.replace(config, seed=1)))
    experiment = with_teacher(experiment)
    state = place_state(experiment, appoint_teacher, teacher)
    state = state._replace(params=student.params)
    batch = next(experiment.task.load().train(0))

    def loss(params):
        (logits, _), (lesson, _) = (
            experiment.predict({"params": x}, *experiment.task.inputs(batch))
            for x in (params, teacher.params)
        )
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        soft = optax.losses.kl_divergence(
            jax.nn.log_softmax(logits / 2), jax.nn.softmax(lesson / 2)
        )
        return (0.7 * hard + 0.3 * 4 * soft).mean()

    expected = jax.tree.map(
        lambda x, g: x - 0.5 * g, student.params, jax.grad(loss)(student.params)
    )
    expected = jax.device_get(expected)  # the step consumes its state
    after, _ = make_train_step(experiment)(state, batch)
    for x, y in zip(*map(jax.tree.leaves, (after.params, expected)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_the_teacher_counts_in_multiply_adds_of_training():
    alone = make_plan(set_up(dataclasses.replace(lstm_config(), distill=Distill())))
    taught = make_plan(set_up(lstm_config()))
    # 8 rows of 12 tokens in each of the 15 steps after the fifth.
    forward = 256 * 12 + 4 * 12 * 48
    assert taught.training_macs - alone.training_macs == 15 * 8 * 12 * forward


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: setattr(c.prune, "begin_step", 1),
            "at step 2 or later, not at step 1",
        ),
        (lambda c: setattr(c.prune, "enabled", False), "nothing is pruned"),
        (
            lambda c: setattr(c.distill, "weight", 1.5),
            r"weight must be in \[0, 1\], got",
        ),
        (
            lambda c: setattr(c.distill, "temperature", 0.0),
            "must be positive and finite",
        ),
    ],
)
def test_what_cannot_teach_is_refused(change, message):
    config = lstm_config()
    change(config)
    with pytest.raises(ConfigError, match=message):
        validate(config)
