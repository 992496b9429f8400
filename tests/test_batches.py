"""Batches against the source: their order, their share and their end."""

import gc
import io
import itertools
import threading

import numpy as np
import pytest
from PIL import Image

from agp_jax.data.augmentations import centre_crop
from agp_jax.data.batches import eval_batches, train_batches
from agp_jax.data.sources import DataError, EncodedSource, Source


def make_source(size, shape=(4, 4, 1), seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
    return Source(images, np.arange(size, dtype=np.int32))


def make_encoded(size):
    """JPEG files of many shapes, the i-th with label i and of brightness 5 i."""
    records = []
    for i in range(size):
        shape = (20 + 7 * i % 31, 20 + 11 * i % 29, 3)
        pixels = np.full(shape, 5 * i, np.uint8)
        pixels[: shape[0] // 2] += 2
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=100)
        name = f"{i}.JPEG".encode()
        records.append({"image": file.getvalue(), "label": i, "file_name": name})
    return EncodedSource("files", records, np.arange(size), 16)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(batch, expected):
    assert batch.keys() == expected.keys()
    for name in expected:
        assert batch[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(batch[name], expected[name])


@pytest.mark.parametrize("augment", ["none", "shift", "crop_flip"])
def test_a_batch_is_a_function_of_the_step(digits, augment):
    options = dict(batch_size=16, seed=5, augment=augment)
    skipped = take(train_batches(digits, **options), 203)[200:]
    started = take(train_batches(digits, start_step=200, **options), 3)
    for batch, expected in zip(started, skipped, strict=True):
        assert_equal(batch, expected)


def test_starting_at_a_late_step_equals_skipping_there():
    source = make_source(50)
    skipped = take(train_batches(source, batch_size=8, seed=0), 1001)[1000]
    started = next(train_batches(source, batch_size=8, seed=0, start_step=1000))
    assert_equal(started, skipped)


@pytest.mark.parametrize("size, batch_size", [(50, 8), (7, 16), (64, 64), (1, 3)])
def test_each_epoch_sees_each_example_once(size, batch_size):
    batches = train_batches(make_source(size), batch_size=batch_size, seed=0)
    count = -(-3 * size // batch_size)
    seen = np.concatenate([batch["label"] for batch in take(batches, count)])
    epochs = seen[: 3 * size].reshape(3, size)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(size), (3, 1)))
    assert size < 50 or len({tuple(epoch) for epoch in epochs}) == 3


def test_images_stay_with_their_labels():
    source = make_source(50)
    batch = next(train_batches(source, batch_size=20, seed=0))
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"], source.images[batch["label"]])


def test_seeds_give_other_orders_and_other_augmentations():
    source = make_source(50)
    first, second = (
        next(train_batches(source, batch_size=50, seed=seed)) for seed in (0, 1)
    )
    assert (first["label"] != second["label"]).any()
    source = Source(make_source(1).images.repeat(50, 0), source.labels)
    first, second = (
        next(train_batches(source, batch_size=50, seed=seed, augment="shift"))
        for seed in (0, 1)
    )
    assert (first["image"] != second["image"]).any()


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("augment", ["crop_flip", "resized_crop_flip"])
def test_processes_share_the_batch_of_one(process_count, augment):
    whole_images = augment == "resized_crop_flip"
    source = make_encoded(50) if whole_images else make_source(50)
    options = dict(batch_size=8, seed=3, start_step=10, augment=augment)
    whole = take(train_batches(source, **options), 20)
    for i in range(process_count):
        own = train_batches(
            source, process_index=i, process_count=process_count, **options
        )
        for batch, expected in zip(take(own, 20), whole, strict=True):
            part = slice(i * 8 // process_count, (i + 1) * 8 // process_count)
            assert_equal(batch, {key: value[part] for key, value in expected.items()})


@pytest.mark.parametrize("size", [1, 7, 8, 9, 31])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_sees_every_example_once_in_order(size, process_count):
    source = make_source(size)
    parts = [
        list(
            eval_batches(
                source, batch_size=8, process_index=i, process_count=process_count
            )
        )
        for i in range(process_count)
    ]
    batches = [
        {key: np.concatenate([part[key] for part in batch]) for key in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    assert len(batches) == -(-size // 8)
    assert all(len(batch["image"]) == 8 for batch in batches)
    every = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    weights = (np.arange(len(batches) * 8) < size).astype(np.float32)
    np.testing.assert_array_equal(every["weight"], weights)
    assert every["weight"].dtype == np.float32
    assert_equal(
        {"image": every["image"][:size], "label": every["label"][:size]}, source[:]
    )


@pytest.mark.parametrize("size, process_count", [(7, 1), (7, 2), (8, 4), (9, 2)])
def test_evaluation_sees_the_middle_of_each_encoded_image(size, process_count):
    source = make_encoded(size)
    parts = [
        list(
            eval_batches(
                source, batch_size=4, process_index=i, process_count=process_count
            )
        )
        for i in range(process_count)
    ]
    for start, batch in zip(range(0, size, 4), zip(*parts, strict=True), strict=True):
        for i, found in enumerate(
            example
            for part in batch
            for example in zip(
                part["image"], part["label"], part["weight"], strict=True
            )
        ):
            record = source.records[min(start + i, size - 1)]
            image = Image.open(io.BytesIO(record["image"]))
            np.testing.assert_array_equal(found[0], centre_crop(image, 16))
            assert found[1] == record["label"] and found[2] == (start + i < size)


@pytest.mark.parametrize("augment", ["none", "resized_crop_flip"])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_change_no_encoded_batch(augment, num_threads):
    source = make_encoded(10)
    options = dict(batch_size=4, seed=1, augment=augment)
    found = take(train_batches(source, num_threads=num_threads, **options), 12)
    resumed = train_batches(source, start_step=5, num_threads=2, **options)
    assert found[0]["image"].shape == (4, 16, 16, 3)
    for batch, expected in zip(take(resumed, 7), found[5:], strict=True):
        assert_equal(batch, expected)
    for batch in found:
        assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
        brightness = batch["image"].mean((1, 2, 3))
        np.testing.assert_array_equal(brightness // 5, batch["label"])
    first = np.concatenate([batch["label"] for batch in found])[:10]
    assert sorted(first) == list(range(10))


def test_evaluation_is_the_same_with_any_number_of_threads():
    source, one = make_encoded(9), make_source(9)
    for batches, count in (source, 3), (one, 2):
        expected = list(eval_batches(batches, batch_size=2, num_threads=1))
        found = list(eval_batches(batches, batch_size=2, num_threads=count))
        assert len(found) == 5
        for batch, other in zip(found, expected, strict=True):
            assert_equal(batch, other)


def test_an_image_that_cannot_be_decoded_is_named():
    source = make_encoded(3)
    record = source.records[1]
    record["image"] = record["image"][:-50]
    with pytest.raises(DataError, match="1.JPEG of files cannot be read"):
        list(eval_batches(source, batch_size=3))
    with pytest.raises(DataError, match="record 2 of files cannot be read"):
        EncodedSource("files", [], np.arange(5), 8).subset(np.array([2]))[np.array([0])]


def test_several_threads_end_with_the_iterator():
    before = grain_threads()
    batches = eval_batches(make_encoded(20), batch_size=2, num_threads=2)
    next(batches)
    threads = grain_threads() - before
    assert threads
    batches.close()
    for thread in threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


@pytest.mark.parametrize("stop", ["close", "drop"])
def test_the_thread_ends_with_the_iterator(stop):
    batches = train_batches(make_source(50), batch_size=8, seed=0)
    before = grain_threads()
    next(batches)
    (thread,) = grain_threads() - before
    if stop == "close":
        batches.close()
    del batches
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


def grain_threads():
    return {t for t in threading.enumerate() if t.name.startswith("grain-prefetch")}


def test_wrong_options_are_refused_at_once():
    source, empty = make_source(4), make_source(0)
    train, evaluate = train_batches, eval_batches
    with pytest.raises(ValueError, match="multiple of the 3 processes, but it is 8"):
        train(source, batch_size=8, seed=0, process_count=3)
    with pytest.raises(ValueError, match="multiple of the 1 processes, but it is 0"):
        evaluate(source, batch_size=0)
    with pytest.raises(ValueError, match="process_index 2"):
        evaluate(source, batch_size=8, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="holds no examples"):
        evaluate(empty, batch_size=8)
    with pytest.raises(ValueError, match="'flip' in .*'crop_flip'"):
        train(source, batch_size=8, seed=0, augment="flip")
    with pytest.raises(ValueError, match="'resized_crop_flip' is not for images of"):
        train(source, batch_size=8, seed=0, augment="resized_crop_flip")
    for augment in "shift", "crop_flip":
        with pytest.raises(ValueError, match=f"'{augment}' is not for whole images"):
            train(make_encoded(2), batch_size=8, seed=0, augment=augment)
    with pytest.raises(ValueError, match="they are -1 and 0"):
        train(source, batch_size=8, seed=0, start_step=-1)
