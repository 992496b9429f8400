"""Crops against the definition of torchvision, with resizing written out in NumPy."""

import numpy as np
import pytest
from PIL import Image

from agp_jax.data.augmentations import DRAWS_PER_CROP, centre_crop, random_resized_crop


def make_image(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def resize(pixels, width, height):
    """Bilinear with a triangle as wide as the pixels that become one."""

    def weights(before, after):
        scale = before / after
        centres = (np.arange(after)[:, None] + 0.5) * scale
        distances = np.abs(np.arange(before) + 0.5 - centres) / max(scale, 1)
        triangle = np.maximum(0, 1 - distances)
        return triangle / triangle.sum(1, keepdims=True)

    down, across = weights(pixels.shape[0], height), weights(pixels.shape[1], width)
    return np.einsum("ab,bcd,ec->aed", down, pixels, across)


def assert_close(found, expected):
    assert found.shape == expected.shape and found.dtype == np.uint8
    np.testing.assert_allclose(found, expected, atol=1.6)  # rounded after both axes


@pytest.mark.parametrize(
    "width, height, size, resized",
    [
        (60, 40, 28, (48, 32)),
        (40, 61, 28, (32, 48)),  # 48.8, rounded down
        (33, 33, 28, (32, 32)),
        (20, 90, 28, (32, 144)),  # enlarged
        (75, 50, 21, (36, 24)),
        (75, 50, 20, (34, 23)),  # 22.86 rounds to 23
    ],
)
def test_evaluation_sees_the_middle_of_a_resized_image(width, height, size, resized):
    pixels = make_image(width, height)
    whole = resize(pixels, *resized)
    left, top = (round((side - size) / 2) for side in resized)
    found = centre_crop(Image.fromarray(pixels), size)
    assert_close(found, whole[top : top + size, left : left + size])


def draw(*, area=0.5, ratio=0.5, down=0.0, right=0.0, mirror=0.9, attempt=0):
    """Numbers whose attempt of this number is the first that fits a wide image."""
    draws = np.full(DRAWS_PER_CROP, 1 - 1e-9)
    draws[:3] = down, right, mirror
    draws[3 + 2 * attempt : 5 + 2 * attempt] = area, ratio
    return draws


@pytest.mark.parametrize("attempt", [0, 1, 9])
@pytest.mark.parametrize("mirror", [0.49, 0.51])
def test_a_random_crop_is_the_part_that_the_numbers_say(attempt, mirror):
    pixels = make_image(90, 40)
    # (0.08 + 0.92 a) of 3,600 pixels, at a ratio of 4/3 to the power of 2 r - 1
    area, ratio = 0.3, 0.75
    numbers = draw(
        area=area, ratio=ratio, down=0.4, right=0.999, mirror=mirror, attempt=attempt
    )
    cells, shape = 3600 * (0.08 + 0.92 * area), (4 / 3) ** (2 * ratio - 1)
    width, height = round((cells * shape) ** 0.5), round((cells / shape) ** 0.5)
    top, left = int(0.4 * (40 - height + 1)), 90 - width
    expected = resize(pixels[top : top + height, left : left + width], 16, 16)
    if mirror < 0.5:
        expected = expected[:, ::-1]
    crop = random_resized_crop(Image.fromarray(pixels), numbers, 16)
    assert_close(crop, expected)


@pytest.mark.parametrize(
    "width, height, box",
    [
        (90, 30, (25, 0, 40, 30)),  # at most 4/3 as wide as high
        (30, 90, (0, 25, 30, 40)),  # at least 3/4
        (31, 30, (0, 0, 31, 30)),
    ],
)
def test_where_no_part_fits_it_is_the_middle(width, height, box):
    pixels = make_image(width, height)
    numbers = np.ones(DRAWS_PER_CROP)
    numbers[3::2] = 1.2  # more than the whole image
    left, top, across, down = box
    expected = resize(pixels[top : top + down, left : left + across], 16, 16)
    crop = random_resized_crop(Image.fromarray(pixels), numbers, 16)
    assert_close(crop, expected)


def test_areas_and_ratios_are_spread_as_they_should_be():
    """Pixels that hold their own place show which part a crop was."""
    side = 256
    places = np.zeros((side, side, 3), np.uint8)
    places[..., 0], places[..., 1] = np.arange(side), np.arange(side)[:, None]
    image = Image.fromarray(places)
    draws = np.random.default_rng(0).random((2000, DRAWS_PER_CROP))
    found = []
    for numbers in draws:
        crop = random_resized_crop(image, numbers, 32).astype(float)
        # 30 of 32 columns lie between the centres of the second and the last but one.
        across = abs(crop[:, -2, 0] - crop[:, 1, 0]).mean() * 32 / 29
        down = (crop[-2, :, 1] - crop[1, :, 1]).mean() * 32 / 29
        found.append((across * down / side**2, across / down))
    areas, ratios = np.transpose(found)
    assert 0.07 < areas.min() < 0.1 and 0.9 < areas.max() < 1.01
    assert 0.74 < ratios.min() < 0.77 and 1.3 < ratios.max() < 1.35
    # It fits where area <= exp(-|log ratio|), and |log ratio| is uniform in 0..limit.
    limit = np.log(4 / 3)
    weights = (1 - np.exp(-limit)) - 0.08 * limit
    moment = (1 - np.exp(-2 * limit)) / 4 - 0.08**2 / 2 * limit
    assert abs(areas.mean() - moment / weights) < 0.02
    assert abs(np.log(ratios).mean()) < 0.02
