"""ImageNet (ILSVRC 2012) from its two official tars, as tfds lays it out.

The builder of tfds needs TensorFlow for as much data. Here a shard is written in one
go, from a few classes, and put where it belongs when it is whole: what was interrupted
goes on with the next one. Records are those of tfds; only their order is the tars'.
"""

import contextlib
import io
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from tensorflow_datasets.core.file_adapters import ArrayRecordFileAdapter

from agp_jax.data.imagenet_tars import (
    Shard,
    list_files,
    list_shards,
    validation_number,
)
from agp_jax.data.sources import DataError, one_line


def prepare_imagenet(source: str | None, path: Path) -> None:
    """Writes the tars of the directory `source` to the directory `path`.

    What is done lies beside it, in a directory whose name belongs to these tars, and is
    found there by the next call. Several may do the same at once, each all of it.
    """
    synsets = _lines("labels.txt")
    shards = list_shards(source, synsets)
    contents = repr([(shard.name, shard.files) for shard in shards])
    checksum = zlib.crc32(contents.encode())
    work = path.with_name(f"incomplete.{path.name}.{checksum:08x}")
    work.mkdir(parents=True, exist_ok=True)
    if path.exists():  # by another process, since the caller looked
        work.rmdir()
        return
    features = _features()
    validation_labels = _lines("validation_labels.txt")
    with (
        tempfile.TemporaryDirectory("", "incomplete.", path.parent) as directory,
        _show_progress(shards) as show,
    ):
        for shard in shards:
            if _num_records(work / shard.name) is None:
                records = _read_records(shard, validation_labels)
                serialized = ((0, features.serialize_example(x)) for x in records)
                part = os.path.join(directory, shard.name)
                try:
                    ArrayRecordFileAdapter.write_examples(part, serialized)
                except RuntimeError as error:  # how array_record says the disk is full
                    raise OSError(one_line(error)) from error
                os.replace(part, work / shard.name)
            show(shard)
    tfds.folder_dataset.write_metadata(
        data_dir=work,
        features=features,
        split_infos=[
            _describe_split(split, shards, work) for split in ("train", "validation")
        ],
        version=path.name,
        check_data=False,  # by TensorFlow
        supervised_keys=("image", "label"),
        homepage="https://image-net.org/",
    )
    os.rename(work, path)


def _lines(name: str) -> list[str]:
    """The lines of a list that tfds has: synsets by class, or by validation image."""
    return tfds.core.tfds_path(f"datasets/imagenet2012/{name}").read_text().split()


def _features() -> tfds.features.FeaturesDict:
    names = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names_file=names),
            "file_name": tfds.features.Text(),
        }
    )


def _describe_split(
    split: str, shards: Sequence[Shard], work: Path
) -> tfds.core.SplitInfo:
    files = [work / shard.name for shard in shards if shard.split == split]
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[_num_records(file) for file in files],
        num_bytes=sum(file.stat().st_size for file in files),
    )


def _num_records(file: Path) -> int | None:
    """How many records a shard has; None where it is not there or not whole."""
    try:
        return ArrayRecordFileAdapter.num_examples(file)
    except Exception:  # array_record: others for what is missing, cut off or changed
        return None


# --- records ------------------------------------------------------------------------


def _read_records(
    shard: Shard, validation_labels: Sequence[str]
) -> Iterator[dict[str, Any]]:
    with open(shard.tar, "rb") as stream:
        for file in shard.files:
            stream.seek(file.start)
            content = stream.read(file.size)
            if shard.split == "train":
                yield from _read_class(content, file.name, shard.tar)
            else:
                label = validation_labels[validation_number(file.name) - 1]
                yield _make_record(content, file.name, label, str(shard.tar))


def _read_class(content: bytes, name: str, tar: Path) -> Iterator[dict[str, Any]]:
    synset = name.removesuffix(".tar")
    where = f"{tar}: {name}"
    for file in list_files(io.BytesIO(content), where):
        if not re.fullmatch(rf"{synset}_\d+\.JPEG", file.name):
            raise DataError(
                f"{where} holds {file.name}, but images are expected to be named "
                f"{synset}_NUMBER.JPEG; download it again"
            )
        image = content[file.start : file.start + file.size]
        yield _make_record(image, file.name, synset, where)


def _make_record(content: bytes, name: str, label: str, where: str) -> dict[str, Any]:
    """The record of an image: an RGB or grey JPEG as it is, others as RGB JPEG."""
    try:
        image = Image.open(io.BytesIO(content))
        if not content.startswith(b"\xff\xd8") or image.mode not in ("RGB", "L"):
            encoded = io.BytesIO()  # there are a PNG and two dozen in CMYK
            image.convert("RGB").save(encoded, "JPEG", quality=100)
            content = encoded.getvalue()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{where}: {name} is no image ({one_line(error)}); download it again"
        ) from error
    return {"image": io.BytesIO(content), "label": label, "file_name": name}


# --- progress -----------------------------------------------------------------------


@contextlib.contextmanager
def _show_progress(shards: Sequence[Shard]) -> Iterator[Callable[[Shard], None]]:
    """Shows on the standard error stream how much is done.

    Yields a function of the shard that is done.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    counts = {
        split: sum(len(shard.files) for shard in shards if shard.split == split)
        for split in ("train", "validation")
    }
    console.print(
        f"the tars hold {counts['train']} of 1000 classes for training and "
        f"{counts['validation']} of 50000 images for validation"
    )
    total = sum(shard.num_bytes for shard in shards)
    if not console.is_terminal:
        done = 0

        def print_line(shard: Shard) -> None:
            nonlocal done
            done += shard.num_bytes
            console.print(f"{done / total:6.1%}  {shard.name}")

        yield print_line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=total)
        yield lambda shard: progress.update(
            task, advance=shard.num_bytes, description=shard.split
        )
