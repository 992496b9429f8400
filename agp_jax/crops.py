"""The squares that are cut out of photographs, for training and for evaluation.

They are those of torchvision, with which the published accuracies were measured:
bilinear, and averaging over as many pixels as become one. Both take RGB images and give
uint8 (size, size, 3).
"""

import math

import numpy as np
from PIL import Image

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
