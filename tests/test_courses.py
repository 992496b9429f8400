"""Weights over training, counted from schedules, against masks made at every step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import cut_config, run_quietly, tiny_config

import agp_jax as agp
from agp_jax.training.config import ConfigError, Data, Model, Prune
from agp_jax.training.courses import Course, items_per_step, make_course
from agp_jax.training.experiment import set_up
from agp_jax.training.plans import find_twin, make_plan
from agp_jax.trees import flatten_with_paths

KINDS = {
    "elements": (agp.Rule(".*/kernel", agp.element()),),
    "together": (agp.Rule(".*/kernel", agp.element(), scope="rule"),),
    "blocks": (agp.Rule("hidden.*/kernel", agp.block((8, 1))),),
    "filters alone": (agp.Rule("hidden.*/kernel", agp.filters()),),
    "units": (agp.Rule("hidden.*/kernel", agp.filters()),),
}


def masked_counts(experiment, num_steps):
    """How many weights masks of random parameters keep in each step."""
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(
        lambda x: jnp.asarray(draw(x.shape), x.dtype), experiment.whole["params"]
    )
    paths, leaves, _ = flatten_with_paths(params)
    weights = {x.path.removeprefix("params/") for x in experiment.cost.weights}

    @jax.jit
    def count(masks, step):
        masks = agp.make_masks(
            params, experiment.rules, step, masks, couplings=experiment.ranking
        )
        kept = agp.apply_masks(params, masks)
        found = zip(paths, jax.tree.leaves(kept), strict=True)
        return masks, sum(jnp.sum(x != 0) for path, x in found if path in weights)

    masks, counts = None, []
    for step in range(num_steps):
        masks, total = count(masks, step) if masks else count(None, step)
        counts.append(int(total))
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_that_of_the_masks_of_every_step(kind):
    config = tiny_config("", steps=12)
    config.prune = Prune(
        final_sparsity=0.7,
        initial_sparsity=0.1,
        begin_step=2,
        end_step=9,
        frequency=3,
        rules=KINDS[kind],
        coupled=kind == "units",
    )
    experiment = set_up(config)
    course = make_course(experiment)
    counts = masked_counts(experiment, 12)
    for num_steps in (1, 5, 12):
        average = course.average_weights(num_steps)
        np.testing.assert_allclose(average, np.mean(counts[:num_steps]), rtol=1e-12)


def test_a_course_goes_over_into_another():
    first = Course((0, 10, 20), (8.0, 4.0, 2.0), (8, 8, 8))
    later = Course((0, 12, 30), (3.0, 3.0, 1.0), (5, 5, 5))
    course = first.then(later, 15)
    steps = [8.0] * 10 + [4.0] * 5 + [3.0] * 15 + [1.0] * 10
    assert course.average_weights(40) == np.mean(steps)
    assert course.average_weights(12) == np.mean(steps[:12])
    assert course.training_macs(40, 6) == 3 * 6 * (15 * 8 + 25 * 5)


def test_a_run_and_its_plan_tell_the_same(digits_dir, tmp_path):
    config = cut_config(digits_dir)
    plan = make_plan(set_up(config))
    summary = run_quietly(config, tmp_path)
    assert summary["average_weights"] == plan.average_weights
    assert summary["training_macs"] == plan.training_macs
    macs = [2720, 1232]  # for an image, 20 steps of 30 before the cut
    assert plan.training_macs == 3 * 64 * (20 * macs[0] + 10 * macs[1])
    assert items_per_step(set_up(config)) == 64


@pytest.mark.parametrize("size", ["final", "average"])
def test_a_twin_is_dense_and_of_equal_size(size):
    config = tiny_config("", model=Model(name="mlp", width=64))
    config.prune.twin = size
    twin = find_twin(config)
    assert not twin.prune.enabled and twin.model.name == "mlp"
    pruned = dataclasses.replace(config, prune=dataclasses.replace(config.prune))
    pruned.prune.twin = ""
    plan = make_plan(set_up(pruned))
    wanted = plan.nonzero if size == "final" else plan.average_weights
    weights = {
        width: set_up(
            dataclasses.replace(twin, model=Model(name="mlp", width=width))
        ).whole_cost.weight_params
        for width in range(2, 65)
    }
    best = min(weights, key=lambda width: abs(weights[width] - wanted))
    assert weights[twin.model.width] == weights[best]
    assert find_twin(twin) == twin


def test_a_twin_of_a_decoder_has_whole_heads():
    config = tiny_config("")
    config.data = Data(name="pydoc_bytes", bptt=8)
    config.model = Model(name="gpt", width=64, depth=1, num_heads=4)
    config.prune.rules = (agp.Rule("blocks/.*/kernel", agp.element(), stacked_axes=1),)
    config.prune.twin = "final"
    assert find_twin(config).model.width % 8 == 0


def test_a_task_of_ones_own_has_no_twin_here():
    config = tiny_config("", task=lambda config: None)
    config.prune.twin = "final"
    with pytest.raises(ConfigError, match="with config.task give your dense model"):
        find_twin(config)
