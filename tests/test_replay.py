"""A thinned function computes, transformed or not, what the masked one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from thinning_cases import (
    COUPLINGS,
    UNITS,
    assert_trees_equal,
    cut_of,
    draw,
    make_variables,
    masked,
    network,
)

import agp_jax as agp


def thinned_pair(fn, variables, cut, masks):
    """The masked and the thinned variables, and the thinned function."""
    zeroed = masked(variables, masks)
    return zeroed, agp.thin(zeroed, cut), agp.thin_function(fn, variables, cut)


@pytest.fixture(autouse=True)
def float64():
    """Else a sum that cancels would be noise, and depend on the order of its terms."""
    with jax.enable_x64(True):
        yield


with jax.enable_x64(True):
    VARIABLES, X = make_variables(), draw((4, 5), seed=9)
    FULL, SMALL, THIN = thinned_pair(
        network, VARIABLES, cut_of(1, 4), COUPLINGS.masks({UNITS: [1, 4]})
    )


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_a_thinned_function_takes_other_batches(batch):
    x = draw((batch, 5))
    np.testing.assert_allclose(THIN(SMALL, x), network(FULL, x), rtol=1e-9)
    np.testing.assert_allclose(jax.jit(THIN)(SMALL, x), network(FULL, x), rtol=1e-9)


def test_a_thinned_function_can_be_transformed():
    def loss(fn):
        return lambda variables, x: jnp.sum(jnp.sin(fn(variables, x)))

    full, small = jax.grad(loss(network))(FULL, X), jax.grad(loss(THIN))(SMALL, X)
    assert_trees_equal(small, agp.thin(full, cut_of(1, 4)), rtol=1e-9, atol=1e-12)
    again = jax.jit(jax.grad(jax.checkpoint(loss(THIN))))(SMALL, X)
    assert_trees_equal(again, small, rtol=1e-9, atol=1e-12)
    by_row = jax.vmap(lambda x: THIN(SMALL, x[None])[0])(X)
    np.testing.assert_allclose(by_row, network(FULL, X), rtol=1e-9)
    two = jax.tree.map(lambda *x: jnp.stack(x), SMALL, jax.tree.map(jnp.sin, SMALL))
    each = jax.vmap(THIN, in_axes=(0, None))(two, X)
    np.testing.assert_allclose(each[0], network(FULL, X), rtol=1e-9)
    _, forward = jax.jvp(lambda x: THIN(SMALL, x), (X,), (X,))
    _, expected = jax.jvp(lambda x: network(FULL, x), (X,), (X,))
    np.testing.assert_allclose(forward, expected, rtol=1e-9, atol=1e-12)


def test_a_thinned_function_can_be_exported():
    exported = jax.export.export(jax.jit(THIN))(SMALL, X)
    np.testing.assert_allclose(exported.call(SMALL, X), network(FULL, X), rtol=1e-9)
    pytest.importorskip("flatbuffers")
    back = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(back.call(SMALL, X), network(FULL, X), rtol=1e-9)


with jax.enable_x64(True):
    SEQUENCES = draw({"up": (5, 6), "down": (6, 5), "first": (1, 1, 5), "bias": (6,)})


def with_a_first_row(params, x):
    rows = jnp.stack([x, 2 * x, jnp.sin(x)], 1)
    first = jnp.broadcast_to(params["first"], (x.shape[0], 1, 5))
    rows = jnp.concatenate([first, rows], 1)
    hidden = jnp.tanh(rows.reshape(-1, 5) @ params["up"] + params["bias"][None])
    hidden = jnp.pad(hidden.reshape(x.shape[0], 4, 6), ((0, 0), (1, 1), (0, 0)))
    hidden = hidden[:, 2:-1, ::-1][..., ::-1].reshape(x.shape[0], -1)
    return hidden @ jnp.tile(params["down"], (3, 1))


def less_the_mean_of_the_batch(params, x):
    hidden = jnp.tile(x @ params["up"], (2, 1))
    hidden = (hidden - hidden.mean(0, keepdims=True))[: x.shape[0]]
    return jnp.concatenate([hidden, -hidden]) @ params["down"]


def step_by_step(params, x):
    def step(carry, now):
        carry = jnp.tanh(now @ params["up"] + carry * params["bias"][None])
        return carry, carry

    start = jnp.zeros((x.shape[0], 6))
    _, hidden = lax.scan(step, start, jnp.stack([x, -x, x]))
    return jnp.sort(hidden[-1], axis=0) @ params["down"]


def row_by_row(params, x):
    return lax.map(lambda row: jnp.tanh(row @ params["up"]) @ params["down"], x)


def by_places_in_the_batch(params, x):
    hidden = jnp.tanh(x @ params["up"]) * jnp.arange(x.shape[0])[:, None]
    hidden = hidden + params["bias"][None] * jnp.ones(x.shape[0])[:, None]
    largest = lax.dynamic_slice_in_dim(hidden, jnp.argmax(x[:, 0]), 1)
    _, places = lax.top_k(x[:, 1], 1)
    same = hidden[jnp.zeros(x.shape[0], int)]
    return (largest + hidden[places] + same) @ params["down"]


@pytest.mark.parametrize(
    "fn",
    [
        with_a_first_row,
        less_the_mean_of_the_batch,
        step_by_step,
        row_by_row,
        by_places_in_the_batch,
    ],
)
def test_a_thinned_function_can_be_exported_for_any_batch(fn):
    couplings = agp.find_couplings(fn, SEQUENCES, X)
    masks = couplings.masks({"up[1]": [0, 3, 4]})
    cut = agp.plan_cut(masks, couplings)
    full, small, thin_fn = thinned_pair(fn, SEQUENCES, cut, masks)
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 5), jnp.float64)
    exported = jax.export.export(jax.jit(thin_fn))(small, x)
    for size in (1, 3, 8):
        x = draw((size, 5), seed=size)
        np.testing.assert_allclose(exported.call(small, x), fn(full, x), rtol=1e-9)


def test_what_is_merged_with_a_symbolic_size_cannot_be_cut():
    def fn(params, x):
        hidden = (x @ params["up"]).reshape(-1, 3)  # two heads of each row
        return jnp.tanh(hidden).reshape(x.shape[0], 6) @ params["down"]

    couplings = agp.find_couplings(fn, SEQUENCES, X)
    (heads,) = (group for group in couplings.groups if group.num_units == 2)
    cut = agp.plan_cut(couplings.masks({heads.name: [0]}), couplings)
    thin_fn, small = agp.thin_function(fn, SEQUENCES, cut), agp.thin(SEQUENCES, cut)
    assert thin_fn(small, X).shape == (4, 5)
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 5), jnp.float64)
    with pytest.raises(
        ValueError, match=r"it cannot be removed because of \w+ at .*py"
    ):
        jax.eval_shape(thin_fn, small, x)


def test_converters_may_trace_shapes(monkeypatch):
    """They put functions of their own in the place of JAX's while they trace."""
    for name in ("shape", "ndim", "size"):
        of_numpy = getattr(np, name)
        monkeypatch.setattr(jnp, name, lambda x, f=of_numpy: jnp.asarray(f(x)) + 0)

    def fn(variables, x):
        out = jax.nn.relu(jnp.tile(network(variables, x), (1, 2)))
        return out.reshape(2, -1)[:, ::2]

    thinned = jax.jit(agp.thin_function(fn, VARIABLES, cut_of(1, 4)))
    np.testing.assert_allclose(thinned(SMALL, X), fn(FULL, X), rtol=1e-9)


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
    scale = jnp.float64(3)

    def loss(fn, params):
        return jnp.sum(fn(params, X, scale=scale)["logits"] ** 2)

    np.testing.assert_allclose(loss(thin_fn, small), loss(fn, full), rtol=1e-9)
    found = jax.grad(loss, argnums=1)(thin_fn, small)
    expected = agp.thin(jax.grad(loss, argnums=1)(fn, full), cut)
    assert_trees_equal(found, expected, rtol=1e-9)


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
    np.testing.assert_allclose(found["up"], expected_up[:, stays], rtol=1e-9)
    np.testing.assert_allclose(found["slope"], back.sum(0)[None, stays], rtol=1e-9)


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
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_updated_statistics_come_out_thinned():
    def fn(variables, x):
        hidden = x @ variables["params"]["up"]
        stats = variables["batch_stats"]["norm"]
        mean = 0.9 * stats["mean"] + 0.1 * hidden.mean(0)
        return network(variables, x), {"norm": {"mean": mean, "var": hidden.var(0)}}

    cut = cut_of(1, 4)
    found = agp.thin_function(fn, VARIABLES, cut)(SMALL, X)
    logits, stats = fn(FULL, X)
    np.testing.assert_allclose(found[0], logits, rtol=1e-9)
    expected = agp.thin({"batch_stats": stats}, cut)["batch_stats"]
    assert_trees_equal(found[1], expected, rtol=1e-9)


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


def test_axes_that_are_not_cut_may_have_any_size():
    """What is carried from batch to batch has as many rows as a batch."""

    def fn(variables, x):
        hidden = jnp.tanh(x @ variables["into"] + variables["carry"])
        return hidden @ variables["out"], hidden

    variables = draw({"into": (5, 6), "carry": (4, 6), "out": (6, 3)})
    inputs = draw({"x": (4, 5)})["x"]
    couplings = agp.find_couplings(lambda v, x: fn(v, x)[0], variables, inputs)
    masks = couplings.masks({"into[1]": [1, 4]})
    cut = agp.plan_cut(masks, couplings)
    full, small, thinned = thinned_pair(fn, variables, cut, masks)
    for rows in (1, 3):
        fewer = {**full, "carry": full["carry"][:rows]}
        found = thinned({**small, "carry": small["carry"][:rows]}, inputs[:rows])
        outputs, hidden = fn(fewer, inputs[:rows])
        np.testing.assert_allclose(found[0], outputs, rtol=1e-9)
        kept = np.delete(np.asarray(hidden), [1, 4], axis=1)
        np.testing.assert_allclose(found[1], kept, rtol=1e-9)
    with pytest.raises(ValueError, match="expects carry of shape"):
        thinned({**small, "carry": full["carry"]}, inputs)


def assert_equal_when_cut(fn, variables, *inputs, removed):
    """Outputs and a gradient, thinned and masked, where these units are removed."""
    couplings = agp.find_couplings(fn, variables, *inputs)
    masks = couplings.masks(removed)
    cut = agp.plan_cut(masks, couplings)
    full, small, thin_fn = thinned_pair(fn, variables, cut, masks)

    def run(fn, variables):
        return jax.jit(jax.value_and_grad(lambda v: jnp.sum(jnp.sin(fn(v, *inputs)))))(
            variables
        )

    (expected, gradient), (found, small_gradient) = run(fn, full), run(thin_fn, small)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert_trees_equal(small_gradient, agp.thin(gradient, cut), rtol=1e-9, atol=1e-12)
    return {path: cut.thin_shape(path) for path in cut}


@pytest.mark.parametrize(
    "positions",
    [
        np.arange(8).reshape(2, 4),
        np.stack([np.arange(4)] * 2),
        np.arange(4)[None],
        np.arange(4)[:, None],
        np.arange(4)[:, None] - np.arange(4)[None] + 3,
        np.arange(8).reshape(2, 2, 2),
    ],
    ids=["rows", "equal rows", "1 x n", "n x 1", "relative", "2 x 2 x 2"],
)
@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_a_table_is_read_by_known_indices_of_any_shape(positions, array):
    positions = array(positions)

    def fn(params, x):
        read = jnp.tanh(params["table"][positions] @ params["mix"])
        return (x @ params["up"] + read.sum(tuple(range(read.ndim - 1)))) @ params[
            "out"
        ]

    shapes = {"table": (8, 6), "mix": (6, 6), "up": (5, 6), "out": (6, 3)}
    removed = {"table[1]": [0, 2, 5], "up[1]": [1, 4]}
    cut = assert_equal_when_cut(fn, draw(shapes), X[0], removed=removed)
    assert cut == {"table": (8, 3), "mix": (3, 4), "up": (5, 4), "out": (4, 3)}


@pytest.mark.parametrize("picks", [[[3, 1, 0], [2, 5, 4]], [[5, 5]], [[4], [0]]])
def test_features_are_picked_by_known_indices_of_two_axes(picks):
    """As by one: picked units that stay are found where they then are."""
    picks = np.array(picks)

    def fn(params, x):
        hidden = jnp.tanh(x @ params["up"])[:, picks]
        return jnp.einsum("bij,ijc->bc", hidden, params["out"])

    params = draw({"up": (5, 6), "out": (*picks.shape, 3)})
    couplings = agp.find_couplings(fn, params, X)
    for group in couplings.groups:
        assert_equal_when_cut(fn, params, X, removed={group.name: [1]})


def test_features_are_picked_from_a_window_of_positions():
    """JAX makes one gather of both."""

    def fn(params, x):
        rows = jnp.stack([x, 2 * x, jnp.sin(x)], 1)
        hidden = jnp.tanh(rows @ params["up"])[:, 1:, np.array([5, 0, 2, 3])]
        return hidden.sum(1) @ params["out"]

    params = draw({"up": (5, 6), "out": (4, 3)})
    couplings = agp.find_couplings(fn, params, X)
    assert [group.num_units for group in couplings.groups] == [4]
    assert_equal_when_cut(fn, params, X, removed={"up[1]": [0, 3]})


def test_known_indices_of_two_axes_at_once_pick_pairs():
    rows, columns = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 1, 2, 1, 2, 0])

    def fn(params, x):
        grid = jnp.tanh(x @ params["up"]).reshape(-1, 3, 3)
        return grid[:, rows, columns] @ params["out"]

    params = draw({"up": (5, 9), "out": (6, 3)})
    couplings = agp.find_couplings(fn, params, X)
    assert [group.num_units for group in couplings.groups] == [3, 3]
    for group in couplings.groups:
        cut = assert_equal_when_cut(fn, params, X, removed={group.name: [1]})
        assert cut["up"] == (5, 6) and cut["out"] == (4, 3)


@pytest.mark.parametrize("around", [lambda f: f, jax.checkpoint])
def test_indices_are_known_in_layers_that_lose_other_units(around):
    """A permutation of features, and a table of a square of indices in each layer."""
    order, places = np.array([3, 1, 0, 2, 5, 4]), np.array([[0, 2, 1], [1, 0, 2]])

    def fn(params, x):
        @around
        def layer(x, weights):
            bias = weights["table"][places].sum((0, 1))
            hidden = jnp.tanh(x @ weights["up"] + bias[None])
            return x + hidden[:, order] @ weights["down"], None

        return lax.scan(layer, x, params)[0]

    params = draw({"up": (3, 5, 6), "table": (3, 4, 6), "down": (3, 6, 5)})
    removed = {"table[2]": np.array([[0, 1], [2, 5], [3, 4]])}
    cut = assert_equal_when_cut(fn, params, X, removed=removed)
    assert cut == {"up": (3, 5, 4), "table": (3, 4, 4), "down": (3, 4, 5)}


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 16])
def test_a_recurrence_by_associative_scan_has_any_length(length):
    """At most lengths some of its slices are of nothing."""

    def fn(params, x):
        def compose(first, second):
            return first[0] * second[0], first[1] * second[0] + second[1]

        decay, step = jax.nn.sigmoid(x @ params["decay"]), x @ params["step"]
        _, states = lax.associative_scan(compose, (decay, step), axis=1)
        return states @ params["out"]

    params = draw({"decay": (5, 6), "step": (5, 6), "out": (6, 3)})
    removed = {"decay[1]": [0, 3, 4]}
    cut = assert_equal_when_cut(fn, params, draw((2, length, 5)), removed=removed)
    assert cut == {"decay": (5, 3), "step": (5, 3), "out": (3, 3)}


def rolled_by_all(hidden):
    return jnp.roll(jnp.roll(hidden, 0, 1), hidden.shape[2], 2)


def joined_with_no_time(hidden):
    return jnp.concatenate([hidden[:, :0], hidden[:, np.zeros(0, int)], hidden], 1)


def joined_with_no_units(hidden):
    none = hidden[:, :, :0]
    return jnp.concatenate([none, hidden, jnp.where(none > 0, none, 1)], 2)


def split_off_nothing(hidden):
    return jnp.concatenate(jnp.split(hidden, [0, 2, 2], 2)[::-1], 2)


def with_empty_sums(hidden):
    return (
        hidden
        + hidden[:, :0].sum(1, keepdims=True)
        + jnp.repeat(hidden, 0, 0).sum(0, keepdims=True)
    )


@pytest.mark.parametrize(
    "move",
    [
        rolled_by_all,
        joined_with_no_time,
        joined_with_no_units,
        split_off_nothing,
        with_empty_sums,
    ],
)
def test_a_slice_of_nothing_stays_one(move):
    def fn(params, x):
        return move(jnp.tanh(x @ params["up"])) @ params["down"]

    params = draw({"up": (5, 6), "down": (6, 3)})
    removed = {"up[1]": [0, 2, 5]}
    cut = assert_equal_when_cut(fn, params, draw((2, 3, 5)), removed=removed)
    assert cut == {"up": (5, 3), "down": (3, 3)}


def test_leaves_and_inputs_without_entries_are_thinned_past():
    def fn(params, x):
        hidden = jnp.tanh(x @ params["up"])
        prompt = jnp.broadcast_to(params["prompt"], (len(x), 0, 6))
        hidden = jnp.concatenate([prompt, hidden], 1)
        return hidden @ params["down"] + x @ params["left"] @ params["right"]

    params = draw({"up": (5, 6), "down": (6, 3), "left": (5, 0), "right": (0, 3)})
    params["prompt"] = jnp.zeros((0, 6))
    for x in (draw((2, 3, 5)), jnp.zeros((0, 3, 5))):
        cut = assert_equal_when_cut(fn, params, x, removed={"up[1]": [0, 2]})
        assert cut == {"up": (5, 4), "down": (4, 3), "prompt": (0, 4)}


def rms_norm(x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3)


def fast_layer_norm(x):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.mean(x * x, -1, keepdims=True) - mean**2
    return (x - mean) * lax.rsqrt(variance + 1e-3)


def by_absolute_sum(x):
    return x / (1 + jnp.abs(x).sum(-1, keepdims=True))


def by_l2_norm(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def groups_of_two(x):
    return rms_norm(x.reshape(*x.shape[:-1], 2, -1)).reshape(x.shape)


NORMS = [rms_norm, fast_layer_norm, by_absolute_sum, by_l2_norm, groups_of_two]


@pytest.mark.parametrize("norm", NORMS)
def test_sums_over_zeros_change_nothing(norm):
    """The width of a residual stream is exact, and in the layers of a scan, too."""

    def fn(params, x):
        def layer(stream, weights):
            hidden = jax.nn.gelu(norm(stream) * weights["scale"] @ weights["up"])
            return stream + hidden @ weights["down"], None

        stream, _ = lax.scan(layer, x @ params["stem"], params["layers"])
        penalty = sum(jnp.sum(w**2) + jnp.abs(w).sum() for w in jax.tree.leaves(params))
        return norm(stream) @ params["head"] + penalty

    layers = {"scale": (2, 1, 8), "up": (2, 8, 4), "down": (2, 4, 8)}
    params = draw({"stem": (5, 8), "layers": layers, "head": (8, 3)})
    couplings = agp.find_couplings(fn, params, X)
    widths = [g for g in couplings.groups if g.name.startswith("layers/down[2]")]
    assert all(group.exact for group in couplings.groups) and widths
    removed = {group.name: [0] for group in widths}
    cut = assert_equal_when_cut(fn, params, X, removed=removed)
    assert cut["stem"][1] == cut["head"][0] == cut["layers/up"][1] < 8


def test_a_carry_is_zero_only_if_it_stays_so():
    """What is added in each step reaches the last part of the carry two steps later."""

    def fn(params, x):
        def step(carry, _):
            first, second, last = carry
            last = last + rms_norm(last) + second
            return (first + params["every"], second + first, last), None

        start = [x @ params[name] for name in ("a", "b", "c")]
        (*_, last), _ = lax.scan(step, tuple(start), None, length=4)
        return last @ params["out"]

    params = draw({"a": (5, 6), "b": (5, 6), "c": (5, 6), "out": (6, 3)})
    params["every"] = draw((1, 6))
    removed = {"a[1]": [1, 4]}
    assert agp.find_couplings(fn, params, X)["a[1]"].exact
    cut = assert_equal_when_cut(fn, params, X, removed=removed)
    assert cut["every"] == (1, 4)
    drifts = lambda p, x: fn({**p, "every": jnp.exp(p["every"])}, x)  # noqa: E731
    (group,) = agp.find_couplings(drifts, params, X).groups
    assert group.inexact.startswith("reduce_sum at ")
    assert "rms_norm" in group.inexact


@jax.custom_jvp
def with_inner_derivative(x):
    return jax.nn.relu(x) * x


@with_inner_derivative.defjvp
def _(primals, tangents):
    return with_inner_derivative(*primals), tangents[0] * jax.nn.softplus(*primals)


@jax.custom_vjp
def with_inner_loop(x):
    return lax.fori_loop(0, 2, lambda _, x: jax.nn.relu6(x) * 0.9, x)


with_inner_loop.defvjp(
    lambda x: (with_inner_loop(x), x), lambda x, g: (g * with_inner_loop(x),)
)


def branches(x):
    return lax.cond(x.sum() > 0, jax.nn.relu, jnp.tanh, x)


@pytest.mark.parametrize(
    "function",
    [
        jax.nn.relu,
        jax.nn.mish,
        jax.checkpoint(jax.nn.relu6),
        branches,
        with_inner_derivative,
        with_inner_loop,
    ],
)
def test_layers_that_lose_other_units_have_derivatives_of_their_own(function):
    def fn(params, x):
        def layer(x, weights):
            return x + function(x @ weights["up"]) @ weights["down"], None

        return lax.scan(layer, x, params)[0]

    params = draw({"up": (3, 5, 6), "down": (3, 6, 5)})
    removed = {"up[2]": np.array([[0, 1], [2, 5], [3, 4]])}
    cut = assert_equal_when_cut(fn, params, X, removed=removed)
    assert cut == {"up": (3, 5, 4), "down": (3, 4, 5)}


def shift(h):
    """A quarter of the channels from the step before, a quarter from the one after."""
    later, sooner, rest = jnp.split(h, [2, 4], axis=-1)
    later = jnp.pad(later[:, 1:], ((0, 0), (0, 1), (0, 0)))
    sooner = jnp.pad(sooner[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.concatenate([later, sooner, rest], -1)


def shuffle_half(h):
    return jnp.concatenate([h[..., np.array([2, 0, 3, 1])], h[..., 4:]], -1)


def activate_half(h):
    return jnp.concatenate([jax.nn.relu(h[..., :4]), jnp.tanh(h[..., 4:])], -1)


def rotate_part_of_heads(h):
    heads = h.reshape(*h.shape[:-1], 2, 4)
    turned = jnp.concatenate([jnp.sin(heads[..., :2]), heads[..., 2:]], -1)
    return turned.reshape(h.shape)


def pad_with_ones(h):
    return jnp.pad(h, ((0, 0), (0, 0), (2, 3)), constant_values=1.0)


def pick_pairs(h):
    picks = np.array([0, 1, 2, 3, 0, 1, 2, 3]), np.array([0, 1, 0, 1, 1, 0, 1, 0])
    return h.reshape(*h.shape[:-1], 4, 2)[..., *picks]


def pick_some_pairs(h):
    return h.reshape(*h.shape[:-1], 4, 2)[..., np.arange(4), np.array([0, 1, 0, 1])]


@pytest.mark.parametrize(
    "move, sizes",
    [
        (lambda h: jnp.roll(h, 3, -1), [3, 5]),
        (shift, [2, 2, 4]),
        (shuffle_half, [4, 4]),
        (activate_half, [4, 4]),
        (lambda h: jnp.concatenate([h[..., ::2], h[..., 1::2]], -1), [4, 4]),
        (rotate_part_of_heads, [2, 2, 2]),
        (pad_with_ones, [5, 8]),
        (pick_pairs, [2, 4]),
    ],
)
def test_values_that_hold_a_part_of_the_units_are_as_large_in_all_layers(move, sizes):
    def fn(params, x):
        def layer(x, weights):
            return x + move(jnp.tanh(x @ weights["up"])) @ weights["down"], None

        return lax.scan(layer, x, params)[0]

    width = jax.eval_shape(move, jnp.zeros((2, 3, 8))).shape[-1]
    params, x = draw({"up": (3, 5, 8), "down": (3, width, 5)}), draw((2, 3, 5))
    stack, *groups = agp.find_couplings(fn, params, x).groups
    assert stack.is_stack and stack.num_units == 3
    assert sorted(group.num_units for group in groups) == sizes
    assert all(group.num_layers == 3 for group in groups)
    rng = np.random.default_rng(0)
    removed = {
        g.name: np.stack([rng.permutation(g.num_units)[:1] for _ in range(3)])
        for g in groups
    }
    cut = assert_equal_when_cut(fn, params, x, removed=removed)
    assert cut["up"][2] < 8 and cut["down"][1] < width


def test_what_picks_other_pairs_in_each_layer_goes_in_all():
    """How many of four pairs stay is not settled by how many rows and columns do."""

    def fn(params, x):
        def layer(x, weights):
            hidden = pick_some_pairs(jnp.tanh(x @ weights["up"]))
            return x + hidden @ weights["down"], None

        return lax.scan(layer, x, params)[0]

    params = draw({"up": (3, 5, 8), "down": (3, 4, 5)})
    stack, *groups = agp.find_couplings(fn, params, X).groups
    assert stack.is_stack and stack.num_units == 3
    assert sorted(g.num_units for g in groups) == [2, 4]
    assert all(group.num_layers is None for group in groups)
    for group in groups:
        assert_equal_when_cut(fn, params, X, removed={group.name: [1]})


def test_bits_are_read_at_another_width():
    """Axes pass but the one that counts the parts of a number."""

    def fn(params, x):
        narrow = lax.bitcast_convert_type(x @ params["up"], jnp.uint32)
        again = lax.bitcast_convert_type(narrow, jnp.float64)
        low = narrow[..., 0].astype(jnp.float64) * 2.0**-32
        wide = lax.bitcast_convert_type(params["bytes"], jnp.int32)
        return (again + low + wide[None] * 2.0**-31) @ params["down"]

    params = draw({"up": (5, 6), "down": (6, 3)})
    rng = np.random.default_rng(0)
    params["bytes"] = jnp.asarray(rng.integers(-128, 128, (6, 4)), jnp.int8)
    couplings = agp.find_couplings(fn, params, X)
    ((start, stop, reason),) = couplings.frozen["bytes", 1]
    assert (start, stop) == (0, 4) and reason.startswith("bitcast_convert_type at ")
    masks = couplings.masks({"up[1]": [1, 4]})
    cut = agp.plan_cut(masks, couplings)
    full, small, thin_fn = thinned_pair(fn, params, cut, masks)
    assert small["bytes"].shape == (4, 4)
    np.testing.assert_allclose(thin_fn(small, X), fn(full, X), rtol=1e-9)


def through_frequencies(params, x):
    """A Fourier layer: features are mixed for each frequency of the positions."""
    spectrum = jnp.fft.rfft(jnp.tanh(x @ params["up"]), axis=1)
    mixed = jnp.einsum("bfc,fcd->bfd", spectrum, params["mix"])
    return jnp.fft.irfft(mixed, n=x.shape[1], axis=1) @ params["out"]


def through_both(params, x):
    mixed = jnp.tanh(jnp.fft.fft2(x @ params["up"], axes=(0, 1)).real)
    return (mixed @ params["mix"][0] + mixed @ params["mix"][1]) @ params["out"]


def sorted_and_normalised(params, x):
    ordered = rms_norm(jnp.sort(x @ params["up"], axis=1))
    largest, places = lax.top_k(ordered, 2, axis=1)
    mixed = jnp.tanh(largest * (1 + places)) @ params["mix"].sum(0)
    return mixed @ params["out"]


@pytest.mark.parametrize(
    "fn", [through_frequencies, through_both, sorted_and_normalised]
)
def test_what_goes_along_positions_hands_on_the_features(fn):
    params = draw({"up": (5, 6), "mix": (3, 6, 8), "out": (8, 3)})
    removed = {"up[1]": [0, 2, 3], "mix[2]": [1, 6, 7]}
    cut = assert_equal_when_cut(fn, params, draw((2, 4, 5)), removed=removed)
    assert cut == {"up": (5, 3), "mix": (3, 3, 5), "out": (5, 3)}


def without_zeros(hidden):
    return jnp.where(jnp.any(hidden != 0, axis=0), hidden, -jnp.inf)


def without_zeros_by_all(hidden):
    return jnp.where(jnp.all(hidden == 0, 0, keepdims=True), -jnp.inf, hidden)


def shifted(hidden):
    absent = jnp.where(jnp.all(hidden == 0, 0, keepdims=True), -jnp.inf, 0.0)
    return jnp.flip(2 * (hidden - 1 + absent) / 3, axis=1)[:, ::-1]


@pytest.mark.parametrize("lowered", [without_zeros, without_zeros_by_all, shifted])
def test_what_is_minus_infinity_where_masked_is_left_out(lowered):
    """Zeros that become minus infinity count in no maximum, and in no softmax."""

    def fn(params, x):
        logits = lowered(x @ params["up"])
        total = jnp.sum(jax.nn.softplus(logits) + jax.nn.sigmoid(logits), -1)
        ends = jnp.max(logits, -1) + jnp.min(-jnp.minimum(logits, 9), -1)
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        scale = (total + ends + log_sum)[:, None]
        return scale * jax.nn.softmax(logits) @ params["down"]

    params = draw({"up": (5, 6), "down": (6, 3)})
    assert agp.find_couplings(fn, params, X)["up[1]"].exact
    cut = assert_equal_when_cut(fn, params, X, removed={"up[1]": [1, 4, 5]})
    assert cut == {"up": (5, 3), "down": (3, 3)}


@pytest.mark.parametrize(
    "inexact",
    [
        lambda x: jnp.max(x + 1, axis=-1, keepdims=True),
        lambda x: jnp.min(without_zeros(x), axis=-1, keepdims=True),
        lambda x: jnp.sum(1 + jnp.exp(without_zeros(x)), axis=-1, keepdims=True),
        lambda x: jnp.sum(jnp.sign(x) * without_zeros(x), axis=-1, keepdims=True),
    ],
)
def test_other_numbers_count(inexact):
    def fn(params, x):
        x = x @ params["up"]
        return inexact(x) * x @ params["down"]

    params = draw({"up": (5, 6), "down": (6, 3)})
    assert not agp.find_couplings(fn, params, X)["up[1]"].exact


def best_two(params, x):
    logits = without_zeros_of(params["router"], x)
    return lax.top_k(logits, 2)[1]


def without_zeros_of(router, x):
    return jnp.where(jnp.any(router != 0, 0, keepdims=True), x @ router, -jnp.inf)


EXPERTS = {"router": (5, 4), "up": (4, 5, 3)}


def test_each_layer_may_lose_other_experts():
    def fn(params, x):
        def layer(x, kernels):
            chosen = best_two(kernels, x)
            order = jnp.argsort(chosen.ravel())
            made = jnp.einsum("tc,tkch->th", x, kernels["up"][chosen])
            sizes = jnp.bincount(chosen.ravel(), length=4).astype(jnp.int32)
            runs = lax.ragged_dot(x[order // 2], kernels["gate"], sizes)
            runs = jnp.zeros_like(runs).at[order].set(runs).reshape(4, 2, 3).sum(1)
            first = kernels["first"][chosen[0, 0]][None]
            return x + jnp.tanh(made + runs + first) @ kernels["down"], None

        return lax.scan(layer, x, params)[0]

    shapes = {**EXPERTS, "gate": (4, 5, 3), "down": (3, 5), "first": (4, 3)}
    params = draw({path: (2, *shape) for path, shape in shapes.items()})
    removed = {"router[2]": [[0, 3], [2, 1]]}
    cut = assert_equal_when_cut(fn, params, X, removed=removed)
    assert cut["router"] == (2, 5, 2) and cut["up"] == cut["gate"] == (2, 2, 5, 3)


def test_numbers_of_experts_may_be_used_in_many_ways():
    def fn(params, x):
        up, chosen = params["up"], best_two(params, x)
        here = jnp.expand_dims(chosen, -1)
        ramp = jnp.arange(4)[None, None]
        loads = jnp.bincount(chosen.ravel(), length=4).astype(up.dtype)
        found = [
            up[jnp.sort(chosen, axis=-1)[:, ::-1]],
            up[jnp.stack([chosen, chosen[::-1]])[0]],
            up[jnp.clip(chosen, 0, 3).astype(jnp.uint8)],
            up.at[chosen.ravel(), 1].set(2.0)[chosen],
            up.at[chosen[0, 0]].multiply(2.0)[chosen],
            up[chosen] * (chosen + jnp.arange(4.0)[chosen])[..., None, None],
            jnp.take(up, chosen, axis=0, mode="clip"),
            jnp.take_along_axis(up, chosen[0, :, None, None], axis=0),
            jnp.einsum("tke,ech->ch", (here == np.arange(4)[None, None]) * 1.0, up),
            jnp.where(here != ramp, 0.0, 1.0) @ jnp.cumsum(loads)[:, None],
            jnp.cumsum(loads)[chosen] - chosen,
        ]
        return sum(jnp.sum(jnp.sin(i + x)) for i, x in enumerate(found))

    params = draw(EXPERTS)
    assert agp.find_couplings(fn, params, X)["router[1]"].exact
    cut = assert_equal_when_cut(fn, params, X, removed={"router[1]": [0, 2]})
    assert cut == {"router": (5, 2), "up": (2, 5, 3)}


@pytest.mark.parametrize(
    "use",
    [
        lambda chosen, up: up[(chosen + 1) % 4],
        lambda chosen, up: up[jnp.where(chosen > 1, chosen, 0)],
        lambda chosen, up: up[3 - chosen],
        lambda chosen, up: up[jnp.minimum(chosen, 2)],
        lambda chosen, up: up.reshape(2, 2, 5, 3)[chosen // 2, chosen % 2],
        lambda chosen, up: jnp.concatenate([up, up])[chosen + 4],
    ],
)
def test_what_is_computed_of_numbers_fixes_what_it_picks_from(use):
    def fn(params, x):
        return use(best_two(params, x), params["up"])

    couplings = agp.find_couplings(fn, draw(EXPERTS), X)
    assert "gather at " in couplings.frozen["up", 0][0][2]


def test_as_many_experts_stay_as_are_chosen():
    def fn(params, x):
        return params["up"][best_two(params, x)]

    params = draw(EXPERTS)
    couplings = agp.find_couplings(fn, params, X)
    assert "4 units, 2 chosen at a time, exact" in couplings.table()
    masks = couplings.masks({"router[1]": [0, 2, 3]})
    cut = agp.plan_cut(masks, couplings)
    assert cut.thin_shape("router") == (5, 2)
    kept = {"router": {1: np.array([1])}, "up": {0: np.array([1])}}
    thinned = agp.thin_function(fn, params, agp.Cut(kept, cut.shapes))
    with pytest.raises(ValueError, match="leaves 1 of what top_k at .* chooses 2 from"):
        thinned({"router": jnp.ones((5, 1)), "up": jnp.ones((1, 5, 3))}, X)


def test_experts_of_ragged_products_lose_width_and_hidden_units():
    """The two best of three experts for each token, in runs of tokens sorted by it."""

    def fn(params, x):
        stream = x @ params["embed"]
        tokens = rms_norm(stream)
        weights, experts = lax.top_k(jax.nn.softmax(tokens @ params["router"]), 2)
        order = jnp.argsort(experts.ravel())
        sizes = jnp.bincount(experts.ravel(), length=3).astype(jnp.int32)
        routed = jnp.repeat(tokens, 2, axis=0)[order]
        gate = lax.ragged_dot(routed, params["gate"], sizes)
        hidden = jax.nn.silu(gate) * lax.ragged_dot(routed, params["up"], sizes)
        made = lax.ragged_dot(hidden, params["down"], sizes)
        made = jnp.zeros_like(made).at[order].set(made)
        made = made.reshape(*experts.shape, -1) * weights[..., None]
        return (stream + made.sum(1)) @ params["head"]

    wide, narrow = {"gate": (3, 8, 6), "up": (3, 8, 6)}, {"down": (3, 6, 8)}
    ends = {"embed": (5, 8), "router": (8, 3), "head": (8, 3)}
    params, x = draw({**ends, **wide, **narrow}), draw((7, 5))
    couplings = agp.find_couplings(fn, params, x)
    assert {g.name: g.exact for g in couplings.groups} == {
        "down[2]": True,
        "gate[2]": True,
        "router[1]": False,  # zeros are no lowest numbers
    }
    removed = {"down[2]": [1, 4, 5], "gate[2]": [0, 3]}
    cut = assert_equal_when_cut(fn, params, x, removed=removed)
    assert cut["gate"] == cut["up"] == (3, 5, 4) and cut["down"] == (3, 4, 5)


@pytest.mark.parametrize(
    "mask",
    [
        lambda: np.ones((2, 2)),
        lambda: jnp.ones((2, 2), bool).astype(jnp.float64),
        lambda: [np.full(2, 0.5)] * 2,
    ],
)
def test_a_constant_of_one_number_ties_nothing(mask):
    """A mask over the heads of two layers leaves each its own choice of heads."""

    def fn(params, x):
        ones = mask()
        for i in range(2):
            heads = jnp.tanh(x @ params["up"][i]).reshape(-1, 2, 3)
            heads = heads * ones[i][None, :, None] + jnp.zeros((4, 2, 3))
            x = x + heads.reshape(-1, 6) @ params["down"][i]
        return x

    params = draw({"up": [(5, 6), (5, 6)], "down": [(6, 5), (6, 5)]})
    names = [f"up/{i}[1]{kind}" for i in range(2) for kind in ("", "#2")]
    removed = {names[0]: [0], names[2]: [1]}
    couplings = agp.find_couplings(fn, params, X)
    assert [group.name for group in couplings.groups] == names
    cut = assert_equal_when_cut(fn, params, X, removed=removed)
    assert cut["up/0"] == cut["up/1"] == (5, 3)


def test_zeros_are_known_in_arrays_of_one_number():
    def fn(params, x):
        hidden = x @ params["up"]
        clipped = jnp.maximum(hidden, jnp.zeros_like(hidden))
        clipped = jnp.minimum(clipped, jnp.full_like(hidden, 6.0))
        chosen = jnp.where(x[:, :1] > 0, clipped, jnp.zeros((4, 6)))
        return rms_norm(chosen) @ params["down"]

    params = draw({"up": (5, 6), "down": (6, 3)})
    assert agp.find_couplings(fn, params, X)["up[1]"].exact
    cut = assert_equal_when_cut(fn, params, X, removed={"up[1]": [1, 4, 5]})
    assert cut == {"up": (5, 3), "down": (3, 3)}
