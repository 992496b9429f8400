"""Rules with couplings: units ranked by summed scores, masked in every member."""

import ast
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import agp_jax as agp
from agp_jax.trees import flatten_with_paths

LINE = agp.polynomial_schedule(0.75, begin_step=0, end_step=3, power=1.0)
HALF = agp.one_shot(0.5, step=1)


def residual(params, x):
    """Two layers that write to one stream of 8 features, with a hidden layer of 12."""
    stream = x @ params["embed"]["kernel"] + params["embed"]["bias"][None]
    hidden = stream @ params["up"]["kernel"] + params["up"]["bias"][None]
    stream = stream + jnp.maximum(hidden, 0) @ params["down"]["kernel"]
    return stream @ params["head"]["kernel"]


def draw(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape))  # noqa: E731
    return {
        "embed": {"kernel": normal(5, 8), "bias": normal(8)},
        "up": {"kernel": normal(8, 12), "bias": normal(12)},
        "down": {"kernel": normal(12, 8)},
        "head": {"kernel": normal(8, 3)},
    }


X = jnp.float32(np.random.default_rng(9).normal(size=(4, 5)))


@functools.cache
def couplings():
    return agp.find_couplings(residual, draw(), X)


def filters(pattern, schedule=HALF, **options):
    return agp.Rule(pattern, agp.filters(), schedule, **options)


def masks_at(params, rules, step, masks=None, **options):
    @jax.jit
    def make(params, masks, options):
        return agp.make_masks(
            params, rules, step, masks, couplings=couplings(), **options
        )

    return make(params, masks, options)


def lowest(scores, count):
    """The numbers of the `count` lowest scores; of equals, those that come last."""
    order = np.lexsort((-np.arange(len(scores)), scores))
    return set(order[:count].tolist())


def gone(mask, axis):
    """The slices along an axis in which nothing is kept."""
    others = tuple(i for i in range(mask.ndim) if i != axis)
    return set(np.flatnonzero(~np.asarray(mask).any(axis=others)).tolist())


@pytest.mark.parametrize("score", [jnp.abs, jnp.square])
def test_units_are_ranked_by_scores_summed_over_the_named_producers(score):
    params = draw()
    rules = [filters("embed/kernel|down/kernel", score=score)]
    masks = masks_at(params, rules, 1)
    sums = sum(
        np.asarray(score(params[name]["kernel"]), np.float64).sum(0)
        for name in ("embed", "down")
    )
    assert gone(masks["embed"]["kernel"], 1) == lowest(sums, 4)
    only_one = masks_at(params, [filters("down/kernel", score=score)], 1)
    own = np.asarray(score(params["down"]["kernel"]), np.float64).sum(0)
    assert gone(only_one["embed"]["kernel"], 1) == lowest(own, 4)


def test_masks_cover_every_slice_of_a_unit_and_nothing_else():
    masks = masks_at(draw(), [filters("up/kernel")], 1)
    lost = gone(masks["up"]["kernel"], 1)
    assert len(lost) == 6
    keeps = np.array([unit not in lost for unit in range(12)])
    np.testing.assert_array_equal(
        masks["up"]["kernel"], np.broadcast_to(keeps, (8, 12))
    )
    np.testing.assert_array_equal(masks["up"]["bias"], keeps)
    np.testing.assert_array_equal(
        masks["down"]["kernel"], np.broadcast_to(keeps[:, None], (12, 8))
    )
    assert masks["embed"] == {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode()}


def test_a_parameter_of_two_groups_loses_the_slices_of_both():
    masks = masks_at(draw(), [filters("(embed|up)/kernel")], 1)
    stream, hidden = gone(masks["embed"]["bias"], 0), gone(masks["up"]["bias"], 0)
    assert (len(stream), len(hidden)) == (4, 6)
    expected = np.ones((12, 8), bool)
    expected[list(hidden)] = False
    expected[:, list(stream)] = False
    np.testing.assert_array_equal(masks["down"]["kernel"], expected)


def test_channels_rank_units_by_what_reads_them():
    params = draw()
    rule = agp.Rule("down/kernel", agp.channels(), HALF)
    masks = masks_at(params, [rule], 1)
    sums = np.abs(np.asarray(params["down"]["kernel"], np.float64)).sum(1)
    assert gone(masks["up"]["kernel"], 1) == lowest(sums, 6)


def test_counts_follow_the_schedule_and_units_never_come_back():
    rules = [filters("up/kernel", LINE), filters("embed/kernel", LINE)]
    masks, lost = None, set()
    for step, (of_stream, of_hidden) in enumerate([(0, 0), (2, 3), (4, 6), (6, 9)]):
        masks = masks_at(draw(step), rules, step, masks)
        assert len(gone(masks["embed"]["kernel"], 1)) == of_stream
        assert len(gone(masks["up"]["kernel"], 1)) == of_hidden
        assert lost <= gone(masks["up"]["kernel"], 1)
        lost = gone(masks["up"]["kernel"], 1)


def test_one_unit_of_each_group_stays():
    most = agp.one_shot(0.99, step=1)
    masks = masks_at(draw(), [filters("(up|embed)/kernel", most)], 1)
    assert len(gone(masks["up"]["kernel"], 1)) == 11
    assert len(gone(masks["embed"]["kernel"], 1)) == 7


def test_groups_of_a_rule_are_ranked_together():
    params = draw()
    rules = [filters("(up|embed)/kernel", scope="rule")]
    masks = masks_at(params, rules, 1)
    sums = [
        np.abs(np.asarray(params[name]["kernel"], np.float64)).sum(0)
        for name in ("embed", "up")
    ]
    expected = lowest(np.concatenate(sums), 10)
    found = gone(masks["embed"]["bias"], 0) | {
        8 + unit for unit in gone(masks["up"]["bias"], 0)
    }
    assert found == expected


def test_a_group_with_a_weight_that_is_not_finite_loses_nothing():
    params = draw()
    params["embed"]["kernel"] = params["embed"]["kernel"].at[2, 3].set(jnp.nan)
    masks = masks_at(params, [filters("(embed|up|down)/kernel")], 1)
    assert not gone(masks["embed"]["bias"], 0)
    assert len(gone(masks["up"]["bias"], 0)) == 6


def test_weights_pruned_one_by_one_and_units_go_side_by_side():
    params = draw()
    rules = [filters("up/kernel"), agp.Rule("down/kernel", agp.element(), HALF)]
    masks = masks_at(params, rules, 1)
    lost = gone(masks["up"]["kernel"], 1)
    alone = agp.make_masks(params, rules[1:], 1)["down"]["kernel"]
    expected = np.asarray(alone).copy()
    expected[list(lost)] = False
    np.testing.assert_array_equal(masks["down"]["kernel"], expected)


def test_gradients_and_outside_scores_rank_units():
    params, gradients = draw(), draw(1)
    rule = filters("up/kernel", score=lambda w, g: jnp.abs(w * g))
    masks = masks_at(params, [rule], 1, gradients=gradients)
    product = np.asarray(params["up"]["kernel"]) * np.asarray(gradients["up"]["kernel"])
    sums = np.abs(product.astype(np.float64)).sum(0)
    assert gone(masks["up"]["bias"], 0) == lowest(sums, 6)
    scores = {"up": {"kernel": jnp.tile(jnp.arange(12.0), (8, 1))}}
    masks = masks_at(params, [filters("up/kernel")], 1, scores=scores)
    assert gone(masks["up"]["bias"], 0) == set(range(6))


def attention(params, x):
    """Four heads of three features, in one flat axis."""
    q, k, v = (
        (x @ params[name]["kernel"]).reshape(*x.shape[:-1], 4, 3) for name in "qkv"
    )
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return mixed.reshape(*x.shape[:-1], 12) @ params["out"]["kernel"]


def draw_attention():
    rng = np.random.default_rng(3)
    shapes = {"q": (5, 12), "k": (5, 12), "v": (5, 12), "out": (12, 5)}
    return {
        name: {"kernel": jnp.float32(rng.normal(size=shape))}
        for name, shape in shapes.items()
    }


def test_heads_go_whole_in_queries_keys_values_and_output():
    params = draw_attention()
    x = jnp.float32(np.random.default_rng(4).normal(size=(2, 6, 5)))
    found = agp.find_couplings(attention, params, x)
    rule = agp.Rule("[qkv]/kernel", agp.heads(4), HALF)
    masks = agp.make_masks(params, [rule], 1, couplings=found)
    sums = sum(
        np.abs(np.asarray(params[name]["kernel"], np.float64)).sum(0).reshape(4, 3)
        for name in "qkv"
    ).sum(1)
    features = {3 * h + i for h in lowest(sums, 2) for i in range(3)}
    for name, axis in (("q", 1), ("k", 1), ("v", 1), ("out", 0)):
        assert gone(masks[name]["kernel"], axis) == features
    with pytest.raises(ValueError, match="units of several kinds.*by name, as in"):
        rule = filters("q/kernel")
        agp.make_masks(params, [rule], 1, couplings=found)


def grouped_attention(params, x):
    """Queries of four heads, of which each two share keys and values."""
    query = jnp.einsum("rlw,whf->rlhf", x, params["q"])
    key, value = (jnp.einsum("rlw,whf->rlhf", x, params[name]) for name in "kv")
    query = query.reshape(*x.shape[:2], 2, 2, 3)  # (rows, length, of keys, each, 3)
    scores = jnp.einsum("rqhgf,rkhf->rhgqk", query, key)
    y = jnp.einsum("rhgqk,rkhf->rqhgf", jax.nn.softmax(scores), value)
    return jnp.einsum("rlhf,hfw->rlw", y.reshape(*x.shape[:2], 4, 3), params["out"])


def draw_grouped():
    rng = np.random.default_rng(6)
    shapes = {"q": (5, 4, 3), "k": (5, 2, 3), "v": (5, 2, 3), "out": (4, 3, 5)}
    return {name: jnp.float32(rng.normal(size=x)) for name, x in shapes.items()}


@pytest.mark.parametrize(
    ("units", "heads"), [(r"k\[1\]", [[0, 1], [2, 3]]), (r"q\[1\]", [[0, 2], [1, 3]])]
)
def test_units_of_several_kinds_are_chosen_by_name(units, heads):
    params = draw_grouped()
    x = jnp.float32(np.random.default_rng(7).normal(size=(2, 6, 5)))
    found = agp.find_couplings(grouped_attention, params, x)
    rule = agp.Rule("q", agp.filters(axis=1), HALF, units=units)
    masks = agp.make_masks(params, [rule], 1, couplings=found)
    norms = np.abs(np.asarray(params["q"], np.float64)).sum((0, 2))
    lost = min(heads, key=lambda unit: norms[unit].sum())
    assert gone(masks["q"], 1) == gone(masks["out"], 0) == set(lost)
    cut = agp.plan_cut(masks, found)
    thinned = agp.thin(params, cut)
    assert thinned["q"].shape[1] == 2
    assert thinned["k"].shape[1] == (1 if "k" in units else 2)
    np.testing.assert_allclose(
        agp.thin_function(grouped_attention, params, cut)(thinned, x),
        grouped_attention(agp.apply_masks(params, masks), x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_what_can_be_cut_is_told_where_a_rule_names_nothing():
    params, x = draw_grouped(), jnp.zeros((2, 6, 5))
    found = agp.find_couplings(grouped_attention, params, x)
    with pytest.raises(ValueError) as several:
        rule = agp.Rule("q", agp.filters(axis=1), HALF)
        agp.make_masks(params, [rule], 1, couplings=found)
    assert "along axis 1 2 units of k[1], 2 slices each" in str(several.value)
    advised = ast.literal_eval(re.search(r"units=('.*')\)", str(several.value))[1])
    rule = agp.Rule("q", agp.filters(axis=1), HALF, units=advised)
    assert agp.make_masks(params, [rule], 1, couplings=found)["k"] is not None
    for rule, message in (
        (agp.Rule("q", agp.heads(3, axis=1), HALF), "does not divide into 3"),
        (
            agp.Rule("q", agp.heads(1, axis=1), HALF),
            "It has .*along axis 1 2 units of k",
        ),
        (agp.Rule("q", agp.filters(axis=1), HALF, units="x"), "no units named 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            agp.make_masks(params, [rule], 1, couplings=found)
    with pytest.raises(ValueError, match="units names groups of filters, channels"):
        agp.Rule("q", agp.element(), HALF, units="x")
    with pytest.raises(ValueError, match=r"units '\(' is not a regular expression"):
        agp.Rule("q", agp.filters(), HALF, units="(")


def out_in(params, x):
    """Kernels (out, in), as in Equinox and PyTorch."""
    return jnp.maximum(x @ params["up"].T, 0) @ params["down"].T


@pytest.mark.parametrize(
    ("fn", "pattern", "structure", "advised", "lost"),
    [
        (out_in, "up", agp.filters(), agp.filters(axis=0), ("up", 0, 4)),
        (out_in, "down", agp.channels(), agp.channels(axis=1), ("up", 0, 4)),
        (attention, "q/kernel", agp.heads(3), agp.heads(4, axis=1), ("k/kernel", 1, 6)),
    ],
)
def test_the_structure_that_has_units_is_named(fn, pattern, structure, advised, lost):
    rng = np.random.default_rng(8)
    params = {"up": rng.normal(size=(8, 5)), "down": rng.normal(size=(3, 8))}
    params = jax.tree.map(jnp.float32, params) if fn is out_in else draw_attention()
    found = agp.find_couplings(fn, params, jnp.zeros((2, 6, 5)))
    with pytest.raises(ValueError, match=rf": agp.{re.escape(str(advised))}"):
        agp.make_masks(params, [agp.Rule(pattern, structure, HALF)], 1, couplings=found)
    rules = [agp.Rule(pattern, advised, HALF)]
    masks = jax.jit(lambda p: agp.make_masks(p, rules, 1, couplings=found))(params)
    path, axis, num_slices = lost
    mask = dict(zip(*flatten_with_paths(masks)[:2], strict=True))[path]
    assert len(gone(mask, axis)) == num_slices


def stack(params, x):
    """Three layers, whose weights are stacked, with 8 hidden features each."""

    def layer(x, weights):
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

    return jax.lax.scan(layer, x, params)[0]


def test_stacked_layers_lose_different_units_and_equally_many():
    rng = np.random.default_rng(5)
    params = {
        "up": jnp.float32(rng.normal(size=(3, 4, 8))),
        "down": jnp.float32(rng.normal(size=(3, 8, 4))),
    }
    x = jnp.ones((2, 4))
    found = agp.find_couplings(stack, params, x)
    masks = agp.make_masks(params, [filters("up", stacked_axes=1)], 1, couplings=found)
    sums = np.abs(np.asarray(params["up"], np.float64)).sum(1)
    for layer in range(3):
        assert gone(masks["up"][layer], 1) == lowest(sums[layer], 4)
        assert gone(masks["down"][layer], 0) == lowest(sums[layer], 4)
    cut = agp.plan_cut(masks, found)
    thinned = agp.thin(params, cut)
    assert thinned["up"].shape == (3, 4, 4)
    masked = stack(agp.apply_masks(params, masks), x)
    again = agp.thin_function(stack, params, cut)(thinned, x)
    np.testing.assert_allclose(again, masked, rtol=1e-5, atol=1e-6)


def layer_by_layer(params, x):
    for i in range(3):
        x = x + jax.nn.relu(x @ params["up"][:, i]) @ params["down"][:, i]
    return x


def test_layers_that_lose_the_same_units_cannot_be_ranked_apart():
    params = {"up": jnp.ones((4, 3, 8)), "down": jnp.ones((8, 3, 4))}
    found = agp.find_couplings(layer_by_layer, params, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="layers along its axis 1 lose the same units"):
        agp.make_masks(params, [filters("up", stacked_axes=(1,))], 1, couplings=found)
    masks = agp.make_masks(params, [filters("up")], 1, couplings=found)
    assert gone(masks["up"], 2) == gone(masks["down"], 0) == {4, 5, 6, 7}


def train(tx, params, steps):
    return go_on(tx, params, jax.jit(tx.init)(params), steps, residual)


def go_on(tx, params, state, steps, fn):
    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: (fn(p, X) ** 2).mean())(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("packed", [False, True])
def test_prune_masks_units_and_a_cut_takes_them_out(packed):
    rules = [filters("(embed|down|up)/kernel", LINE)]
    inner = optax.adamw(0.05)
    tx = agp.prune(inner, rules, couplings=couplings(), packed=packed)
    params, state = train(tx, draw(), 4)
    masks = agp.get_masks(state)
    assert len(gone(masks["up"]["bias"], 0)) == 9
    assert len(gone(masks["embed"]["bias"], 0)) == 6
    for masked, x in zip(
        jax.tree.leaves(agp.apply_masks(params, masks)),
        jax.tree.leaves(params),
        strict=True,
    ):
        np.testing.assert_array_equal(masked, x)
    cut = agp.plan_cut(masks, couplings())
    thinned = agp.thin(params, cut)
    assert thinned["down"]["kernel"].shape == (3, 2)
    assert thinned["head"]["kernel"].shape == (2, 3)
    again = agp.thin_function(residual, params, cut)(thinned, X)
    np.testing.assert_allclose(again, residual(params, X), rtol=1e-5, atol=1e-6)


def test_training_goes_on_after_the_cut_as_it_would_have_with_masks():
    rules = [filters("(embed|down|up)/kernel", LINE)]
    tx = agp.prune(optax.adamw(0.05), rules, couplings=couplings())
    params, state = train(tx, draw(), 4)
    cut = agp.plan_cut(agp.get_masks(state), couplings())
    thin_fn = agp.thin_function(residual, params, cut)
    thinned_state = agp.thin_opt_state(state, params, cut)
    masked, _ = go_on(tx, params, state, 5, residual)
    expected = agp.thin(masked, cut)
    inner = optax.adamw(0.05)
    for after, given in (
        (inner, thinned_state.inner_state),
        (agp.prune(inner, []), thinned_state),
    ):
        thinned, _ = go_on(after, agp.thin(params, cut), given, 5, thin_fn)
        for x, y in zip(*map(jax.tree.leaves, (thinned, expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights_give_the_same_masks_and_masks_lie_as_they_do(axis_type):
    params = draw()
    rules = [filters("(embed|down|up)/kernel")]
    expected = masks_at(params, rules, 1)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    specs = {
        "embed": {"kernel": PartitionSpec(None, "y"), "bias": PartitionSpec("x")},
        "up": {"kernel": PartitionSpec("x", "y"), "bias": PartitionSpec()},
        "down": {"kernel": PartitionSpec("y", "x")},
        "head": {"kernel": PartitionSpec("y", None)},
    }
    with jax.set_mesh(mesh):
        sharded = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs
        )
        masks = jax.jit(lambda p: masks_at(p, rules, 1))(sharded)
    jax.tree.map(np.testing.assert_array_equal, masks, expected)
    if axis_type == AxisType.Explicit:
        jax.tree.map(
            lambda m, x: m.sharding.is_equivalent_to(x.sharding, x.ndim) or 1 / 0,
            masks,
            sharded,
        )


def normalised(params, x):
    stream = jax.nn.softmax(x @ params["embed"]["kernel"])
    return stream @ params["head"]["kernel"]


@pytest.mark.parametrize(
    "rules, message",
    [
        ([filters("head/kernel")], "'head/kernel' prunes head/kernel.*dense..head/ker"),
        (
            [filters("embed/kernel"), filters("down/kernel", LINE)],
            "'down/kernel' and rule 'embed/kernel' both prune the units of down/kern",
        ),
    ],
)
def test_what_cannot_be_pruned_so_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        masks_at(draw(), rules, 1)


def test_units_that_a_cut_would_change_are_refused():
    params = {
        "embed": {"kernel": jnp.ones((5, 8))},
        "head": {"kernel": jnp.ones((8, 3))},
    }
    found = agp.find_couplings(normalised, params, X)
    with pytest.raises(ValueError, match="another one than one with zeros"):
        agp.make_masks(params, [filters("embed/kernel")], 1, couplings=found)


def test_couplings_of_other_parameters_are_refused():
    with pytest.raises(ValueError, match="'down/kernel', which is no parameter.*subtr"):
        params = {"embed": draw()["embed"]}
        masks_at(params, [filters("embed/kernel")], 1)
    params = draw()
    params["up"]["kernel"] = jnp.ones((8, 13))
    match = r"up/kernel with shape \(8, 12\).*\(8, 13\).*anew: agp.prune\(inner, \[\]\)"
    rule = agp.Rule("up/kernel", agp.heads(12), HALF)  # 13 do not divide
    with pytest.raises(ValueError, match=match):
        masks_at(params, [rule], 1)
    tx = agp.prune(optax.sgd(0.1), [rule], couplings=couplings())
    state = jax.eval_shape(tx.init, draw())
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(tx.update, params, state, params)
