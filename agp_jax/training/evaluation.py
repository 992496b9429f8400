"""Evaluation: how good and how sparse a state is, agreed on by all processes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from agp_jax.masks import fingerprint
from agp_jax.pruning import get_masks
from agp_jax.training.counts import (
    TensorCount,
    count_weights,
    total_sparsity,
    total_target,
)
from agp_jax.training.experiment import Experiment, State
from agp_jax.training.meshes import put_batch
from agp_jax.training.processes import check_same
from agp_jax.training.steps import Sums
from agp_jax.training.tasks import Batch, Splits
from agp_jax.trees import PyTree

EvalStep = Callable[..., tuple[Sums, PyTree]]


def evaluate(
    experiment: Experiment, eval_step: EvalStep, splits: Splits, state: State
) -> dict[str, float]:
    """What is reported of the test split, and of what was held out."""
    task, mesh = experiment.task, experiment.mesh

    def describe(batches: Iterator[Batch]) -> dict[str, float]:
        collections, all_sums = state.collections, []
        for batch in batches:
            batch = put_batch(batch, mesh)
            sums, collections = eval_step(state.params, collections, batch)
            all_sums.append(sums)
        return task.describe(mean_per_item(all_sums))

    judged = {"test": splits.test, "validation": splits.validation}
    return {
        f"{split}_{name}": value
        for split, batches in judged.items()
        if batches is not None
        for name, value in describe(batches()).items()
    }


def describe_training(
    experiment: Experiment, state: State, recent: Sequence[Sums]
) -> dict[str, Any]:
    """What was measured in training recently, and how sparse the state is."""
    means = experiment.task.describe(mean_per_item(recent))
    counts = count_state(experiment, state)
    return {
        "step": int(state.step),
        "loss": means.pop("loss"),
        **{f"train_{name}": value for name, value in means.items()},
        "sparsity_target": total_target(counts),
        "sparsity": total_sparsity(counts),
        "mask_fingerprint": agreed_fingerprint(experiment, state),
    }


def mean_per_item(sums: Sequence[Sums]) -> dict[str, float]:
    """Sums over several batches, added up in float64, as means over their items."""
    totals = jax.tree.map(
        lambda *x: float(np.sum(x, dtype=np.float64)), *jax.device_get(sums)
    )
    count = totals.pop("count")
    return {name: total / count for name, total in totals.items()}


def count_state(experiment: Experiment, state: State) -> list[TensorCount]:
    """How much of every weight is left, and how much was asked to go."""
    return count_weights(
        state.params,
        experiment.matched,
        int(state.step),
        before=experiment.whole_cost.subtree("params"),
        coupled=experiment.config.prune.coupled,
    )


_fingerprint = jax.jit(fingerprint)


def agreed_fingerprint(experiment: Experiment, state: State) -> str:
    """The fingerprint of the masks, of which all devices must have the same.

    Devices that hold whole masks compute it each from its own, and so do groups of
    devices that divide the masks among them: copies that have come apart show.

    Raises:
      ProcessError: on all processes, if there are several fingerprints.
    """
    masks = get_masks(state.opt_state) if experiment.config.prune.enabled else {}
    copies = [int(shard.data) for shard in _fingerprint(masks).addressable_shards]
    check_same(
        copies,
        f"after step {int(state.step)} the devices do not all have the same masks. The "
        f"same command resumes from the last checkpoint, where they had. If they come "
        f"apart again, look for a broken device or a host with other software. The "
        f"fingerprints of the masks",
    )
    return f"{copies[0]:08x}"
