"""Pruned SGD is the paper's plain loop in NumPy, bit for bit, for every structure."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pruned_optimizers import multi_steps
from pruning_cases import draw_dyadic, jit_step, keep_best, num_removed, start

import agp_jax as agp


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
        agp.n_of_m(2, 4),
        (8, 3),
        lambda i, j: i % 4,
        lambda i, j: i // 4 * 3 + j,
        sparsity=0.5,
    ),
    "1 of 3": Case(
        agp.n_of_m(1, 3, axis=-1),
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
    """All moments of a run with every structure, and the text of its program.

    Nothing in it asks for the usual promotion of dtypes.
    """
    tx = agp.prune(optax.sgd(0.25), all_rules())
    with jax.numpy_dtype_promotion("strict"):
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


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_another_dtype_need_no_promotion_either(packed):
    tx = agp.prune(optax.sgd(0.25), all_rules(), packed=packed)
    params = draw_dyadic(0, ALL_SHAPES)
    gradients = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, gradients, state, params)
    assert after == state
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


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


# What a step compiles to


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
