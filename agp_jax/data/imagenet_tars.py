"""The two official tars of ImageNet (ILSVRC 2012), and what is written from them."""

import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from agp_jax.data.sources import DataError, one_line

TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_CLASSES_PER_SHARD = 4  # about 550 MB; each shard is a file that stays open
_IMAGES_PER_SHARD = 1000


class File(NamedTuple):
    """A file in a tar."""

    name: str
    start: int
    size: int


class Shard(NamedTuple):
    """What one file of records is made from: tars of classes, or images."""

    split: str
    name: str
    tar: Path
    files: Sequence[File]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


def list_shards(source: str | None, synsets: Sequence[str]) -> list[Shard]:
    """The shards to write, from the tables of contents of both tars.

    Raises `DataError` where a tar is missing, cut off or not the official one.
    """
    if not source:
        raise DataError(
            f"imagenet2012 is made from {TRAIN_TAR} and {VALIDATION_TAR}, which "
            f"https://image-net.org/download-images offers after registration; "
            f"download both to one directory and give its path as --source"
        )
    classes = _list_tar(Path(source) / TRAIN_TAR)
    known = {f"{synset}.tar" for synset in synsets}
    strangers = [file.name for file in classes if file.name not in known]
    if strangers:
        raise DataError(
            f"{source}/{TRAIN_TAR} holds {strangers[0]}, which is none of the tars of "
            f"the {len(known)} classes; is it that of ILSVRC 2012, tasks 1 and 2?"
        )
    images = _list_tar(Path(source) / VALIDATION_TAR)
    for file in images:
        if not 1 <= validation_number(file.name) <= 50_000:
            raise DataError(
                f"{source}/{VALIDATION_TAR} holds {file.name}, but images are expected "
                f"from ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_00050000.JPEG"
            )
    return [
        *_divide("train", Path(source) / TRAIN_TAR, classes, _CLASSES_PER_SHARD),
        *_divide(
            "validation", Path(source) / VALIDATION_TAR, images, _IMAGES_PER_SHARD
        ),
    ]


def _divide(
    split: str, tar: Path, files: Sequence[File], per_shard: int
) -> Iterator[Shard]:
    count = -(-len(files) // per_shard)
    for i in range(count):
        name = f"imagenet2012-{split}.array_record-{i:05d}-of-{count:05d}"
        yield Shard(split, name, tar, files[i * per_shard : (i + 1) * per_shard])


def _list_tar(path: Path) -> list[File]:
    try:
        stream = open(path, "rb")
    except OSError as error:
        raise DataError(
            f"no {path.name} in {path.parent} can be read ({error.strerror}); --source "
            f"is the directory that holds both {TRAIN_TAR} and {VALIDATION_TAR}, as "
            f"they were downloaded"
        ) from error
    with stream:
        return list_files(stream, str(path))


def list_files(stream: BinaryIO, name: str) -> list[File]:
    """The files of a tar, by name, if it goes on to its end."""
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            files = [
                File(PurePosixPath(member.name).name, member.offset_data, member.size)
                for member in tar
                if member.isfile()
            ]
            stream.seek(tar.offset)
            is_whole = stream.read(512) == bytes(
                512
            )  # where tarfile stops, right or not
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(name, one_line(error)) from error
    if not is_whole:
        raise _damaged(name, f"it breaks off after {len(files)} files")
    if not files:
        raise _damaged(name, "it is empty")
    if len({file.name for file in files}) < len(files):
        raise _damaged(name, "it has several files of one name")
    return sorted(files)


def _damaged(name: str, problem: str) -> DataError:
    return DataError(
        f"{name} is damaged, truncated or no tar archive ({problem}); download it again"
    )


def validation_number(name: str) -> int:
    """1 to 50,000 by the name of an image, or 0."""
    match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
    return int(match[1]) if match else 0
