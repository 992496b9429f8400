"""CIFAR-10 from its binary archive."""

import lzma
import os
import tarfile
import zlib

import numpy as np

from agp_jax.data.sources import DataError, Source, one_line

_CIFAR10_FOLDER = "cifar-10-batches-bin"
_CIFAR10_NAMES = "batches.meta.txt"
_CIFAR10_FILES = {
    "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
    "test": ["test_batch.bin"],
}


def read_cifar10(archive: str | None) -> tuple[dict[str, Source], list[str]]:
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
