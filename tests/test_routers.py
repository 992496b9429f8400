"""Masked experts are never chosen, as if they were cut already."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from thinning_cases import assert_trees_equal
from thinning_zoo import numbers, weights

import agp_jax as agp


def chosen_experts(params, x, chosen, gates):
    """Copies of the experts' kernels for each token, as Mixtral's are gated."""
    hidden = jax.nn.silu(jnp.einsum("td,tkdh->tkh", x, params["gate"][chosen]))
    hidden = hidden * jnp.einsum("td,tkdh->tkh", x, params["up"][chosen])
    return jnp.einsum("tkh,tkhd,tk->td", hidden, params["down"][chosen], gates)


def mixtral(params, x):
    """Softmax, then the best two, whose shares are made to sum to 1."""
    gates, chosen = lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
    gates = gates / gates.sum(-1, keepdims=True)
    return chosen_experts(params, x, chosen, gates)


def deepseek(params, x):
    """Sigmoids, chosen with a bias that is no part of the shares, and a shared one."""
    scores = jax.nn.sigmoid(x @ params["router"] + params["bias"])
    _, chosen = lax.top_k(scores + params["favour"], 2)
    gates = jnp.take_along_axis(scores, chosen, axis=-1)
    gates = 2.5 * gates / (gates.sum(-1, keepdims=True) + 1e-20)
    shared = jax.nn.silu(x @ params["shared"]) @ params["shared"].T
    return chosen_experts(params, x, chosen, gates) + shared


def switch(params, x):
    """The best one for each token, and a loss that balances how often each is."""
    probabilities = jax.nn.softmax(x @ params["router"])
    chosen = jnp.argmax(probabilities, axis=-1)
    mask = jax.nn.one_hot(chosen, 4)
    hidden = jax.nn.relu(jnp.einsum("te,td,edh->teh", mask, x, params["up"]))
    made = jnp.einsum("teh,ehd,te->td", hidden, params["down"], mask * probabilities)
    balance = 4 * jnp.sum(mask.mean(0) * probabilities.mean(0))
    gated = jnp.einsum("te,edh->td", mask, params["gate"][:, :, :6])
    return made + gated + 0.1 * balance


def qwen(params, x):
    """Runs of tokens by expert, in layers of a scan that are computed again."""

    @jax.checkpoint
    def layer(x, params):
        shares = jax.nn.softmax(x @ params["router"], axis=-1)
        gates, chosen = lax.top_k(shares, 2)
        flat = chosen.ravel()
        order = jnp.argsort(flat)
        runs, sizes = x[order // 2], jnp.bincount(flat, length=4)
        hidden = jax.nn.silu(lax.ragged_dot(runs, params["gate"], sizes))
        hidden = hidden * lax.ragged_dot(runs, params["up"], sizes)
        made = lax.ragged_dot(hidden, params["down"], sizes)
        made = jnp.zeros_like(made).at[order].set(made).reshape(*chosen.shape, -1)
        return x + jnp.einsum("tkd,tk->td", made, gates), None

    return lax.scan(layer, x, params)[0]


EXPERTS = {"router": (6, 4), "gate": (4, 6, 8), "up": (4, 6, 8), "down": (4, 8, 6)}
PARAMS = weights(**EXPERTS)
MODELS = {
    "mixtral": (mixtral, PARAMS),
    "deepseek": (
        deepseek,
        {
            **PARAMS,
            **weights(1, bias=(1, 4), shared=(6, 3)),
            "favour": jnp.array([[-0.1, -0.9, -0.2, -0.8]]),
        },
    ),
    "switch": (switch, PARAMS),
    "qwen": (qwen, weights(**{path: (2, *shape) for path, shape in EXPERTS.items()})),
}
X = numbers(7, 6)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_masked_is_what_will_be_cut(name):
    fn, params = MODELS[name]
    wrapped = agp.without_experts(fn, "router")
    couplings = agp.find_couplings(wrapped, params, X)
    (group,) = (g for g in couplings.groups if g.num_chosen)
    members = {m.path for m in group.members}
    assert group.exact and members == set(params) - {"shared"}
    masks = couplings.masks({group.name: [0, 2]})
    cut = agp.plan_cut(masks, couplings)
    masked = agp.apply_masks(params, masks)

    def run(fn, params):
        loss = lambda p: (jnp.sum(jnp.sin(fn(p, X))), fn(p, X))  # noqa: E731
        return jax.jit(jax.grad(loss, has_aux=True))(params)

    gradient, expected = run(wrapped, masked)
    thinned = agp.thin_function(fn, params, cut)
    small_gradient, found = run(thinned, agp.thin(masked, cut))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    whole = agp.thin(gradient, cut)
    assert_trees_equal(small_gradient, whole, rtol=1e-4, atol=1e-6)
    bare = jax.jit(fn)(masked, X)
    assert np.abs(bare - expected).max() > 1e-3  # zeros alone are something else


@pytest.mark.parametrize("name", ["mixtral", "qwen"])
def test_experts_are_cut_from_what_is_exported_for_any_batch(name):
    fn, params = MODELS[name]
    wrapped = agp.without_experts(fn, "router")
    couplings = agp.find_couplings(wrapped, params, X)
    (group,) = (g for g in couplings.groups if g.num_chosen)
    masks = couplings.masks({group.name: [0, 2]})
    cut = agp.plan_cut(masks, couplings)
    masked = agp.apply_masks(params, masks)
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 6), X.dtype)
    for function, variables in (
        (agp.thin_function(fn, params, cut), agp.thin(masked, cut)),
        (wrapped, masked),
    ):
        exported = jax.export.export(jax.jit(function))(variables, x)
        found = exported.call(variables, X)
        np.testing.assert_allclose(found, wrapped(masked, X), rtol=2e-5, atol=1e-6)


def test_a_function_without_masked_experts_is_itself():
    wrapped = agp.without_experts(mixtral, "router")
    np.testing.assert_allclose(wrapped(PARAMS, X), mixtral(PARAMS, X), rtol=1e-6)
    np.testing.assert_allclose(
        wrapped(PARAMS, x=X[:2]), mixtral(PARAMS, X[:2]), rtol=1e-6
    )


def test_a_gradient_inside_is_not_taken_for_a_router():
    """Of its products with the router's kernel the one sums over experts."""

    def fn(params, x):
        return jax.grad(lambda x: jnp.sum(mixtral(params, x) ** 2))(x)

    found = agp.without_experts(fn, "router")(PARAMS, X)
    np.testing.assert_allclose(found, fn(PARAMS, X), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "pattern, message",
    [("gate", "matches gate of: down"), ("routers", "matches no path of: down")],
)
def test_a_pattern_without_a_router_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        agp.without_experts(mixtral, pattern)(PARAMS, X)


SCHEDULE = agp.polynomial_schedule(0.5, begin_step=1, end_step=3)


@pytest.mark.parametrize("pattern", ["router", "gate|up|down"])
def test_experts_go_while_a_model_trains(pattern):
    """In each layer as many, those of the smallest norm; then the cut trains on."""
    fn, params = MODELS["qwen"]
    wrapped = agp.without_experts(fn, "router")
    couplings = agp.find_couplings(wrapped, params, X)
    rules = [agp.Rule(pattern, agp.experts(), SCHEDULE)]
    masks = agp.make_masks(params, rules, 3, couplings=couplings)
    norms = sum(
        np.abs(np.moveaxis(np.asarray(x), 2 if path == "router" else 1, 1)).sum(
            axis=tuple(range(2, x.ndim))
        )
        for path, x in params.items()
        if re.fullmatch(pattern, path)
    )
    kept = norms >= np.sort(norms, axis=1)[:, 2:3]
    np.testing.assert_array_equal(masks["up"].all((2, 3)), kept)
    np.testing.assert_array_equal(masks["router"].any(1), kept)

    tx = agp.prune(optax.adam(1e-2), rules, couplings=couplings)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: jnp.mean(wrapped(p, X) ** 2))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    cut = agp.plan_cut(agp.get_masks(state), couplings)
    assert cut.thin_shape("up") == (2, 2, 6, 8)
    small = agp.thin_function(fn, params, cut)(agp.thin(params, cut), X)
    np.testing.assert_allclose(small, wrapped(params, X), rtol=2e-5, atol=1e-6)


WRAPPED = agp.without_experts(mixtral, "router")


def rule(sparsity=0.5, pattern="router", **options):
    return agp.Rule(pattern, agp.experts(), agp.one_shot(sparsity), **options)


@pytest.mark.parametrize(
    "rule, fn, message",
    [
        (rule(0.75), WRAPPED, "2 at a time, so 2 may go"),
        (rule(scope="rule"), WRAPPED, "scope='tensor'"),
        (rule(), mixtral, "wrap the function in agp.without_experts, or put agp.dense"),
        (rule(), lambda p, x: x @ p["router"] @ p["up"][0, :4], "be chosen between"),
        (rule(), None, r"experts\(\), which only couplings know: pass couplings="),
    ],
)
def test_rules_for_experts_say_what_they_need(rule, fn, message):
    couplings = fn and agp.find_couplings(fn, PARAMS, X)
    with pytest.raises(ValueError, match=message):
        agp.make_masks(PARAMS, [rule], 0, couplings=couplings)
