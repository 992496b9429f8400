"""Learning rates, plateaus and the group lasso against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agp_jax.training.config import Config, GroupLasso, Optimizer
from agp_jax.training.optimizers import (
    make_learning_rate,
    make_optimizer,
    note_loss,
    penalty,
    plateau_scale,
)


def rates(optimizer, steps):
    schedule = make_learning_rate(Config(steps=100, optimizer=optimizer))
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize(
    ("options", "powers"),
    [
        ({}, {0: 0, 1: 1, 50: 50}),
        ({"decay_every": 10}, {0: 0, 9: 0, 10: 1, 99: 9}),
        ({"decay_every": 10, "decay_begin": 30}, {29: 0, 30: 3, 40: 4}),
        ({"decay_every": 10, "decay_begin": 30, "decay_end": 50}, {50: 5, 99: 5}),
        (
            {"decay_every": 10, "decay_begin": 30, "decay_origin": 20},
            {29: 0, 30: 1, 40: 2},
        ),
        ({"decay_every": 10, "warmup_steps": 5}, {5: 0, 10: 1, 20: 2}),
    ],
    ids=[
        "each step",
        "every ten",
        "with a jump",
        "with an end",
        "without jump",
        "late",
    ],
)
def test_exponential_decay_counts_powers_from_its_origin(options, powers):
    optimizer = Optimizer(
        learning_rate=0.2, decay="exponential", decay_factor=0.9, **options
    )
    expected = [0.2 * 0.9**power for power in powers.values()]
    np.testing.assert_allclose(rates(optimizer, powers), expected, rtol=1e-5)


def lowered_by_pytorch(losses, factor, patience, cooldown):
    """How often torch.optim.lr_scheduler.ReduceLROnPlateau has lowered, each time."""
    best, bad, cooling, lowered, history = np.inf, 0, 0, 0, []
    for loss in losses:
        if loss < best * (1 - 1e-4):
            best, bad = loss, 0
        else:
            bad += 1
        if cooling > 0:
            cooling, bad = cooling - 1, 0
        if bad > patience:
            lowered, cooling, bad = lowered + 1, cooldown, 0
        history.append(factor**lowered)
    return history


@pytest.mark.parametrize(("patience", "cooldown"), [(0, 0), (1, 0), (1, 3), (3, 3)])
def test_a_plateau_lowers_the_rate_as_pytorch_does(patience, cooldown):
    config = Config(
        optimizer=Optimizer(
            learning_rate=0.5,
            decay="plateau",
            decay_factor=0.5,
            patience=patience,
            cooldown=cooldown,
            momentum=0.0,
            weight_decay=0.0,
        )
    )
    tx = make_optimizer(config)
    params = {"kernel": jnp.ones(3)}
    state = tx.init(params)
    losses = np.random.default_rng(0).choice([1.0, 0.99995, 0.9, 0.8, 1.1], 24)
    losses = np.sort(losses)[::-1][np.argsort(np.random.default_rng(1).random(24))]
    update = jax.jit(tx.update)
    scales = lowered_by_pytorch(losses, 0.5, patience, cooldown)
    assert len(set(scales)) > 2
    for step, (loss, scale) in enumerate(zip(losses, scales, strict=True), start=1):
        for _ in range(2):  # steps do not count, evaluations do
            updates, state = update(params, state, params)
        state = note_loss(config, state, float(loss), step)
        np.testing.assert_allclose(plateau_scale(state), scale, rtol=1e-5)
        updates, _ = update(params, state, params)
        np.testing.assert_allclose(updates["kernel"], -0.5 * scale, rtol=1e-5)


def test_other_optimizers_take_no_notice_of_losses():
    config = Config(optimizer=Optimizer(name="adamw"))
    state = make_optimizer(config).init({"kernel": jnp.ones(3)})
    noted = note_loss(config, state, 1.0, step=100)
    assert jax.tree.structure(noted) == jax.tree.structure(state)
    assert plateau_scale(noted) == 1.0


def test_the_group_lasso_sums_the_norms_of_kernels():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 4, 5)).astype(np.float32)
    kernel[:, :, 1, 2] = 0.0
    params = {
        "conv1": {"kernel": kernel},
        "conv2": {"kernel": kernel},
        "head": {"kernel": kernel[0, 0]},
    }
    lasso = GroupLasso(strength=0.1, pattern="conv1/kernel|head/kernel", end_step=7)
    norms = np.sqrt((kernel.astype(np.float64) ** 2).sum((0, 1)))
    value = penalty(lasso, params, jnp.int32(6))
    np.testing.assert_allclose(value, 0.1 * norms.sum(), rtol=1e-5)
    assert penalty(lasso, params, jnp.int32(7)) == 0.0

    gradient = jax.grad(lambda p: penalty(lasso, p, jnp.int32(0)))(params)
    expected = 0.1 * kernel / np.where(norms, norms, 1.0)
    np.testing.assert_allclose(gradient["conv1"]["kernel"], expected, atol=1e-6)
    assert not optax.tree.norm([gradient["conv2"], gradient["head"]])


def test_without_strength_nothing_is_added():
    params = {"conv": {"kernel": jnp.full((3, 3, 1, 1), jnp.nan)}}
    assert penalty(GroupLasso(), params, jnp.int32(0)) == 0.0


def test_a_restart_warms_up_and_decays_anew():
    optimizer = Optimizer(learning_rate=0.2, warmup_steps=5, restart_at=(40,))
    steps = [0, 5, 39, 40, 42, 45, 100]
    # A cosine over the 35 steps from 5 to 40, and over the 55 from 45 to 100.
    nearly_zero = 0.1 * (1 + np.cos(np.pi * 34 / 35))
    expected = [0, 0.2, nearly_zero, 0, 0.2 * 2 / 5, 0.2, 0]
    np.testing.assert_allclose(rates(optimizer, steps), expected, atol=1e-7)
