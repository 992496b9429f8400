import contextlib
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

import agp_jax as agp

NUM_STEPS = 8
LEVELS = {2: 0.1, 4: 0.8 - 0.7 / 8, 6: 0.8}  # equation 1 with n = 2, by hand
GRADUAL = agp.polynomial_schedule(
    0.8, begin_step=2, end_step=6, frequency=2, initial_sparsity=0.1
)
KERNEL_RULE = agp.Rule("dense/kernel", agp.element(), GRADUAL)
HEAD_RULE = agp.Rule("head/kernel", agp.filters(), agp.one_shot(0.5, step=4))
RULES = [KERNEL_RULE, HEAD_RULE]
SHAPES = {  # all differ, so that the shape of a state's leaf tells what it mirrors
    "dense": {"kernel": (6, 8), "bias": (8,)},
    "head": {"kernel": (8, 10), "scale": (10,)},
}
NO_MASK = optax.MaskedNode()


def is_shape(x):
    return isinstance(x, tuple)


def draw(seed, shapes=SHAPES, dtype=np.float32):
    """Normal numbers for a tree of shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=is_shape,
    )


def draw_dyadic(seed, shapes):
    """Multiples of 1/64 below 2: sums and quarters of them are exact, ties abound."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.integers(-127, 128, shape) / 64, np.float32),
        shapes,
        is_leaf=is_shape,
    )


def assert_same(tree, other):
    """Equal in structure, dtypes and every bit of every number."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def level_at(levels, t):
    """The value of the last of the events `levels` until t."""
    passed = [event for event in levels if event <= t]
    return levels[max(passed)] if passed else 0.0


def num_removed(levels, t, size):
    return min(math.floor(level_at(levels, t) * size), size - 1)


def keep_best(scores, alive, num_lost):
    """NumPy's choice among the cells of one contest: which of them stay."""
    order = np.lexsort((np.arange(scores.size), -scores, ~alive))
    kept = np.zeros(scores.size, bool)
    kept[order[: scores.size - num_lost]] = True
    return kept & alive


def remake(params, masks, t):
    """The masks of RULES for the weights `params`, in NumPy."""
    scores = np.abs(np.asarray(params["dense"]["kernel"], np.float32)).ravel()
    lost = num_removed(LEVELS, t, scores.size)
    kernel = keep_best(scores, masks["dense"].ravel(), lost).reshape(6, 8)
    scores = np.abs(np.asarray(params["head"]["kernel"], np.float32)).sum(0)
    head = keep_best(scores, masks["head"].any(0), num_removed({4: 0.5}, t, 10))
    return {"dense": kernel, "head": np.broadcast_to(head, (8, 10))}


NOTHING_REMOVED = {"dense": np.ones((6, 8), bool), "head": np.ones((8, 10), bool)}


def multiply(tree, masks):
    """`tree` with zeros where its two kernels are masked."""
    return {
        name: {**leaves, "kernel": jnp.where(masks[name], leaves["kernel"], 0)}
        for name, leaves in tree.items()
    }


def prune_states(state):
    is_state = lambda x: isinstance(x, agp.PruneState)  # noqa: E731
    return [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]


class Moment(NamedTuple):
    """What there is between two steps."""

    params: Any
    state: Any


def start(tx, params):
    return Moment(params, tx.init(params))


def jit_step(tx, **options):
    """One compiled training step, gradients given."""
    tx = optax.with_extra_args_support(tx)

    def step(gradients, moment, **extra):
        updates, state = tx.update(gradients, moment.state, moment.params, **extra)
        return Moment(optax.apply_updates(moment.params, updates), state)

    return jax.jit(step, **options)


# A table of optimizers, each with pruning and without


def average_params(decay):
    """A user's own transformation: an average of the parameters it is shown."""

    def update(updates, state, params=None):
        blend = lambda old, new: decay * old + (1 - decay) * new  # noqa: E731
        return updates, jax.tree.map(blend, state, params)

    return optax.GradientTransformation(lambda params: params, update)


class Setup(NamedTuple):
    """Ways to build an optimizer.

    Attributes:
      pruned: the optimizer with `prune` in it.
      bare: the same without.
      reach: what the gradient of one weight changes: its "element", "leaf" or "tree".
      every: how many calls of its `update` make one update of the weights.
      residue: bounds what the state holds where weights are masked.
    """

    pruned: optax.GradientTransformation
    bare: optax.GradientTransformation
    reach: str = "element"
    every: int = 1
    residue: float = 0.0


def around(bare, **options):
    return Setup(agp.prune(bare, RULES), bare, **options)


def inside(wrap, bare, **options):
    return Setup(wrap(agp.prune(bare, RULES)), wrap(bare), **options)


def multi_steps(tx):
    return optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()


def split(first, second):
    """The pruned kernels' optimizers and sgd for the rest."""
    labels = {
        "dense": {"kernel": "first", "bias": "rest"},
        "head": {"kernel": "second", "scale": "rest"},
    }
    parts = {"first": first, "second": second, "rest": optax.sgd(0.1)}
    if second is None:
        labels["head"]["kernel"] = "first"
        del parts["second"]
    return optax.partition(parts, labels)


KERNELS = {
    "dense": {"kernel": True, "bias": False},
    "head": {"kernel": True, "scale": False},
}
MOMENTUM = optax.sgd(0.1, momentum=0.9)
DECAYED_MOMENTUM = optax.chain(optax.add_decayed_weights(0.01), MOMENTUM)
SETUPS = {
    "sgd": around(optax.sgd(0.1)),
    "momentum": around(MOMENTUM),
    "nesterov": around(optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "decayed momentum": around(DECAYED_MOMENTUM),
    "adam": around(optax.adam(0.01)),
    "adamw": around(optax.adamw(0.01)),
    "adamax": around(optax.adamax(0.01), residue=1e-8),  # its eps is in nu
    "lamb": around(optax.lamb(0.01), reach="leaf"),
    "lion": around(optax.lion(0.01)),
    "adafactor": around(optax.adafactor(0.01, min_dim_size_to_factor=2), reach="leaf"),
    "adafactor unfactored": around(  # its epsilon of 1e-30 is in v
        optax.adafactor(0.01), reach="leaf", residue=1e-12
    ),
    "rmsprop": around(optax.rmsprop(0.01, momentum=0.9)),
    "clipping inside": around(
        optax.chain(optax.clip_by_global_norm(1.0), DECAYED_MOMENTUM), reach="tree"
    ),
    "clipping before": inside(
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        optax.sgd(0.1),
        reach="tree",
    ),
    "MultiSteps inside": around(multi_steps(MOMENTUM)),
    "MultiSteps around": inside(multi_steps, MOMENTUM, every=2),
    "masked": inside(lambda tx: optax.masked(tx, KERNELS), MOMENTUM),
    "partition": inside(lambda tx: split(tx, None), MOMENTUM),
    "two in a partition": Setup(
        split(
            agp.prune(MOMENTUM, [KERNEL_RULE]),
            agp.prune(optax.sgd(0.1), [HEAD_RULE]),
        ),
        split(MOMENTUM, optax.sgd(0.1)),
    ),
    "inject_hyperparams inside": around(
        optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 8))
    ),
    "inject_hyperparams around": Setup(
        optax.inject_hyperparams(lambda rate: agp.prune(optax.adam(rate), RULES))(0.1),
        optax.inject_hyperparams(lambda rate: optax.adam(rate))(0.1),
    ),
    "apply_if_finite inside": around(optax.apply_if_finite(MOMENTUM, 3)),
    "apply_if_finite around": inside(lambda tx: optax.apply_if_finite(tx, 3), MOMENTUM),
    "learning rate schedule": around(
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 8))
    ),
    "reduce_on_plateau": around(
        optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1, factor=0.5))
    ),
    "average of parameters": around(optax.chain(optax.sgd(0.1), average_params(0.9))),
    "schedule_free_adamw": around(contrib.schedule_free_adamw(0.1, weight_decay=0.01)),
}
BY_ELEMENT = [name for name, setup in SETUPS.items() if setup.reach == "element"]
BY_LEAF = [name for name, setup in SETUPS.items() if setup.reach == "leaf"]
all_setups = pytest.mark.parametrize("name", SETUPS)


@functools.cache
def train(name):
    """All moments of a run with a set-up, and its step."""
    step = jit_step(SETUPS[name].pruned)
    moments = [start(SETUPS[name].pruned, draw(0))]
    for t in range(1, NUM_STEPS + 1):
        moments.append(step(draw(t), moments[-1], value=jnp.float32(1.0)))
    return moments, step


@functools.cache
def bare_step(name):
    return jit_step(SETUPS[name].bare)


def train_by_hand(name):
    """The parameters and masks of a loop around the bare optimizer, masks in NumPy."""
    moment, masks = start(SETUPS[name].bare, draw(0)), NOTHING_REMOVED
    for t in range(1, NUM_STEPS + 1):
        gradients = multiply(draw(t), masks)
        if t % SETUPS[name].every == 0 and t // SETUPS[name].every in LEVELS:
            masks = remake(moment.params, masks, t // SETUPS[name].every)
        moment = bare_step(name)(gradients, moment, value=jnp.float32(1.0))
        moment = Moment(multiply(moment.params, masks), moment.state)
        yield moment.params, masks


@all_setups
def test_trees_and_dtypes_are_those_of_the_bare_optimizer(name):
    pruned, bare, *_ = SETUPS[name]
    params = draw(0)
    updates = {}
    for key, tx in ("pruned", pruned), ("bare", bare):
        tx = optax.with_extra_args_support(tx)
        state = jax.eval_shape(tx.init, params)
        updates[key], after = jax.eval_shape(
            functools.partial(tx.update, value=1.0), params, state, params
        )
        assert jax.tree.structure(state) == jax.tree.structure(after)
        for old, new in zip(
            jax.tree.leaves(state), jax.tree.leaves(after), strict=True
        ):
            assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert updates["pruned"] == updates["bare"]


@all_setups
def test_one_compilation_serves_all_steps(name):
    _, step = train(name)
    assert step._cache_size() == 1


@all_setups
def test_weights_are_zero_where_masked_and_counts_exact_at_every_step(name):
    every = SETUPS[name].every
    for t, (params, state) in enumerate(train(name)[0]):
        masks = agp.get_masks(state)
        assert [int(s.step) for s in prune_states(state)] == [t // every] * len(
            prune_states(state)
        )
        assert masks["dense"]["bias"] == masks["head"]["scale"] == NO_MASK
        for key in "dense", "head":
            mask, weights = masks[key]["kernel"], params[key]["kernel"]
            assert mask.dtype == bool and mask.shape == weights.shape
            np.testing.assert_array_equal(weights != 0, mask)
        lost = num_removed(LEVELS, t // every, 48)
        assert int(jnp.sum(params["dense"]["kernel"] == 0)) == lost
        lost = 8 * num_removed({4: 0.5}, t // every, 10)
        assert int(jnp.sum(params["head"]["kernel"] == 0)) == lost


@all_setups
def test_masks_only_lose_cells(name):
    masks = [agp.get_masks(state) for _, state in train(name)[0]]
    for before, after in zip(masks, masks[1:], strict=False):
        revived = jax.tree.map(lambda old, new: jnp.any(new & ~old), before, after)
        assert not any(jax.tree.leaves(revived))


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_training_is_the_bare_optimizer_with_weights_masked_by_hand(name):
    for (params, state), (expected, masks) in zip(
        train(name)[0][1:], train_by_hand(name), strict=True
    ):
        found = agp.get_masks(state)
        for key in "dense", "head":
            np.testing.assert_array_equal(found[key]["kernel"], masks[key])
            np.testing.assert_allclose(
                params[key]["kernel"], expected[key]["kernel"], rtol=1e-5, atol=1e-7
            )
        assert_same(params["dense"]["bias"], expected["dense"]["bias"])
        assert_same(params["head"]["scale"], expected["head"]["scale"])


@pytest.mark.parametrize("name", BY_LEAF)
def test_dense_leaves_train_as_with_the_bare_optimizer(name):
    for (params, _), (expected, _) in zip(
        train(name)[0][1:], train_by_hand(name), strict=True
    ):
        assert_same(params["dense"]["bias"], expected["dense"]["bias"])
        assert_same(params["head"]["scale"], expected["head"]["scale"])


@pytest.mark.parametrize("name", ["lamb", "adafactor", "clipping inside"])
def test_between_events_the_bare_optimizer_works_on_masked_gradients(name):
    moments, _ = train(name)
    for t in 1, 3, 5, 7, 8:
        masks = agp.get_masks(moments[t - 1].state)
        masks = {key: masks[key]["kernel"] for key in ("dense", "head")}
        moment = Moment(moments[t - 1].params, moments[t - 1].state.inner_state)
        gradients = multiply(draw(t), masks)
        expected = bare_step(name)(gradients, moment, value=jnp.float32(1.0))
        for x, y in zip(
            jax.tree.leaves(moments[t].params),
            jax.tree.leaves(multiply(expected.params, masks)),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@all_setups
def test_the_optimizer_remembers_nothing_of_masked_weights(name):
    for _, state in train(name)[0]:
        masks = agp.get_masks(state)
        for key in "dense", "head":
            mask = masks[key]["kernel"]
            for inner in [s.inner_state for s in prune_states(state)]:
                for path, leaf in jax.tree_util.tree_leaves_with_path(inner):
                    if leaf.shape == mask.shape and leaf.dtype != bool:
                        left = jnp.abs(jnp.where(mask, 0, leaf)).max()
                        assert left <= SETUPS[name].residue, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "pruned, dense",
    [("mu/kernel", "kernel"), ("kernel", "mu/kernel"), ("nu/mu/kernel", "mu/kernel")],
)
def test_a_moment_is_masked_like_its_own_parameter(pruned, dense):
    shape = (3, 4)
    shapes = {"kernel": shape, "mu": {"kernel": shape}, "nu": {"mu": {"kernel": shape}}}
    bare = optax.adam(0.1)
    tx = agp.prune(bare, [agp.Rule(pruned, agp.element(), agp.one_shot(0.5, step=1))])
    moment, expected = start(tx, draw(0, shapes)), start(bare, draw(0, shapes))
    step, bare_step = jit_step(tx), jit_step(bare)
    for t in 1, 2:
        moment = step(draw(t, shapes), moment)
        expected = bare_step(draw(t, shapes), expected)
    find = lambda tree, path: functools.reduce(dict.get, path.split("/"), tree)  # noqa: E731
    for name in "mu", "nu":
        average = getattr(moment.state.inner_state[0], name)
        assert int(jnp.sum(find(average, pruned) == 0)) == 6
        assert_same(find(average, dense), find(getattr(expected.state[0], name), dense))


def test_counters_survive_a_pruned_scalar_of_their_name():
    rules = [agp.Rule(".*", agp.element(), agp.one_shot(0.5, step=2), scope="rule")]
    params = {"count": jnp.float32(0.1), "kernel": jnp.arange(1.0, 4.0)}
    tx = agp.prune(optax.adam(0.01), rules)
    step, moment = jit_step(tx), start(tx, params)
    for _ in range(3):
        moment = step(jax.tree.map(jnp.ones_like, params), moment)
    assert moment.params["count"] == 0
    assert moment.state.inner_state[0].count == 3


def test_a_transformation_after_prune_breaks_the_zeros():
    moment = start(tx := optax.chain(SETUPS["sgd"].pruned, optax.scale(0.5)), draw(0))
    step = jit_step(tx)
    for t in range(1, 5):
        moment = step(draw(t), moment)
    kernel, mask = moment.params["dense"]["kernel"], agp.get_masks(moment.state)
    assert int(jnp.sum((kernel != 0) & ~mask["dense"]["kernel"])) >= 30


# Plain gradual pruning, bit for bit, for every structure


class Case(NamedTuple):
    """A structure and how NumPy numbers its cells and contests."""

    structure: agp.Structure
    shape: tuple
    cells: Any  # indices of a weight -> the number of its cell within its contest
    contests: Any = None  # indices of a weight -> its contest
    stacked_axes: int = 0
    sparsity: float = 0.7
    power: int = 1


CASES = {
    "element": Case(agp.element(), (5, 7), lambda i, j: 7 * i + j),
    "element of a scalar": Case(agp.element(), (), lambda: 0),
    "element by squares": Case(agp.element(), (4, 9), lambda i, j: 9 * i + j, power=2),
    "block": Case(agp.block((2, 3)), (6, 9), lambda i, j: i // 2 * 3 + j // 3),
    "block of a kernel": Case(
        agp.block((1, 1, 4, 1)),
        (2, 1, 8, 3),
        lambda i, j, k, n: ((i + j) * 2 + k // 4) * 3 + n,
    ),
    "filters": Case(agp.filters(), (2, 2, 3, 7), lambda i, j, k, n: n),
    "channels": Case(agp.channels(), (9, 5), lambda i, j: i, power=2),
    "heads": Case(agp.heads(5), (4, 10), lambda i, j: j // 2),
    "2 of 4": Case(
        agp.n_m(2, 4),
        (8, 3),
        lambda i, j: i % 4,
        lambda i, j: i // 4 * 3 + j,
        sparsity=0.5,
    ),
    "1 of 3": Case(
        agp.n_m(1, 3, axis=-1),
        (4, 6),
        lambda i, j: j % 3,
        lambda i, j: i * 2 + j // 3,
        sparsity=2 / 3,
    ),
    "stacked element": Case(
        agp.element(),
        (3, 4, 5),
        lambda i, j, k: 5 * j + k,
        lambda i, j, k: i,
        stacked_axes=1,
    ),
    "stacked filters": Case(
        agp.filters(),
        (2, 2, 3, 6),
        lambda i, j, k, n: n,
        lambda i, j, k, n: 2 * i + j,
        stacked_axes=2,
    ),
}
TOGETHER = {"together/a": (5, 3), "together/b": (2, 4, 3)}
ALL_SHAPES = {name: case.shape for name, case in CASES.items()} | TOGETHER


def case_levels(sparsity):
    return {2: sparsity * (1 - 8 / 27), 3: sparsity * (1 - 1 / 27), 4: sparsity, 1: 0.0}


def all_rules():
    curve = functools.partial(agp.polynomial_schedule, begin_step=1, end_step=4)
    rules = [
        agp.Rule(
            name,
            case.structure,
            curve(case.sparsity),
            score=jnp.square if case.power == 2 else jnp.abs,
            stacked_axes=case.stacked_axes,
        )
        for name, case in CASES.items()
    ]
    return [*rules, agp.Rule("together/.", agp.element(), curve(0.7), scope="rule")]


@functools.cache
def train_all_structures():
    """All moments of a run with every structure, and the text of its program."""
    tx = agp.prune(optax.sgd(0.25), all_rules())
    moments = [start(tx, draw_dyadic(0, ALL_SHAPES))]
    step = jit_step(tx).lower(moments[0].params, moments[0]).compile()
    for t in range(1, 6):
        moments.append(step(draw_dyadic(t, ALL_SHAPES), moments[-1]))
    return moments, step.as_text()


def plain_loop(name):
    """Gradual pruning of one tensor as the paper has it, in NumPy."""
    weights = np.asarray(draw_dyadic(0, ALL_SHAPES)[name])
    mask = np.ones(weights.shape, bool)
    case = CASES[name]
    index = np.indices(weights.shape)
    cells = np.broadcast_to(np.asarray(case.cells(*index)), weights.shape)
    contests = np.zeros(weights.shape, int)
    contests += case.contests(*index) if case.contests else 0
    for t in range(1, 6):
        gradient = np.asarray(draw_dyadic(t, ALL_SHAPES)[name])
        updated = weights - np.float32(0.25) * gradient * mask
        for contest in range(contests.max() + 1):
            here = contests == contest
            num_cells = cells[here].max() + 1
            add = functools.partial(np.bincount, cells[here], minlength=num_cells)
            scores = add(np.abs(weights[here].astype(np.float64)) ** case.power)
            lost = num_removed(case_levels(case.sparsity), t, num_cells)
            mask[here] = keep_best(scores, add(mask[here]) > 0, lost)[cells[here]]
        weights = np.where(mask, updated, 0)
        yield weights, mask


@pytest.mark.parametrize("name", CASES)
def test_sgd_is_the_plain_gradual_pruning_loop(name):
    for moment, (weights, mask) in zip(
        train_all_structures()[0][1:], plain_loop(name), strict=True
    ):
        np.testing.assert_array_equal(moment.state.masks[name], mask)
        np.testing.assert_array_equal(moment.params[name], weights)


def test_tensors_ranked_together_share_one_count():
    weights = {k: np.asarray(draw_dyadic(0, ALL_SHAPES)[k]) for k in TOGETHER}
    mask = np.ones(39, bool)
    for t, moment in enumerate(train_all_structures()[0][1:], start=1):
        gradients = draw_dyadic(t, ALL_SHAPES)
        flat = np.concatenate([weights[k].ravel() for k in TOGETHER])
        slope = np.concatenate([np.asarray(gradients[k]).ravel() for k in TOGETHER])
        updated = flat - np.float32(0.25) * slope * mask
        mask = keep_best(np.abs(flat), mask, num_removed(case_levels(0.7), t, 39))
        flat = np.where(mask, updated, 0)
        for key, part in zip(TOGETHER, np.split(flat, [15]), strict=True):
            weights[key] = part.reshape(TOGETHER[key])
            np.testing.assert_array_equal(moment.params[key], weights[key])


# Dtypes and odd trees


@pytest.mark.parametrize(
    "dtype, gradient_dtype",
    [
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float16", "bfloat16"),
        ("float64", "float32"),
        ("float64", "float64"),
    ],
)
def test_weights_of_any_dtype_become_exact_zeros(dtype, gradient_dtype):
    rules = [agp.Rule("kernel", agp.element(), GRADUAL)]
    shapes = {"kernel": (6, 8), "bias": (8,)}
    with jax.enable_x64("float64" in (dtype, gradient_dtype)):
        tx, bare = agp.prune(optax.sgd(0.1), rules), optax.sgd(0.1)
        step, step_bare = jit_step(tx), jit_step(bare)
        moment = start(tx, draw(0, shapes, dtype))
        mask = np.ones(48, bool)
        for t in range(1, NUM_STEPS + 1):
            gradients = draw(t, shapes, gradient_dtype)
            kept = jnp.asarray(mask.reshape(6, 8))
            masked = {**gradients, "kernel": jnp.where(kept, gradients["kernel"], 0)}
            expected, _ = step_bare(masked, start(bare, moment.params))
            scores = np.abs(np.asarray(moment.params["kernel"], np.float32)).ravel()
            moment = step(gradients, moment)
            mask = keep_best(scores, mask, num_removed(LEVELS, t, 48))
            assert moment.params["kernel"].dtype == dtype
            np.testing.assert_array_equal(moment.state.masks["kernel"].ravel(), mask)
            expected["kernel"] = jnp.where(mask.reshape(6, 8), expected["kernel"], 0)
            assert_same(moment.params, expected)
        assert step._cache_size() == 1


@pytest.mark.parametrize("packed", [False, True])
def test_leaves_that_cannot_be_pruned_train_as_ever(packed):
    params = {
        "layers": [
            draw_dyadic(i, {"kernel": s}) for i, s in enumerate([(3, 5), (16,)])
        ],
        "pair": (jnp.arange(4), jnp.array([True, False])),
        "none": None,
        "nothing": {},
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(2.0),
        "single": jnp.ones((1,)),
    }
    rules = [agp.Rule(".*", agp.element(), agp.one_shot(0.6, step=2))]
    bare = optax.sgd(0.25, momentum=0.5)  # exact with these numbers
    tx = agp.prune(bare, rules, packed=packed)
    pruned, dense = start(tx, params), start(bare, params)
    step, step_bare = jit_step(tx), jit_step(bare)
    gradients = jax.tree.map(jnp.ones_like, params)
    for _ in range(3):
        pruned, dense = step(gradients, pruned), step_bare(gradients, dense)
    assert step._cache_size() == step_bare._cache_size()
    masks = agp.get_masks(pruned.state)
    assert masks["pair"] == (NO_MASK, NO_MASK)
    assert masks["none"] is None and masks["nothing"] == {}
    assert [int(jnp.sum(x)) for x in jax.tree.leaves(masks)] == [0, 6, 7, 1, 1]
    layers, dense_layers = pruned.params.pop("layers"), dense.params.pop("layers")
    assert_same(pruned.params, dense.params)
    for i in range(2):
        mask = masks["layers"][i]["kernel"]
        expected = jnp.where(mask, dense_layers[i]["kernel"], 0)
        assert_same(layers[i]["kernel"], expected)


def test_a_number_among_the_parameters_is_left_alone():
    rules = [agp.Rule("kernel", agp.element(), agp.one_shot(0.5, step=1))]
    tx = agp.prune(optax.sgd(0.1, momentum=0.9), rules)
    params = {"kernel": jnp.arange(1.0, 5.0), "gain": 1.0}
    updates, _ = tx.update(
        {"kernel": jnp.ones(4), "gain": 1.0}, tx.init(params), params
    )
    trained = optax.apply_updates(params, updates)
    np.testing.assert_allclose(trained["kernel"], [0, 0, 2.9, 3.9], rtol=1e-6)
    np.testing.assert_allclose(trained["gain"], 0.9, rtol=1e-6)


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


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from equations(value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bare", [optax.adam(0.1), multi_steps(optax.sgd(0.1))])
def test_a_step_adds_two_conditionals_and_neither_sort_nor_callback(bare, packed):
    params = draw_dyadic(0, ALL_SHAPES)
    count = {}
    for tx in bare, agp.prune(bare, all_rules(), packed=packed):
        state = tx.init(params)
        jaxpr = jax.make_jaxpr(tx.update)(params, state, params)
        names = [equation.primitive.name for equation in equations(jaxpr.jaxpr)]
        assert not [x for x in names if re.search("sort|top_k|callback|infeed", x)]
        count[tx] = names.count("cond")
    assert count[tx] == count[bare] + 2


def test_the_compiled_step_has_one_conditional_and_stays_on_the_device():
    _, text = train_all_structures()  # plain SGD has no state to mask
    assert len(re.findall(r"\bconditional\(", text)) == 1
    assert not re.search(r"callback|infeed|outfeed|\bsort\(|TopK", text)


# Events at step 0, scores, extra arguments


def test_masks_of_step_0_are_there_after_init():
    rules = [
        agp.Rule(
            "dense/kernel",
            agp.element(),
            agp.polynomial_schedule(
                0.8, begin_step=0, end_step=4, frequency=2, initial_sparsity=0.5
            ),
        )
    ]
    tx = agp.prune(optax.sgd(0.1, momentum=0.9), rules)
    params, state = jax.jit(functools.partial(start, tx))(draw(0))
    scores = np.abs(np.asarray(params["dense"]["kernel"])).ravel()
    mask = keep_best(scores, np.ones(48, bool), 24).reshape(6, 8)
    np.testing.assert_array_equal(state.masks["dense"]["kernel"], mask)
    sparse = agp.apply_masks(params, state.masks)
    np.testing.assert_array_equal(
        sparse["dense"]["kernel"], np.where(mask, params["dense"]["kernel"], 0)
    )
    step = jit_step(tx)
    for before in params, sparse:  # masked by hand or not, the first update does it
        after = step(draw(1), Moment(before, state))
        np.testing.assert_array_equal(after.params["dense"]["kernel"] != 0, mask)
        np.testing.assert_array_equal(after.state.masks["dense"]["kernel"], mask)
        trace = after.state.inner_state[0].trace["dense"]["kernel"]
        np.testing.assert_array_equal(trace != 0, mask)


def taylor(weights, gradients):
    return jnp.square(weights * gradients)


def test_gradient_scores_at_step_0_are_refused():
    curve = functools.partial(agp.one_shot, 0.5)
    tx = agp.prune(
        optax.sgd(0.1), [agp.Rule("k", agp.element(), curve(), score=taylor)]
    )
    with pytest.raises(ValueError, match="rule 'k' ranks k by gradients.*step 1"):
        tx.init({"k": jnp.ones(4)})
    agp.prune(
        optax.sgd(0.1), [agp.Rule("k", agp.element(), curve(step=1), score=taylor)]
    ).init({"k": jnp.ones(4)})


def test_gradient_scores_use_the_gradients_of_the_update():
    rules = [agp.Rule("k", agp.element(), GRADUAL, score=taylor)]
    tx = agp.prune(optax.sgd(0.25), rules)
    shapes = {"k": (6, 8)}
    step, moment = jit_step(tx), start(tx, draw_dyadic(0, shapes))
    mask = np.ones(48, bool)
    for t in range(1, NUM_STEPS + 1):
        gradients = draw_dyadic(t, shapes)
        weights, slope = (
            np.asarray(x["k"]).ravel() for x in (moment.params, gradients)
        )
        mask = keep_best(np.square(weights * slope), mask, num_removed(LEVELS, t, 48))
        moment = step(gradients, moment)
        expected = (weights - np.float32(0.25) * slope) * mask
        np.testing.assert_array_equal(moment.params["k"].ravel(), expected)


@pytest.mark.parametrize("absent", [None, NO_MASK])
def test_given_scores_replace_the_rules_own_at_events(absent):
    tx = SETUPS["sgd"].pruned
    step, moment, masks = jit_step(tx), start(tx, draw(0)), NOTHING_REMOVED
    for t in range(1, NUM_STEPS + 1):
        given = jnp.exp(draw(100 + t, (6, 8)))
        given = jnp.where(masks["dense"], given, np.nan)  # of the masked none is read
        scores = {
            "dense": {"kernel": given, "bias": absent},
            "head": {"kernel": absent, "scale": absent},
        }
        moment = step(draw(t), moment, scores=scores)
        masks = remake({**moment.params, "dense": {"kernel": given}}, masks, t)
        for key in "dense", "head":  # the head's scores are its own weights
            np.testing.assert_array_equal(moment.params[key]["kernel"] != 0, masks[key])


def test_scores_of_another_shape_are_refused():
    tx = SETUPS["sgd"].pruned
    params, state = start(tx, draw(0))
    scores = draw(1, SHAPES | {"dense": {"kernel": (8, 6), "bias": (8,)}})
    with pytest.raises(ValueError, match=r"dense/kernel must have its shape \(6, 8\)"):
        tx.update(params, state, params, scores=scores)


@pytest.mark.parametrize(
    "wrap",
    [lambda tx: tx, lambda tx: optax.masked(tx, True), optax.chain],
    ids=["alone", "masked", "chain"],
)
def test_extra_arguments_reach_the_wrapped_optimizer(wrap):
    def update(updates, state, params=None, *, value, **rest):
        assert sorted(rest) == ["gradient_scale"]
        scale = value * rest["gradient_scale"]
        return jax.tree.map(lambda g: scale * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = wrap(agp.prune(inner, [HEAD_RULE]))
    step, moment = jit_step(tx), start(tx, draw(0))
    for _ in range(2):
        moment = step(draw(1), moment, value=3.0, gradient_scale=2.0, scores=draw(2))
    expected = draw(0)["dense"]["bias"] + 12.0 * draw(1)["dense"]["bias"]
    np.testing.assert_allclose(moment.params["dense"]["bias"], expected, rtol=1e-5)


def test_reduce_on_plateau_hears_the_loss():
    (moment, *_), step = train("reduce_on_plateau")

    def run(value):
        after = moment
        for t in range(1, 5):
            after = step(draw(t), after, value=jnp.float32(value / t))
        return after.state.inner_state[1].scale

    assert run(1.0) == 1.0  # the loss falls, the rate stays
    assert run(-1.0) < 1.0


# Numbers that are not finite


def spoil(tree, key, number, row=0):
    kernel = tree[key]["kernel"].at[row, 0].set(number)
    return {**tree, key: {**tree[key], "kernel": kernel}}


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_keeps_its_mask(number):
    moments, step = train("sgd")
    for t in 4, 6:
        before = moments[t - 1]
        weight = before.state.masks["dense"]["kernel"][:, 0]
        row = int(np.flatnonzero(weight)[0])  # of a weight that is still there
        before = before._replace(params=spoil(before.params, "dense", number, row))
        moment = step(draw(t), before, value=jnp.float32(1))
        for key, same in ("dense", before), ("head", moments[t]):
            expected = same.state.masks[key]["kernel"]
            assert_same(moment.state.masks[key]["kernel"], expected)
            assert jnp.all((moment.params[key]["kernel"] == 0) == ~expected)
        assert moment.state.step == t


def test_a_bad_gradient_of_a_masked_weight_does_nothing():
    moments, step = train("momentum")
    for t in range(5, NUM_STEPS + 1):
        gone = np.argwhere(~np.asarray(moments[t - 1].state.masks["dense"]["kernel"]))
        gradients = draw(t)
        for number, (i, j) in zip([np.nan, np.inf], gone, strict=False):
            kernel = gradients["dense"]["kernel"].at[i, j].set(number)
            gradients["dense"] = {**gradients["dense"], "kernel": kernel}
        assert_same(step(gradients, moments[t - 1], value=jnp.float32(1)), moments[t])


def test_the_next_event_catches_up():
    tx = SETUPS["sgd"].pruned
    step, moment = jit_step(tx), start(tx, draw(0))
    counts = []
    for t in range(1, NUM_STEPS + 1):
        scores = {**draw(50), "head": {"kernel": None, "scale": None}}
        if t == 4:
            scores = spoil(scores, "dense", np.nan, row=slice(None))
        moment = step(draw(t), moment, scores=scores)
        counts.append(int(jnp.sum(moment.params["dense"]["kernel"] == 0)))
    assert counts == [0, 4, 4, 4, 4, 38, 38, 38]


def test_apply_if_finite_inside_skips_the_update_and_prunes_as_planned():
    moments, step = train("apply_if_finite inside")
    before = moments[3]
    moment = step(spoil(draw(4), "head", np.nan), before, value=jnp.float32(1))
    masks = {k: np.asarray(before.state.masks[k]["kernel"]) for k in NOTHING_REMOVED}
    assert_same(moment.params, multiply(before.params, remake(before.params, masks, 4)))
    assert moment.state.step == 4


def test_apply_if_finite_around_puts_the_event_off():
    moments, step = train("apply_if_finite around")
    bad = step(spoil(draw(4), "head", np.nan), moments[3], value=jnp.float32(1))
    assert_same(bad.params, moments[3].params)
    assert_same(bad.state.inner_state, moments[3].state.inner_state)
    good = step(draw(4), bad, value=jnp.float32(1))
    assert_same(good.params, moments[4].params)


# Packed masks, masks found again, errors


@pytest.mark.parametrize("t", range(NUM_STEPS + 1))
def test_packed_masks_change_no_bit(t):
    plain, packed = learned()[t], learned(packed=True)[t]
    assert_same(packed.params, plain.params)
    assert_same(packed.state.inner_state, plain.state.inner_state)
    assert_same(agp.get_masks(packed.state), agp.get_masks(plain.state))


def test_packed_masks_take_a_bit_per_weight():
    sizes = [x.nbytes for x in jax.tree.leaves(learned(packed=True)[0].state.masks)]
    assert sizes == [48 // 8, 80 // 8]


def test_masks_of_parts_named_by_a_prefix_are_united():
    rules = [agp.Rule(".*kernel", agp.element(), agp.one_shot(0.5, step=1))]
    part = agp.prune(optax.sgd(0.25), rules)
    both = optax.chain(
        optax.masked(part, {"dense": True, "head": False}),
        optax.masked(part, {"dense": False, "head": True}),
    )
    whole = agp.prune(optax.sgd(0.25), rules)
    gradients = draw_dyadic(1, SHAPES)
    results = [
        jit_step(tx)(gradients, start(tx, draw_dyadic(0, SHAPES)))
        for tx in (both, whole)
    ]
    assert_same(results[0].params, results[1].params)
    assert_same(agp.get_masks(results[0].state), agp.get_masks(results[1].state))


def test_masks_of_a_part_apply_to_the_whole():
    rules = [agp.Rule(".*kernel", agp.element(), agp.one_shot(0.5))]
    params = draw(0)
    for part in (
        {"dense": True, "head": False},
        {"dense": {"kernel": True, "bias": False}},
    ):
        part = {"head": False, **part}
        state = optax.masked(agp.prune(optax.sgd(0.1), rules), part).init(params)
        sparse = agp.apply_masks(params, agp.get_masks(state))
        assert int(jnp.sum(sparse["dense"]["kernel"] == 0)) == 24
        assert_same(sparse["head"], params["head"])


def test_a_state_without_masks_is_refused():
    with pytest.raises(ValueError, match="no PruneState.*agp.prune"):
        agp.get_masks(optax.adam(0.1).init(draw(0)))


@pytest.mark.parametrize("place", [lambda state: state, jax.device_get])
def test_two_masks_of_one_parameter_are_refused(place):
    tx = optax.chain(SETUPS["sgd"].pruned, SETUPS["adam"].pruned)
    with pytest.raises(ValueError, match="several PruneStates"):
        agp.get_masks(place(tx.init(draw(0))))


def test_update_without_parameters_is_refused():
    tx = SETUPS["sgd"].pruned
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
        tx.update(draw(1), tx.init(draw(0)))


def test_a_rule_without_effect_is_refused_when_training_starts():
    rules = [*RULES, agp.Rule("dense/kernal", agp.element(), GRADUAL)]
    with pytest.raises(ValueError, match="'dense/kernal' matches no.*dense/kernel"):
        agp.prune(optax.sgd(0.1), rules).init(draw(0))
    tx = split(agp.prune(optax.sgd(0.1), RULES), optax.sgd(0.1))
    with pytest.raises(ValueError, match="'head/kernel' matches no parameter"):
        jax.eval_shape(tx.init, draw(0))


# Many devices

SHARDED = {
    "element": ((16, 32), P("x", "y"), agp.element(), {}),
    "block": ((16, 32), P("x", "y"), agp.block((2, 4)), {}),
    "filters": ((3, 8, 32), P(None, "y", "x"), agp.filters(), {}),
    "channels": ((16, 64), P(("x", "y"), None), agp.channels(), {}),
    "groups": ((16, 32), P("x", "y"), agp.n_m(2, 4), {}),
    "stack": ((4, 8, 16), P(None, "x", "y"), agp.block((1, 4)), {"stacked_axes": 1}),
    "rule/a": ((32, 16), P("x", "y"), agp.element(), {}),
    "rule/b": ((64,), P("y"), agp.element(), {}),
    "bias": ((16,), P("y"), None, {}),
}
SPREAD_STACKS = {  # as layers under scan whose first axis is spread over devices
    "element": ((4, 8, 16), P("x", None, "y"), agp.element(), {"stacked_axes": 1}),
    "filters": ((4, 8, 16), P("x", "y", None), agp.filters(), {"stacked_axes": 1}),
    "groups": ((4, 8, 16), P("x", None, "y"), agp.n_m(2, 4), {"stacked_axes": 1}),
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
