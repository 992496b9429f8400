"""Classification of images: the task that the bundled image models learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agp_jax import data
from agp_jax.data.augmentations import check_augment
from agp_jax.data.batches import eval_batches, train_batches
from agp_jax.data.sources import AnySource
from agp_jax.models import make_model
from agp_jax.training.config import Config, ConfigError
from agp_jax.training.distillation import divergence
from agp_jax.training.tasks import Batch, Quality, Splits, Task


def make_classification(config: Config) -> Task:
    """The task of a config whose dataset holds images.

    A batch is `{"image": uint8 (rows, height, width, channels), "label": int32
    (rows,)}`, in evaluation with a `"weight"`, float32 (rows,), 0 for padding.
    """
    dataset = data.DATASETS[config.data.name]
    if size := config.data.image_size:
        shape = (size, size, dataset.image_shape[2])
        dataset = dataclasses.replace(dataset, image_shape=shape)
    return Task(
        model=make_model(config.model.name, dataset.num_classes, config.model.width),
        example={
            "image": np.zeros((1, *dataset.image_shape), np.uint8),
            "label": np.zeros(1, np.int32),
        },
        num_items=1,
        item="image",
        inputs=lambda batch: (_normalised(batch["image"], dataset),),
        measure=_measure,
        describe=lambda means: means,
        quality=Quality("accuracy", ".2%", higher_is_better=True),
        load=functools.partial(_load, config),
        distill=divergence,
    )


def _normalised(images: jax.Array, dataset: data.Dataset) -> jax.Array:
    """float32 images of about zero mean and unit variance, from uint8."""
    mean = np.array(dataset.mean, np.float32).reshape(1, 1, 1, -1)
    std = np.array(dataset.std, np.float32).reshape(1, 1, 1, -1)
    return (images.astype(jnp.float32) / 255 - mean) / std


def _measure(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    labels = batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    weight = batch.get("weight", np.ones(labels.shape, np.float32))
    correct = jnp.argmax(logits, -1) == labels
    return {
        "count": jnp.sum(weight),
        "loss": jnp.sum(losses * weight),
        "accuracy": jnp.sum(correct * weight),
    }


def _load(config: Config) -> Splits:
    """The images that a config trains on and is judged by.

    Raises:
      ConfigError: if they cannot be augmented as it says.
      DataError: if they are missing or damaged.
    """
    options = config.data
    load = functools.partial(
        data.load, options.name, data_dir=options.dir, image_size=options.image_size
    )
    train, held_out = load("train"), None
    try:
        check_augment(options.augment, train)
        if options.hold_out:
            train, held_out = data.hold_out(train, options.hold_out, config.seed)
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error
    shares = {
        "batch_size": config.batch_size,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }

    def batches_from(start_step: int):
        return train_batches(
            train,
            seed=config.seed,
            start_step=start_step,
            augment=options.augment,
            **shares,
        )

    def every_image(source: AnySource):
        return functools.partial(eval_batches, source, **shares)

    return Splits(
        train=batches_from,
        test=every_image(load("test")),
        validation=None if held_out is None else every_image(held_out),
    )
