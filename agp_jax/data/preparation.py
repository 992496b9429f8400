"""Datasets written as ArrayRecord by tfds, without TensorFlow."""

import os
import tempfile
from pathlib import Path

import tensorflow_datasets as tfds
from PIL import Image

from agp_jax.data.cifar10 import read_cifar10
from agp_jax.data.datasets import Dataset
from agp_jax.data.digits import read_digits
from agp_jax.data.directories import dataset_named, open_directory, version_path
from agp_jax.data.imagenet import prepare_imagenet
from agp_jax.data.sources import DataError, Source


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes splits in memory as tfds itself writes CIFAR-10."""

    __module__ = "agp_jax.data"  # tfds records it; under `python -m` it is __main__

    def __init__(self, dataset, splits, label_names, *, data_dir):
        self.name = dataset.name
        self.VERSION = tfds.core.Version(dataset.version)
        self._dataset, self._splits, self._label_names = dataset, splits, label_names
        super().__init__(data_dir=data_dir)

    def _info(self):
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=self._dataset.image_shape),
            "label": tfds.features.ClassLabel(names=self._label_names),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            # CIFAR-10 in the order of tfds: the same batches whoever prepared it.
            disable_shuffling=self.name == "digits",
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split):
        source = self._splits[split]
        for i in range(len(source)):
            # As a PIL image: tfds would encode a NumPy array with TensorFlow.
            image = Image.fromarray(source.images[i].squeeze())
            label = int(source.labels[i])
            yield i, {"id": f"{split}_{i:05d}", "image": image, "label": label}

    def _log_download_bytes(self):  # would name a directory that is about to move
        pass

    _log_download_done = _log_download_bytes


def prepare(name: str, *, data_dir: str = "", source: str | None = None) -> str:
    """Writes `name` as ArrayRecord to `data_dir/name/version` and returns that path.

    Takes CIFAR-10 from the archive `source`, `cifar-10-binary.tar.gz`, and ImageNet
    from a directory `source` with its two tars; leaves data that is there already as it
    is. The directory appears complete or not at all, also when several processes
    prepare the same data at once. ImageNet goes on where it was interrupted.

    Raises `DataError` where the archive is missing or not as it should be, or nothing
    can be written.
    """
    dataset = dataset_named(name)
    path = version_path(dataset, data_dir)
    if name == "digits" and source:
        raise DataError("the digits come with scikit-learn and are made of no --source")
    if os.path.exists(path):
        open_directory(dataset, path)
        return str(path)
    try:
        if name == "imagenet2012":
            prepare_imagenet(source, path)
        else:
            splits, names = read_digits() if name == "digits" else read_cifar10(source)
            _prepare_in_memory(dataset, splits, names, path)
    except OSError as error:
        if not os.path.exists(path):  # otherwise another process was faster
            raise DataError(
                f"cannot write {name} to {path} ({error}); choose a writable directory "
                f"with --data_dir or the environment variable TFDS_DATA_DIR"
            ) from error
    return str(path)


def _prepare_in_memory(
    dataset: Dataset, splits: dict[str, Source], label_names: list[str], path: Path
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # tfds's own temporary names repeat among processes that seed `random` alike.
    with tempfile.TemporaryDirectory("", "incomplete.", path.parent) as work:
        builder = _Builder(dataset, splits, label_names, data_dir=work)
        builder.download_and_prepare(file_format="array_record")
        os.rename(builder.data_dir, path)
