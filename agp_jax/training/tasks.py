"""Tasks: what a model is trained to do, as the training loop sees it.

The loop knows no images and no tokens. A task brings the model, the data, what is
measured of a batch, and the words in which that is reported.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from flax import linen as nn

Batch = Mapping[str, Any]  # arrays whose first axis is the rows of the batch


class Splits(NamedTuple):
    """The data of a task.

    With several processes each gives its contiguous part of every batch's rows.

    Attributes:
      train: endless batches from a step on: the i-th is that of step `start_step + i`,
        a function of the seed and that step alone.
      test: every item once, in batches of one shape.
      validation: the same of what is kept from training to choose by; None if nothing
        is.
      saved: JSON values by name that tell what a model's numbers mean, such as a
        vocabulary; kept with the checkpoints. A run does not resume with others.
    """

    train: Callable[[int], Iterator[Batch]]
    test: Callable[[], Iterator[Batch]]
    validation: Callable[[], Iterator[Batch]] | None = None
    saved: Mapping[str, Any] = MappingProxyType({})


class Quality(NamedTuple):
    """The number a model is judged by: one of those that `Task.describe` gives."""

    name: str  # "accuracy"
    form: str  # how it is printed: ".2%"
    higher_is_better: bool

    def format(self, value: float) -> str:
        return format(value, self.form)


class Task(NamedTuple):
    """What is learned, from what, and how it is judged.

    Attributes:
      model: called as `model.apply(variables, *inputs(batch), train=...)`. What it
        carries from batch to batch, such as running statistics or a recurrent state,
        is a variable collection beside "params".
      example: arrays with the shapes and dtypes of a batch, on which the model is
        initialised and its cost measured.
      num_items: how many items are in `example`; costs are per item.
      item: what one is called: "image", "token".
      inputs: what the model is called with, of a batch.
      measure: sums over the items of a batch, of the model's outputs and the batch:
        "count", "loss" and what else is reported. Padding counts 0.
      describe: what is reported, of the means per item of what `measure` gives; "loss"
        among it.
      quality: which of that judges the model.
      load: reads the data; a plan needs none of it.
      distill: how far the model's outputs are from a teacher's: a sum over the items of
        a batch, of outputs, the teacher's, the batch and a temperature. None where
        `config.distill` is not used.
    """

    model: nn.Module
    example: Batch
    num_items: int
    item: str
    inputs: Callable[[Batch], tuple[jax.Array, ...]]
    measure: Callable[[jax.Array, Batch], dict[str, jax.Array]]
    describe: Callable[[dict[str, float]], dict[str, float]]
    quality: Quality
    load: Callable[[], Splits]
    distill: Callable[[Any, Any, Batch, float], jax.Array] | None = None
