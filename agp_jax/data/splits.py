"""The splits of prepared data."""

import io
import math
import os
import resource
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.file_adapters import ArrayRecordFileAdapter

from agp_jax.data.datasets import Dataset
from agp_jax.data.directories import (
    damaged,
    dataset_named,
    open_directory,
    version_path,
)
from agp_jax.data.preparation import prepare
from agp_jax.data.sources import AnySource, DataError, EncodedSource, Source


def load(
    name: str, split: str, *, data_dir: str = "", image_size: int = 0
) -> AnySource:
    """The split `"train"` or `"test"` of `name`.

    Data is expected where tfds writes it, in `data_dir/name/version`. The digits come
    with scikit-learn and are written there at first use. Warns where a split is not as
    long as it is known to be.

    The digits and CIFAR-10 are read into memory. ImageNet stays on disk, and batches
    are decoded when they are made; their images have height and width `image_size`, by
    default 224. Its test split is the one of 50,000 validation images.

    Raises `DataError` where data is missing or damaged or cannot be written.
    """
    dataset = dataset_named(name)
    if split not in ("train", "test"):
        raise ValueError(f"no split {split!r} in ['train', 'test']")
    own_size = dataset.image_shape[0]
    if image_size < 0 or image_size not in (0, own_size) and not dataset.whole_images:
        raise DataError(
            f"{name} has no images of image_size {image_size}; choose 0, which stands "
            f"for its own {own_size}"
        )
    path = version_path(dataset, data_dir)
    if name == "digits" and not os.path.exists(path):
        tfds.disable_progress_bar()  # the work of a moment
        prepare(name, data_dir=data_dir)
    builder = open_directory(dataset, path)
    stored = split if split == "train" else dataset.test_split
    try:
        # PIL decodes here: tfds would warn that OpenCV, which it prefers, is missing.
        encoded = {"image": tfds.decode.SkipDecoding()}
        records = builder.as_data_source(stored, decoders=encoded)
        if dataset.whole_images:
            _check_shards(builder.info.splits[stored])
            indices = np.arange(len(records))
            source = EncodedSource(str(path), records, indices, image_size or own_size)
        else:
            source = _read(records, dataset)
    except Exception as error:  # array_record, protobuf, PIL: each has its own
        raise damaged(dataset, path, f"{stored} split: {error}") from error
    size = dataset.train_size if split == "train" else dataset.test_size
    if len(source) != size:
        warnings.warn(
            f"{path} holds {len(source)} {split} images, but all of {name} are "
            f"{size}: results are not comparable",
            stacklevel=2,
        )
    return source


def _read(records: Sequence[Any], dataset: Dataset) -> Source:
    images = np.empty((len(records), *dataset.image_shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for i, record in enumerate(records):
        pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
        images[i] = pixels.reshape(dataset.image_shape)
        labels[i] = record["label"]
    return Source(images, labels)


def _check_shards(split: tfds.core.SplitInfo) -> None:
    """Finds out before training whether all records are there.

    They are in files that stay open, up to a thousand of tfds's own: the limit to their
    number, often 1,024, is raised by as many.
    """
    found = split.get_available_shards(file_format=tfds.core.FileFormat.ARRAY_RECORD)
    count = sum(ArrayRecordFileAdapter.num_examples(shard) for shard in found)
    if count != split.num_examples:
        raise ValueError(f"{count} of {split.num_examples} records are there")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        more = soft + len(found)
        limit = more if hard == resource.RLIM_INFINITY else min(more, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def hold_out(
    source: AnySource, fraction: float, seed: int
) -> tuple[AnySource, AnySource]:
    """The source without a part for validation, and that part.

    The part is `floor(fraction * len(source))` examples, drawn by `seed` alone; both
    keep the order of the source.

    >>> source = Source(np.zeros((5, 8, 8, 1), np.uint8), np.arange(5, dtype=np.int32))
    >>> [sorted(part.labels.tolist()) for part in hold_out(source, 0.4, seed=0)]
    [[1, 2, 4], [0, 3]]
    """
    size = len(source)
    count = math.floor(fraction * size)
    if not 0 < count < size:
        raise ValueError(
            f"a fraction {fraction} of {size} examples is {count}; at least one must "
            f"be held out, and one left"
        )
    # Two numbers, as epochs are seeded, but of an epoch that never comes.
    order = np.random.RandomState([seed, 2**32 - 1]).permutation(size)
    held_out, rest = np.sort(order[:count]), np.sort(order[count:])
    return source.subset(rest), source.subset(held_out)
