"""Small tars of ImageNet's true format: JPEG in colour, grey and CMYK, and a PNG."""

import io
import tarfile
import zlib

import numpy as np
from PIL import Image

SYNSETS = ["n01440764", "n01443537", "n02105855", "n03062245", "n13037406", "n15075141"]
IMAGES_PER_CLASS = 7
VALIDATION_NUMBERS = [1, 2, 3, 4, 5, 6, 49_999, 50_000]
KINDS = {3: "L", 4: "CMYK", 5: "PNG"}  # by the number of an image; others are RGB JPEG


def make_pixels(name):
    """Smooth pixels of their own shape and colours for each name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    height, width = rng.integers(40, 80, 2)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def make_file(name, kind="RGB"):
    """An image as a file; whatever it is, the archives call it JPEG."""
    image, file = make_pixels(name), io.BytesIO()
    if kind == "PNG":
        image.save(file, "PNG")
    else:
        image.convert(kind).save(file, "JPEG", quality=90)
    return file.getvalue()


def class_files(synset):
    names = {i: f"{synset}_{i}.JPEG" for i in range(IMAGES_PER_CLASS)}
    return {name: make_file(name, KINDS.get(i, "RGB")) for i, name in names.items()}


def validation_files():
    names = {i: f"ILSVRC2012_val_{i:08d}.JPEG" for i in VALIDATION_NUMBERS}
    return {name: make_file(name, KINDS.get(i, "RGB")) for i, name in names.items()}


def make_tar(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def archive_contents():
    """Both archives as files by name, which `write_archives` writes."""
    return {
        "ILSVRC2012_img_train.tar": {
            f"{synset}.tar": class_files(synset) for synset in reversed(SYNSETS)
        },
        "ILSVRC2012_img_val.tar": validation_files(),
    }


def write_archives(directory, contents):
    """A file that is a dict becomes a tar."""
    for name, files in contents.items():
        content = make_tar(
            {
                file: make_tar(inner) if isinstance(inner, dict) else inner
                for file, inner in files.items()
            }
        )
        (directory / name).write_bytes(content)
    return directory
