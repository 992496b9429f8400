import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agp_jax as agp
from agp_jax.models.lstm import (
    LstmLanguageModel,
    large_lstm,
    medium_lstm,
    recur,
    small_lstm,
)
from agp_jax.trees import flatten_with_paths

VOCABULARY, WIDTH, ROWS, LENGTH = 11, 6, 3, 5
NO_STARTS = np.zeros(ROWS, bool)
each_decoder = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def random_tokens(length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCABULARY, (ROWS, length)).astype(np.int32)


def make(tied=True, **options):
    """A small model with variables that are all random, the carry and biases too."""
    model = LstmLanguageModel(VOCABULARY, WIDTH, tied=tied, **options)
    shapes = jax.eval_shape(
        functools.partial(model.init, train=False),
        jax.random.key(0),
        random_tokens(),
        NO_STARTS,
    )
    rng = np.random.default_rng(1)
    draw = lambda x: (0.5 * rng.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
    return model, jax.tree.map(draw, shapes)


def run(model, variables, tokens, starts=NO_STARTS):
    """Logits, and the carry that they leave."""
    apply = functools.partial(model.apply, train=False, mutable=["carry"])
    logits, changes = jax.jit(apply)(variables, tokens, starts)
    return logits, changes["carry"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_logits(variables, tokens):
    """The formulas of torch.nn.LSTM, one step and one layer at a time, in float64."""
    params, carry = jax.tree.map(np.float64, (variables["params"], variables["carry"]))
    embedding = params["embedding"]["embedding"]
    decoder = params["decoder"]
    states = {k: [x["hidden_state"], x["cell_state"]] for k, x in carry.items()}
    logits = []
    for now in tokens.T:
        x = embedding[now]
        for name, state in states.items():
            into, again = params[name]["input"], params[name]["hidden"]
            gates = x @ into["kernel"] + into["bias"]
            gates += state[0] @ again["kernel"] + again["bias"]
            i, f, g, o = np.split(gates, 4, axis=1)
            state[1] = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
            state[0] = x = sigmoid(o) * np.tanh(state[1])
        logits.append(x @ decoder.get("kernel", embedding.T) + decoder["bias"])
    return np.stack(logits, axis=1), states


@each_decoder
def test_logits_and_carry_are_those_of_the_formulas(tied):
    model, variables = make(tied)
    tokens = random_tokens()
    logits, carry = run(model, variables, tokens)
    expected, states = numpy_logits(variables, tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    for name, (hidden, cell) in states.items():
        np.testing.assert_allclose(carry[name]["hidden_state"], hidden, atol=1e-5)
        np.testing.assert_allclose(carry[name]["cell_state"], cell, atol=1e-5)


def test_hidden_states_are_those_of_torch():
    torch = pytest.importorskip("torch")
    model, variables = make()
    params, carry = variables["params"], variables["carry"]
    lstm = torch.nn.LSTM(WIDTH, WIDTH, num_layers=2)
    state = lstm.state_dict()
    for i in range(2):
        for ours, theirs in (("input", "ih"), ("hidden", "hh")):
            gates = params[f"layer{i}"][ours]
            state[f"weight_{theirs}_l{i}"] = torch.from_numpy(gates["kernel"].T.copy())
            state[f"bias_{theirs}_l{i}"] = torch.from_numpy(gates["bias"])
    lstm.load_state_dict(state)
    tokens = random_tokens()
    embedded = torch.from_numpy(params["embedding"]["embedding"][tokens.T])
    before = tuple(
        torch.from_numpy(np.stack([carry[f"layer{i}"][name] for i in range(2)]))
        for name in ("hidden_state", "cell_state")
    )
    with torch.no_grad():
        outputs, (hidden, cell) = lstm(embedded, before)
    logits, after = run(model, variables, tokens)
    decoder = params["embedding"]["embedding"].T
    expected = outputs.numpy() @ decoder + params["decoder"]["bias"]
    np.testing.assert_allclose(logits, expected.swapaxes(0, 1), rtol=1e-5, atol=1e-5)
    for i in range(2):
        layer = after[f"layer{i}"]
        np.testing.assert_allclose(layer["hidden_state"], hidden[i], atol=1e-5)
        np.testing.assert_allclose(layer["cell_state"], cell[i], atol=1e-5)


def test_a_text_goes_on_in_the_next_batch():
    model, variables = make()
    tokens = random_tokens(8)
    whole, last = run(model, variables, tokens)
    first, carry = run(model, variables, tokens[:, :3])
    second, carry = run(model, {**variables, "carry": carry}, tokens[:, 3:])
    parts = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rows_that_start_forget_what_was_carried():
    model, variables = make()
    tokens = random_tokens()
    starts = np.array([True, False, True])
    some, _ = run(model, variables, tokens, starts)
    carried, _ = run(model, variables, tokens)
    anew, carry = run(model, {"params": variables["params"]}, tokens)
    zeros = jax.tree.map(np.zeros_like, variables["carry"])
    np.testing.assert_array_equal(some, np.where(starts[:, None, None], anew, carried))
    assert np.abs(np.asarray(anew - carried)).max() > 1e-3
    assert jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, zeros)
    from_zeros, _ = run(model, {**variables, "carry": zeros}, tokens)
    np.testing.assert_array_equal(from_zeros, anew)


def test_a_carry_of_another_number_of_rows_is_of_other_texts():
    model, variables = make()
    apply = functools.partial(model.apply, train=False)
    _, after = run(model, variables, random_tokens())
    params, fewer = {"params": variables["params"]}, random_tokens()[:2]
    found = apply({**params, "carry": after}, fewer, NO_STARTS[:2])
    np.testing.assert_array_equal(found, apply(params, fewer, NO_STARTS[:2]))


def test_a_carry_that_is_not_mutable_stays():
    model, variables = make()
    logits = model.apply(variables, random_tokens(), NO_STARTS, train=False)
    np.testing.assert_allclose(
        logits, run(model, variables, random_tokens())[0], atol=1e-6
    )


@each_decoder
def test_it_starts_as_published(tied):
    model = LstmLanguageModel(500, 64, tied=tied)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), random_tokens(), NO_STARTS)
    paths, leaves, _ = flatten_with_paths(variables)
    for path, leaf in zip(paths, leaves, strict=True):
        if path.startswith("carry/") or path == "params/decoder/bias":
            assert not leaf.any(), path
        else:
            is_layer = path.startswith("params/layer")
            bound = 1 / math.sqrt(64) if is_layer else 0.1
            assert 0.97 * bound < leaf.max() <= bound, path
            assert -bound <= leaf.min() < -0.97 * bound, path


def test_training_drops_what_layers_and_decoder_read():
    tokens, keys = random_tokens(), {"dropout": jax.random.key(0)}
    model, variables = make(dropout=0.5)
    kept, _ = make(dropout=0.0)
    fn = functools.partial(model.apply, variables, tokens, NO_STARTS)
    assert np.abs(np.asarray(fn(train=True, rngs=keys) - fn(train=False))).max() > 0.1
    np.testing.assert_array_equal(
        kept.apply(variables, tokens, NO_STARTS, train=True), fn(train=False)
    )
    # The decoder reads nothing where everything is dropped.
    nothing, _ = make(dropout=1.0)
    logits = nothing.apply(variables, tokens, NO_STARTS, train=True, rngs=keys)
    bias = variables["params"]["decoder"]["bias"]
    np.testing.assert_array_equal(logits, np.broadcast_to(bias, logits.shape))


def test_gradients_are_those_of_the_steps_one_by_one():
    rng = np.random.default_rng(0)
    shapes = [(LENGTH, ROWS, 4 * WIDTH), (WIDTH, 4 * WIDTH), *[(ROWS, WIDTH)] * 2]
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    weights = [rng.standard_normal((LENGTH, ROWS, WIDTH)).astype(np.float32)]
    weights += [rng.standard_normal((ROWS, WIDTH)).astype(np.float32) for _ in range(2)]

    def steps(gates, kernel, hidden, cell):
        outputs = []
        for gate in gates:
            i, f, g, o = jnp.split(gate + hidden @ kernel, 4, axis=-1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            outputs.append(hidden)
        return jnp.stack(outputs), hidden, cell

    def gradients(fn):
        def loss(*inputs):
            parts = zip(fn(*inputs), weights, strict=True)
            return sum((a * b).sum() for a, b in parts)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*inputs)

    for found, expected in zip(gradients(recur), gradients(steps), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# The matrices of all layers and of the decoder, tied and not, by AGP_EXAMPLES' sums:
# 4 matrices of 4 * width**2, and 33,278 * width once or twice.
PUBLISHED = [
    (small_lstm, 7_295_600, 13_951_200),
    (medium_lstm, 28_390_700, 50_021_400),
    (large_lstm, 85_917_000, 135_834_000),
]


@pytest.mark.parametrize("make_model, tied, untied", PUBLISHED)
def test_published_models_have_their_weights(make_model, tied, untied):
    for is_tied, weights in ((True, tied), (False, untied)):
        model = make_model(33_278, is_tied)
        tokens, starts = np.zeros((1, 4), np.int32), np.zeros(1, bool)
        init = functools.partial(model.init, train=False)
        variables = jax.eval_shape(init, jax.random.key(0), tokens, starts)
        paths, leaves, _ = flatten_with_paths(variables["params"])
        matrices = {p: x.size for p, x in zip(paths, leaves, strict=True) if x.ndim > 1}
        assert sum(matrices.values()) == weights
        names = [f"layer{i}/{x}/kernel" for i in (0, 1) for x in ("input", "hidden")]
        names += ["embedding/embedding", *([] if is_tied else ["decoder/kernel"])]
        assert sorted(matrices) == sorted(names)
        predict = functools.partial(model.apply, train=False)
        cost = agp.measure_cost(predict, variables, tokens, starts)
        assert cost.macs == 4 * tied  # looking vectors up multiplies nothing


@each_decoder
def test_the_units_of_each_layer_are_one_exact_group(tied):
    model, variables = make(tied)
    predict = functools.partial(model.apply, train=False)
    couplings = agp.find_couplings(predict, variables, random_tokens(), NO_STARTS)
    found = {
        frozenset((m.path, m.axis, m.indices.shape[1]) for m in group.members)
        for group in couplings.groups
    }

    def layer(i, *readers):
        start = f"params/layer{i}"
        return {
            (f"carry/layer{i}/hidden_state", 1, 1),
            (f"carry/layer{i}/cell_state", 1, 1),
            (f"{start}/input/kernel", 1, 4),
            (f"{start}/input/bias", 0, 4),
            (f"{start}/hidden/kernel", 1, 4),
            (f"{start}/hidden/bias", 0, 4),
            (f"{start}/hidden/kernel", 0, 1),
            *readers,
        }

    embedding = {
        ("params/embedding/embedding", 1, 1),
        ("params/layer0/input/kernel", 0, 1),
    }
    expected = [layer(0, ("params/layer1/input/kernel", 0, 1))]
    if tied:
        expected += [layer(1, *embedding)]
    else:
        expected += [layer(1, ("params/decoder/kernel", 0, 1)), embedding]
    assert found == set(map(frozenset, expected))
    assert all(g.exact and g.num_units == WIDTH for g in couplings.groups)


def cut_some(model, variables):
    """Masks over the variables, and the cut of 2 and 3 units of the groups."""
    predict = functools.partial(model.apply, train=False)
    couplings = agp.find_couplings(predict, variables, random_tokens(), NO_STARTS)
    removed = {g.name: [0, 3, 4][i % 2 :] for i, g in enumerate(couplings.groups)}
    masks = couplings.masks(removed)
    cut = agp.plan_cut({"params": masks["params"]}, couplings)
    return masks, cut


@each_decoder
def test_a_cut_leaves_what_the_masked_model_computes(tied):
    model, variables = make(tied)
    masks, cut = cut_some(model, variables)
    # What dead units carry needs no mask: nothing reads it.
    masks = {"params": masks["params"]}
    inputs = random_tokens(), np.array([False, True, False])
    predict = functools.partial(model.apply, train=False)
    with_carry = functools.partial(predict, mutable=["carry"])
    assert agp.check_cut(predict, variables, masks, cut, *inputs).error <= 1e-6
    thinned = agp.thin(agp.apply_masks(variables, masks), cut)
    assert thinned["carry"]["layer0"]["cell_state"].shape == (ROWS, WIDTH - 3)
    logits, changes = with_carry(thinned, *inputs)
    function = agp.thin_function(with_carry, variables, cut)
    expected, carry = function(thinned, *inputs)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        *(jax.device_get(x["carry"]) for x in (changes, carry)),
    )
    assert np.abs(np.asarray(logits - predict(variables, *inputs))).max() > 1e-2


@each_decoder
def test_a_cut_leaves_the_gradients_of_training(tied):
    model, variables = make(tied, dropout=0.3)
    masks, cut = cut_some(model, variables)
    inputs = random_tokens(), np.array([False, True, False]), jax.random.key(3)

    def loss(variables, tokens, starts, key):
        logits, _ = model.apply(
            variables,
            tokens,
            starts,
            train=True,
            rngs={"dropout": key},
            mutable=["carry"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    masked = agp.apply_masks(variables, masks)
    gradients = jax.jit(jax.grad(loss))(masked, *inputs)
    expected = agp.thin(gradients, cut)
    thinned = jax.jit(jax.grad(agp.thin_function(loss, variables, cut)))
    found = thinned(agp.thin(masked, cut), *inputs)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        *jax.device_get((found, expected)),
    )
    assert np.abs(found["params"]["layer0"]["hidden"]["kernel"]).max() > 1e-4


def test_a_rule_for_filters_prunes_and_cuts_units():
    model, variables = make()
    params, tokens = variables["params"], random_tokens()
    predict = functools.partial(model.apply, train=False)
    couplings = agp.find_couplings(predict, variables, tokens, NO_STARTS)
    rule = agp.Rule("layer0/.*/kernel", agp.filters(), agp.one_shot(0.5))
    rules = [rule, agp.dense(".*")]
    tx = agp.prune(optax.sgd(0.1), rules, couplings=couplings.subtree("params"))
    state = jax.jit(tx.init)(params)
    cut = agp.plan_cut({"params": agp.get_masks(state)}, couplings)
    half = WIDTH // 2
    assert cut.thin_shape("params/layer0/hidden/kernel") == (half, 4 * half)
    assert cut.thin_shape("params/layer1/input/kernel") == (half, 4 * WIDTH)
    assert cut.thin_shape("carry/layer0/hidden_state") == (ROWS, half)
