"""Batches of images.

A training batch is a function of the seed and the step, so a resumed run needs no
iterator state and sees the batches that the uninterrupted one would have seen.
"""

import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from agp_jax.data.augmentations import (
    centre_crops,
    check_augment,
    draws_per_image,
    vary,
)
from agp_jax.data.sources import AnySource, EncodedSource


def train_batches(
    source: AnySource,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    augment: str = "none",
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches; the i-th is that of training step `start_step + i`.

    A batch is `{"image": uint8 (local_batch, height, width, channels), "label": int32
    (local_batch,)}`, `local_batch` being `batch_size / process_count`. Each epoch is a
    new permutation of all examples; batches may cross epochs, so none is dropped. Each
    process has a contiguous part of the batch, and of the augmentation, that one alone
    would have.

    Without augmentation, images of any size are as in evaluation.

    Threads of grain work ahead, each on a batch of its own; they end with the iterator,
    or at its `close()`. By default there is one for images in memory, which leaves the
    other cores to XLA, and one per core for images that must be decoded.

    >>> from agp_jax.data.sources import Source
    >>> source = Source(np.zeros((6, 2, 2, 1), np.uint8), np.arange(6, dtype=np.int32))
    >>> batches = train_batches(source, batch_size=3, seed=0)
    >>> sorted(np.concatenate([next(batches)["label"] for _ in range(2)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    _check_batching(source, batch_size, process_index, process_count)
    check_augment(augment, source)
    if start_step < 0 or not 0 <= seed < 2**32:
        raise ValueError(
            f"start_step must be at least 0 and seed in 0..2**32-1, "
            f"but they are {start_step} and {seed}"
        )
    size = len(source)
    local_batch = batch_size // process_count
    mine = slice(process_index * local_batch, (process_index + 1) * local_batch)
    num_draws = draws_per_image(source)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.RandomState([seed, epoch]).permutation(size)

    def make_batch(step: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        epoch, start = divmod(step * batch_size, size)
        num_epochs = -(-(start + batch_size) // size)
        orders = np.concatenate([order(epoch + i) for i in range(num_epochs)])
        batch = source[orders[start : start + batch_size][mine]]
        draws = rng.random((batch_size, num_draws))  # the whole batch's, everywhere
        images = vary(source, augment, batch["image"], draws[mine])
        return batch | {"image": images}

    # grain numbers the steps, seeds `rng` by them and reads ahead. Its own shuffle and
    # batch go example by example, and the shuffle is the slower the smaller the data:
    # they took fifty times as long for a batch of digits.
    steps = grain.MapDataset.range(sys.maxsize).seed(seed)
    batches = steps.random_map(make_batch).slice(slice(start_step, None))
    return _read_ahead(batches, num_threads or _default_threads(source) or 1)


def eval_batches(
    source: AnySource,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order, in batches of one shape.

    A batch is one of `train_batches` with a `"weight"`, float32 (local_batch,): 1 for
    an example, 0 for the copies of the last one that fill the last batch. A batch is
    divided among the processes in contiguous parts, so all yield as many batches.
    Threads decode ahead as in `train_batches`; images in memory need none by default.

    >>> from agp_jax.data.sources import Source
    >>> source = Source(np.zeros((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32))
    >>> [batch["weight"].tolist() for batch in eval_batches(source, batch_size=2)]
    [[1.0, 1.0], [1.0, 0.0]]
    """
    _check_batching(source, batch_size, process_index, process_count)
    local_batch = batch_size // process_count
    mine = process_index * local_batch + np.arange(local_batch)

    def make_batch(start: int) -> dict[str, np.ndarray]:
        indices = start + mine
        weight = (indices < len(source)).astype(np.float32)
        batch = source[np.minimum(indices, len(source) - 1)]
        if isinstance(source, EncodedSource):
            batch["image"] = centre_crops(batch["image"], source.image_size)
        return batch | {"weight": weight}

    starts = grain.MapDataset.range(0, len(source), batch_size)
    return _read_ahead(starts.map(make_batch), num_threads or _default_threads(source))


def _default_threads(source: AnySource) -> int:
    return os.cpu_count() or 1 if isinstance(source, EncodedSource) else 0


def _read_ahead(batches: grain.MapDataset, num_threads: int) -> Iterator[Any]:
    """Iterates over batches that so many threads make; none makes them when asked."""
    reading = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=num_threads + 1
    )
    return iter(batches.to_iter_dataset(reading))


def _check_batching(source, batch_size, process_index, process_count) -> None:
    if not len(source):
        raise ValueError("the source holds no examples")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in 0..process_count-1")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be a positive multiple of the {process_count} processes, "
            f"but it is {batch_size}; it counts the examples of all processes"
        )
