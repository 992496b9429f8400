import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agp_jax as agp
from agp_jax.models.gpt import Gpt, rotate, waves
from agp_jax.trees import flatten_with_paths

VOCABULARY, WIDTH, DEPTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 11, 12, 3, 4, 2, 4, 10
ROWS, LENGTH = 2, 5
EXPERTS_PER_TOKEN = 2  # the default
STARTS = np.array([True, False])


def random_tokens(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)


def make(kv_heads=KV_HEADS, **options):
    """A small model, and variables that make every part of it matter."""
    model = Gpt(VOCABULARY, WIDTH, DEPTH, HEADS, kv_heads, HEAD_DIM, HIDDEN, **options)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), random_tokens(), STARTS)
    rng = np.random.default_rng(1)

    def draw(keys, x):
        numbers = 0.4 * rng.standard_normal(x.shape) + (keys[-1].key == "scale")
        return numbers.astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def predict_with(model):
    return jax.jit(functools.partial(model.apply, train=False))


def rms_norm(x, scale):
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def numpy_logits(variables, tokens):
    """Layer by layer, row by row, position by position and head by head, in float64."""
    params = jax.tree.map(np.float64, variables["params"])
    embedding = params["embedding"]["embedding"]
    half = HEAD_DIM // 2

    def turn(x, position):
        angles = position * 10_000.0 ** (-np.arange(half) / half)
        turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag])

    def attention(kernels, x):
        query, key, value = (
            (x @ kernels[name]["kernel"]).reshape(len(x), -1, HEAD_DIM)
            for name in ("query", "key", "value")
        )
        shared = HEADS // key.shape[1]
        y = np.zeros(query.shape)
        for t in range(len(x)):
            for h in range(HEADS):
                now = turn(query[t, h], t)
                past = [turn(key[s, h // shared], s) for s in range(t + 1)]
                weights = np.exp([now @ k / np.sqrt(HEAD_DIM) for k in past])
                y[t, h] = weights / weights.sum() @ value[: t + 1, h // shared]
        return y.reshape(len(x), -1) @ kernels["out"]["kernel"]

    def mlp(kernels, x):
        if "router" in kernels:
            return np.stack([experts(kernels, token) for token in x])
        gate, up = x @ kernels["gate"]["kernel"], x @ kernels["up"]["kernel"]
        return (gate / (1 + np.exp(-gate)) * up) @ kernels["down"]["kernel"]

    def experts(kernels, token):
        logits = token @ kernels["router"]["kernel"]
        best = np.argsort(-logits)[:EXPERTS_PER_TOKEN]
        weights = np.exp(logits[best]) / np.exp(logits[best]).sum()
        own = {k: v for k, v in kernels.items() if k != "router"}
        made = [mlp(jax.tree.map(lambda x, e=e: x[e], own), token) for e in best]
        return weights @ np.stack(made)

    logits = []
    for row in tokens:
        x = embedding[row]
        for i in range(DEPTH):
            block = jax.tree.map(lambda stacked, i=i: stacked[i], params["blocks"])
            x = x + attention(block["attention"], rms_norm(x, block["norm1"]["scale"]))
            x = x + mlp(block["mlp"], rms_norm(x, block["norm2"]["scale"]))
        logits.append(rms_norm(x, params["final_norm"]["scale"]) @ embedding.T)
    return np.stack(logits)


@pytest.mark.parametrize(
    "options",
    [{"kv_heads": 1}, {"kv_heads": 2}, {"kv_heads": 4}, {"num_experts": 4}],
    ids=str,
)
def test_logits_are_those_of_the_formulas(options):
    model, variables = make(**options)
    tokens = random_tokens()
    logits = predict_with(model)(variables, tokens, STARTS)
    expected = numpy_logits(variables, tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_logits_tell_nothing_of_later_tokens():
    model, variables = make()
    predict = predict_with(model)
    tokens = random_tokens()
    other = tokens.copy()
    other[:, 3] = (tokens[:, 3] + 1) % VOCABULARY
    before, after = (
        predict(variables, tokens, STARTS),
        predict(variables, other, ~STARTS),
    )
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(np.asarray(before - after)).max(axis=(0, 2))[3:] > 1e-3).all()


def test_products_of_turned_vectors_depend_on_their_distance():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2, 8)).astype(np.float32)
    one, other = (jnp.broadcast_to(x, (1, 6, 1, 8)) for x in vectors)
    one, other = (rotate(x, *waves(6, 8))[0, :, 0] for x in (one, other))
    products = np.asarray(one @ other.T)
    for distance in range(-5, 6):
        along = np.diagonal(products, distance)
        np.testing.assert_allclose(along, along[0], atol=1e-5)
    np.testing.assert_array_equal(one[0], vectors[0])
    assert np.ptp(products[0]) > 0.1


def loss_of(model):
    def loss(variables, tokens, starts, key):
        logits = model.apply(
            variables, tokens, starts, train=True, rngs={"dropout": key}
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    return loss


def test_layers_computed_again_have_the_same_gradients():
    inputs = random_tokens(), STARTS, jax.random.key(0)
    found = []
    for remat in (False, True):
        model, variables = make(remat=remat, dropout=0.2)
        loss = jax.value_and_grad(loss_of(model))
        is_there = "remat" in str(jax.make_jaxpr(loss)(variables, *inputs))
        assert is_there == remat
        found.append(jax.jit(loss)(variables, *inputs))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_near_and_keeps_parameters_and_logits_in_float32():
    model, variables = make()
    low, _ = make(dtype=jnp.bfloat16)
    inputs = random_tokens(), STARTS
    expected = predict_with(model)(variables, *inputs)
    logits = predict_with(low)(variables, *inputs)
    made = jax.eval_shape(
        functools.partial(low.init, train=False), jax.random.key(0), *inputs
    )
    assert {x.dtype for x in (logits, *jax.tree.leaves(made))} == {jnp.dtype("float32")}
    error = np.abs(np.asarray(logits - expected)).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.03


def test_training_drops_and_starts_are_not_read():
    model, variables = make(dropout=0.5)
    tokens = random_tokens()
    predict = predict_with(model)
    expected = predict(variables, tokens, STARTS)
    np.testing.assert_array_equal(predict(variables, tokens, ~STARTS), expected)
    train = jax.jit(
        lambda key: model.apply(
            variables, tokens, STARTS, train=True, rngs={"dropout": key}
        )
    )
    one, other = train(jax.random.key(0)), train(jax.random.key(1))
    assert np.abs(np.asarray(one - other)).max() > 0.1
    nothing, _ = make(dropout=1.0)
    logits = jax.jit(
        lambda key: nothing.apply(
            variables, tokens, STARTS, train=True, rngs={"dropout": key}
        )
    )(jax.random.key(0))
    np.testing.assert_array_equal(logits, np.zeros_like(logits))


def test_parameters_and_macs_are_those_counted_by_hand():
    model, variables = make()
    paths, leaves, _ = flatten_with_paths(variables["params"])
    query, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    assert {p: x.shape for p, x in zip(paths, leaves, strict=True)} == {
        "blocks/attention/key/kernel": (DEPTH, WIDTH, kv),
        "blocks/attention/out/kernel": (DEPTH, query, WIDTH),
        "blocks/attention/query/kernel": (DEPTH, WIDTH, query),
        "blocks/attention/value/kernel": (DEPTH, WIDTH, kv),
        "blocks/mlp/down/kernel": (DEPTH, HIDDEN, WIDTH),
        "blocks/mlp/gate/kernel": (DEPTH, WIDTH, HIDDEN),
        "blocks/mlp/up/kernel": (DEPTH, WIDTH, HIDDEN),
        "blocks/norm1/scale": (DEPTH, WIDTH),
        "blocks/norm2/scale": (DEPTH, WIDTH),
        "embedding/embedding": (VOCABULARY, WIDTH),
        "final_norm/scale": (WIDTH,),
    }
    weights = DEPTH * WIDTH * (2 * query + 2 * kv + 3 * HIDDEN) + VOCABULARY * WIDTH
    inputs = random_tokens()[:1], STARTS[:1]
    cost = agp.measure_cost(
        functools.partial(model.apply, train=False), variables, *inputs
    )
    assert cost.params == weights + (2 * DEPTH + 1) * WIDTH
    assert cost.weight_params == weights
    of_scores = 2 * DEPTH * HEADS * LENGTH**2 * HEAD_DIM
    assert cost.macs == LENGTH * weights + of_scores


def test_new_kernels_are_normal_and_what_ends_in_the_stream_is_smaller():
    model = Gpt(500, 64, 8, 4)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), random_tokens(), STARTS)
    paths, leaves, _ = flatten_with_paths(variables["params"])
    for path, leaf in zip(paths, leaves, strict=True):
        if path.endswith("scale"):
            assert (leaf == 1).all(), path
        else:
            ends = path.endswith(("out/kernel", "down/kernel"))
            np.testing.assert_allclose(leaf.std(), 0.005 if ends else 0.02, rtol=0.03)
    assert variables["params"]["blocks"]["mlp"]["up"]["kernel"].shape == (8, 64, 176)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple of the 3 heads of keys, got 4"),
        ({"num_heads": 5}, "multiple of the 5 heads, got 16; or give head_dim"),
        ({"num_heads": 4, "head_dim": 5}, "even number of features.*got 5"),
        (
            {"num_experts": 1},
            "experts_per_token must be from 1 to the 1",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(options, message):
    model = Gpt(VOCABULARY, 16, 1, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            functools.partial(model.init, train=False),
            jax.random.key(0),
            random_tokens(),
            STARTS,
        )


def find_groups(model, variables):
    """The couplings of a model, and its groups by what makes their units."""
    predict = functools.partial(model.apply, train=False)
    couplings = agp.find_couplings(predict, variables, random_tokens(), STARTS)
    groups = {}
    for group in couplings.groups:
        made = sorted(
            (m.path.split("/")[-2], m.indices.shape[1])
            for m in group.members
            if m.role == "out"
        )
        groups[LAYERS if group.is_stack else tuple(made)] = group
    return couplings, groups


LAYERS = "layers"
STREAM = (("down", 1), ("embedding", 1), ("out", 1))
GATES = (("gate", 1), ("up", 1))


def test_units_of_layers_are_channels_and_heads():
    model, variables = make(2)
    _, groups = find_groups(model, variables)
    assert {
        made: (g.num_layers, g.num_units, g.exact)
        for made, g in groups.items()
        if made != STREAM
    } == {
        LAYERS: (None, DEPTH, True),
        GATES: (DEPTH, HIDDEN, True),
        # Keys and values with their two queries, one query of each, and features.
        (("key", 4), ("query", 8), ("value", 4)): (DEPTH, 2, True),
        (("query", 8),): (DEPTH, 2, True),
        (("value", 2),): (DEPTH, 4, True),
    }
    assert groups[STREAM].num_units == WIDTH
    _, groups = find_groups(*make(4))
    assert set(groups) == {
        LAYERS,
        STREAM,
        GATES,
        (("key", 4), ("query", 4), ("value", 4)),
        (("value", 4),),
    }


def cut_half(couplings, groups, **options):
    """Masks, and a cut of half the units, others in each layer."""
    rng = np.random.default_rng(2)
    removed = {
        g.name: np.stack(
            [rng.permutation(g.num_units)[: g.num_units // 2] for _ in range(DEPTH)]
        )
        if g.num_layers
        else rng.permutation(g.num_units)[: g.num_units // 2]
        for g in groups
    }
    masks = couplings.masks(removed)
    return masks, agp.plan_cut(masks, couplings, **options)


@pytest.mark.parametrize(
    "exact, experts",
    [(True, 0), (False, 0), (True, 4)],
    ids=["exact", "stream", "experts"],
)
def test_a_cut_leaves_what_the_masked_model_computes(exact, experts):
    model, variables = make(num_experts=experts)
    predict = functools.partial(model.apply, train=False)
    couplings, groups = find_groups(model, variables)
    some = [g for made, g in groups.items() if (made != STREAM) == exact]
    masks, cut = cut_half(couplings, some, inexact=not exact)
    inputs = random_tokens(), STARTS
    assert agp.check_cut(predict, variables, masks, cut, *inputs).error <= 1e-5
    # The model itself runs what is left, its norms with the divisor of before.
    thinned = agp.thin(agp.apply_masks(variables, masks), cut)
    logits = predict_with(model)(thinned, *inputs)
    expected = jax.jit(agp.thin_function(predict, variables, cut))(thinned, *inputs)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(logits - predict_with(model)(variables, *inputs)).max() > 0.1


def test_a_cut_leaves_the_gradients_of_training():
    model, variables = make(remat=True, dropout=0.2)
    loss = loss_of(model)
    couplings, groups = find_groups(model, variables)
    masks, cut = cut_half(couplings, [g for g in groups.values() if g.exact])
    masked = agp.apply_masks(variables, masks)
    inputs = random_tokens(), STARTS, jax.random.key(4)
    expected = agp.thin(jax.jit(jax.grad(loss))(masked, *inputs), cut)
    thinned = jax.jit(jax.grad(agp.thin_function(loss, variables, cut)))
    found = thinned(agp.thin(masked, cut), *inputs)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert np.abs(a).max() > 1e-4


def test_rules_prune_heads_and_channels_of_each_layer():
    model, variables = make()
    params = variables["params"]
    couplings, _ = find_groups(model, variables)
    half = agp.one_shot(0.5)
    rules = [
        agp.Rule(".*/(key|value)/kernel", agp.heads(KV_HEADS), half, stacked_axes=1),
        agp.Rule(".*/(gate|up)/kernel", agp.filters(), half, stacked_axes=1),
        agp.dense(".*"),
    ]
    tx = agp.prune(optax.sgd(0.1), rules, couplings=couplings.subtree("params"))
    masks = agp.get_masks(jax.jit(tx.init)(params))
    cut = agp.plan_cut({"params": masks}, couplings)
    assert cut.thin_shape("params/blocks/attention/key/kernel") == (3, 12, 4)
    assert cut.thin_shape("params/blocks/attention/query/kernel") == (3, 12, 8)
    assert cut.thin_shape("params/blocks/attention/out/kernel") == (3, 8, 12)
    assert cut.thin_shape("params/blocks/mlp/down/kernel") == (3, 5, 12)
    assert len(cut["params/blocks/mlp/down/kernel"][1]) == DEPTH


def test_a_stack_with_routers_keeps_its_layers():
    """With all experts masked nothing is left to choose."""
    model, variables = make(num_experts=4)
    couplings, _ = find_groups(model, variables)
    ((_, _, reason),) = couplings.frozen["params/blocks/mlp/router/kernel", 0]
    of_zeros = r"more than add .*: of zeros select_n at .*gpt.py.*_logits"
    assert re.search(of_zeros, reason)
    rules = [agp.Rule("blocks/.*", agp.layers(), agp.one_shot(0.5))]
    params = couplings.subtree("params")
    with pytest.raises(ValueError, match="of no stack of layers .*select_n at"):
        agp.make_masks(variables["params"], rules, 0, couplings=params)


def test_experts_of_each_layer_go_while_it_trains():
    """What is left trains on as the masked model would."""
    model, variables = make(num_experts=4)
    params, loss = variables["params"], loss_of(model)
    couplings, _ = find_groups(model, variables)
    couplings = couplings.subtree("params")
    schedule = agp.polynomial_schedule(0.5, begin_step=1, end_step=2)
    rules = [agp.Rule("blocks/mlp/router/kernel", agp.experts(), schedule)]
    inner = optax.adam(1e-2)
    pruning = agp.prune(inner, rules, couplings=couplings)
    batch = random_tokens(), STARTS, jax.random.key(4)

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, params, state):
        gradients = jax.grad(lambda p: loss({"params": p}, *batch))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = pruning.init(params)
    for _ in range(2):
        params, state = step(pruning, params, state)
    cut = agp.plan_cut(agp.get_masks(state), couplings)
    assert cut.thin_shape("blocks/mlp/down/kernel") == (DEPTH, 2, HIDDEN, WIDTH)
    assert cut.thin_shape("blocks/mlp/router/kernel") == (DEPTH, WIDTH, 2)
    small, small_state = agp.thin(params, cut), agp.thin_opt_state(state, params, cut)
    found, _ = step(inner, small, small_state.inner_state)  # all events are over
    expected = agp.thin(step(pruning, params, state)[0], cut)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_rules_keep_n_of_m_of_each_layer():
    _, variables = make()
    kernel = variables["params"]["blocks"]["mlp"]["gate"]["kernel"]
    rule = agp.Rule("gate", agp.n_of_m(2, 4), agp.one_shot(0.5), stacked_axes=1)
    mask = np.asarray(agp.make_masks({"gate": kernel}, [rule], 0)["gate"])
    groups = mask.reshape(DEPTH, WIDTH // 4, 4, HIDDEN)
    assert (groups.sum(axis=2) == 2).all()
