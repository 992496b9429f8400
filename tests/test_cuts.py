"""Which units a cut takes, and cuts as values: saved, printed, divided and joined."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from thinning_cases import (
    COUPLINGS,
    STACKED,
    UNITS,
    VARIABLES,
    X,
    assert_trees_equal,
    cut_of,
    draw,
    kept_units,
    masked,
    masks_without,
    network,
    stacked,
    stacked_cut,
)

import agp_jax as agp


def assert_same_outputs(found, expected):
    """Of `(function, variables)` at X, in float64: else sums that cancel are noise."""
    with jax.enable_x64(True):
        outputs = [
            fn(*jax.tree.map(jnp.float64, (variables, X)))
            for fn, variables in (found, expected)
        ]
    np.testing.assert_allclose(*outputs, rtol=1e-9)


# plan_cut


def test_dead_units_are_cut_and_leaves_without_masks_follow():
    assert kept_units(cut_of(1, 4)) == [0, 2, 3, 5]
    assert kept_units(cut_of()) == list(range(6))


@pytest.mark.parametrize("path", ["up", "norm/scale", "norm/bias", "down"])
def test_a_unit_stays_if_one_entry_of_a_mask_does(path):
    masks = masks_without(1, 4)
    node = masks["params"]["norm"] if "norm" in path else masks["params"]
    name = path.split("/")[-1]
    index = {"up": (3, 4), "down": (4, 2)}.get(path, (4,))
    node[name] = node[name].at[index].set(True)
    assert kept_units(agp.plan_cut(masks, COUPLINGS)) == [0, 2, 3, 4, 5]


# Warned of, as a test below shows.
says_why_nothing = pytest.mark.filterwarnings("ignore:nothing is cut")


@says_why_nothing
def test_the_leaf_that_makes_a_unit_vanish_must_be_masked():
    """relu(bias) is not zero: only the masked reader removes it."""
    masks = masks_without(1, 4)["params"]
    reader_alone = {"params": {"down": masks["down"]}}
    assert kept_units(agp.plan_cut(reader_alone, COUPLINGS)) == [0, 2, 3, 5]
    for missing in ({}, {"down": optax.MaskedNode()}):
        without = {"params": {"up": masks["up"], "norm": masks["norm"], **missing}}
        assert not agp.plan_cut(without, COUPLINGS)


@says_why_nothing
def test_closing_takes_the_word_of_what_makes_the_units():
    masks = {"params": {"up": masks_without(0, 5)["params"]["up"]}}
    assert not agp.plan_cut(masks, COUPLINGS)
    assert kept_units(agp.plan_cut(masks, COUPLINGS, close=True)) == [1, 2, 3, 4]
    readers = {"params": {"down": masks_without(0, 5)["params"]["down"]}}
    assert not agp.plan_cut(readers, COUPLINGS, close=True)


@pytest.mark.parametrize(
    "round_to, kept",
    [(1, 3), (2, 4), (3, 3), (4, 4), (5, 5), (6, 6), (8, 6)],
)
def test_kept_widths_are_rounded_up_to_a_multiple(round_to, kept):
    cut = agp.plan_cut(masks_without(0, 2, 3), COUPLINGS, round_to=round_to)
    stays = kept_units(cut)
    assert len(stays) == kept
    assert {1, 4, 5} <= set(stays)
    with pytest.raises(
        ValueError, match="round_to must be a whole number from 1 on, got 0"
    ):
        agp.plan_cut(masks_without(0), COUPLINGS, round_to=0)


def test_one_unit_of_a_group_stays():
    assert len(kept_units(cut_of(*range(6)))) == 1


def test_no_part_of_an_axis_becomes_empty():
    """Units 0 and 1 are an array of their own for a while: one of them stays."""

    def fn(params, x):
        hidden = x @ params["up"]
        first, rest = jnp.tanh(hidden[:, :2]), hidden[:, 2:]
        return jnp.concatenate([first, rest], axis=1) @ params["down"]

    params = draw({"up": (5, 6), "down": (6, 3)})
    couplings = agp.find_couplings(fn, params, X)
    masks = jax.tree.map(lambda x: np.ones(x.shape, bool), params)
    masks["up"][:, [0, 1, 3]] = masks["down"][[0, 1, 3]] = False
    cut = agp.plan_cut(masks, couplings)
    stays = set(cut["up"][1].tolist())
    assert {2, 4, 5} <= stays and 3 not in stays and len(stays) == 4
    thin_fn = agp.thin_function(fn, params, cut)
    zeroed = masked(params, masks)
    assert_same_outputs((thin_fn, agp.thin(zeroed, cut)), (fn, zeroed))


@says_why_nothing
def test_groups_that_are_not_exact_are_cut_on_request():
    def fn(params, x):
        return jax.nn.softmax(x @ params["up"]) @ params["down"]

    params = draw({"up": (5, 6), "down": (6, 3)})
    couplings = agp.find_couplings(fn, params, X)
    masks = couplings.masks({"up[1]": [2]})
    assert not agp.plan_cut(masks, couplings)
    cut = agp.plan_cut(masks, couplings, inexact=True)
    assert cut["up"][1].tolist() == [0, 1, 3, 4, 5]
    # The thinned program normalises over what stays, as if exp(0) had never been.
    stays = np.delete(np.arange(6), 2)
    up, down, x = (np.float64(x) for x in (params["up"], params["down"], X))
    numerator = np.exp(x @ up[:, stays])
    expected = numerator / numerator.sum(1, keepdims=True) @ down[stays]
    thin_fn = agp.thin_function(fn, params, cut)
    assert_same_outputs((thin_fn, agp.thin(params, cut)), (lambda *_: expected, params))


def test_stacked_layers_lose_as_many_units_as_the_one_that_loses_least():
    couplings = agp.find_couplings(stacked, STACKED, X)
    masks = jax.tree.map(lambda x: np.ones(x.shape, bool), STACKED)
    for layer, units in enumerate([[0, 1, 2], [3, 1], [2, 3]]):
        masks["layers"]["up"][layer][:, units] = False
        masks["layers"]["down"][layer][units] = False
    cut = agp.plan_cut(masks, couplings)
    (rows,) = cut["layers/up"].values()
    assert rows.tolist() == cut["layers/down"][1].tolist()
    assert rows.shape == (3, 2) and rows[1:].tolist() == [[0, 2], [0, 1]]
    assert 3 in rows[0]
    zeroed = masked(STACKED, masks)
    thin_fn = agp.thin_function(stacked, STACKED, cut)
    assert_same_outputs((thin_fn, agp.thin(zeroed, cut)), (stacked, zeroed))


@pytest.mark.parametrize(
    "masks, message",
    [
        (
            {"norm": {"bias": np.ones(6, bool)}},
            "the masks have 'norm/bias'.*did you mean 'params/norm/bias'.*prefix",
        ),
        ({"params": {"middle": np.ones(6, bool)}}, "the masks have 'params/middle'"),
        (
            {"params": {"up": np.ones((6, 5), bool)}},
            r"mask of params/up must be bool of shape \(5, 6\), got bool of .*\(6, 5\)",
        ),
        (
            {"params": {"up": np.ones((5, 6))}},
            "mask of params/up must be bool .*got float64",
        ),
    ],
)
def test_masks_of_other_paths_shapes_and_types_raise(masks, message):
    with pytest.raises(ValueError, match=message):
        agp.plan_cut(masks, COUPLINGS)


# Cut


def test_a_cut_goes_through_json_and_is_compared_by_value():
    for cut in (cut_of(1, 4), stacked_cut(), cut_of()):
        back = agp.Cut.from_dict(json.loads(json.dumps(cut.to_dict())))
        assert back == cut and back is not cut
        assert back.shapes == cut.shapes
    assert cut_of(1, 4) != cut_of(1, 3) and cut_of(1) != {"params/up": {1: [0]}}
    loaded = agp.Cut.from_dict(json.loads(json.dumps(cut_of(1, 4).to_dict())))
    assert_trees_equal(agp.thin(VARIABLES, loaded), agp.thin(VARIABLES, cut_of(1, 4)))


def test_a_cut_prints_shapes_before_and_after():
    cut = cut_of(1, 4)
    assert "params/up: (5, 6) -> (5, 4)" in str(cut).splitlines()
    assert cut.thin_shape("params/up") == (5, 4)
    assert cut_of().thin_shape("params/up") == (5, 6)


def test_the_cut_of_a_subtree_cuts_that_part():
    cut = cut_of(1, 4)
    part = cut.subtree("params")
    assert_trees_equal(
        agp.thin(VARIABLES["params"], part), agp.thin(VARIABLES, cut)["params"]
    )
    assert set(part.shapes) == {"up", "down", "norm/scale", "norm/bias"}
    with pytest.raises(
        ValueError, match="nothing is under 'param'; paths: .*params/up"
    ):
        cut.subtree("param")


def test_two_cuts_are_one():
    first = cut_of(1, 4)
    small = agp.thin(VARIABLES, first)
    thin_fn = agp.thin_function(network, VARIABLES, first)
    couplings = agp.find_couplings(thin_fn, small, X)
    second = agp.plan_cut(masks_without(0, 2, of=couplings), couplings)
    both = first.then(second)
    assert kept_units(both) == [2, 5]
    smaller = agp.thin(small, second)
    assert_trees_equal(agp.thin(VARIABLES, both), smaller)
    twice = agp.thin_function(thin_fn, small, second)
    once = agp.thin_function(network, VARIABLES, both)
    expected = masked(VARIABLES, COUPLINGS.masks({UNITS: [0, 1, 3, 4]}))
    for found in (once, twice):
        assert_same_outputs((found, smaller), (network, expected))


def test_two_cuts_of_stacked_layers_are_one():
    first = stacked_cut()
    small = agp.thin(STACKED, first)
    thin_fn = agp.thin_function(stacked, STACKED, first)
    couplings = agp.find_couplings(thin_fn, small, X)
    group = couplings["layers/up[2]"]
    for removed in ([1], np.array([[0], [1], [0]])):
        masks = couplings.masks({group.name: removed})
        second = agp.plan_cut(masks, couplings)
        expected = agp.thin(small, second)
        assert_trees_equal(agp.thin(STACKED, first.then(second)), expected)
        assert expected["layers"]["up"].shape == (3, 5, 1)


def test_a_later_cut_of_other_shapes_raises():
    first = cut_of(1, 4)
    with pytest.raises(ValueError, match=r"shape \(6,\), but this cut leaves \(4,\)"):
        first.then(cut_of(2))
    with pytest.raises(ValueError, match="this cut has no such path"):
        first.then(stacked_cut())


def squash(params, x):
    return jax.nn.softmax(x @ params["up"]) @ params["down"]


def activate(params, x):
    return jnp.maximum(x @ params["up"] + params["bias"], 0) @ params["down"]


@pytest.mark.parametrize(
    ("network", "keeper"),
    [(activate, r"down keeps its part .*couplings="), (squash, r"inexact=True")],
)
def test_an_empty_cut_says_what_keeps_units_alive(network, keeper):
    params = {
        "up": jnp.ones((4, 8)),
        "bias": jnp.ones((1, 8)),
        "down": jnp.ones((8, 2)),
    }
    couplings = agp.find_couplings(network, params, jnp.ones((1, 4)))
    rules = [agp.Rule("up", agp.filters(), agp.one_shot(0.5))]
    masks = agp.make_masks(params, rules, 0)
    with pytest.warns(
        UserWarning, match=rf"nothing is cut: .* 4 units of up.*{keeper}"
    ):
        cut = agp.plan_cut(masks, couplings)
    assert not cut and str(cut) == "nothing is cut"
