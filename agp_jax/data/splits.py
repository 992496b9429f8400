"""The splits of prepared data."""

import io
import os
import warnings

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from agp_jax.data.directories import (
    damaged,
    dataset_named,
    open_directory,
    version_path,
)
from agp_jax.data.preparation import prepare
from agp_jax.sources import Source


def load(name: str, split: str, *, data_dir: str = "") -> Source:
    """Reads the split `"train"` or `"test"` of `name` into memory, decoded.

    Data is expected where tfds writes it, in `data_dir/name/version`. The digits come
    with scikit-learn and are written there at first use. Warns where a split is not as
    long as it is known to be.

    Raises `DataError` where data is missing or damaged or cannot be written.
    """
    dataset = dataset_named(name)
    if split not in ("train", "test"):
        raise ValueError(f"no split {split!r} in ['train', 'test']")
    path = version_path(dataset, data_dir)
    if name == "digits" and not os.path.exists(path):
        tfds.disable_progress_bar()  # the work of a moment
        prepare(name, data_dir=data_dir)
    builder = open_directory(dataset, path)
    try:
        # PIL decodes here: tfds would warn that OpenCV, which it prefers, is missing.
        encoded = {"image": tfds.decode.SkipDecoding()}
        records = builder.as_data_source(split, decoders=encoded)
        images = np.empty((len(records), *dataset.image_shape), np.uint8)
        labels = np.empty(len(records), np.int32)
        for i, record in enumerate(records):
            pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
            images[i] = pixels.reshape(dataset.image_shape)
            labels[i] = record["label"]
    except Exception as error:  # array_record, protobuf, PIL: each has its own
        raise damaged(dataset, path, f"{split} split: {error}") from error
    size = dataset.train_size if split == "train" else dataset.test_size
    if len(images) != size:
        warnings.warn(
            f"{path} holds {len(images)} {split} images, but all of {name} are "
            f"{size}: results are not comparable",
            stacklevel=2,
        )
    return Source(images, labels)
