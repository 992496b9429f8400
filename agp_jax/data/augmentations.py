"""How training varies images, and the squares that are cut out of photographs.

The squares are those of torchvision, with which the published accuracies were measured:
bilinear, and averaging over as many pixels as become one. Both take RGB images and give
uint8 (size, size, 3).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

from agp_jax.data.sources import AnySource, Source

_AREA = 0.08, 1.0  # a random crop's part of the image
_RATIO = 3 / 4, 4 / 3  # and its width by its height
_ATTEMPTS = 10
DRAWS_PER_CROP = 3 + 2 * _ATTEMPTS


def random_resized_crop(image: Image.Image, draws: np.ndarray, size: int) -> np.ndarray:
    """A random part of an image, resized, and mirrored in half of the cases.

    Uniform numbers `draws` in [0, 1) decide: the first two where the part lies, the
    third whether it is mirrored, and pairs of the others its area, uniform in 8 to 100
    % of the image, and the logarithm of its ratio. The first pair counts that gives a
    part within the image; without one it is the largest in the middle that has a
    possible ratio.
    """
    width, height = _crop_size(image.width, image.height, draws[3:].reshape(-1, 2))
    down, right, mirror = draws[:3]
    if width and height:
        left = int(right * (image.width - width + 1))
        top = int(down * (image.height - height + 1))
    else:
        width = min(image.width, round(image.height * _RATIO[1]))
        height = min(image.height, round(image.width / _RATIO[0]))
        left, top = (image.width - width) // 2, (image.height - height) // 2
    crop = image.crop((left, top, left + width, top + height))
    crop = crop.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(crop)
    return pixels[:, ::-1] if mirror < 0.5 else pixels


def _crop_size(width: int, height: int, attempts: np.ndarray) -> tuple[int, int]:
    """The width and height of the first part that fits, or zeros."""
    least, most = math.log(_RATIO[0]), math.log(_RATIO[1])
    for area_draw, ratio_draw in attempts.tolist():
        area = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * area_draw)
        ratio = math.exp(least + (most - least) * ratio_draw)
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            return across, down
    return 0, 0


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The middle of an image whose short side becomes 256/224 of `size`.

    >>> centre_crop(Image.new("RGB", (500, 375)), 224).shape
    (224, 224, 3)
    """
    short = round(size * 256 / 224)
    width, height = (short * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    across, down = image.width / width, image.height / height
    # What lies outside is not computed; a pixel in a thousand is rounded otherwise.
    box = left * across, top * down, (left + size) * across, (top + size) * down
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _shift(images: np.ndarray, draws: np.ndarray, *, pad: int = 1) -> np.ndarray:
    """Moves each image by up to `pad` pixels in both directions; zeros come in."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = (draws[:, :2] * (2 * pad + 1)).astype(int)
    moved = np.empty_like(images)
    # A loop over slices copies whole rows: 3 times faster than one fancy index.
    for i, (top, left) in enumerate(corners.tolist()):
        moved[i] = padded[i, top : top + height, left : left + width]
    return moved


def _crop_flip(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Pads by 4 zeros, crops to the old size, mirrors half of the images."""
    moved = _shift(images, draws, pad=4)
    flipped = draws[:, 2] < 0.5
    moved[flipped] = moved[flipped, :, ::-1]
    return moved


def _resized_crop_flip(
    images: Iterable[Image.Image], draws: np.ndarray, size: int = 224
) -> np.ndarray:
    """Random parts of whole images at one size, half of them mirrored."""
    crops = np.empty((len(draws), size, size, 3), np.uint8)
    for crop, image, numbers in zip(crops, images, draws, strict=True):
        crop[:] = random_resized_crop(image, numbers, size)
    return crops


def centre_crops(images: Iterable[Image.Image], size: int) -> np.ndarray:
    """The middles of whole images, uint8 (batch, size, size, 3)."""
    return np.stack([centre_crop(image, size) for image in images])


# Functions of uint8 images (batch, height, width, channels) and of uniform numbers in
# [0, 1) (batch, 3) that decide for each image. They take batches because grain's calls
# for each example cost many times the work that is done in them. "resized_crop_flip"
# takes whole images instead, one after the other, and DRAWS_PER_CROP numbers for each.
AUGMENTATIONS: dict[str, Callable[[Any, np.ndarray], np.ndarray]] = {
    "none": lambda images, draws: images,
    "shift": _shift,
    "crop_flip": _crop_flip,
    "resized_crop_flip": _resized_crop_flip,
}


def check_augment(augment: str, source: AnySource) -> None:
    """Raises a `ValueError` where a source's images cannot be varied so."""
    if augment not in AUGMENTATIONS:
        raise ValueError(f"no augmentation {augment!r} in {list(AUGMENTATIONS)}")
    images, possible = "whole images of any size", ["none", "resized_crop_flip"]
    if isinstance(source, Source):
        images = "images of one size"
        possible = [name for name in AUGMENTATIONS if name != "resized_crop_flip"]
    if augment not in possible:
        raise ValueError(
            f"augmentation {augment!r} is not for {images}; choose one of {possible}"
        )


def vary(source: AnySource, augment: str, images: Any, draws: np.ndarray) -> Any:
    """The images of a training batch, uint8, from those of its source."""
    if isinstance(source, Source):
        return AUGMENTATIONS[augment](images, draws)
    if augment == "none":
        return centre_crops(images, source.image_size)
    return _resized_crop_flip(images, draws, source.image_size)


def draws_per_image(source: AnySource) -> int:
    """How many random numbers decide how one image is varied."""
    return 3 if isinstance(source, Source) else DRAWS_PER_CROP
