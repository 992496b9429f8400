"""Data against scikit-learn's arrays and against archives of CIFAR-10's format."""

import concurrent.futures
import json
import pathlib
import shutil
import threading
import time
import zlib

import numpy as np
import pytest
from cifar_archives import (
    CIFAR_FILES,
    LABEL_NAMES,
    cifar_contents,
    make_records,
    write_archive,
)
from sklearn.datasets import load_digits

from agp_jax import data

SPLITS = ("train", "test")


# --- digits -------------------------------------------------------------------------


def test_the_digits_are_those_of_scikit_learn_each_in_one_split(digits_dir):
    splits = [data.load("digits", name, data_dir=digits_dir) for name in SPLITS]
    read = [0, 0]
    for values, label in zip(*load_digits(return_X_y=True), strict=True):
        # Both splits keep scikit-learn's order: the next image heads one of them.
        for i, split in enumerate(splits):
            if read[i] < len(split) and is_digit(split[read[i]], values, label):
                read[i] += 1
                break
        else:
            pytest.fail(f"image {sum(read)} of scikit-learn is next in neither split")
    assert read == [len(split) for split in splits] == [1347, 450]


def is_digit(example, values, label):
    restored = np.round(example["image"] * (16 / 255))
    return example["label"] == label and (restored == values.reshape(8, 8, 1)).all()


def test_a_quarter_of_each_class_of_digits_is_for_testing(digits_dir):
    test = data.load("digits", "test", data_dir=digits_dir)
    counts = np.bincount(load_digits().target)
    np.testing.assert_allclose(np.bincount(test.labels), counts / 4, atol=1)


def test_the_split_of_the_digits_never_changes(digits_dir):
    test = data.load("digits", "test", data_dir=digits_dir)
    assert zlib.crc32(test.images.tobytes()) == 4122706811
    assert test.images.dtype == np.uint8 and test.labels.dtype == np.int32


def test_the_table_describes_the_digits(digits):
    dataset = data.DATASETS["digits"]
    pixels = digits.images / 255
    assert digits.images.shape == (dataset.train_size, *dataset.image_shape)
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), dataset.mean, atol=5e-5)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), dataset.std, atol=5e-5)


def test_the_digits_prepare_themselves_where_tfds_keeps_its_data(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert data.default_data_dir() == str(tmp_path)
    assert len(data.load("digits", "test")) == 450
    assert (tmp_path / "digits/1.0.0/dataset_info.json").exists()
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.default_data_dir() == str(tmp_path / "tensorflow_datasets")


def test_several_may_prepare_the_same_data_at_once(tmp_path, digits):
    start = threading.Barrier(4)

    def load():
        start.wait()
        return data.load("digits", "train", data_dir=str(tmp_path))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(load) for _ in range(4)]
    for future in futures:
        np.testing.assert_array_equal(future.result().images, digits.images)
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_data_that_is_there_is_left_as_it_is(digits_dir):
    record = next(pathlib.Path(digits_dir).rglob("*train*"))
    before = record.stat()
    data.prepare("digits", data_dir=digits_dir)
    assert record.stat() == before


# --- CIFAR-10 -----------------------------------------------------------------------


def prepare_cifar(archive, data_dir):
    command = ["prepare", "cifar10", f"--source={archive}", f"--data_dir={data_dir}"]
    return data.main(command)


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_cifar10_comes_out_as_it_is_in_the_archive(tmp_path, capsys, mode):
    archive = write_archive(tmp_path / "cifar", cifar_contents(), mode=mode)
    assert prepare_cifar(archive, tmp_path) == 0
    path = tmp_path / "cifar10/3.0.2"
    out = capsys.readouterr().out
    assert out == (f"cifar10: 100 of 50000 train, 20 of 10000 test images in {path}\n")
    assert (path / "label.labels.txt").read_text().split() == LABEL_NAMES
    for split, names in ("train", CIFAR_FILES[:5]), ("test", CIFAR_FILES[5:]):
        with pytest.warns(UserWarning, match=f"{20 * len(names)} {split} images"):
            source = data.load("cifar10", split, data_dir=str(tmp_path))
        expected = {}
        for record in np.concatenate([make_records(name) for name in names]):
            image = np.zeros((32, 32, 3), np.uint8)
            for y, x, channel in np.ndindex(4, 32, 3):
                image[y, x, channel] = record[1 + channel * 1024 + y * 32 + x]
            expected[image[:4].tobytes()] = record[0]
        found = {
            image[:4].tobytes(): label
            for image, label in zip(source.images, source.labels, strict=True)
        }
        assert found == expected


def cut(contents, path):
    write_archive(path, contents)
    path.write_bytes(path.read_bytes()[:-5])


def cut_in_half(contents, path):
    write_archive(path, contents)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wrong_checksum(contents, path):
    write_archive(path, contents)
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))  # CRC-32 and length


def cut_uncompressed(contents, path):
    write_archive(path, contents, mode="w")
    path.write_bytes(path.read_bytes()[:100_000])


def no_archive(contents, path):
    path.write_bytes(contents["test_batch.bin"])


def other_folder(contents, path):
    write_archive(path, contents, folder="cifar-10-batches-py")


def no_test_batch(contents, path):
    del contents["test_batch.bin"]
    write_archive(path, contents)


def partial_record(contents, path):
    write_archive(path, contents | {"data_batch_3.bin": bytes(3073 + 3072)})


def no_records(contents, path):
    write_archive(path, contents | {"data_batch_3.bin": b""})


def large_label(contents, path):
    write_archive(path, contents | {"data_batch_3.bin": bytes([10, *bytes(3072)])})


def few_names(contents, path):
    write_archive(path, contents | {"batches.meta.txt": b"cat\ndog\n"})


def nothing(contents, path):
    pass


@pytest.mark.parametrize(
    "spoil, message",
    [
        (cut, "is damaged, truncated or no tar archive"),
        (cut_in_half, "is damaged, truncated or no tar archive"),
        (cut_uncompressed, "is damaged, truncated or no tar archive"),
        (wrong_checksum, "is damaged, truncated or no tar archive"),
        (no_archive, "is damaged, truncated or no tar archive"),
        (other_folder, "has no data_batch_1.bin, data_batch_2.bin, data_batch_3.bin"),
        (no_test_batch, "has no test_batch.bin in cifar-10-batches-bin/"),
        (partial_record, "data_batch_3.bin has 6145 bytes, which are not records"),
        (no_records, "data_batch_3.bin has 0 bytes, which are not records of 3073"),
        (large_label, "data_batch_3.bin has a label 10"),
        (few_names, "batches.meta.txt names ['cat', 'dog'], not 10 classes"),
        (nothing, "no archive"),
    ],
)
def test_a_wrong_archive_is_one_line_and_writes_nothing(
    tmp_path, capsys, spoil, message
):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    spoil(cifar_contents(), archive)
    assert prepare_cifar(archive, tmp_path / "data") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err and str(archive) in captured.err
    assert captured.out == "" and not (tmp_path / "data").exists()


def test_cifar10_says_where_it_looked_and_how_to_prepare_it(tmp_path, capsys):
    directory = tmp_path / "my data"
    with pytest.raises(data.DataError) as error:
        data.load("cifar10", "train", data_dir=str(directory))
    assert str(error.value) == (
        f"no cifar10 at {directory}/cifar10/3.0.2; prepare it with: python -m "
        f"agp_jax.data prepare cifar10 --source=cifar-10-binary.tar.gz "
        f"--data_dir='{directory}'"
    )
    assert data.main(["prepare", "cifar10", f"--data_dir={directory}"]) == 1
    assert "give its path as --source" in capsys.readouterr().err


def test_digits_take_no_source(tmp_path):
    with pytest.raises(data.DataError, match="come with scikit-learn"):
        data.prepare("digits", data_dir=str(tmp_path), source="digits.csv")


def test_data_appears_complete_or_not_at_all(tmp_path, digits_dir):
    expected = data.load("digits", "test", data_dir=digits_dir).images
    path = tmp_path / "digits/1.0.0"
    states = {False: 0, True: 0}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        preparation = pool.submit(data.prepare, "digits", data_dir=str(tmp_path))
        while not (finished := preparation.done()) or not states[True]:
            there = path.exists()  # what a reader meets, and what a kill would leave
            states[there] += 1
            if there:
                found = data.load("digits", "test", data_dir=str(tmp_path)).images
                np.testing.assert_array_equal(found, expected)
            else:
                assert not finished
            time.sleep(0.001)
    assert states[False] > 1


# --- directories that are not as they should be -------------------------------------


def test_a_directory_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match="cannot write digits .* TFDS_DATA_DIR"):
        data.load("digits", "train", data_dir=str(tmp_path / "file"))
    assert data.main(["prepare", "digits", f"--data_dir={tmp_path}/file"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def edit_info(path, **changes):
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps(info | changes))


def test_tfrecord_data_is_named_with_the_way_to_convert_it(tmp_path, digits_dir):
    path = pathlib.Path(shutil.copytree(digits_dir, tmp_path / "data")) / "digits/1.0.0"
    edit_info(path, fileFormat="tfrecord")
    for call in (data.load, "digits", "train"), (data.prepare, "digits"):
        with pytest.raises(data.DataError, match="has the format tfrecord") as error:
            call[0](*call[1:], data_dir=str(tmp_path / "data"))
        assert f"tfds convert_format --dataset_version_dir={path}" in str(error.value)
    # What that command adds to the directory is read.
    edit_info(path, alternativeFileFormats=["array_record"])
    assert len(data.load("digits", "train", data_dir=str(tmp_path / "data"))) == 1347


def truncate_records(path):
    record = next(path.glob("*train*"))
    record.write_bytes(record.read_bytes()[:-10])


def flip_record_bits(path):
    record = next(path.glob("*train*"))
    content = bytearray(record.read_bytes())
    content[len(content) // 2] ^= 255
    record.write_bytes(content)


def remove_records(path):
    next(path.glob("*train*")).unlink()


def remove_info(path):
    (path / "dataset_info.json").unlink()


def empty_info(path):
    (path / "dataset_info.json").write_text("{}")


def remove_split(path):
    splits = json.loads((path / "dataset_info.json").read_text())["splits"]
    edit_info(path, splits=splits[:1])


def be_a_file(path):
    shutil.rmtree(path)
    path.write_text("")


@pytest.mark.parametrize(
    "damage",
    [
        truncate_records,
        flip_record_bits,
        remove_records,
        remove_info,
        empty_info,
        remove_split,
        be_a_file,
    ],
)
def test_a_damaged_directory_is_named_with_what_to_do(tmp_path, digits_dir, damage):
    path = pathlib.Path(shutil.copytree(digits_dir, tmp_path / "data")) / "digits/1.0.0"
    damage(path)
    with pytest.raises(data.DataError, match="move it away, then prepare") as error:
        data.load("digits", "train", data_dir=str(tmp_path / "data"))
    message = str(error.value)
    assert message.startswith(f"{path} cannot be read as digits 1.0.0 (")
    assert "\n" not in message


def test_another_dataset_is_not_taken_for_cifar10(tmp_path, digits_dir):
    path = tmp_path / "cifar10/3.0.2"
    shutil.copytree(pathlib.Path(digits_dir) / "digits/1.0.0", path)
    with pytest.raises(data.DataError, match="cannot be read as cifar10"):
        data.load("cifar10", "train", data_dir=str(tmp_path))


def test_an_unknown_dataset_or_split_is_refused():
    with pytest.raises(ValueError, match="'mnist' in .*'digits'"):
        data.load("mnist", "train")
    with pytest.raises(ValueError, match="'validation' in"):
        data.load("digits", "validation")
