"""Whole layers, pruned and cut: of stacks that a scan steps through, and of loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import agp_jax as agp
from agp_jax.models.resnet_cifar import CifarResNet
from tests.thinning_cases import assert_trees_equal, draw, masked

X = draw((2, 3), seed=7)
STACK = draw({"norm": (4, 3), "up": (4, 3, 5), "down": (4, 5, 3)}, seed=8)
STACK_NAME = "down[0]"


def branch(x, weights):
    """What a layer adds: an MLP of the normalised stream."""
    size = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    hidden = jnp.tanh((x / size * weights["norm"][None]) @ weights["up"])
    return hidden @ weights["down"]


def step(x, weights):
    return x + branch(x, weights)


def stack(params, x):
    return lax.scan(lambda x, weights: (step(x, weights), None), x, params)[0]


def assert_equal_when_cut(fn, params, removed, *inputs, close=1e-9):
    """The thinned function against the masked one: outputs, and gradients of a loss.

    In float64, or else what cancels is noise.
    """
    with jax.enable_x64(True):
        params, inputs = jax.tree.map(in_float64, (params, inputs))
        couplings = agp.find_couplings(fn, params, *inputs)
        masks = couplings.masks(removed)
        cut = agp.plan_cut(masks, couplings)
        zeroed = masked(params, masks)
        small, thin_fn = agp.thin(zeroed, cut), agp.thin_function(fn, params, cut)

        def run(fn):
            def loss(params):
                out = fn(params, *inputs)
                return sum(jnp.square(x).sum() for x in jax.tree.leaves(out)), out

            return jax.jit(jax.grad(loss, has_aux=True))

        gradients, expected = run(fn)(zeroed)
        found, out = run(thin_fn)(small)
        assert all(jnp.abs(x).max() > 0.1 for x in jax.tree.leaves(expected))
        assert_trees_equal(out, expected, rtol=close, atol=close)
        live = agp.thin(masks, cut)
        gradients = masked(agp.thin(gradients, cut), live)
        assert_trees_equal(masked(found, live), gradients, rtol=close, atol=close)
    return cut


def in_float64(x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float64) if is_float else x


# Stacks


def test_a_stack_is_shortened():
    cut = assert_equal_when_cut(stack, STACK, {STACK_NAME: [1, 2]}, X)
    assert {cut.thin_shape(path)[0] for path in STACK} == {2}
    assert [cut[path][0].tolist() for path in STACK] == [[0, 3]] * 3


def test_layers_that_stay_lose_units_of_their_own():
    """A layer that goes sets no bound to what the others lose."""
    others = np.array([[0, 1, 2], [0, 1, 4], [1, 2, 3], [2, 3, 4]])
    couplings = agp.find_couplings(stack, STACK, X)
    masks = couplings.masks({STACK_NAME: [2], "up[2]": others})
    cut = agp.plan_cut(masks, couplings)
    rows = [[3, 4], [2, 3], [0, 1]]
    assert cut["up"][2].tolist() == cut["down"][1].tolist() == rows
    assert_equal_when_cut(stack, STACK, {STACK_NAME: [2], "up[2]": others}, X)
    assert agp.Cut.from_dict(cut.to_dict()) == cut
    # The same in two cuts, in either order.
    for first in ({STACK_NAME: [2]}, {"up[2]": others}):
        early = agp.plan_cut(couplings.masks(first), couplings)
        fn, small = agp.thin_function(stack, STACK, early), agp.thin(STACK, early)
        later = agp.plan_cut(agp.thin(masks, early), agp.find_couplings(fn, small, X))
        assert early.then(later) == cut
    report = agp.check_cut(stack, STACK, masks, cut, X)
    assert report.error < 1e-9
    every = agp.check_cut(stack, STACK, masks, cut, X, tolerance=-1)
    assert set(every.groups) == {STACK_NAME, "up[2]"}
    assert max(every.groups.values()) < 1e-9


def test_one_layer_stays_and_layers_are_not_rounded():
    couplings = agp.find_couplings(stack, STACK, X)
    cut = agp.plan_cut(couplings.masks({STACK_NAME: range(4)}), couplings, round_to=2)
    assert cut.thin_shape("up") == (1, 3, 2)
    cut = agp.plan_cut(couplings.masks({STACK_NAME: [0]}), couplings, round_to=2)
    assert cut.thin_shape("up") == (3, 3, 5)


def drop_layer(x, weights):
    """A step of more than one sum: remembered in part, and left out at random."""
    weights, key, number = weights

    @jax.checkpoint
    def add(x, weights):
        new = branch(x, weights) * (1 + number)
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        new = jnp.where(keep, new / 0.5, 0)
        return x + new, new

    new, added = add(x, weights)
    return lax.cond(number > 1, lambda: new, lambda: x), added


def test_random_keys_and_counters_go_with_their_layer():
    """So dropout has the same bits in the layers that stay."""

    def fn(params, x, key):
        keys = jax.random.split(jax.random.fold_in(key, 1), 4)
        x, added = lax.scan(drop_layer, x, (params, keys, jnp.arange(4.0)))
        return x + added.sum(0)

    cut = assert_equal_when_cut(fn, STACK, {STACK_NAME: [0, 2]}, X, jax.random.key(3))
    assert cut.thin_shape("up") == (2, 3, 5)


def rescaled(x, weights):
    return 0.5 * x + branch(x, weights)


def rectified(x, weights):
    return jax.nn.relu(x + branch(x, weights))


def without_skip(x, weights):
    return branch(x, weights)


def divided(x, weights):
    return x + branch(x, weights) / jnp.linalg.norm(
        x @ weights["up"], axis=-1, keepdims=True
    )


def rounded(x, weights):
    narrow = x.astype(jnp.bfloat16) + branch(x, weights).astype(jnp.bfloat16)
    return narrow.astype(x.dtype)


@pytest.mark.parametrize("layer", [rescaled, rectified, without_skip, divided, rounded])
def test_a_stack_whose_steps_do_more_than_add_is_fixed(layer):
    def fn(params, x):
        return lax.scan(lambda x, w: (layer(x, w), None), x, params)[0]

    couplings = agp.find_couplings(fn, STACK, X)
    assert not any(group.is_stack for group in couplings.groups)
    ((start, stop, reason),) = couplings.frozen["up", 0]
    assert (start, stop) == (0, 4)
    assert "whose steps do more than add to what they carry" in reason


def test_layers_whose_number_an_input_or_output_has_are_fixed():
    def with_input(params, x, more):
        steps = params, more
        return lax.scan(lambda h, s: (step(h, s[0]) + 0 * s[1], None), x, steps)[0]

    def with_output(params, x):
        return lax.scan(lambda h, w: (step(h, w), h), x, params)

    for fn, inputs in ((with_output, (X,)), (with_input, (X, jnp.ones((4, 2, 3))))):
        couplings = agp.find_couplings(fn, STACK, *inputs)
        assert not any(group.is_stack for group in couplings.groups)


# Loops

STREAM = "h_0/down[1]"  # the group of its features
NAMES = ("h_0", "h_1", "h_2")
ONE = {"norm": (3,), "up": (3, 5), "down": (5, 3), "gain": ()}
LOOP = draw({"in": (3, 3), "head": (3, 2), **dict.fromkeys(NAMES, ONE)}, seed=9)
IN_BRANCHES = {f"{name}/{leaf}" for name in NAMES for leaf in ONE}


def loop(params, x):
    """Three layers, of which the second is remembered in part alone."""
    x = x @ params["in"]
    for name in NAMES:
        add = jax.checkpoint(gained) if name == "h_1" else gained
        x = add(x, params[name])
    return x @ params["head"]


def gained(x, weights):
    return x + weights["gain"] * branch(x, weights)


def without(cut):
    """What a cut leaves of the loop's parameters, by names."""
    return {path for path in cut.shapes if path not in cut.gone}


def test_layers_of_a_loop_go_whole():
    couplings = agp.find_couplings(loop, LOOP, X)
    assert {frozenset(b.leaves) for b in couplings.branches} == {
        frozenset(f"{name}/{leaf}" for leaf in ONE) for name in NAMES
    }
    first, second, _ = (branch.name for branch in couplings.branches)
    removed = {first: [0], second: [0]}
    cut = assert_equal_when_cut(loop, LOOP, removed, X)
    assert set(cut.gone) == {f"{n}/{leaf}" for n in ("h_0", "h_1") for leaf in ONE}
    assert "h_0/up: (3, 5) -> gone" in str(cut) and bool(cut) and all(cut.gone.values())
    assert agp.Cut.from_dict(cut.to_dict()) == cut
    small = agp.thin(LOOP, cut)
    assert small["h_0"] == dict.fromkeys(ONE) and small["h_2"] == LOOP["h_2"]
    # Nothing is computed in its place.
    costs = [
        agp.measure_cost(fn, params, X).macs
        for fn, params in ((loop, LOOP), (agp.thin_function(loop, LOOP, cut), small))
    ]
    assert costs[0] - costs[1] == 2 * (2 * 3 * 5 * 2)


def test_layers_of_a_loop_go_with_units_of_those_that_stay():
    couplings = agp.find_couplings(loop, LOOP, X)
    removed = {couplings.branches[0].name: [0], "h_1/up[1]": [1, 2], STREAM: [0]}
    cut = assert_equal_when_cut(loop, LOOP, removed, X)
    assert cut.thin_shape("h_1/up") == (2, 3) and "h_0/up" in cut.gone
    masks = couplings.masks(removed)
    for first in ([couplings.branches[0].name], ["h_1/up[1]", STREAM]):
        early = agp.plan_cut(couplings.masks({n: removed[n] for n in first}), couplings)
        fn, small = agp.thin_function(loop, LOOP, early), agp.thin(LOOP, early)
        later = agp.plan_cut(agp.thin(masks, early), agp.find_couplings(fn, small, X))
        assert early.then(later) == cut
        with pytest.raises(ValueError, match="this cut leaves"):
            early.then(early)
    report = agp.check_cut(loop, LOOP, masks, cut, X, tolerance=-1)
    assert set(report.groups) == {*removed} and report.error < 1e-6


def test_a_branch_that_is_not_all_masked_stays():
    couplings = agp.find_couplings(loop, LOOP, X)
    masks = couplings.masks({couplings.branches[0].name: [0]})
    for leaf in ONE:
        assert not agp.plan_cut(
            masks | {"h_0": masks["h_0"] | {leaf: np.ones(ONE[leaf], bool)}}, couplings
        ).gone
    needed = min(couplings.branches[0].needed).split("/")[1]
    some = {leaf: mask for leaf, mask in masks["h_0"].items() if leaf != needed}
    assert not agp.plan_cut({"h_0": some}, couplings).gone


def tied(params, x):
    for name in NAMES:
        x = x + branch(x, params[name] | {"down": params["h_0"]["down"]})
    return x


def after_norm(params, x):
    for name in NAMES:
        x = branch(x + branch(x, params[name]), params["h_0"])
    return x


def two_ways(params, x):
    return branch(x, params["h_0"]) + branch(x, params["h_1"])


def divided_loop(params, x):
    made = branch(x, params["h_0"])
    return x + made / jnp.linalg.norm(made, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "fn, branches",
    [
        (tied, [{"norm", "up"}, {"norm", "up"}]),
        (after_norm, [{"norm", "up", "down"}, {"norm", "up", "down"}]),
        (two_ways, []),  # either could go, and then the other is the stream
        (divided_loop, []),  # 0 / 0
    ],
)
def test_a_branch_has_what_is_of_use_for_it_alone(fn, branches):
    couplings = agp.find_couplings(fn, {n: LOOP[n] for n in NAMES}, X)
    found = [{path.split("/")[1] for path in b.leaves} for b in couplings.branches]
    assert [x for x in found if "gain" not in x][-len(branches) or 99 :] == branches


def normed(variables, x, train):
    """Layers with running statistics, and what these are after a step."""
    params, stats = variables["params"], dict(variables["batch_stats"])
    for name in NAMES:
        hidden = x @ params[name]["up"]
        mean = hidden.mean(0) if train else stats[name]
        if train:
            stats[name] = 0.9 * stats[name] + 0.1 * mean
        hidden = jnp.tanh(hidden - mean[None])
        x = x + hidden @ params[name]["down"]
    return x, {"batch_stats": stats}


def test_statistics_of_a_layer_go_with_it():
    variables = {
        "params": {n: {"up": LOOP[n]["up"], "down": LOOP[n]["down"]} for n in NAMES},
        "batch_stats": draw(dict.fromkeys(NAMES, (5,)), seed=3),
    }
    couplings = agp.find_couplings(lambda v, x: normed(v, x, False)[0], variables, X)
    masks = couplings.subtree("params").masks({"h_1/down": [0]})
    cut = agp.plan_cut({"params": masks}, couplings)
    assert cut.gone == {
        "params/h_1/up": True, "params/h_1/down": True, "batch_stats/h_1": False,
    }  # fmt: skip
    zeroed = agp.apply_masks(variables, {"params": masks})
    for train in (False, True):
        fn = lambda v, x, train=train: normed(v, x, train)  # noqa: E731
        found = agp.thin_function(fn, variables, cut)(agp.thin(zeroed, cut), X)
        out, stats = fn(zeroed, X)
        assert_trees_equal(found, (out, agp.thin(stats, cut)), rtol=1e-6)
    reads = agp.thin_function(
        lambda v, x: x + v["batch_stats"]["h_1"].sum(), variables, cut
    )
    with pytest.raises(ValueError, match="still reads batch_stats/h_1.*reduce_sum"):
        reads(agp.thin(zeroed, cut), X)


def test_residual_blocks_of_a_bundled_model_go_whole():
    """Those that pad their shortcut, too; of statistics come out those that stay."""
    model = CifarResNet(3, depth=8, width=2)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), "float32")
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), images
    )
    predict = functools.partial(model.apply, train=False)
    couplings = agp.find_couplings(predict, variables, images)
    rules = [agp.Rule(r"(stage\d/block\d)/.*", agp.layers(), agp.one_shot(0.4))]
    masks = {
        "params": agp.make_masks(
            variables["params"], rules, 0, couplings=couplings.subtree("params")
        )
    }
    cut = agp.plan_cut(masks, couplings)
    assert len(cut.gone) == 6 + 4  # kernels, scales and biases; means and variances
    zeroed = agp.apply_masks(variables, masks)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    out, stats = jax.jit(train)(zeroed, images)
    thinned = jax.jit(agp.thin_function(train, variables, cut))
    expected = out, agp.thin(stats, cut)
    found = thinned(agp.thin(zeroed, cut), images)
    assert_trees_equal(found, expected, rtol=1e-5, atol=1e-6)


# Rules


def test_a_rule_prunes_layers_by_all_that_it_names_of_them():
    score = lambda name, leaf="down": float(jnp.abs(LOOP[name][leaf]).sum())  # noqa: E731
    couplings = agp.find_couplings(loop, LOOP, X)
    for pattern, own in (
        (r"h_\d/.*", [*ONE]),
        (r"(h_\d)/down", ["down"]),
        (r"(h_.)/up|(h_.)/norm", ["up", "norm"]),
    ):
        rules = [agp.Rule(pattern, agp.layers(), agp.one_shot(0.4))]
        make = functools.partial(agp.make_masks, rules=rules, couplings=couplings)
        masks = jax.jit(make, static_argnames="step")(LOOP, step=0)
        weakest = min(NAMES, key=lambda name: sum(score(name, leaf) for leaf in own))
        lost = agp.sparsity(masks)
        lost.pop("total")
        assert lost == {path: float(path.startswith(weakest)) for path in IN_BRANCHES}


def test_training_prunes_layers_gradually_and_goes_on_after_the_cut():
    def fn(params, x):
        return loop(params["loop"], stack(params["stack"], x))

    params = {"loop": LOOP, "stack": STACK}
    couplings = agp.find_couplings(fn, params, X)
    schedule = agp.polynomial_schedule(0.6, begin_step=1, end_step=3)
    rules = [agp.Rule(r"loop/(h_.)/down|stack/.*", agp.layers(), schedule)]
    tx = agp.prune(optax.adam(0.01), rules, couplings=couplings)
    state = tx.init(params)

    def train(fn, tx, params, state, steps):
        @jax.jit
        def update(params, state):
            grads = jax.grad(lambda p: jnp.square(fn(p, X) - 1).sum())(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        states = [(params, state)]
        for _ in range(steps):
            states.append(update(*states[-1]))
        return states[1:]

    def layers_left(masks):
        alive = [bool(masks["loop"][n]["down"].all()) for n in NAMES]
        return alive + masks["stack"]["down"].all((1, 2)).tolist()

    before = layers_left(agp.get_masks(state))
    states = train(fn, tx, params, state, 4)
    for count, (_, state) in zip((0, 3, 4, 4), states, strict=True):
        masks = agp.get_masks(state)
        now = layers_left(masks)
        assert now.count(False) == count and now <= before
        for path, part in agp.sparsity(masks).items():
            assert path == "total" or path.startswith("stack") or part in (0, 1)
        before = now
    params, state = states[-1]
    cut = agp.plan_cut(masks, couplings)
    assert cut.thin_shape("stack/up")[0] == sum(now[3:])
    assert len(cut.gone) == len(ONE) * now[:3].count(False)
    small = agp.thin(params, cut), agp.thin_opt_state(state, params, cut).inner_state
    ((expected, _),) = train(fn, tx, params, state, 1)
    ((found, _),) = train(
        agp.thin_function(fn, params, cut), optax.adam(0.01), *small, 1
    )
    assert_trees_equal(found, agp.thin(expected, cut), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "pattern, message",
    [
        (r"(h_0|h_1)/.*|head", "prunes head by .*part of no residual branch"),
        ("head", "no name in it has a number.*in parentheses"),
        (r"(h)_./up", None),
        (r"h_./(up|down)", "branch of several layers: down, up.*in parentheses"),
    ],
)
def test_rules_for_what_is_no_layer_raise(pattern, message):
    couplings = agp.find_couplings(loop, LOOP, X)
    rules = [agp.Rule(pattern, agp.layers(), agp.one_shot(0.5))]
    if message is None:  # one layer, which stays
        masks = agp.make_masks(LOOP, rules, 0, couplings=couplings)
        assert agp.sparsity(masks)["total"] == 0
        return
    with pytest.raises(ValueError, match=message):
        agp.make_masks(LOOP, rules, 0, couplings=couplings)


def test_rules_for_layers_need_couplings_and_no_axes():
    rules = [agp.Rule("h_./.*", agp.layers(), agp.one_shot(0.5))]
    with pytest.raises(ValueError, match="pass couplings=agp.find_couplings"):
        agp.make_masks(LOOP, rules, 0)
    for options in ({"stacked_axes": 1}, {"units": ".*"}):
        with pytest.raises(ValueError, match="leave units and stacked_axes out"):
            agp.Rule("h_./.*", agp.layers(), agp.one_shot(0.5), **options)
