"""Runs with `prune` end alike however JAX transforms, packs, cuts or spreads them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pruned_optimizers import MOMENTUM, SETUPS
from pruning_cases import (
    NUM_STEPS,
    RULES,
    Moment,
    assert_same,
    draw,
    draw_dyadic,
    jit_step,
    start,
)

import agp_jax as agp

# JAX's transformations


def loss(params, batch):
    hidden = jax.nn.relu(
        batch @ params["dense"]["kernel"] + params["dense"]["bias"][None]
    )
    outputs = hidden @ params["head"]["kernel"] * params["head"]["scale"][None]
    return jnp.mean((outputs - 1.0) ** 2)


def batches():
    return jnp.stack([draw(t, (4, 6)) for t in range(NUM_STEPS)])


def learn(tx, moment, batch, loss=loss):
    gradients = jax.grad(loss)(moment.params, batch)
    updates, state = tx.update(gradients, moment.state, moment.params)
    return Moment(optax.apply_updates(moment.params, updates), state)


PRUNED = SETUPS["momentum"].pruned


@functools.cache
def learn_step(packed=False):
    tx = agp.prune(MOMENTUM, RULES, packed=packed)
    return jax.jit(functools.partial(learn, tx))


@functools.cache
def learned(seed=0, packed=False):
    tx = agp.prune(MOMENTUM, RULES, packed=packed)
    moments = [start(tx, draw(seed))]
    for batch in batches():
        moments.append(learn_step(packed)(moments[-1], batch))
    return moments


def test_donated_buffers_give_the_same_run():
    moment = jax.jit(lambda: start(PRUNED, draw(0)))()
    step = jax.jit(functools.partial(learn, PRUNED), donate_argnums=0)
    for batch, expected in zip(batches(), learned()[1:], strict=True):
        before = moment
        moment = step(moment, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
        assert_same(moment, expected)


REBUILT = optax.inject_hyperparams(  # makes its optimizer anew at each update
    lambda rate: agp.prune(optax.sgd(rate, momentum=0.9), RULES)
)(0.1)


@pytest.mark.parametrize("tx", [PRUNED, REBUILT], ids=["one", "rebuilt"])
def test_a_loop_without_jit_compiles_once_and_gives_the_same_run(tx, caplog):
    moment, counts = start(tx, draw(0)), []
    with jax.log_compiles():
        for t in range(1, NUM_STEPS + 1):
            caplog.clear()
            gradients = jax.grad(loss)(moment.params, batches()[t - 1])
            caplog.clear()
            updates, state = tx.update(gradients, moment.state, moment.params)
            counts.append(sum("Finished XLA" in x.message for x in caplog.records))
            moment = Moment(optax.apply_updates(moment.params, updates), state)
    assert counts[0] > 0 and counts[2:] == [0] * (NUM_STEPS - 2)
    masks = agp.get_masks(moment.state)
    assert_same(masks, agp.get_masks(learned()[-1].state))


def test_devices_with_copies_of_their_own_prune_each_of_them():
    step = jax.pmap(functools.partial(learn, PRUNED), donate_argnums=0)
    apart = [learned(0)[1], learned(1)[1]]
    together = jax.tree.map(lambda *x: jnp.stack(x), *apart)
    together = step(together, jnp.stack([batches()[1]] * 2))
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], together)
        assert_same(one.state.masks, learned(i)[2].state.masks)


def update_in_shard_map(spec, gradient_spec=None, score=jnp.abs):
    """Masks of an update inside of a shard_map that divides parameters by `spec`."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    rules = [agp.Rule("w", agp.element(), agp.one_shot(0.5, step=1), score=score)]
    tx = agp.prune(optax.sgd(0.1), rules)
    weights = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)), "f4")}
    states = agp.PruneState(P(), spec, P())
    update = jax.shard_map(
        lambda *args: tx.update(*args)[1],
        mesh=mesh,
        in_specs=(gradient_spec or spec, states, spec),
        out_specs=states,
    )
    masks = jax.jit(update)(weights, tx.init(weights), weights).masks
    return weights["w"], masks["w"]


def test_copies_are_pruned_inside_of_shard_map():
    weights, mask = update_in_shard_map(P())
    size = np.abs(np.asarray(weights))
    np.testing.assert_array_equal(mask, size > np.sort(size.ravel())[7])


@pytest.mark.parametrize(
    "specs",
    [(P("x"),), (P(None, None), P("x"), lambda w, g: jnp.abs(w * g.sum()))],
    ids=["weights", "gradients"],
)
def test_what_shard_map_divides_is_refused(specs):
    with pytest.raises(ValueError, match="along x hold.* w .*outside of shard_map"):
        update_in_shard_map(*specs)


def test_scan_over_steps_gives_the_same_run():
    @jax.jit
    def run(moment):
        body = lambda moment, batch: (learn(PRUNED, moment, batch), None)  # noqa: E731
        return jax.lax.scan(body, moment, batches())[0]

    moment = run(start(PRUNED, draw(0)))
    assert_same(agp.get_masks(moment.state), agp.get_masks(learned()[-1].state))
    for x, y in zip(
        jax.tree.leaves(moment), jax.tree.leaves(learned()[-1]), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_remat_in_the_loss_gives_the_same_masks():
    step = jax.jit(functools.partial(learn, PRUNED, loss=jax.checkpoint(loss)))
    moment = start(PRUNED, draw(0))
    for batch in batches():
        moment = step(moment, batch)
    assert_same(moment.state.masks, learned()[-1].state.masks)


def test_vmapped_runs_prune_by_their_own_step():
    step = jax.jit(jax.vmap(functools.partial(learn, PRUNED)))
    for ahead in range(NUM_STEPS - 2):
        apart = [learned(0)[ahead], learned(1)[2]]  # the second is at the first event
        together = jax.tree.map(lambda *x: jnp.stack(x), *apart)
        together = step(together, batches()[jnp.array([ahead, 2])])
        expected = [learned(0)[ahead + 1], learned(1)[3]]
        for i in range(2):
            one = jax.tree.map(lambda x, i=i: x[i], together)
            assert_same(one.state.masks, expected[i].state.masks)
            assert one.state.step == expected[i].state.step
            assert_same(
                one.params["dense"]["kernel"] == 0,
                expected[i].params["dense"]["kernel"] == 0,
            )
    assert step._cache_size() == 1


def test_init_can_be_vmapped_and_jitted():
    params = [draw(seed) for seed in range(2)]
    states = jax.vmap(PRUNED.init)(jax.tree.map(lambda *x: jnp.stack(x), *params))
    expected = [jax.jit(PRUNED.init)(x) for x in params]
    assert_same(states, jax.tree.map(lambda *x: jnp.stack(x), *expected))


@pytest.mark.parametrize("packed", [False, True])
def test_abstract_states_have_the_shapes_of_real_ones(packed):
    tx = agp.prune(MOMENTUM, RULES, packed=packed)
    shapes = jax.eval_shape(lambda: start(tx, draw(0)))
    after = jax.eval_shape(functools.partial(learn, tx), shapes, batches()[0])
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    real = learned(packed=packed)
    assert describe(shapes) == describe(real[0]) == describe(after)
    assert jax.tree.structure(shapes) == jax.tree.structure(real[-1])


def test_accumulated_gradients_prune_like_one_large_batch():
    @jax.jit
    def step(moment, batch):
        parts = [jax.grad(loss)(moment.params, half) for half in (batch[:2], batch[2:])]
        gradients = jax.tree.map(lambda x, y: (x + y) / 2, *parts)
        updates, state = PRUNED.update(gradients, moment.state, moment.params)
        return Moment(optax.apply_updates(moment.params, updates), state)

    moment = start(PRUNED, draw(0))
    for batch in batches():
        moment = step(moment, batch)
    assert_same(moment.state.masks, learned()[-1].state.masks)


@pytest.mark.parametrize("cut", range(NUM_STEPS + 1))
@pytest.mark.parametrize("packed", [False, True])
def test_a_run_cut_anywhere_resumes_bit_for_bit(packed, cut):
    moment = jax.device_get(learned(packed=packed)[cut])
    for batch in batches()[cut:]:
        moment = learn_step(packed)(moment, batch)
    assert_same(moment, learned(packed=packed)[-1])


# Packed masks


@pytest.mark.parametrize("t", range(NUM_STEPS + 1))
def test_packed_masks_change_no_bit(t):
    plain, packed = learned()[t], learned(packed=True)[t]
    assert_same(packed.params, plain.params)
    assert_same(packed.state.inner_state, plain.state.inner_state)
    assert_same(agp.get_masks(packed.state), agp.get_masks(plain.state))


def test_packed_masks_take_a_bit_per_weight():
    sizes = [x.nbytes for x in jax.tree.leaves(learned(packed=True)[0].state.masks)]
    assert sizes == [48 // 8, 80 // 8]


# Many devices

SHARDED = {
    "element": ((16, 32), P("x", "y"), agp.element(), {}),
    "block": ((16, 32), P("x", "y"), agp.block((2, 4)), {}),
    "filters": ((3, 8, 32), P(None, "y", "x"), agp.filters(), {}),
    "channels": ((16, 64), P(("x", "y"), None), agp.channels(), {}),
    "groups": ((16, 32), P("x", "y"), agp.n_of_m(2, 4), {}),
    "stack": ((4, 8, 16), P(None, "x", "y"), agp.block((1, 4)), {"stacked_axes": 1}),
    "rule/a": ((32, 16), P("x", "y"), agp.element(), {}),
    "rule/b": ((64,), P("y"), agp.element(), {}),
    "bias": ((16,), P("y"), None, {}),
}
SPREAD_STACKS = {  # as layers under scan whose first axis is spread over devices
    "element": ((4, 8, 16), P("x", None, "y"), agp.element(), {"stacked_axes": 1}),
    "filters": ((4, 8, 16), P("x", "y", None), agp.filters(), {"stacked_axes": 1}),
    "groups": ((4, 8, 16), P("x", None, "y"), agp.n_of_m(2, 4), {"stacked_axes": 1}),
}


def sharded_rules(entries):
    curve = agp.polynomial_schedule(0.5, begin_step=1, end_step=3)
    rules = [
        agp.Rule(name, structure, curve, **options)
        for name, (_, _, structure, options) in entries.items()
        if structure and "/" not in name
    ]
    together = agp.Rule("rule/.", agp.element(), curve, scope="rule")
    return [*rules, together] if "rule/a" in entries else rules


def shard_like_parameters(entries, mesh, tree):
    """A sharding per array of `tree`: that of the parameter in whose place it is."""

    def sharding(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        spec = entries[names[-1]][1] if names and leaf.ndim else P()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def run_on(mesh, entries, packed=False):
    """The last moment of a run on a mesh, or on one device."""
    inner = optax.sgd(0.25, momentum=0.5)  # exact with these numbers
    tx = agp.prune(inner, sharded_rules(entries), packed=packed)
    init, step = functools.partial(start, tx), jit_step(tx)
    shapes = {name: entry[0] for name, entry in entries.items()}
    place, options = lambda tree: tree, {}
    if mesh:
        spread = functools.partial(shard_like_parameters, entries, mesh)
        place = lambda tree: jax.device_put(tree, spread(tree))  # noqa: E731
        abstract = jax.eval_shape(init, draw_dyadic(0, shapes))
        options["out_shardings"] = spread(abstract)
    moment = jax.jit(init, **options)(place(draw_dyadic(0, shapes)))
    for t in range(1, 4):
        moment = step(place(draw_dyadic(t, shapes)), moment)
    return moment


@functools.cache
def run_on_one_device(name):
    return run_on(None, MESHED[name])


MESHED = {"all structures": SHARDED, "spread stacks": SPREAD_STACKS}


@pytest.mark.parametrize(
    "name, packed, in_context",
    [
        ("all structures", False, True),
        ("all structures", True, False),
        ("spread stacks", False, False),
    ],
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_training_equals_that_on_one_device(kind, name, packed, in_context):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        moment = run_on(mesh, MESHED[name], packed)
    expected = run_on_one_device(name)
    assert_same(moment.params, expected.params)
    assert_same(agp.get_masks(moment.state), expected.state.masks)
    for key, weights in moment.params.items():
        mask = moment.state.masks[key]
        if key != "bias":
            stored = mask.bits if packed else mask
            assert stored.sharding.is_equivalent_to(weights.sharding, weights.ndim), key
            assert len(stored.sharding.device_set) == 8
