"""Cuts, and what they leave of trees, optimizer states and functions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import agp_jax as agp
from agp_jax.trees import flatten_with_paths

# --- A model with statistics, and its cuts -----------------------------------


def normalise(x, params, stats):
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale = lax.rsqrt(stats["var"] + 1e-5) * params["scale"]
    shift = params["bias"] - stats["mean"] * scale
    return x * scale.reshape(shape) + shift.reshape(shape)


def network(variables, x):
    """5 features, 6 hidden units that are normalised, 3 logits."""
    params, stats = variables["params"], variables["batch_stats"]["norm"]
    hidden = jax.nn.relu(normalise(x @ params["up"], params["norm"], stats))
    return hidden @ params["down"]


def draw(shapes, seed=0):
    """Random numbers, none of them zero, in a tree of shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.float32(0.5 + rng.random(shape)) * rng.choice([-1, 1], shape),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make_variables(seed=0):
    variables = draw(
        {
            "params": {
                "up": (5, 6),
                "norm": {"scale": (6,), "bias": (6,)},
                "down": (6, 3),
            },
            "batch_stats": {"norm": {"mean": (6,), "var": (6,)}},
        },
        seed,
    )
    stats = variables["batch_stats"]["norm"]
    stats["var"] = jnp.abs(stats["var"])
    return variables


VARIABLES = make_variables()
X = jnp.float32(np.random.default_rng(9).normal(size=(4, 5)))
COUPLINGS = agp.find_couplings(network, VARIABLES, X)
UNITS = "params/up[1]"


def masks_without(*units, of=COUPLINGS):
    """Masks of the parameters alone, as training has them."""
    return {"params": of.masks({UNITS: list(units)})["params"]}


def masked(variables, masks):
    return jax.tree.map(
        lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), variables, masks
    )


def cut_of(*units):
    return agp.plan_cut(masks_without(*units), COUPLINGS)


def kept_units(cut):
    """Which of the six units stay: along every leaf the same."""
    homes = {"params/up": 1, "params/down": 0}
    homes |= {f"params/norm/{name}": 0 for name in ("scale", "bias")}
    homes |= {f"batch_stats/norm/{name}": 0 for name in ("mean", "var")}
    if not cut:
        return list(range(6))
    assert {path: list(axes) for path, axes in cut.items()} == {
        path: [axis] for path, axis in homes.items()
    }
    (kept,) = {tuple(cut[path][axis].tolist()) for path, axis in homes.items()}
    return list(kept)


def assert_trees_equal(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    paths, leaves, _ = flatten_with_paths(found)
    for path, x, y in zip(paths, leaves, jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype, path
        if tolerance:
            np.testing.assert_allclose(x, y, err_msg=path, **tolerance)
        else:
            np.testing.assert_array_equal(x, y, err_msg=path)


# --- plan_cut ----------------------------------------------------------------


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


def test_the_leaf_that_makes_a_unit_vanish_must_be_masked():
    """relu(bias) is not zero: only the masked reader removes it."""
    masks = masks_without(1, 4)["params"]
    reader_alone = {"params": {"down": masks["down"]}}
    assert kept_units(agp.plan_cut(reader_alone, COUPLINGS)) == [0, 2, 3, 5]
    for missing in ({}, {"down": optax.MaskedNode()}):
        without = {"params": {"up": masks["up"], "norm": masks["norm"], **missing}}
        assert not agp.plan_cut(without, COUPLINGS)


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
    with pytest.raises(ValueError, match="round_to must be at least 1, got 0"):
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
    np.testing.assert_allclose(
        thin_fn(agp.thin(zeroed, cut), X), fn(zeroed, X), rtol=1e-5
    )


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
    numerator = np.exp(np.float64(X @ params["up"][:, stays]))
    expected = numerator / numerator.sum(1, keepdims=True) @ params["down"][stays]
    found = agp.thin_function(fn, params, cut)(agp.thin(params, cut), X)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def stacked(params, x):
    def layer(x, weights):
        return x + jax.nn.relu(x @ weights["up"]) @ weights["down"], None

    x, _ = lax.scan(layer, x, params["layers"])
    return x


STACKED = draw({"layers": {"up": (3, 5, 4), "down": (3, 4, 5)}}, seed=3)


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
    found = agp.thin_function(stacked, STACKED, cut)(agp.thin(zeroed, cut), X)
    np.testing.assert_allclose(found, stacked(zeroed, X), rtol=1e-5)


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


# --- Cut ---------------------------------------------------------------------


def test_a_cut_goes_through_json_and_is_compared_by_value():
    for cut in (cut_of(1, 4), stacked_cut(), cut_of()):
        back = agp.Cut.from_dict(json.loads(json.dumps(cut.to_dict())))
        assert back == cut and back is not cut
        assert back.shapes == cut.shapes
    assert cut_of(1, 4) != cut_of(1, 3) and cut_of(1) != {"params/up": {1: [0]}}
    loaded = agp.Cut.from_dict(json.loads(json.dumps(cut_of(1, 4).to_dict())))
    assert_trees_equal(agp.thin(VARIABLES, loaded), agp.thin(VARIABLES, cut_of(1, 4)))


def stacked_cut():
    couplings = agp.find_couplings(stacked, STACKED, X)
    (group,) = couplings.groups
    removed = {group.name: np.array([[0, 1], [1, 3], [2, 3]])}
    return agp.plan_cut(couplings.masks(removed), couplings)


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
    for found in (once(smaller, X), twice(smaller, X)):
        np.testing.assert_allclose(found, network(expected, X), rtol=1e-5)


def test_two_cuts_of_stacked_layers_are_one():
    first = stacked_cut()
    small = agp.thin(STACKED, first)
    thin_fn = agp.thin_function(stacked, STACKED, first)
    couplings = agp.find_couplings(thin_fn, small, X)
    (group,) = couplings.groups
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


# --- thin --------------------------------------------------------------------


def test_every_tree_with_the_paths_is_cut_alike():
    cut, stays = cut_of(1, 4), [0, 2, 3, 5]

    def by_numpy(tree):
        params, stats = tree["params"], tree["batch_stats"]
        pick = lambda x: np.asarray(x)[stays]  # noqa: E731
        return {
            "params": {
                "up": np.asarray(params["up"])[:, stays],
                "norm": jax.tree.map(pick, params["norm"]),
                "down": pick(params["down"]),
            },
            "batch_stats": jax.tree.map(pick, stats),
        }

    masks = COUPLINGS.masks({UNITS: [1, 2]})
    averages = jax.tree.map(lambda x: (x * 0.9).astype(jnp.bfloat16), VARIABLES)
    for tree in (VARIABLES, masks, averages, make_variables(5)):
        assert_trees_equal(agp.thin(tree, cut), by_numpy(tree))
        assert_trees_equal(jax.jit(lambda t: agp.thin(t, cut))(tree), by_numpy(tree))
        on_host = jax.tree.map(np.asarray, tree)
        found = agp.thin(on_host, cut)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))
        assert_trees_equal(found, by_numpy(tree))
        shapes = agp.thin(jax.eval_shape(lambda t=tree: t), cut)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
            lambda x: (x.shape, x.dtype), by_numpy(tree)
        )


def test_parts_of_a_tree_are_cut_and_missing_leaves_stay_missing():
    cut = cut_of(1, 4)
    part = {"params": {"up": VARIABLES["params"]["up"], "down": optax.MaskedNode()}}
    found = agp.thin(part, cut)
    np.testing.assert_array_equal(
        found["params"]["up"], part["params"]["up"][:, np.array([0, 2, 3, 5])]
    )
    assert found["params"]["down"] == optax.MaskedNode()


def test_each_stacked_layer_keeps_its_own_units():
    found = agp.thin(STACKED, stacked_cut())["layers"]
    kept = [[2, 3], [0, 2], [0, 1]]
    up, down = STACKED["layers"]["up"], STACKED["layers"]["down"]
    for layer, units in enumerate(kept):
        np.testing.assert_array_equal(found["up"][layer], up[layer][:, np.array(units)])
        np.testing.assert_array_equal(
            found["down"][layer], down[layer][np.array(units)]
        )


def test_trees_of_other_paths_and_shapes_raise():
    cut = cut_of(1, 4)
    with pytest.raises(ValueError, match=r"the cut has no 'up'.*cut.subtree"):
        agp.thin({"up": VARIABLES["params"]["up"]}, cut)
    with pytest.raises(
        ValueError, match=r"norm/mean has shape \(4,\), but.* for \(6,\); has it"
    ):
        agp.thin(agp.thin(VARIABLES, cut), cut)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axes", [("a", None), (None, "a"), ("b", "a"), ("a", "b")])
def test_arrays_on_many_devices_are_cut_where_they_are(kind, axes):
    mesh = jax.make_mesh((4, 2), ("a", "b"), (kind, kind))
    shapes = {"up": (16, 32), "down": (32, 16)}
    params = draw(shapes)

    def fn(params, x):
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    couplings = agp.find_couplings(fn, params, jnp.ones((1, 16)))
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    masks = jax.device_put(couplings.masks({"up[1]": np.arange(0, 32, 2)}), sharding)
    placed = jax.device_put(params, sharding)
    cut = agp.plan_cut(masks, couplings)
    found = agp.thin(placed, cut)
    np.testing.assert_array_equal(found["up"], params["up"][:, 1::2])
    np.testing.assert_array_equal(found["down"], params["down"][1::2])
    # JAX remembers the copy of an array that it has brought to the host.
    assert all(x._npy_value is None for x in jax.tree.leaves((masks, placed)))
    for name, whole in {"up": 0, "down": 1}.items():
        assert len(found[name].sharding.device_set) == 8
        before, after = placed[name], found[name]
        blocks = [x.sharding.shard_shape(x.shape)[whole] for x in (before, after)]
        assert blocks[0] == blocks[1]


# --- thin_opt_state ----------------------------------------------------------


SHAPES = jax.tree.map(jnp.shape, VARIABLES["params"])
GONE = masks_without(1, 4)["params"]
CUT = cut_of(1, 4).subtree("params")


def after_updates(tx, params, prepare):
    """Parameters and state after updates with the same gradients, prepared."""
    step = jax.jit(tx.update)
    state = tx.init(params)
    for seed in range(3):
        updates, state = step(prepare(draw(SHAPES, seed + 10)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lamb, clipped": optax.chain(
        optax.clip_by_global_norm(1.0), optax.lamb(1e-2, weight_decay=0.1)
    ),
    "adam, averaged": optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "several steps": optax.MultiSteps(optax.adam(1e-2), 2),
    "masked": optax.masked(
        optax.adam(1e-2), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "partition": optax.partition(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(0.1, momentum=0.9)},
        lambda p: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", p),
    ),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "history": optax.scale_by_lbfgs(memory_size=2),
    "factored": optax.scale_by_factored_rms(min_dim_size_to_factor=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_thinned_state_is_the_one_that_thinned_training_has(name):
    """Masked parameters and gradients on one side, small ones on the other."""
    tx = OPTIMIZERS[name]
    start = masked(VARIABLES["params"], GONE)
    params, state = after_updates(tx, start, lambda g: masked(g, GONE))
    found = agp.thin_opt_state(state, params, CUT)
    small = agp.thin(start, CUT)
    expected = after_updates(tx, small, lambda g: agp.thin(g, CUT))
    assert_trees_equal((agp.thin(params, CUT), found), expected, rtol=2e-5, atol=1e-6)
    shapes = jax.eval_shape(tx.init, params)
    abstract = agp.thin_opt_state(shapes, jax.eval_shape(lambda: params), CUT)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, found)
    under_jit = jax.jit(lambda s: agp.thin_opt_state(s, params, CUT))(state)
    assert_trees_equal(under_jit, found, rtol=1e-6)


@pytest.mark.parametrize("shape, kept", [((6, 8), 4), ((8, 6), 4), ((2, 5, 7), 3)])
def test_factored_moments_are_the_means_over_what_stays(shape, kept):
    """Also where the larger of the two axes becomes the smaller one."""
    axis = len(shape) - 1 if shape[-1] > shape[-2] else len(shape) - 2
    stays = np.sort(np.random.default_rng(0).permutation(shape[axis])[:kept])
    cut = agp.Cut({"kernel": {axis: stays}}, {"kernel": shape})
    params = draw({"kernel": shape})
    params["kernel"] *= np.isin(np.arange(shape[axis]), stays).reshape(
        [-1 if i == axis else 1 for i in range(len(shape))]
    )
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    _, state = tx.update(params, tx.init(params), params)
    small = agp.thin(params, cut)
    _, expected = tx.update(small, tx.init(small), small)
    found = agp.thin_opt_state(state, params, cut)
    assert_trees_equal(found, expected, rtol=1e-5)


def test_factored_moments_over_other_axes_raise():
    cut = agp.Cut({"kernel": {2: np.arange(2)}}, {"kernel": (4, 5, 6)})
    params = draw({"kernel": (4, 5, 6)})
    state = optax.scale_by_factored_rms(min_dim_size_to_factor=2).init(params)
    with pytest.raises(ValueError, match="largest axes are others; make a new state"):
        agp.thin_opt_state(state, params, cut)


@pytest.mark.parametrize("packed", [False, True])
def test_masks_of_prune_are_cut_with_its_moments(packed):
    rules = [agp.Rule("up", agp.filters(), agp.one_shot(0.5, step=1))]
    rules += [agp.Rule("norm/.*", None), agp.Rule("down", agp.element())]
    rules[2] = agp.Rule("down", agp.element(), agp.one_shot(0.2, step=2))
    tx = agp.prune(
        optax.sgd(0.1, momentum=0.9),
        rules,
        couplings=COUPLINGS.subtree("params"),
        packed=packed,
    )
    params, state = after_updates(tx, VARIABLES["params"], lambda g: g)
    masks = agp.get_masks(state)
    cut = agp.plan_cut({"params": masks}, COUPLINGS)
    stays = kept_units(cut)
    assert len(stays) == 3
    small = agp.thin_opt_state(state, params, cut.subtree("params"))
    assert isinstance(small, agp.PruneState) and small.step == 3
    assert_trees_equal(agp.get_masks(small)["down"], masks["down"][np.array(stays)])
    assert bool(agp.get_masks(small)["up"].all())
    (trace,) = (x.trace for x in state.inner_state if hasattr(x, "trace"))
    (found,) = (x.trace for x in small.inner_state if hasattr(x, "trace"))
    assert_trees_equal(found, agp.thin(trace, cut.subtree("params")))


def by_path(tree):
    paths, leaves, _ = flatten_with_paths(tree)
    return dict(zip(paths, leaves, strict=True))


def test_paths_that_end_alike_are_not_confused():
    shape = (3, 4, 4)
    params = draw({"Conv_0": {"kernel": shape}, "Block": {"Conv_0": {"kernel": shape}}})
    shapes = {"Conv_0/kernel": shape, "Block/Conv_0/kernel": shape}
    tx = optax.adam(1e-2)
    _, state = tx.update(params, tx.init(params), params)
    for path, other in (tuple(shapes), tuple(shapes)[::-1]):
        cut = agp.Cut({path: {2: np.array([0, 3])}}, shapes)
        found = agp.thin_opt_state(state, params, cut)
        for name in ("mu", "nu"):
            before, after = (by_path(getattr(x[0], name)) for x in (state, found))
            np.testing.assert_array_equal(after[path], before[path][..., [0, 3]])
            np.testing.assert_array_equal(after[other], before[other])


def test_states_and_parameters_that_do_not_fit_raise():
    params = VARIABLES["params"]
    sums = jax.tree.map(lambda x: x.sum(-1), params)
    with pytest.raises(ValueError, match="shape .* for .*make a new state with opti"):
        agp.thin_opt_state({"sums": sums}, params, CUT)
    with pytest.raises(ValueError, match="cut.subtree"):
        agp.thin_opt_state(optax.adam(1e-2).init(params), params, cut_of(1, 4))


# --- thin_function -----------------------------------------------------------


def thinned_pair(fn, variables, cut, masks):
    """The masked and the thinned variables, and the thinned function."""
    zeroed = masked(variables, masks)
    return zeroed, agp.thin(zeroed, cut), agp.thin_function(fn, variables, cut)


FULL, SMALL, THIN = thinned_pair(
    network, VARIABLES, cut_of(1, 4), COUPLINGS.masks({UNITS: [1, 4]})
)


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_a_thinned_function_takes_other_batches(batch):
    x = draw((batch, 5))
    np.testing.assert_allclose(THIN(SMALL, x), network(FULL, x), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(THIN)(SMALL, x), network(FULL, x), rtol=1e-5)


def test_a_thinned_function_can_be_transformed():
    def loss(fn):
        return lambda variables, x: jnp.sum(jnp.sin(fn(variables, x)))

    full, small = jax.grad(loss(network))(FULL, X), jax.grad(loss(THIN))(SMALL, X)
    assert_trees_equal(small, agp.thin(full, cut_of(1, 4)), rtol=1e-4, atol=1e-6)
    again = jax.jit(jax.grad(jax.checkpoint(loss(THIN))))(SMALL, X)
    assert_trees_equal(again, small, rtol=1e-5, atol=1e-6)
    by_row = jax.vmap(lambda x: THIN(SMALL, x[None])[0])(X)
    np.testing.assert_allclose(by_row, network(FULL, X), rtol=1e-5)
    two = jax.tree.map(lambda *x: jnp.stack(x), SMALL, jax.tree.map(jnp.sin, SMALL))
    each = jax.vmap(THIN, in_axes=(0, None))(two, X)
    np.testing.assert_allclose(each[0], network(FULL, X), rtol=1e-5)
    _, forward = jax.jvp(lambda x: THIN(SMALL, x), (X,), (X,))
    _, expected = jax.jvp(lambda x: network(FULL, x), (X,), (X,))
    np.testing.assert_allclose(forward, expected, rtol=1e-4, atol=1e-6)


def test_a_thinned_function_can_be_exported():
    exported = jax.export.export(jax.jit(THIN))(SMALL, X)
    np.testing.assert_allclose(exported.call(SMALL, X), network(FULL, X), rtol=1e-5)
    pytest.importorskip("flatbuffers")
    back = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(back.call(SMALL, X), network(FULL, X), rtol=1e-5)


def test_a_function_inside_remat_and_with_keywords_is_thinned():
    @jax.checkpoint
    def block(params, x):
        return jnp.tanh(x @ params["up"])

    def fn(params, x, *, scale):
        return {"logits": block(params, x) @ params["down"] * scale}

    params = draw({"up": (5, 6), "down": (6, 3)})
    couplings = agp.find_couplings(lambda p, x: fn(p, x, scale=2.0), params, X)
    masks = couplings.masks({"up[1]": [0, 3, 5]})
    cut = agp.plan_cut(masks, couplings)
    full, small, thin_fn = thinned_pair(fn, params, cut, masks)
    scale = jnp.float32(3)

    def loss(fn, params):
        return jnp.sum(fn(params, X, scale=scale)["logits"] ** 2)

    np.testing.assert_allclose(loss(thin_fn, small), loss(fn, full), rtol=1e-5)
    found = jax.grad(loss, argnums=1)(thin_fn, small)
    expected = agp.thin(jax.grad(loss, argnums=1)(fn, full), cut)
    assert_trees_equal(found, expected, rtol=1e-5)


def test_relu_has_the_same_derivative_at_zero():
    """jax.nn.relu says 0 there, the maximum it is made of says 1/2."""

    def loss(fn, variables):
        return jnp.sum(fn(variables, X))

    norm = jax.tree.map(jnp.zeros_like, FULL["params"]["norm"])
    zero = {**FULL, "params": {**FULL["params"], "norm": norm}}
    found = jax.grad(loss, argnums=1)(THIN, agp.thin(zero, cut_of(1, 4)))
    assert all(not g.any() for g in jax.tree.leaves(found["params"]))


def test_a_custom_pullback_stays():
    """Rounds on the way there, and passes three times the gradient back."""

    @jax.custom_vjp
    def rounded(x, slope):
        return jnp.round(x) * slope

    def forward(x, slope):
        return rounded(x, slope), slope

    def backward(slope, g):
        return 3.0 * g * slope, jnp.sum(g, 0, keepdims=True)

    rounded.defvjp(forward, backward)

    def fn(params, x):
        return rounded(x @ params["up"], params["slope"]) @ params["down"]

    params = draw({"up": (5, 6), "slope": (1, 6), "down": (6, 3)})
    couplings = agp.find_couplings(fn, params, X)
    masks = couplings.masks({"up[1]": [1, 4]})
    cut = agp.plan_cut(masks, couplings)
    full, small, thin_fn = thinned_pair(fn, params, cut, masks)
    found = jax.grad(lambda p: jnp.sum(thin_fn(p, X)))(small)
    back = np.float64(full["down"]).sum(1)[None] * np.ones((4, 1))
    stays = [0, 2, 3, 5]
    expected_up = 3 * np.float64(X).T @ (back * np.float64(full["slope"]))
    np.testing.assert_allclose(found["up"], expected_up[:, stays], rtol=1e-5)
    np.testing.assert_allclose(found["slope"], back.sum(0)[None, stays], rtol=1e-5)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_dropout_drops_the_same_entries(implementation):
    def fn(variables, x, key):
        params = variables["params"]
        hidden = x @ params["up"]
        kept = jax.random.bernoulli(key, 0.5, hidden.shape)
        return jnp.where(kept, 2 * hidden, 0) @ params["down"], kept

    key = jax.random.key(3, impl=implementation)
    cut = cut_of(1, 4)
    expected, kept = fn(FULL, X, key)
    found, small_kept = agp.thin_function(fn, VARIABLES, cut)(SMALL, X, key)
    np.testing.assert_array_equal(small_kept, np.asarray(kept)[:, [0, 2, 3, 5]])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_updated_statistics_come_out_thinned():
    def fn(variables, x):
        hidden = x @ variables["params"]["up"]
        stats = variables["batch_stats"]["norm"]
        mean = 0.9 * stats["mean"] + 0.1 * hidden.mean(0)
        return network(variables, x), {"norm": {"mean": mean, "var": hidden.var(0)}}

    cut = cut_of(1, 4)
    found = agp.thin_function(fn, VARIABLES, cut)(SMALL, X)
    logits, stats = fn(FULL, X)
    np.testing.assert_allclose(found[0], logits, rtol=1e-5)
    expected = agp.thin({"batch_stats": stats}, cut)["batch_stats"]
    assert_trees_equal(found[1], expected, rtol=1e-5)


def test_a_function_that_needs_what_is_cut_is_refused():
    def adds_input(variables, x):
        hidden = x @ variables["params"]["up"] + x[:, :1]
        return network(variables, x) + jnp.sum(hidden + x[:, [0, 1, 2, 3, 4, 0]])

    thin_fn = agp.thin_function(adds_input, VARIABLES, cut_of(1, 4))
    with pytest.raises(ValueError, match="index 1, but it cannot.*because of input"):
        thin_fn(SMALL, X)


def test_a_function_that_ties_more_leaves_is_refused():
    """The cut is of a function that leaves `other` alone; this one adds it."""
    params = draw({"up": (5, 6), "down": (6, 3), "other": (6,)})

    def fn(params, x, other=0):
        return (x @ params["up"] + other) @ params["down"]

    couplings = agp.find_couplings(fn, params, X)
    cut = agp.plan_cut(couplings.masks({"up[1]": [2]}), couplings)
    assert "other" not in cut
    more = lambda params, x: fn(params, x, params["other"][None])  # noqa: E731
    thin_fn = agp.thin_function(more, params, cut)
    with pytest.raises(
        ValueError, match=r"index 2, but it goes together with other\[0\] index 2"
    ):
        thin_fn(agp.thin(params, cut), X)


def test_variables_of_other_shapes_are_refused():
    cut = cut_of(1, 4)
    with pytest.raises(ValueError, match=r"expects .*got.*pass thin\(variables, cut\)"):
        THIN(VARIABLES, X)
    with pytest.raises(ValueError, match="pass the variables before the cut"):
        agp.thin_function(network, SMALL, cut)
    with pytest.raises(ValueError, match="variables without it.*Cut.subtree"):
        agp.thin_function(network, VARIABLES["params"], cut)


# --- check_cut ---------------------------------------------------------------


def test_masks_of_all_slices_make_no_difference():
    masks = masks_without(1, 4)
    report = agp.check_cut(network, VARIABLES, masks, cut_of(1, 4), X)
    assert report.error < 1e-6
    assert report.groups == {}
    assert str(report).startswith("relative error ") and "from" not in str(report)


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
    closed = np.asarray(two_layers(jax.tree.map(jnp.multiply, params, full), X))
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
    (group,) = couplings.groups
    masks = couplings.masks({group.name: np.array([[0, 1], [1, 3], [2, 3]])})
    cut = agp.plan_cut(masks, couplings)
    assert agp.check_cut(stacked, STACKED, masks, cut, X).error < 1e-6
    report = agp.check_cut(stacked, STACKED, {}, cut, X)
    assert report.error > 0.01 and report.groups.keys() == {group.name}
