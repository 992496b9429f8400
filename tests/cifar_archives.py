"""Small archives of CIFAR-10's true format."""

import io
import tarfile
import zlib

import numpy as np

LABEL_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def make_records(name, size=20):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    records = rng.integers(0, 256, (size, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(size) % 10
    return records


def cifar_contents(size=20):
    names = "\n".join([*LABEL_NAMES, "", ""]).encode()
    files = {name: make_records(name, size).tobytes() for name in CIFAR_FILES}
    return {"batches.meta.txt": names} | files


def write_archive(path, contents, folder="cifar-10-batches-bin", mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
