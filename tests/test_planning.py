"""Plans tell what masks would, without masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agp_jax as agp
from agp_jax.trees import flatten_with_paths

SCHEDULE = agp.polynomial_schedule(0.7, begin_step=0, end_step=6, frequency=3)


def predict(params, x):
    def layer(x, inner):
        return x + jnp.maximum(x @ inner["up"], 0) @ inner["down"], None

    x = jnp.maximum(x @ params["stem"]["kernel"] + params["stem"]["bias"], 0)
    x, _ = jax.lax.scan(layer, x, params["blocks"])
    return x @ params["head"]["kernel"]


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


PARAMS = {
    "stem": {"kernel": draw(6, 8), "bias": draw(1, 8)},
    "blocks": {"up": draw(3, 8, 20), "down": draw(3, 20, 8)},
    "head": {"kernel": draw(8, 5)},
}
X = draw(2, 6)

KINDS = {
    "elements": agp.Rule(".*/(kernel|up)", agp.element(), SCHEDULE),
    "layers": agp.Rule("blocks/.*", agp.element(), SCHEDULE, stacked_axes=1),
    "together": agp.Rule(".*/kernel", agp.element(), SCHEDULE, scope="rule"),
    "blocks": agp.Rule("blocks/.*", agp.block((2, 4)), SCHEDULE, stacked_axes=1),
    "2:4": agp.Rule("blocks/up", agp.n_of_m(2, 4), agp.one_shot(0.5), stacked_axes=1),
    "filters": agp.Rule("stem/kernel", agp.filters(), SCHEDULE),
    "units": agp.Rule("blocks/up", agp.filters(), SCHEDULE, stacked_axes=1),
    "width": agp.Rule("stem/kernel", agp.filters(), SCHEDULE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_what_masks_leave(kind):
    rules, masks = [KINDS[kind], agp.dense("head/kernel")], None
    rules = rules if kind not in ("elements", "together") else rules[:1]
    couplings = None
    if kind in ("units", "width"):
        couplings = agp.find_couplings(predict, PARAMS, X)
    for step in (0, 3, 6):
        masks = agp.make_masks(PARAMS, rules, step, masks, couplings=couplings)
    left = agp.apply_masks(PARAMS, masks)
    shapes = jax.eval_shape(lambda: PARAMS)
    plan = agp.plan(rules, shapes, couplings)
    paths, leaves, _ = flatten_with_paths(left)
    counts = {p: int(jnp.sum(x != 0)) for p, x in zip(paths, leaves, strict=True)}
    assert plan.nonzero == sum(counts.values())
    assert plan.size == sum(x.size for x in leaves)
    if kind != "together":
        assert {t.path: t.nonzero for t in plan.tensors} == counts


def test_multiply_adds_after_a_cut_are_those_of_the_function_that_is_cut():
    couplings = agp.find_couplings(predict, PARAMS, X)
    rules = [KINDS["units"], KINDS["width"]]
    masks = agp.make_masks(PARAMS, rules, 6, couplings=couplings)
    cut = agp.plan_cut(masks, couplings)
    smaller = agp.thin_function(predict, PARAMS, cut)
    cost = agp.measure_cost(smaller, agp.thin(PARAMS, cut), X)
    plan = agp.plan(rules, PARAMS, couplings, predict, (X,))
    assert (plan.before.macs, plan.after.macs) == (
        2 * (6 * 8 + 3 * 2 * 8 * 20 + 8 * 5),
        cost.macs,
    )
    assert f"multiply-adds: {plan.before.macs:,}, and {cost.macs:,} (" in str(plan)


def test_layers_of_a_loop_are_counted_and_cut():
    def loop(params, x):
        for name in sorted(params):
            x = x + jnp.maximum(x @ params[name]["up"], 0) @ params[name]["down"]
        return x

    params = {f"h_{i}": {"up": draw(4, 6), "down": draw(6, 4)} for i in range(5)}
    couplings = agp.find_couplings(loop, params, draw(1, 4))
    rules = [agp.Rule("h_.*", agp.layers(), agp.one_shot(0.5))]
    plan = agp.plan(rules, params, couplings, loop, (draw(1, 4),))
    assert plan.nonzero == 3 * 48
    assert (plan.before.macs, plan.after.macs) == (5 * 48, 3 * 48)


def test_equal_tensors_share_a_line_of_eighty_columns():
    shapes = {
        f"stage{i}": {f"block{j}": {"kernel": draw(2, 4)} for j in range(3)}
        for i in (1, 2)
    }
    text = str(agp.plan([agp.Rule(".*", agp.element(), SCHEDULE)], shapes))
    (row,) = [line for line in text.splitlines() if line.startswith("stage")]
    assert row.split() == "stage[1-2]/block[0-2]/kernel 6 x 2x4 18 62.50% 0".split()
    assert max(map(len, text.splitlines())) <= 80


def test_a_plan_of_seven_billion_weights_needs_none():
    shape = jax.ShapeDtypeStruct((32, 4096, 57344), jnp.bfloat16)
    rules = [agp.Rule("w", agp.element(), agp.one_shot(0.9), stacked_axes=1)]
    left = 32 * (4096 * 57344 - 9 * 4096 * 57344 // 10)
    assert agp.plan(rules, {"w": shape}).nonzero == left
