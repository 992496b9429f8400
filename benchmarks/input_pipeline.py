"""Images per second that the input pipeline makes, per core.

    python -m benchmarks.input_pipeline

Two tables:

- Batches, as training and evaluation ask for them, by the number of threads that make
  them: of ImageNet, from JPEG files of its usual size, 500 x 375, in memory, and of
  CIFAR-10.
- Preparation of ImageNet from tars with such files.

The images are noise of several scales, so that their files are as large as those of
photographs. Rates are medians over the rounds, in which all cases are measured in turn;
each leaves out the first batches, in which the threads start. "per core" is by seconds
of processor time, which other programs on the machine do not lengthen much.
"""

import argparse
import contextlib
import functools
import io
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agp_jax import data
from agp_jax.data.batches import eval_batches, train_batches
from agp_jax.data.sources import AnySource, EncodedSource, Source
from benchmarks import measurements

_BATCHES = {
    "data": "",
    "batches": "",
    "threads": "d",
    "images/s": ",.0f",
    "images/s_per_core": ",.0f",
}
_PREPARATION = {
    "data": "",
    "images": ",d",
    "images/s": ",.0f",
    "images/s_per_core": ",.0f",
    "MB/s_per_core": ",.0f",
}
_CLASSES = ["n01440764", "n01443537", "n01484850", "n01491361"]


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    size = (64, 48) if options.small else (500, 375)
    files = [_photograph(size, seed) for seed in range(8 if options.small else 64)]
    mean = np.mean([len(file) for file in files])
    measurements.note(f"{len(files)} files, {mean / 1e3:.0f} kB on average")
    tables = {
        "batches": _measure_batches(files, options),
        "preparation": [_measure_preparation(files, options)],
    }
    measurements.print_table("Batches", tables["batches"], _BATCHES)
    measurements.print_table("Preparation", tables["preparation"], _PREPARATION)
    measurements.report(tables, "the CPU alone", options.json)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = measurements.make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    return parser.parse_args(arguments)


def _photograph(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG file of noise at several scales."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(128, 8, (size[1], size[0], 3))
    for cells in (3, 9, 27, 81):
        noise = rng.normal(0, 70 / cells**0.4, (cells, cells, 3))
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel].astype(np.float32))
            layer = layer.resize(size, Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer)
    file = io.BytesIO()
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def _measure_batches(
    files: list[bytes], options: argparse.Namespace
) -> list[dict[str, Any]]:
    batch_size, num_batches = (4, 2) if options.small else (128, 8)
    records = [{"image": file, "label": 0, "file_name": b"noise"} for file in files]
    indices = np.arange(1000 * batch_size) % len(files)
    imagenet = EncodedSource("noise", records, indices, 32 if options.small else 224)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1000 * batch_size, 32, 32, 3), dtype=np.uint8)
    cifar10 = Source(images, np.zeros(len(images), np.int32))
    cases = {
        (name, how, threads): _stopwatch(
            source, how, threads, batch_size, num_batches * speed
        )
        for name, source, hows, speed in [
            ("ImageNet", imagenet, ["resized_crop_flip", "evaluation"], 1),
            ("CIFAR-10", cifar10, ["crop_flip", "evaluation"], 50),
        ]
        for how in hows
        for threads in options.threads
    }
    found: dict[Any, list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case, measure in cases.items():
            found[case].append(measure())
    rows = []
    for case, rates in found.items():
        rate, rate_per_core = np.median(rates, axis=0).tolist()
        rows.append(
            {
                **dict(zip(("data", "batches", "threads"), case, strict=True)),
                "images/s": rate,
                "images/s_per_core": rate_per_core,
            }
        )
    return rows


def _stopwatch(
    source: AnySource, how: str, threads: int, batch_size: int, num_batches: int
) -> Callable[[], tuple[float, float]]:
    """A measurement of images per second, and per second of processor time."""

    def make() -> Any:
        options = {"batch_size": batch_size, "num_threads": threads}
        if how == "evaluation":
            return eval_batches(source, **options)
        return train_batches(source, seed=0, augment=how, **options)

    def measure() -> tuple[float, float]:
        batches = make()
        for _ in range(2 * threads + 1):
            next(batches)
        seconds = _time(lambda: [next(batches) for _ in range(num_batches)])
        batches.close()
        wall, processor = (num_batches * batch_size / second for second in seconds)
        return wall, processor

    return measure


def _time(work: Callable[[], Any]) -> list[float]:
    """The seconds that something takes, and the seconds of processor time."""
    clocks = time.perf_counter, time.process_time
    began = [clock() for clock in clocks]
    work()
    return [clock() - start for clock, start in zip(clocks, began, strict=True)]


def _measure_preparation(
    files: list[bytes], options: argparse.Namespace
) -> dict[str, Any]:
    per_class = 4 if options.small else 500
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory)
        _write_tars(source, files, per_class)
        num_bytes = sum(tar.stat().st_size for tar in source.iterdir())
        seconds = []
        for i in range(options.rounds):
            data_dir = f"{directory}/{i}"
            prepare = functools.partial(
                data.prepare, "imagenet2012", data_dir=data_dir, source=directory
            )
            with contextlib.redirect_stderr(io.StringIO()):
                seconds.append(_time(prepare))
            shutil.rmtree(data_dir)
    wall, processor = np.median(seconds, axis=0).tolist()
    num_images = per_class * (len(_CLASSES) + 1)
    return {
        "data": "ImageNet",
        "images": num_images,
        "images/s": num_images / wall,
        "images/s_per_core": num_images / processor,
        "MB/s_per_core": num_bytes / 1e6 / processor,
    }


def _write_tars(directory: Path, files: list[bytes], per_class: int) -> None:
    def images(pattern: str) -> Iterator[tuple[str, bytes]]:
        for i in range(per_class):
            yield pattern.format(i + 1), files[i % len(files)]

    classes = [(f"{c}.tar", _make_tar(images(f"{c}_{{}}.JPEG"))) for c in _CLASSES]
    validation = _make_tar(images("ILSVRC2012_val_{:08d}.JPEG"))
    (directory / "ILSVRC2012_img_train.tar").write_bytes(_make_tar(iter(classes)))
    (directory / "ILSVRC2012_img_val.tar").write_bytes(validation)


def _make_tar(files: Iterator[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


if __name__ == "__main__":
    main()
