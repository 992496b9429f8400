"""The jitted steps of an experiment: one that trains, and one that evaluates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from agp_jax.models.folding import fold_norms
from agp_jax.training.experiment import Experiment, State
from agp_jax.training.meshes import keep_placed
from agp_jax.training.optimizers import penalty
from agp_jax.training.tasks import Batch
from agp_jax.trees import PyTree

Sums = dict[str, jax.Array]  # over the items of a batch


def make_train_step(
    experiment: Experiment,
) -> Callable[[State, Batch], tuple[State, Sums]]:
    """A jitted function of a state, which it consumes, and a batch.

    It gives the next state, and what the task measures of the batch before the update.
    """
    config, task = experiment.config, experiment.task
    forward, tx, distill = experiment.forward, experiment.tx, config.distill

    def train_step(state: State, batch: Batch) -> tuple[State, Sums]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        teacher, lesson = state.teacher, None
        if teacher is not None:
            lesson, changes = experiment.predict_whole(teacher, *task.inputs(batch))
            teacher = {**teacher, **changes}

        def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[PyTree, Sums]]:
            variables = {"params": params, **state.collections}
            outputs, changes = forward(variables, key, *task.inputs(batch))
            sums = task.measure(outputs, batch)
            loss = sums["loss"] / sums["count"]
            if lesson is not None and task.distill is not None:
                far = task.distill(outputs, lesson, batch, distill.temperature)
                far = far / sums["count"]
                loss = (1 - distill.weight) * loss + distill.weight * far
            return loss + penalty(config.lasso, params, state.step), (changes, sums)

        gradients, (changes, sums) = jax.grad(loss_fn, has_aux=True)(state.params)
        scores = {}
        if config.prune.fold_norms:
            folded = fold_norms(state.params, state.collections["batch_stats"])
            scores = {"scores": jax.tree.map(jnp.abs, folded)}
        updates, opt_state = tx.update(
            gradients, state.opt_state, state.params, **scores
        )
        params = optax.apply_updates(state.params, updates)
        collections = {**state.collections, **changes}
        return State(state.step + 1, params, collections, opt_state, teacher), sums

    replicated = NamedSharding(experiment.mesh, PartitionSpec())
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(experiment.shardings, replicated)
    )


def make_eval_step(experiment: Experiment) -> Callable[..., tuple[Sums, PyTree]]:
    """A jitted function of params, collections and a batch.

    It gives what the task measures of the batch, and the collections for the next one.
    """
    predict, task, mesh = experiment.predict, experiment.task, experiment.mesh

    @jax.jit
    def eval_step(params: PyTree, collections: Any, batch: Batch) -> tuple[Sums, Any]:
        variables = {"params": params, **collections}
        outputs, changes = predict(variables, *task.inputs(batch))
        changes = keep_placed(changes, mesh)
        return task.measure(outputs, batch), {**collections, **changes}

    return eval_step
