"""The same rules in every kind of model: two dense layers, once per framework."""

import functools
from typing import Any

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from optax import contrib

import agp_jax as agp

NUM_STEPS = 6
CURVE = agp.polynomial_schedule(0.7, begin_step=2, end_step=5)
RULES = [
    agp.Rule(r"(first|0)/kernel", agp.element(), CURVE),
    agp.Rule(r"(second|1)/kernel", agp.channels(), agp.one_shot(0.5, step=3)),
]
BATCH = jnp.asarray(np.random.default_rng(9).normal(size=(7, 4)), jnp.float32)


def draw_weights():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "first": {"kernel": draw(4, 8), "bias": draw(8)},
        "second": {"kernel": draw(8, 3), "bias": draw(3)},
    }


def predict(first, second):
    hidden = jax.nn.relu(BATCH @ first["kernel"] + first["bias"][None])
    return hidden @ second["kernel"] + second["bias"][None]


def loss(outputs):
    return jnp.mean(jnp.square(outputs - 1.0))


def make_optimizer():
    return agp.prune(optax.sgd(0.05, momentum=0.9), RULES)


def train_tree(params, call):
    """Trains any tree of parameters; its trees after each step, and its masks'."""
    tx = make_optimizer()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: loss(call(p)))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(NUM_STEPS):
        params, state = step(params, state)
        yield params, agp.get_masks(state)


def train_dict():
    yield from train_tree(draw_weights(), lambda p: predict(p["first"], p["second"]))


def train_list():
    params = [draw_weights()["first"], draw_weights()["second"]]
    for trees in train_tree(params, lambda p: predict(*p)):
        yield tuple({"first": x[0], "second": x[1]} for x in trees)


def train_tuple():
    params = tuple(draw_weights().values())
    for trees in train_tree(params, lambda p: predict(*p)):
        yield tuple({"first": x[0], "second": x[1]} for x in trees)


@flax.struct.dataclass
class Layer:
    kernel: Any
    bias: Any
    name: str = flax.struct.field(pytree_node=False, default="dense")


@flax.struct.dataclass
class Network:
    first: Layer
    second: Layer


def as_dicts(network):
    return {
        name: {"kernel": layer.kernel, "bias": layer.bias}
        for name, layer in (("first", network.first), ("second", network.second))
    }


def train_dataclass():
    params = Network(**{name: Layer(**x) for name, x in draw_weights().items()})
    call = lambda p: predict(*as_dicts(p).values())  # noqa: E731
    for trees in train_tree(params, call):
        yield tuple(as_dicts(x) for x in trees)


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(8, name="first")(x))
        return nn.Dense(3, name="second")(hidden)


def train_linen():
    state = TrainState.create(
        apply_fn=LinenNetwork().apply, params=draw_weights(), tx=make_optimizer()
    )

    @jax.jit
    def step(state):
        call = lambda p: loss(state.apply_fn({"params": p}, BATCH))  # noqa: E731
        return state.apply_gradients(grads=jax.grad(call)(state.params))

    for _ in range(NUM_STEPS):
        state = step(state)
        yield state.params, agp.get_masks(state.opt_state)


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.second = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def make_nnx_network():
    model = NnxNetwork(nnx.Rngs(0))
    nnx.update(model, draw_weights())
    return model


def train_nnx():
    model = make_nnx_network()
    optimizer = nnx.Optimizer(model, make_optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: loss(model(BATCH)))(model)
        optimizer.update(model, gradients)

    for _ in range(NUM_STEPS):
        step(model, optimizer)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        masks = nnx.to_pure_dict(agp.get_masks(optimizer.opt_state))
        yield params, masks


def train_nnx_functionally():
    graph, params = nnx.split(make_nnx_network(), nnx.Param)

    def call(params):
        return nnx.merge(graph, params, copy=True)(BATCH)

    for trees in train_tree(params, call):
        yield tuple(nnx.to_pure_dict(x) for x in trees)


class EquinoxLayer(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    activation: Any

    def __call__(self, x):
        return self.activation(x @ self.kernel + self.bias[None])


class EquinoxNetwork(eqx.Module):
    first: EquinoxLayer
    second: EquinoxLayer
    calls: jax.Array


def train_equinox():
    weights = draw_weights()
    model = EquinoxNetwork(
        EquinoxLayer(**weights["first"], activation=jax.nn.relu),
        EquinoxLayer(**weights["second"], activation=lambda x: x),
        jnp.int32(0),
    )
    tx = make_optimizer()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        call = lambda model: loss(model.second(model.first(BATCH)))  # noqa: E731
        gradients = eqx.filter_grad(call)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(gradients, state, params)
        return eqx.apply_updates(model, updates), state

    for _ in range(NUM_STEPS):
        model, state = step(model, state)
        yield as_dicts(model), as_dicts(agp.get_masks(state))


class WholeModel(eqx.Module):
    """Not everything in it trains."""

    kernel: jax.Array
    activation: Any
    calls: jax.Array
    width: int
    name: str = "float32"  # no array, though the name of a dtype


@pytest.mark.parametrize("seen_by_init", [lambda model: model, None])
def test_update_may_see_all_of_an_equinox_model(seen_by_init):
    kernel = draw_weights()["first"]["kernel"]
    model = WholeModel(kernel, jax.nn.relu, jnp.int32(3), 8)
    filtered = eqx.filter(model, eqx.is_inexact_array)
    rules = [agp.Rule(".*", agp.element(), agp.one_shot(0.5, step=2))]
    tx = agp.prune(optax.sgd(0.1), rules)
    state = tx.init(seen_by_init(model) if seen_by_init else filtered)
    before = jax.tree.structure(state)
    of_kernel = lambda model: jnp.sum(model.kernel**2)  # noqa: E731
    for num_zeros in 0, 16:
        updates, state = tx.update(eqx.filter_grad(of_kernel)(model), state, model)
        model = eqx.apply_updates(model, updates)
        assert int(jnp.sum(model.kernel == 0)) == num_zeros
    assert jax.tree.structure(state) == before and model.activation is jax.nn.relu
    kept = agp.get_masks(state).kernel
    np.testing.assert_allclose(model.kernel, jnp.where(kept, kernel * 0.64, 0), 1e-5)


@functools.cache
def expected():
    return list(train_dict())


@pytest.mark.parametrize(
    "train",
    [
        train_dict,
        train_list,
        train_tuple,
        train_dataclass,
        train_linen,
        train_nnx,
        train_nnx_functionally,
        train_equinox,
    ],
)
def test_a_rule_means_the_same_in_every_kind_of_model(train):
    for t, ((params, masks), (weights, kept)) in enumerate(
        zip(train(), expected(), strict=True), start=1
    ):
        for name in "first", "second":
            mask = masks[name]["kernel"]
            np.testing.assert_array_equal(mask, kept[name]["kernel"])
            np.testing.assert_array_equal(params[name]["kernel"] != 0, mask)
            for key in "kernel", "bias":
                np.testing.assert_allclose(
                    params[name][key], weights[name][key], rtol=1e-4, atol=1e-5
                )
        level = 0.7 * (1 - (1 - (min(t, 5) - 2) / 3) ** 3) if t >= 2 else 0.0
        assert np.sum(params["first"]["kernel"] == 0) == int(level * 32 + 1e-9)
        assert np.sum(params["second"]["kernel"] == 0) == (12 if t >= 3 else 0)


def test_masks_of_an_nnx_optimizer_apply_to_its_model():
    model = make_nnx_network()
    rules = [agp.Rule(".*kernel", agp.element(), agp.one_shot(0.5))]
    optimizer = nnx.Optimizer(
        model, agp.prune(optax.sgd(0.1, momentum=0.9), rules), wrt=nnx.Param
    )
    params = nnx.state(model, nnx.Param)
    sparse = agp.apply_masks(params, agp.get_masks(optimizer.opt_state))
    nnx.update(model, sparse)
    assert int(jnp.sum(model.first.kernel[...] == 0)) == 16
    assert int(jnp.sum(model.second.kernel[...] == 0)) == 12
    np.testing.assert_array_equal(
        model.first.bias[...], draw_weights()["first"]["bias"]
    )


def shapes_of_variables(state):
    """As trainers take stock of a state, or plan where it lies."""
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return [(x.shape, x.dtype) for x in jax.tree.leaves(state, is_leaf=is_variable)]


def test_all_variables_of_an_nnx_optimizer_hold_arrays():
    model = make_nnx_network()
    optimizer = nnx.Optimizer(model, make_optimizer(), wrt=nnx.Param)
    gradients = nnx.state(model, nnx.Param)
    for _ in range(2):
        assert shapes_of_variables(optimizer.opt_state)
        found = shapes_of_variables(nnx.state(optimizer, nnx.OptState))
        assert found.count(((8, 3), bool)) == 1
        assert len(found) == 2 + 4 + 2  # steps, momentum, masks
        graph, state = nnx.split(optimizer)
        assert shapes_of_variables(nnx.state(nnx.merge(graph, state))) == found
        optimizer.update(model, gradients)


def test_all_boxes_in_a_state_hold_arrays():
    params = {
        name: {
            key: nn.Partitioned(x, names=(None,) * x.ndim) for key, x in layer.items()
        }
        for name, layer in draw_weights().items()
    }
    tx = make_optimizer()
    state = tx.init(params)
    _, state = jax.jit(tx.update)(params, state, params)
    unboxed = nn.unbox(state)
    assert unboxed.masks["first"]["bias"] == optax.MaskedNode()
    assert unboxed.masks["first"]["kernel"].shape == (4, 8)
    assert nn.get_partition_spec(state).masks["first"]["bias"] == optax.MaskedNode()
    _, params = nnx.split(make_nnx_network(), nnx.Param)
    state = tx.init(params)
    _, state = jax.jit(tx.update)(params, state, params)
    assert len(shapes_of_variables(state)) == 1 + 2 + 4


def test_an_nnx_optimizer_cannot_hold_packed_masks():
    model = make_nnx_network()
    tx = agp.prune(optax.sgd(0.1), RULES, packed=True)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradients = nnx.grad(lambda model: loss(model(BATCH)))(model)
    optimizer.update(model, gradients)
    with pytest.raises(ValueError, match="use packed=False"):
        optimizer.update(model, gradients)


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.PathContains("kernel")])
def test_an_nnx_optimizer_may_own_part_of_the_model(wrt):
    model = make_nnx_network()
    tx = agp.prune(optax.sgd(0.1, momentum=0.9), RULES)
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        of = nnx.DiffState(0, wrt)
        gradients = nnx.grad(lambda model: loss(model(BATCH)), argnums=of)(model)
        optimizer.update(model, gradients)

    for _ in range(NUM_STEPS):
        step(model, optimizer)
    assert int(jnp.sum(model.first.kernel[...] == 0)) == 22
    assert int(jnp.sum(model.second.kernel[...] == 0)) == 12
    masks = nnx.to_pure_dict(agp.get_masks(optimizer.opt_state))
    for name, layer in ("first", model.first), ("second", model.second):
        np.testing.assert_array_equal(masks[name]["kernel"], layer.kernel[...] != 0)
        assert masks[name]["kernel"].dtype == bool


@pytest.mark.parametrize("packed", [False, True])
def test_a_train_state_survives_flax_serialisation(packed):
    tx = agp.prune(optax.sgd(0.05, momentum=0.9), RULES, packed=packed)
    make = lambda: TrainState.create(  # noqa: E731
        apply_fn=LinenNetwork().apply, params=draw_weights(), tx=tx
    )
    step = jax.jit(lambda state: state.apply_gradients(grads=draw_weights()))
    state = make()
    for _ in range(3):
        state = step(state)
    restored = flax.serialization.from_bytes(make(), flax.serialization.to_bytes(state))
    forms = [jax.tree.structure(x.opt_state) for x in (restored, state)]
    assert forms[0] == forms[1]
    for x, y in zip(
        jax.tree.leaves(step(state)), jax.tree.leaves(step(restored)), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_models_with_batch_statistics_prune_their_parameters_alone():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 8, (2, 2), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.conv(x)))

    rules = [agp.Rule("conv/kernel", agp.filters(), agp.one_shot(0.5, step=2))]
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, agp.prune(optax.sgd(0.1, momentum=0.9), rules), wrt=nnx.Param
    )
    images = jnp.asarray(
        np.random.default_rng(1).normal(size=(2, 4, 4, 1)), jnp.float32
    )

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.mean(model(images) ** 3))(model)
        optimizer.update(model, gradients)

    for _ in range(3):
        step(model, optimizer)
    dead = np.all(np.asarray(model.conv.kernel[...]) == 0, axis=(0, 1, 2))
    assert dead.sum() == 4
    assert list(agp.sparsity(agp.get_masks(optimizer.opt_state))) == [
        "conv/kernel",
        "total",
    ]


CONTRIB = {
    "muon": contrib.muon(0.01),
    "prodigy": contrib.prodigy(),
    "sam": contrib.sam(
        optax.sgd(0.05), optax.sgd(0.05), sync_period=2, opaque_mode=False
    ),
    "flatten": optax.flatten(optax.adam(0.01)),
}


@pytest.mark.parametrize("inner", CONTRIB.values(), ids=CONTRIB)
def test_optimizers_with_states_of_their_own_kind_are_traced_once(inner):
    params, traces = draw_weights(), []
    tx = agp.prune(inner, [agp.Rule(".*kernel", agp.element(), CURVE)])
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        traces.append(None)
        call = lambda p: loss(predict(p["first"], p["second"]))  # noqa: E731
        updates, state = tx.update(jax.grad(call)(params), state, params)
        return optax.apply_updates(params, updates), state

    for t in range(1, NUM_STEPS + 1):
        params, state = step(params, state)
        masks = agp.get_masks(state)
        assert (agp.sparsity(masks)["total"] > 0) == (t > 2)
        for name, layer in params.items():
            assert not np.any(layer["kernel"][~masks[name]["kernel"]])
            assert np.isfinite(layer["kernel"]).all()
    assert len(traces) == 1


def test_averages_in_the_parameters_are_masked_by_the_loop():
    rules = [agp.Rule(".*kernel", agp.element(), CURVE)]
    call = lambda p: loss(predict(p["first"], p["second"]))  # noqa: E731

    def train(tx, num_steps, params):
        params = optax.LookaheadParams.init_synced(params)
        state = tx.init(params)
        for _ in range(num_steps):
            gradients = jax.grad(call)(params.fast)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            masks = agp.get_masks(state)
            both = (agp.apply_masks(x, masks) for x in (params.fast, params.slow))
            params = optax.LookaheadParams(*both)
        return params, masks

    tx = optax.lookahead(agp.prune(optax.sgd(0.05), rules), 2, 0.5)
    params, masks = train(tx, 5, draw_weights())
    kept = masks["first"]["kernel"]
    assert int(kept.sum()) == 32 - 22
    assert not np.any(params.fast["first"]["kernel"][~kept])
    around = agp.prune(optax.lookahead(optax.sgd(0.05), 2, 0.5), rules)
    with pytest.raises(ValueError, match="gradients in a tree like the parameters"):
        train(around, 1, draw_weights())
