"""Cuts of ImageNet's ResNets against what others have published about theirs."""

import re

import jax
import numpy as np
import pytest
from imagenet_resnets import imagenet_resnet

import agp_jax as agp
from agp_jax.trees import flatten_with_paths


def cut_half(fn, variables, image, pattern):
    """The cost of what is left without half the units of each group that `pattern`
    names a producer of."""
    couplings = agp.find_couplings(fn, variables, image)
    removed = {
        group.name: np.arange(group.units // 2)
        for group in couplings.groups
        if any(m.role == "out" and re.fullmatch(pattern, m.path) for m in group.members)
    }
    cut = agp.plan_cut(couplings.masks(removed), couplings)
    thinned = jax.eval_shape(lambda tree: agp.thin(tree, cut), variables)
    return agp.measure_cost(agp.thin_function(fn, variables, cut), thinned, image)


@pytest.mark.parametrize(
    ("pattern", "weights", "macs"),
    [
        ("stage.*/conv[12]/kernel", 12_335_296, 1_822_031_872),
        (
            "(?!stage[23]/block0/conv1|stage2/block1/conv2)stage.*/conv[12]/kernel",
            12_671_168,
            2_037_186_560,
        ),
        ("stage.*/conv2/kernel", 17_329_344, 2_753_298_432),
    ],
    ids=["filters_1", "filters_2", "filters_3"],
)
def test_resnet50_loses_what_distiller_published(pattern, weights, macs):
    cost = cut_half(*imagenet_resnet((3, 4, 6, 3), bottleneck=True), pattern)
    assert (cost.weight_params, cost.macs) == (weights, macs)


def test_half_of_everything_in_resnet18_is_what_torch_pruning_published():
    fn, variables, image = imagenet_resnet((2, 2, 2, 2), bottleneck=False)
    assert agp.measure_cost(fn, variables, image).params == 11_689_512
    cost = cut_half(fn, variables, image, ".*")
    assert cost.params == 3_055_880


def test_a_resnet50_has_a_group_inside_of_each_block_and_one_per_stream():
    fn, variables, image = imagenet_resnet((3, 4, 6, 3), bottleneck=True)
    couplings = agp.find_couplings(fn, variables, image)
    inner = [
        f"stage{s + 1}/block{b}" for s, n in enumerate((3, 4, 6, 3)) for b in range(n)
    ]
    expected = {f"{block}/conv{i}/kernel" for block in inner for i in (1, 2)}
    producers = [
        {m.path for m in group.members if m.role == "out"} for group in couplings.groups
    ]
    assert len(couplings.groups) == 37 and all(g.exact for g in couplings.groups)
    assert expected <= {
        path for found in producers if len(found) == 1 for path in found
    }
    paths, _, _ = flatten_with_paths(variables)
    kernels = {path for path in paths if path.endswith("kernel")} - {"head/kernel"}
    assert set().union(*producers) == kernels
