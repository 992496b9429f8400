"""Counts of what is left of each kernel, and of what was to go, by hand."""

import jax.numpy as jnp
import numpy as np

import agp_jax as agp
from agp_jax.training.counts import count_weights, total_sparsity, total_target

SCHEDULE = agp.polynomial_schedule(0.8, begin_step=10, end_step=20, frequency=5)
PARAMS = {
    "conv": {"kernel": jnp.array([[0.0, 1.0, 0.0, -2.0]]), "bias": jnp.zeros(4)},
    "head": {"kernel": jnp.ones((3, 2))},
}


def predict(params, x):
    hidden = x @ params["conv"]["kernel"] + params["conv"]["bias"][None]
    return (
        hidden.reshape(-1, params["head"]["kernel"].shape[0])
        @ (params["head"]["kernel"])
    )


def cost_of(params):
    return agp.measure_cost(predict, params, jnp.ones((3, 1)))


def count(step):
    rules = [agp.Rule("conv/kernel", agp.element(), SCHEDULE, scope="rule")]
    matched = agp.match_rules(rules, PARAMS)
    return count_weights(PARAMS, matched, step, before=cost_of(PARAMS), coupled=False)


def test_kernels_are_counted_and_biases_are_not():
    conv, head = count(20)
    assert (conv.path, conv.shape, conv.weights) == ("conv/kernel", (1, 4), 4)
    assert (conv.nonzero, conv.sparsity, conv.target) == (2, 0.5, 0.8)
    assert (head.path, head.weights, head.nonzero, head.target) == (
        "head/kernel",
        6,
        6,
        None,
    )
    assert (conv.target_of, head.target_of) == ("rule", "tensor")
    assert total_sparsity([conv, head]) == 1 - 8 / 10
    np.testing.assert_allclose(total_target([conv, head]), 0.8 * 4 / 10)


def test_what_counts_is_what_the_program_multiplies_or_looks_up():
    """Not the number of axes: positions have two, and biases of heads."""
    params = {
        "embedding": jnp.eye(5, 4),
        "positions": jnp.ones((3, 4)),
        "query": {"kernel": jnp.ones((4, 2, 2)), "bias": jnp.ones((2, 2))},
    }

    def attend(params, tokens):
        x = params["embedding"][tokens] + params["positions"]
        query = params["query"]
        return jnp.einsum("td,dhk->thk", x, query["kernel"]) + query["bias"][None]

    cost = agp.measure_cost(attend, params, jnp.zeros(3, jnp.int32))
    matched = agp.match_rules([], params)
    counts = count_weights(params, matched, 0, before=cost, coupled=False)
    assert [(x.path, x.weights, x.nonzero) for x in counts] == [
        ("embedding", 20, 4),
        ("query/kernel", 16, 16),
    ]
    assert sum(x.weights for x in counts) == cost.weight_params


def test_targets_follow_the_schedule():
    targets = [count(step)[0].target for step in (9, 10, 14, 15, 19, 20, 99)]
    np.testing.assert_allclose(targets, [0, 0, 0, 0.7, 0.7, 0.8, 0.8])


def test_what_was_cut_out_counts_as_zero_and_units_have_no_total_target():
    whole = {"conv": {"kernel": jnp.ones((1, 8)), "bias": jnp.ones(8)}}
    whole["head"] = {"kernel": jnp.ones((6, 2))}
    rules = [agp.Rule("conv/kernel", agp.filters(), SCHEDULE)]
    conv, head = count_weights(
        PARAMS, agp.match_rules(rules, PARAMS), 20, before=cost_of(whole), coupled=True
    )
    assert (conv.shape, conv.nonzero, conv.sparsity) == ((1, 8), 2, 0.75)
    assert (head.weights, head.nonzero) == (12, 6)
    assert conv.target == 0.8 and conv.target_of == "units"
    assert total_target([conv, head]) is None
