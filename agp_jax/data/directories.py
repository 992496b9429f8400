"""Where prepared data is, and whether it is what it should be."""

import os
import pathlib
import shlex

import tensorflow_datasets as tfds

from agp_jax.data.datasets import DATASETS, Dataset
from agp_jax.data.sources import DataError, one_line


def default_data_dir() -> str:
    """Where tfds keeps its data: `TFDS_DATA_DIR`, or else `~/tensorflow_datasets`."""
    home = os.path.expanduser("~")
    return os.environ.get("TFDS_DATA_DIR") or os.path.join(home, "tensorflow_datasets")


def open_directory(dataset: Dataset, path: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The reader of a prepared directory, once that is what it should be."""
    if not os.path.exists(path):
        remedy = _remedy(dataset, path.parents[1])
        raise DataError(f"no {dataset.name} at {path}; {remedy}")
    try:
        builder = tfds.builder_from_directory(path)
        info, features = builder.info, builder.info.features
        found = features["image"].shape, features["label"].num_classes, [*info.splits]
        formats = info.available_file_formats()
    except Exception as error:  # whatever tfds, json or protobuf make of it
        raise damaged(dataset, path, error) from error
    shape = (None, None, 3) if dataset.whole_images else dataset.image_shape
    splits = {"train", dataset.test_split}
    if found[:2] != (shape, dataset.num_classes) or not splits <= {*found[2]}:
        raise damaged(dataset, path, f"its images, classes and splits are {found}")
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        raise DataError(
            f"{path} has the format {', '.join(f.value for f in formats)}, but only "
            f"array_record is read without TensorFlow; where that is, convert it with: "
            f"tfds convert_format --dataset_version_dir={shlex.quote(str(path))} "
            f"--out_file_format=array_record; or {_remedy(dataset, 'OTHER_DIR')}"
        )
    return builder


def damaged(dataset: Dataset, path: pathlib.Path, problem: object) -> DataError:
    return DataError(
        f"{path} cannot be read as {dataset.name} {dataset.version} "
        f"({one_line(problem)}); move it away, then "
        f"{_remedy(dataset, path.parents[1])}"
    )


def _remedy(dataset: Dataset, data_dir: str | pathlib.Path) -> str:
    source = f" --source={dataset.source}" if dataset.source else ""
    return (
        f"prepare it with: python -m agp_jax.data prepare {dataset.name}{source} "
        f"--data_dir={shlex.quote(str(data_dir))}"
    )


def dataset_named(name: str) -> Dataset:
    if name not in DATASETS:
        raise ValueError(f"no dataset {name!r} in {list(DATASETS)}")
    return DATASETS[name]


def version_path(dataset: Dataset, data_dir: str) -> pathlib.Path:
    root = pathlib.Path(data_dir or default_data_dir()).expanduser()
    return root.absolute() / dataset.name / dataset.version
