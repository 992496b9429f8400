"""ImageNet from small tars of its true format to batches."""

import concurrent.futures
import io
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import warnings

import numpy as np
import pytest
import tensorflow_datasets as tfds
from imagenet_archives import (
    IMAGES_PER_CLASS,
    KINDS,
    SYNSETS,
    VALIDATION_NUMBERS,
    archive_contents,
    class_files,
    make_file,
    make_pixels,
    make_tar,
    validation_files,
    write_archives,
)
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import (
    imagenet2012_dataset_builder as tfds_imagenet,
)

from agp_jax import data
from agp_jax.data.augmentations import centre_crop
from agp_jax.data.batches import eval_batches, train_batches

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
NAME, VERSION = "imagenet2012", "5.1.0"
NUM_TRAIN = len(SYNSETS) * IMAGES_PER_CLASS


def prepare(tars, data_dir):
    return data.main(["prepare", NAME, f"--source={tars}", f"--data_dir={data_dir}"])


def load(split, data_dir, **options):
    with pytest.warns(UserWarning, match="results are not comparable"):
        return data.load(NAME, split, data_dir=str(data_dir), **options)


def read(data_dir, split):
    """The records by file name, as anyone who uses tfds reads them."""
    builder = tfds.builder_from_directory(f"{data_dir}/{NAME}/{VERSION}")
    encoded = {"image": tfds.decode.SkipDecoding()}
    records = list(builder.as_data_source(split, decoders=encoded))
    by_name = {record["file_name"].decode(): record for record in records}
    assert len(by_name) == len(records) == builder.info.splits[split].num_examples
    return by_name


def tfds_lines(name):
    folder = pathlib.Path(tfds.__file__).parent / "datasets/imagenet2012"
    return (folder / name).read_text().split()


# --- what is prepared ---------------------------------------------------------------


def test_records_are_the_files_of_the_tars(imagenet_dir):
    classes = tfds_lines("labels.txt")
    found = read(imagenet_dir, "train")
    expected = {name: file for s in SYNSETS for name, file in class_files(s).items()}
    assert found.keys() == expected.keys()
    for name, file in expected.items():
        assert classes[found[name]["label"]] == name.split("_")[0]
        check_image(found[name]["image"], name, file)


def test_validation_images_have_the_labels_of_tfds(imagenet_dir):
    classes, labels = tfds_lines("labels.txt"), tfds_lines("validation_labels.txt")
    found, expected = read(imagenet_dir, "validation"), validation_files()
    assert found.keys() == expected.keys()
    for name, file in expected.items():
        number = int(name[-13:-5])
        assert classes[found[name]["label"]] == labels[number - 1]
        check_image(found[name]["image"], name, file)
    builder = tfds.builder_from_directory(f"{imagenet_dir}/{NAME}/{VERSION}")
    assert builder.info.features["label"].names == classes == sorted(classes)


def check_image(content, name, file):
    """CMYK and PNG have become RGB JPEG, all others are as they were."""
    number = int(name[:-5].split("_")[-1])
    kind = KINDS.get(number, "RGB")
    image = Image.open(io.BytesIO(content))
    assert image.format == "JPEG" and image.mode == ("L" if kind == "L" else "RGB")
    if kind in ("RGB", "L"):
        assert content == file
    pixels = np.asarray(make_pixels(name).convert(image.mode), float)
    assert np.abs(np.asarray(image) - pixels).mean() < 6


def test_preparing_says_what_it_found_and_how_far_it_is(
    imagenet_tars, tmp_path, capsys
):
    assert prepare(imagenet_tars, tmp_path) == 0
    path = tmp_path / NAME / VERSION
    captured = capsys.readouterr()
    assert captured.out == (
        f"imagenet2012: {NUM_TRAIN} of 1281167 train, {len(VALIDATION_NUMBERS)} of "
        f"50000 test images in {path}\n"
    )
    lines = captured.err.splitlines()
    assert "6 of 1000 classes for training and 8 of 50000 images" in lines[0]
    assert lines[-1].startswith("100.0%") and len(lines) == 4
    assert os.listdir(tmp_path / NAME) == [VERSION]


def test_several_may_prepare_imagenet_at_once(imagenet_tars, imagenet_dir, tmp_path):
    start = threading.Barrier(3)

    def prepare():
        start.wait()
        data.prepare(NAME, data_dir=str(tmp_path), source=str(imagenet_tars))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(prepare) for _ in range(3)]:
            future.result()
    assert os.listdir(tmp_path / NAME) == [VERSION]
    assert_same_data(tmp_path, imagenet_dir)


def assert_same_data(data_dir, other_dir):
    for split in "train", "validation":
        assert read(data_dir, split) == read(other_dir, split)


# --- interruptions ------------------------------------------------------------------

# The first shard is the smaller one: the second exceeds a limit on the size of files.
KILLED = """
import resource, signal, sys
from agp_jax import data
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
data.main(["prepare", "imagenet2012", *sys.argv[1:]])
"""


def test_a_killed_preparation_goes_on_with_the_next_shard(tmp_path):
    contents = archive_contents()
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (600, 600, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=95)
    contents[TRAIN][f"{SYNSETS[-1]}.tar"][f"{SYNSETS[-1]}_9.JPEG"] = file.getvalue()
    (tmp_path / "tars").mkdir()
    tars = write_archives(tmp_path / "tars", contents)
    options = [f"--source={tars}", f"--data_dir={tmp_path}"]
    command = [sys.executable, "-c", KILLED, *options]
    killed = subprocess.run(command, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    (shard,) = (tmp_path / NAME).rglob("*train*00000-of-00002")
    assert not (tmp_path / NAME / VERSION).exists()
    work = shard.parent
    assert list(work.iterdir()) == [shard]
    before = shard.stat()
    assert prepare(tars, tmp_path) == 0
    after = (tmp_path / NAME / VERSION / shard.name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(read(tmp_path, "train")) == NUM_TRAIN + 1
    assert not work.exists()


def test_what_was_interrupted_is_used_with_the_same_tars_only(
    imagenet_tars, imagenet_dir, tmp_path
):
    contents = archive_contents()
    last = contents[TRAIN][f"{SYNSETS[-1]}.tar"]
    name = f"{SYNSETS[-1]}_2.JPEG"
    good = last[name]
    last[name] = bytes(len(good))  # no image, and a tar of the same table of contents
    tars = tmp_path / "tars"
    tars.mkdir()
    assert prepare(write_archives(tars, contents), tmp_path) == 1
    (work,) = (tmp_path / NAME).iterdir()
    (shard,) = work.iterdir()
    kept = shard.stat().st_ino
    del contents[VALIDATION]["ILSVRC2012_val_00000001.JPEG"]
    assert prepare(write_archives(tars, contents), tmp_path) == 1
    assert len(list((tmp_path / NAME).iterdir())) == 2
    shard.write_bytes(shard.read_bytes()[:-100])  # as after a power cut
    assert prepare(imagenet_tars, tmp_path) == 0
    path = tmp_path / NAME / VERSION
    assert (path / shard.name).stat().st_ino != kept
    assert_same_data(tmp_path, imagenet_dir)


def test_a_full_disk_is_named_and_what_was_written_counts(
    imagenet_tars, imagenet_dir, tmp_path, capsys
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))
    try:
        assert prepare(imagenet_tars, tmp_path) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: cannot write imagenet2012 to {tmp_path}")
    assert prepare(imagenet_tars, tmp_path) == 0
    assert_same_data(tmp_path, imagenet_dir)


# --- tars that are not as they should be --------------------------------------------


def cut_train(tars, contents):
    content = (tars / TRAIN).read_bytes()
    (tars / TRAIN).write_bytes(content[: len(content) // 2])


def cut_between_classes(tars, contents):
    with tarfile.open(tars / TRAIN) as tar:
        end = tar.getmembers()[3].offset
    os.truncate(tars / TRAIN, end)


def no_validation(tars, contents):
    (tars / VALIDATION).unlink()


def no_directory(tars, contents):
    shutil.rmtree(tars)
    tars.write_text("")


def no_tar(tars, contents):
    (tars / VALIDATION).write_bytes(b"<html>please log in</html>" * 100)


def other_class(tars, contents):
    contents[TRAIN]["n99999999.tar"] = {"n99999999_1.JPEG": b""}
    write_archives(tars, contents)


def other_image(tars, contents):
    contents[TRAIN][f"{SYNSETS[0]}.tar"][f"{SYNSETS[1]}_1.JPEG"] = make_file("x")
    write_archives(tars, contents)


def no_image(tars, contents):
    contents[VALIDATION]["ILSVRC2012_val_00000002.JPEG"] = b"\xff\xd8 and no more"
    write_archives(tars, contents)


def unknown_number(tars, contents):
    contents[VALIDATION]["ILSVRC2012_val_00050001.JPEG"] = make_file("x")
    write_archives(tars, contents)


def empty(tars, contents):
    write_archives(tars, contents | {TRAIN: {}})


def empty_class(tars, contents):
    contents[TRAIN][f"{SYNSETS[2]}.tar"] = {}
    write_archives(tars, contents)


def damaged_class(tars, contents):
    content = make_tar(contents[TRAIN][f"{SYNSETS[2]}.tar"])
    contents[TRAIN][f"{SYNSETS[2]}.tar"] = content[:3000] + content[4000:]
    write_archives(tars, contents)


def twice(tars, contents):
    contents[VALIDATION]["folder/ILSVRC2012_val_00000002.JPEG"] = make_file("x")
    write_archives(tars, contents)


DAMAGED = "is damaged, truncated or no tar archive"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (cut_train, f"{TRAIN} {DAMAGED} (unexpected end of data); download it again"),
        (cut_between_classes, f"{TRAIN} {DAMAGED} (it breaks off after"),
        (no_validation, f"no {VALIDATION} in "),
        (no_directory, "can be read (Not a directory); --source is the directory"),
        (no_tar, f"{VALIDATION} {DAMAGED}"),
        (other_class, "holds n99999999.tar, which is none of the tars"),
        (other_image, f"holds {SYNSETS[1]}_1.JPEG, but images are expected to be"),
        (no_image, "ILSVRC2012_val_00000002.JPEG is no image"),
        (unknown_number, "holds ILSVRC2012_val_00050001.JPEG, but"),
        (empty, f"{TRAIN} {DAMAGED} (it is empty)"),
        (empty_class, f"{SYNSETS[2]}.tar {DAMAGED} (it is empty)"),
        (damaged_class, f"{SYNSETS[2]}.tar {DAMAGED}"),
        (twice, "(it has several files of one name)"),
    ],
)
def test_wrong_tars_are_one_line_and_no_data(tmp_path, capsys, spoil, message):
    tars = tmp_path / "tars"
    tars.mkdir()
    spoil(write_archives(tars, archive_contents()), archive_contents())
    assert prepare(tars, tmp_path) == 1
    captured = capsys.readouterr()
    *progress, error = captured.err.splitlines()
    assert error.startswith("error: ") and message in error and str(tars) in error
    assert captured.out == "" and not (tmp_path / NAME / VERSION).exists()


def test_imagenet_says_what_it_is_made_from(tmp_path, capsys):
    assert data.main(["prepare", NAME, f"--data_dir={tmp_path}"]) == 1
    assert f"{TRAIN} and {VALIDATION}" in capsys.readouterr().err
    with pytest.raises(data.DataError, match=r"--source=\S+ --data_dir=") as error:
        data.load(NAME, "train", data_dir=str(tmp_path))
    assert f"python -m agp_jax.data prepare {NAME}" in str(error.value)


# --- what is loaded -----------------------------------------------------------------


def test_evaluation_batches_are_the_images_of_the_tar(imagenet_dir):
    source = load("test", imagenet_dir, image_size=24)
    batches = list(eval_batches(source, batch_size=3))
    images = np.concatenate([batch["image"] for batch in batches])
    assert images.shape == (9, 24, 24, 3) and images.dtype == np.uint8
    for (name, file), image in zip(validation_files().items(), images, strict=False):
        expected = centre_crop(Image.open(io.BytesIO(file)).convert("RGB"), 24)
        exact = KINDS.get(int(name[-13:-5])) in (None, "L")
        difference = np.abs(image.astype(int) - expected).mean()
        assert difference == 0 if exact else difference < 6
    weights = np.concatenate([batch["weight"] for batch in batches])
    np.testing.assert_array_equal(weights, np.arange(9) < 8)


def test_training_batches_come_at_the_size_of_the_dataset_or_another(imagenet_dir):
    source = load("train", imagenet_dir)
    options = dict(batch_size=6, seed=0, augment="resized_crop_flip")
    batch = next(train_batches(source, **options))
    assert batch["image"].shape == (6, 224, 224, 3)
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    small = load("train", imagenet_dir, image_size=16)
    batches = train_batches(small, **options)
    epoch = np.concatenate([next(batches)["label"] for _ in range(NUM_TRAIN // 6)])
    labels = [tfds_lines("labels.txt").index(synset) for synset in SYNSETS]
    assert sorted(epoch) == sorted(labels * IMAGES_PER_CLASS)


def test_only_imagenet_has_another_image_size(digits_dir):
    assert len(data.load("digits", "test", data_dir=digits_dir, image_size=8)) == 450
    with pytest.raises(data.DataError, match="no images of image_size 16; .* own 8"):
        data.load("digits", "test", data_dir=digits_dir, image_size=16)
    with pytest.raises(data.DataError, match="no images of image_size -1"):
        data.load(NAME, "test", data_dir=digits_dir, image_size=-1)


def test_the_table_describes_imagenet():
    dataset = data.DATASETS[NAME]
    assert dataset.image_shape == (224, 224, 3) and dataset.num_classes == 1000
    assert (dataset.train_size, dataset.test_size) == (1_281_167, 50_000)
    assert len(tfds_lines("labels.txt")) == 1000
    assert len(tfds_lines("validation_labels.txt")) == 50_000


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_a_part_is_held_out_of_any_source(imagenet_dir, digits, fraction):
    for source in digits, load("train", imagenet_dir, image_size=8):
        rest, held_out = data.hold_out(source, fraction, 3)
        assert len(held_out) == int(fraction * len(source))
        assert len(rest) + len(held_out) == len(source)
        parts = [examples(part) for part in (rest, held_out)]
        assert sorted(parts[0] + parts[1]) == sorted(examples(source))
        again = data.hold_out(source, fraction, 3)
        assert [examples(part) for part in again] == parts
        assert examples(data.hold_out(source, fraction, 4)[1]) != parts[1]


def examples(source):
    """All examples as bytes, as evaluation sees them."""
    return [
        (batch["image"].tobytes(), int(batch["label"][0]))
        for batch in eval_batches(source, batch_size=1)
    ]


def test_no_part_or_everything_is_not_held_out(digits):
    for fraction in 0.0, 1e-6, 1.0, -0.1:
        with pytest.raises(ValueError, match="at least one must be held out"):
            data.hold_out(digits, fraction, 0)


class TfdsBuilder(tfds_imagenet.Builder, skip_registration=True):
    """The builder of tfds, which shuffles, with its third split; from plain files."""

    name = NAME

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=tfds_lines("labels.txt")),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        labels = tfds_lines("validation_labels.txt")
        train = [(n, f, s) for s in SYNSETS for n, f in class_files(s).items()]
        validation = [
            (n, f, labels[int(n[-13:-5]) - 1]) for n, f in validation_files().items()
        ]
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(validation),
            "test": self._generate_examples([(n, f, -1) for n, f, _ in validation]),
        }

    def _generate_examples(self, examples):
        for name, file, label in examples:
            record = {"image": io.BytesIO(file), "label": label, "file_name": name}
            yield name, record


def test_data_that_tfds_prepared_is_loaded(imagenet_dir, tmp_path):
    builder = TfdsBuilder(data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    for split in "train", "test":
        sources = [
            load(split, directory, image_size=16)
            for directory in (imagenet_dir, tmp_path)
        ]
        for stored, other in zip(*(sorted(labels(s)) for s in sources), strict=True):
            assert stored == other


def labels(source):
    return [
        int(label)
        for batch in eval_batches(source, batch_size=5)
        for label, weight in zip(batch["label"], batch["weight"], strict=True)
        if weight
    ]


def remove_shard(shard):
    shard.unlink()


def cut_shard(shard):
    shard.write_bytes(shard.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [remove_shard, cut_shard])
def test_damaged_records_are_found_before_training(imagenet_dir, tmp_path, damage):
    path = pathlib.Path(shutil.copytree(imagenet_dir, tmp_path / "data"))
    damage(path / NAME / VERSION / "imagenet2012-train.array_record-00001-of-00002")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(data.DataError, match="cannot be read as imagenet2012"):
            data.load(NAME, "train", data_dir=str(path))
    load("test", path)
