"""Each published AGP example ends with the figures that its authors printed."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from agp_jax.training.courses import make_course
from agp_jax.training.experiment import set_up
from agp_jax.training.optimizers import make_learning_rate
from agp_jax.training.plans import make_plan

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import published  # noqa: E402

# Weights and multiply-adds of the whole models.
ALEXNET = (61_090_496, 714_188_480)
MOBILENET = (4_209_088, 568_740_352)
RESNET18 = (11_678_912, 1_814_073_344)
RESNET50 = (25_502_912, 4_089_184_256)
RESNEXT101 = (44_038_848, 7_969_996_800)
RESNET20 = (270_896, 40_813_184)

# Weights left after any cut, those not zero, multiply-adds left, sparsity in percent:
# from the tables in Distiller's schedule files. Where these contradict themselves
# (docs/published.md), from the levels that they prescribe.
ROWS = {
    "alexnet_element_88": (ALEXNET, ALEXNET[0], 7_144_049, ALEXNET[1], "88.30579"),
    "alexnet_hybrid_2dreg": (ALEXNET, ALEXNET[0], 7_144_049, ALEXNET[1], "88.30579"),
    "mobilenet_element_52": (
        MOBILENET,
        MOBILENET[0],
        2_038_208,
        MOBILENET[1],
        "51.57602",
    ),
    "resnext101_element_75": (
        RESNEXT101,
        RESNEXT101[0],
        11_016_768,
        RESNEXT101[1],
        "74.98398",
    ),
    "resnet18_element_60": (RESNET18, RESNET18[0], 4_680_578, RESNET18[1], "59.92283"),
    "resnet50_element_26": (RESNET50, RESNET50[0], 18_871_702, RESNET50[1], "26.00178"),
    "resnet50_element_80": (RESNET50, RESNET50[0], 5_108_133, RESNET50[1], "79.97039"),
    "resnet50_element_85": (RESNET50, RESNET50[0], 3_935_859, RESNET50[1], "84.56702"),
    "resnet50_block_1x1x8": (
        RESNET50,
        RESNET50[0],
        16_147_304,
        RESNET50[1],
        "36.68447",
    ),
    "resnet50_filters_1": (RESNET50, 12_335_296, 12_335_296, 1_822_031_872, "0.00000"),
    "resnet50_filters_2": (RESNET50, 12_671_168, 12_671_168, 2_037_186_560, "0.00000"),
    "resnet50_filters_3": (RESNET50, 17_329_344, 17_329_344, 2_753_298_432, "0.00000"),
    "resnet50_filters_fc": (
        RESNET50,
        12_335_296,
        10_901_696,
        1_822_031_872,
        "11.62193",
    ),
    "resnet20_filters_1": (RESNET20, 223_536, 120_000, 30_655_104, "46.31737"),
    "resnet20_filters_bnfold": (RESNET20, 223_536, 120_000, 30_655_104, "46.31737"),
    "resnet20_filters_2": (RESNET20, 246_704, 143_488, 30_638_720, "41.83799"),
    "resnet20_filters_3": (RESNET20, 223_536, 96_960, 30_655_104, "56.62444"),
    "resnet20_filters_4": (RESNET20, 130_544, 78_776, 24_723_776, "39.65560"),
}


# Some of their tensors, by published name: the non-zero weights of the tables.
TENSORS = {
    "alexnet_element_88": {"features.3.weight": 116_736, "features.0.weight": 23_232},
    "mobilenet_element_52": {
        "model.3.3.weight": 128 * 128,
        "model.4.3.weight": 128 * 256 // 2,
    },
    "resnet50_block_1x1x8": {"layer1.0.conv2.weight": 11_064},
    "resnet20_filters_4": {"fc.weight": 160},
}


# Non-zero weights of language models, the tied embedding counted once.
LANGUAGE_ROWS = {
    "wikitext2_lstm_small": 7_295_600,
    "wikitext2_lstm_medium": 28_390_700,
    "wikitext2_lstm_large": 85_917_000,
    "wikitext2_lstm_large_70": 25_775_100,
    "wikitext2_lstm_large_70b": 25_487_550,
    "wikitext2_lstm_large_73": 29_087_550,
    "wikitext2_lstm_large_80": 16_847_550,
    "wikitext2_lstm_large_90": 8_591_700,
    "wikitext2_lstm_large_95": 4_295_850,
    "wikitext2_lstm_large_base": 15_791_700,
}


@pytest.mark.parametrize("name", LANGUAGE_ROWS)
def test_a_language_model_ends_with_the_published_counts(name):
    """By schedules alone: ranking so many weights takes a test too long."""
    config = published.load(name)
    config.batch_size = 24  # the devices divide it
    experiment = set_up(config)
    course = make_course(experiment)
    assert course.nonzero[-1] == LANGUAGE_ROWS[name]
    assert experiment.config.steps == 40 * 2983
    page = (DOCS / "published.md").read_text()
    for line in published.render_language({name: int(course.nonzero[-1])}).splitlines():
        assert line in page, "run python docs/published.py"


@pytest.mark.parametrize("name", ROWS)
def test_a_row_ends_with_the_published_counts(name):
    (params_dense, macs_dense), params, nonzero, macs, sparsity = ROWS[name]
    plan = make_plan(set_up(published.load(name)))
    ours = plan.to_dict()
    before, after = ours["cut"].values() if ours["cut"] else (ours, ours)
    assert (before["weights"], after["weights"]) == (params_dense, params)
    assert (before["macs"], after["macs"]) == (macs_dense, macs)
    assert ours["nonzero"] == nonzero
    assert f"{100 * plan.sparsity_left:.5f}" == sparsity
    tensors = {tensor["published_name"]: tensor for tensor in ours["tensors"]}
    assert len(tensors) == len(ours["tensors"])
    assert sum(math.prod(tensor["shape_left"]) for tensor in tensors.values()) == params
    assert sum(tensor["nonzero"] for tensor in tensors.values()) == nonzero
    for tensor, count in TENSORS.get(name, {}).items():
        assert tensors[tensor]["nonzero"] == count, tensor

    page = (DOCS / "published.md").read_text()
    for line in published.render({name: plan}).splitlines():
        assert line in page, "run python docs/published.py"


def test_the_page_and_the_tests_have_the_same_rows():
    page = (DOCS / "published.md").read_text()
    named = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    assert named == set(ROWS) | set(LANGUAGE_ROWS)
    assert list(published.LANGUAGE_ROWS) == list(LANGUAGE_ROWS)
    assert list(published.ROWS) == list(dict.fromkeys(published.ROWS))
    assert set(published.ROWS) == set(ROWS)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # By epoch: from running Distiller's own policies.
        ("alexnet_element_88", {0: 0.005, 24: 0.005, 25: 3.589e-4, 89: 4.232e-7}),
        ("mobilenet_element_52", {0: 1e-3, 29: 1e-3, 30: 1e-4, 60: 1e-5, 95: 1e-6}),
        ("resnet18_element_60", {13: 1e-3, 14: 2.288e-4, 30: 4.239e-5, 99: 2.951e-8}),
        ("resnet50_element_26", {13: 1e-3, 14: 2.288e-4, 79: 2.427e-7}),
        ("resnet50_element_80", {40: 0.005, 41: 6.104e-4, 99: 3.116e-5}),
        ("resnet50_element_85", {41: 6.104e-4, 100: 2.96e-5, 119: 2.96e-5}),
        ("resnet50_filters_1", {40: 5e-4, 41: 6.104e-5, 80: 8.258e-6, 99: 8.258e-6}),
        ("resnet50_filters_3", {41: 6.104e-5, 99: 3.116e-6}),
        ("resnet20_filters_1", {49: 0.4, 50: 0.04, 100: 0.004, 179: 4e-4}),
    ],
)
def test_learning_rates_are_those_that_ran(name, rates):
    config = published.load(name)
    rate = make_learning_rate(config)
    first, last = config.steps_per_epoch, config.steps_per_epoch - 1
    for epoch, expected in rates.items():
        for step in (epoch * first, epoch * first + last):
            np.testing.assert_allclose(rate(step), expected, rtol=3e-4)


def test_epochs_are_rounded_up():
    lengths = {name: published.load(name).steps_per_epoch for name in ROWS}
    assert lengths["resnet50_element_80"] == 5005  # 1,281,167 images by 256
    assert lengths["alexnet_element_88"] == 4505  # 1,153,051 of them
    assert lengths["resnet20_filters_1"] == 196
