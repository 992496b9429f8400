"""check_cut measures what a cut changes and names the groups that it comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from thinning_cases import (
    STACKED,
    VARIABLES,
    X,
    cut_of,
    draw,
    masks_without,
    network,
    stacked,
)

import agp_jax as agp


def test_masks_of_all_slices_make_no_difference():
    masks = masks_without(1, 4)
    report = agp.check_cut(network, VARIABLES, masks, cut_of(1, 4), X)
    assert report.error < 1e-6
    assert report.groups == {}
    assert str(report).startswith("the thinned function equals the masked one within")


def two_layers(params, x):
    hidden = jax.nn.relu(x @ params["first"] + params["bias"][None])
    return jax.nn.relu(hidden @ params["second"]) @ params["last"]


def test_a_masked_filter_with_a_bias_is_found_and_named():
    """The bias of the first layer lives on, the second layer has none."""
    params = draw({"first": (5, 6), "bias": (6,), "second": (6, 4), "last": (4, 3)})
    params = jax.tree.map(jnp.abs, params)
    couplings = agp.find_couplings(two_layers, params, X)
    full = couplings.masks({"first[1]": [0, 1], "second[1]": [0]})
    masks = {name: full[name] for name in ("first", "second")}
    masks["second"] = masks["second"].at[:2, 1:].set(True)
    cut = agp.plan_cut(masks, couplings, close=True)
    assert cut["first"][1].tolist() == [2, 3, 4, 5]
    assert cut["second"][1].tolist() == [1, 2, 3]
    report = agp.check_cut(two_layers, params, masks, cut, X)
    zeroed = {**params, **{k: params[k] * masks[k] for k in masks}}
    expected = np.asarray(two_layers(zeroed, X))
    closed = np.asarray(two_layers(agp.apply_masks(params, full), X))
    error = np.abs(closed - expected).max() / np.abs(expected).max()
    assert report.error > 0.01
    assert report.error == pytest.approx(error, rel=1e-3)
    (name,) = report.groups
    assert couplings[name].members[0].path in ("bias", "first")
    assert report.groups[name] == pytest.approx(error, rel=1e-3)
    assert f"from {name}" in str(report)


def test_a_group_that_is_not_exact_is_named():
    def fn(params, x):
        return jax.nn.softmax(x @ params["up"]) @ params["down"]

    params = draw({"up": (5, 6), "down": (6, 3)})
    couplings = agp.find_couplings(fn, params, X)
    masks = couplings.masks({"up[1]": [2]})
    cut = agp.plan_cut(masks, couplings, inexact=True)
    report = agp.check_cut(fn, params, masks, cut, X)
    assert report.error > 0.01 and report.groups.keys() == {"up[1]"}


def test_stacked_layers_are_checked_too():
    couplings = agp.find_couplings(stacked, STACKED, X)
    group = couplings["layers/up[2]"]
    masks = couplings.masks({group.name: np.array([[0, 1], [1, 3], [2, 3]])})
    cut = agp.plan_cut(masks, couplings)
    assert agp.check_cut(stacked, STACKED, masks, cut, X).error < 1e-6
    report = agp.check_cut(stacked, STACKED, {}, cut, X)
    assert report.error > 0.01 and report.groups.keys() == {group.name}
