"""Crops against the definition of torchvision, moves made pixel by pixel."""

import itertools

import numpy as np
import pytest
from PIL import Image

from agp_jax.data.augmentations import (
    AUGMENTATIONS,
    DRAWS_PER_CROP,
    centre_crop,
    random_resized_crop,
)
from agp_jax.data.batches import train_batches
from agp_jax.data.sources import Source


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


def make_images(size, shape):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (size, *shape), dtype=np.uint8)


def moved(image, down, right, mirror):
    """The image shifted, pixel by pixel, and then perhaps mirrored."""
    height, width, _ = image.shape
    result = np.zeros_like(image)
    for y, x in np.ndindex(height, width):
        if 0 <= y - down < height and 0 <= x - right < width:
            to = width - 1 - x if mirror else x
            result[y, to] = image[y - down, x - right]
    return result


@pytest.mark.parametrize(
    "augment, reach, mirrors, shape",
    [("shift", 1, [0], (8, 8, 1)), ("crop_flip", 4, [0, 1], (32, 32, 3))],
)
def test_every_move_comes_and_as_often_as_any_other(augment, reach, mirrors, shape):
    image = make_images(1, shape)
    moves = range(-reach, reach + 1)
    possible = {
        moved(image[0], *move).tobytes(): move
        for move in itertools.product(moves, moves, mirrors)
    }
    source = Source(image.repeat(3, 0), np.zeros(3, np.int32))
    count = 20 * len(possible)
    batches = train_batches(source, batch_size=count, seed=0, augment=augment)
    counts = dict.fromkeys(possible.values(), 0)
    for result in next(batches)["image"]:
        counts[possible[result.tobytes()]] += 1  # a KeyError were an impossible image
    deviations = (np.array([*counts.values()]) - 20) ** 2 / 20
    degrees = len(possible) - 1  # chi-squared: its mean; its variance is twice that
    assert deviations.sum() < degrees + 4 * (2 * degrees) ** 0.5
    assert min(counts.values()) > 0


@pytest.mark.parametrize("augment, reach", [("shift", 1), ("crop_flip", 4)])
@pytest.mark.parametrize("end", [0, 1])
def test_extreme_draws_give_extreme_moves(augment, reach, end):
    images = make_images(2, (8, 8, 3))
    draws = np.full((2, 3), np.nextafter(1, 0) if end else 0.0)
    offset = -reach if end else reach
    mirror = augment == "crop_flip" and not end
    expected = [moved(image, offset, offset, mirror) for image in images]
    before = images.copy()
    np.testing.assert_array_equal(AUGMENTATIONS[augment](images, draws), expected)
    np.testing.assert_array_equal(images, before)
