"""Image datasets without TensorFlow, prepared by tfds as ArrayRecord.

python -m agp_jax.data prepare digits
python -m agp_jax.data prepare cifar10 --source=cifar-10-binary.tar.gz
"""

import argparse
import dataclasses
import io
import lzma
import os
import pathlib
import shlex
import sys
import tarfile
import tempfile
import warnings
import zlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from agp_jax.sources import DataError as DataError
from agp_jax.sources import Source, one_line


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is known of a dataset without reading it."""

    name: str
    version: str  # the one tfds knows, hence the directory `name/version`
    num_classes: int
    image_shape: tuple[int, int, int]  # (height, width, channels)
    train_size: int
    test_size: int
    mean: tuple[float, ...]  # per channel, of pixels in 0..1
    std: tuple[float, ...]


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(
        name="digits",
        version="1.0.0",
        num_classes=10,
        image_shape=(8, 8, 1),
        train_size=1347,
        test_size=450,
        mean=(0.3045,),  # measured on the training split
        std=(0.3759,),
    ),
    "cifar10": Dataset(
        name="cifar10",
        version="3.0.2",
        num_classes=10,
        image_shape=(32, 32, 3),
        train_size=50_000,
        test_size=10_000,
        mean=(0.5, 0.5, 0.5),  # as in the published runs, not the pixels' own
        std=(0.5, 0.5, 0.5),
    ),
}


def default_data_dir() -> str:
    """Where tfds keeps its data: `TFDS_DATA_DIR`, or else `~/tensorflow_datasets`."""
    home = os.path.expanduser("~")
    return os.environ.get("TFDS_DATA_DIR") or os.path.join(home, "tensorflow_datasets")


def load(name: str, split: str, *, data_dir: str = "") -> Source:
    """Reads the split `"train"` or `"test"` of `name` into memory, decoded.

    Data is expected where tfds writes it, in `data_dir/name/version`. The digits come
    with scikit-learn and are written there at first use. Warns where a split is not as
    long as it is known to be.

    Raises `DataError` where data is missing or damaged or cannot be written.
    """
    dataset = _dataset(name)
    if split not in ("train", "test"):
        raise ValueError(f"no split {split!r} in ['train', 'test']")
    path = _path(dataset, data_dir)
    if name == "digits" and not os.path.exists(path):
        tfds.disable_progress_bar()  # the work of a moment
        prepare(name, data_dir=data_dir)
    builder = _open(dataset, path)
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
        raise _damaged(dataset, path, f"{split} split: {error}") from error
    size = dataset.train_size if split == "train" else dataset.test_size
    if len(images) != size:
        warnings.warn(
            f"{path} holds {len(images)} {split} images, but all of {name} are "
            f"{size}: results are not comparable",
            stacklevel=2,
        )
    return Source(images, labels)


def _open(dataset: Dataset, path: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The reader of a prepared directory, once that is what it should be."""
    if not os.path.exists(path):
        remedy = _remedy(dataset, path.parents[1])
        raise DataError(f"no {dataset.name} at {path}; {remedy}")
    try:
        builder = tfds.builder_from_directory(path)
        info, features = builder.info, builder.info.features
        found = features["image"].shape, features["label"].num_classes, {*info.splits}
        formats = info.available_file_formats()
    except Exception as error:  # whatever tfds, json or protobuf make of it
        raise _damaged(dataset, path, error) from error
    if found != (dataset.image_shape, dataset.num_classes, {"train", "test"}):
        raise _damaged(dataset, path, f"its images, classes and splits are {found}")
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        raise DataError(
            f"{path} has the format {', '.join(f.value for f in formats)}, but only "
            f"array_record is read without TensorFlow; where that is, convert it with: "
            f"tfds convert_format --dataset_version_dir={shlex.quote(str(path))} "
            f"--out_file_format=array_record; or {_remedy(dataset, 'OTHER_DIR')}"
        )
    return builder


def _damaged(dataset: Dataset, path: pathlib.Path, problem: object) -> DataError:
    return DataError(
        f"{path} cannot be read as {dataset.name} {dataset.version} "
        f"({one_line(problem)}); move it away, then "
        f"{_remedy(dataset, path.parents[1])}"
    )


def _remedy(dataset: Dataset, data_dir: str | pathlib.Path) -> str:
    source = " --source=cifar-10-binary.tar.gz" if dataset.name == "cifar10" else ""
    return (
        f"prepare it with: python -m agp_jax.data prepare {dataset.name}{source} "
        f"--data_dir={shlex.quote(str(data_dir))}"
    )


def _dataset(name: str) -> Dataset:
    if name not in DATASETS:
        raise ValueError(f"no dataset {name!r} in {list(DATASETS)}")
    return DATASETS[name]


def _path(dataset: Dataset, data_dir: str) -> pathlib.Path:
    root = pathlib.Path(data_dir or default_data_dir()).expanduser()
    return root.absolute() / dataset.name / dataset.version


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

    Takes CIFAR-10 from the archive `source`, `cifar-10-binary.tar.gz`; leaves data that
    is there already as it is. The directory appears complete or not at all, also when
    several processes prepare the same data at once.

    Raises `DataError` where the archive is missing or not as it should be, or nothing
    can be written.
    """
    dataset = _dataset(name)
    path = _path(dataset, data_dir)
    if name == "digits" and source:
        raise DataError("the digits come with scikit-learn and are made of no --source")
    if os.path.exists(path):
        _open(dataset, path)
        return str(path)
    splits, label_names = _digits() if name == "digits" else _cifar10(source)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # tfds's own temporary names repeat among processes that seed `random` alike.
        with tempfile.TemporaryDirectory("", "incomplete.", path.parent) as work:
            builder = _Builder(dataset, splits, label_names, data_dir=work)
            builder.download_and_prepare(file_format="array_record")
            os.rename(builder.data_dir, path)
    except OSError as error:
        if not os.path.exists(path):  # otherwise another process was faster
            raise DataError(
                f"cannot write {name} to {path} ({error}); choose a writable directory "
                f"with --data_dir or the environment variable TFDS_DATA_DIR"
            ) from error
    return str(path)


def _digits() -> tuple[dict[str, Source], list[str]]:
    """The 1,797 digits of scikit-learn, three quarters of each class for training.

    The examples are shuffled with `RandomState(0)`, sorted by class, and every fourth
    goes to the test split; both splits then keep scikit-learn's order. The values 0..16
    become 0..255 as `value * 255 // 16`.
    """
    digits: Any = load_digits()  # annotated by scikit-learn as what it seldom is
    images = (digits.images * 255 // 16).astype(np.uint8)[..., np.newaxis]
    labels = digits.target.astype(np.int32)
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    is_test = np.zeros(len(labels), bool)
    is_test[by_class[::4]] = True
    splits = {
        "train": Source(images[~is_test], labels[~is_test]),
        "test": Source(images[is_test], labels[is_test]),
    }
    return splits, [str(label) for label in range(10)]


_CIFAR10_FOLDER = "cifar-10-batches-bin"
_CIFAR10_NAMES = "batches.meta.txt"
_CIFAR10_FILES = {
    "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
    "test": ["test_batch.bin"],
}


def _cifar10(archive: str | None) -> tuple[dict[str, Source], list[str]]:
    """The contents of CIFAR-10's binary archive, in its order."""
    if not archive:
        raise DataError(
            "cifar10 is made from cifar-10-binary.tar.gz, which "
            "https://www.cs.toronto.edu/~kriz/cifar.html offers; "
            "download it and give its path as --source"
        )
    files = _read_archive(archive)
    wanted = [*sum(_CIFAR10_FILES.values(), []), _CIFAR10_NAMES]
    missing = [name for name in wanted if name not in files]
    if missing:
        raise DataError(
            f"{archive} has no {', '.join(missing)} in {_CIFAR10_FOLDER}/; is it the "
            f"binary version, cifar-10-binary.tar.gz, and whole?"
        )
    label_names = files[_CIFAR10_NAMES].decode("ascii", "replace").split()
    if len(set(label_names)) != 10:
        raise DataError(
            f"{archive}: {_CIFAR10_NAMES} names {label_names}, not 10 classes"
        )
    splits = {}
    for split, names in _CIFAR10_FILES.items():
        parts = [_cifar10_records(archive, name, files[name]) for name in names]
        splits[split] = Source(*map(np.concatenate, zip(*parts, strict=True)))
    return splits, label_names


def _read_archive(archive: str) -> dict[str, bytes]:
    """The files in CIFAR-10's folder, by name; nothing is extracted to disk."""
    files = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                folder, name = os.path.split(os.path.normpath(member.name))
                if folder == _CIFAR10_FOLDER and member.isfile():
                    stream = tar.extractfile(member)
                    assert stream is not None  # as for every regular file
                    files[name] = stream.read()
            while tar.fileobj.read(1 << 20):  # gzip's checksum comes at the very end
                pass
    except FileNotFoundError as error:
        raise DataError(f"no archive {archive}; --source is its path") from error
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{archive} is damaged, truncated or no tar archive "
            f"({one_line(error)}); download it again"
        ) from error
    return files


def _cifar10_records(archive: str, name: str, content: bytes):
    """Images and labels of one file: records of a label and three colour planes."""
    size = 1 + 3 * 32 * 32
    if not content or len(content) % size:
        raise DataError(
            f"{archive}: {name} has {len(content)} bytes, which are not records of "
            f"{size} (a label and 3 planes of 32x32 pixels); download it again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = records[:, 0].astype(np.int32)
    if labels.max() > 9:
        raise DataError(
            f"{archive}: {name} has a label {labels.max()}, but CIFAR-10's are 0 to 9; "
            f"is it the binary version of CIFAR-10?"
        )
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), labels


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m agp_jax.data")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("prepare", help="write a dataset as ArrayRecord")
    command.add_argument("name", choices=DATASETS)
    command.add_argument("--source", help="cifar-10-binary.tar.gz, for cifar10")
    command.add_argument("--data_dir", default="", help="default: where tfds looks")
    args = parser.parse_args(argv)
    try:
        path = prepare(args.name, data_dir=args.data_dir, source=args.source)
        splits = tfds.builder_from_directory(path).info.splits
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    dataset = DATASETS[args.name]
    print(
        f"{args.name}: {splits['train'].num_examples} of {dataset.train_size} train, "
        f"{splits['test'].num_examples} of {dataset.test_size} test images in {path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
