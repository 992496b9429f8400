"""Exact selection against NumPy's stable sort."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agp_jax as agp
from agp_jax.bits import INFINITY, LOWEST, magnitude_bits
from agp_jax.selection import Entrant, keep_largest, search

HIGHEST = INFINITY - 1  # the key of the largest finite float

# The tensors of a selection: shape, contests of its rows, position of the first cell.
LAYOUTS = {
    "scalar": [((), 0, 0)],
    "one cell": [((1, 1), 0, 0)],
    "vector": [((13,), 0, 0)],
    "awkward shape": [((7, 11, 13), 0, 0)],
    "rows": [((5, 8, 3), range(5), 0)],
    "rows of one cell": [((6,), range(6), 0)],
    "rows of rows": [((2, 3, 4), [[0, 1, 2], [3, 4, 5]], 0)],
    "together": [((5, 7), 0, 24), ((4, 6), 0, 0), ((3,), 0, 59)],
    "all kinds": [
        *[((5, 7), 2, 0), ((2, 9), [3, 4], 0), ((3, 3, 3), 2, 35)],
        *[((17,), 0, 0), ((), 1, 0)],
    ],
}

KEYS = {
    "any": lambda rng, shape: rng.integers(LOWEST, INFINITY, shape),
    "few": lambda rng, shape: rng.integers(-1, 2, shape),
    "equal": lambda rng, shape: np.full(shape, rng.integers(-5, 5)),
    "removed": lambda rng, shape: np.full(shape, LOWEST),
    "partly removed": lambda rng, shape: rng.choice([LOWEST, 3, 4], shape),
    "extreme": lambda rng, shape: rng.choice(
        [LOWEST, LOWEST + 1, -1, 0, 1, HIGHEST - 1, HIGHEST], shape
    ),
    "close": lambda rng, shape: 2**30 + rng.integers(0, 3, shape),
}


def as_they_are(keys):
    return keys


def cells_of(layout):
    """For every cell, tensor by tensor: its contest and its position in there."""
    contests, positions = [], []
    for shape, numbers, first in LAYOUTS[layout]:
        rows = np.asarray(numbers)
        num_cells = math.prod(shape[rows.ndim :])
        contests += [np.repeat(rows.ravel(), num_cells)]
        positions += [first + np.tile(np.arange(num_cells), rows.size)]
    return np.concatenate(contests), np.concatenate(positions)


def oracle(layout, keys, num_kept):
    contests, positions = cells_of(layout)
    flat = np.concatenate([np.ravel(x) for x in keys]).astype(np.int64)
    order = np.lexsort((positions, -flat, contests))
    kept = np.zeros(flat.size, bool)
    for contest, k in enumerate(num_kept):
        kept[order[contests[order] == contest][:k]] = True
    ends = np.cumsum([np.size(x) for x in keys])[:-1]
    return [
        part.reshape(x.shape)
        for part, x in zip(np.split(kept, ends), keys, strict=True)
    ]


@functools.cache
def selector(layout):
    num_cells = np.bincount(cells_of(layout)[0]).astype(np.int32)

    @jax.jit
    def select(keys, num_kept):
        entrants = [
            Entrant((x,), as_they_are, shape, np.min(rows), np.ndim(rows), first)
            for x, (shape, rows, first) in zip(keys, LAYOUTS[layout], strict=True)
        ]
        return keep_largest(entrants, num_kept, num_cells)

    return select, num_cells


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exactly_the_largest_stay_and_the_first_of_equals(layout, kind):
    select, num_cells = selector(layout)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        shapes = [shape for shape, _, _ in LAYOUTS[layout]]
        keys = [np.int32(KEYS[kind](rng, shape)) for shape in shapes]
        counts = [rng.integers(1, num_cells + 1) for _ in range(3)]
        for num_kept in (*counts, num_cells, np.ones_like(num_cells)):
            num_kept = np.int32(num_kept)
            ours = select([jnp.asarray(x) for x in keys], num_kept)
            theirs = oracle(layout, keys, num_kept)
            for x, y in zip(ours, theirs, strict=True):
                assert x.dtype == bool
                np.testing.assert_array_equal(x, y)


def test_every_count_of_a_vector_is_met():
    select, _ = selector("vector")
    keys = [np.int32([5, -3, 5, 0, 5, HIGHEST, LOWEST, 0, 0, 5, -3, 7, LOWEST])]
    for k in range(1, 14):
        (kept,) = select(keys, np.int32([k]))
        assert kept.sum() == k
        np.testing.assert_array_equal(kept, oracle("vector", keys, [k])[0])


def test_a_contest_with_a_key_that_is_not_finite_keeps_all():
    select, num_cells = selector("rows")
    rng = np.random.default_rng(0)
    keys = np.int32(KEYS["any"](rng, (5, 8, 3)))
    keys[1, 2, 0], keys[3, :, 1] = INFINITY, INFINITY + 5
    wanted = np.int32([7, 7, 7, 7, 24])
    (kept,) = select([jnp.asarray(keys)], wanted)
    expected = oracle("rows", [keys], np.where([0, 1, 0, 1, 0], num_cells, wanted))
    np.testing.assert_array_equal(kept, expected[0])


@pytest.mark.parametrize("idle_bits", [1, 13, 16, 23])
def test_keys_with_idle_bits_are_searched_exactly(idle_bits):
    rng = np.random.default_rng(idle_bits)
    keys = np.int32(KEYS["any"](rng, (500,)) >> idle_bits << idle_bits)
    keys[:50] = keys[50:100]
    entrant = Entrant((jnp.asarray(keys),), as_they_are, (500,), 0, idle_bits=idle_bits)
    for k in (1, 33, 250, 499):
        (kept,) = keep_largest([entrant], jnp.int32([k]), np.int32([500]))
        order = np.argsort(-np.int64(keys), kind="stable")
        np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(order[:k]))


@pytest.mark.parametrize("draw", ["normal", "laplace", "power", "two scales", "bfloat"])
def test_a_search_of_usual_weights_takes_few_passes(draw):
    rng = np.random.default_rng(0)
    weights = {
        "normal": lambda: rng.normal(0, 0.02, 200_000),
        "laplace": lambda: rng.laplace(0, 0.05, 200_000),
        "power": lambda: rng.standard_t(3, 200_000) * 0.01,
        "two scales": lambda: rng.normal(0, [[0.1], [1e-3]], (2, 100_000)).ravel(),
        "bfloat": lambda: rng.normal(0, 0.02, 200_000).astype(jnp.bfloat16),
    }[draw]()
    values = jnp.asarray(weights)
    idle_bits = 16 if draw == "bfloat" else 0
    entrant = Entrant((values,), magnitude_bits, values.shape, 0, idle_bits=idle_bits)
    for kept in (0.1, 0.5, 0.9):
        counts = jnp.int32([int(kept * values.size)])
        num_passes, *_ = jax.jit(lambda k: search([entrant], k, np.int32([200_000])))(
            counts
        )
        assert num_passes <= 10, kept


def test_selection_gives_the_same_eagerly():
    keys = jnp.int32([3, 1, 3, 2])
    entrant = Entrant((keys,), as_they_are, (4,), 0)
    (kept,) = keep_largest([entrant], jnp.int32([1]), np.int32([4]))
    assert kept.tolist() == [True, False, False, False]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_nothing_large_is_sorted_gathered_or_flattened():
    def select(keys):
        entrant = Entrant((keys,), as_they_are, (64, 96), 0)
        return keep_largest([entrant], jnp.int32([999]), np.int32([64 * 96]))

    jaxpr = jax.make_jaxpr(select)(jnp.zeros((64, 96), jnp.int32))
    names = set()
    for equation in equations(jaxpr.jaxpr):
        name = equation.primitive.name
        names.add(name)
        sizes = [math.prod(x.aval.shape) for x in (*equation.invars, *equation.outvars)]
        if max(sizes, default=0) > 64:
            assert not name.startswith(
                ("sort", "top_k", "gather", "scatter", "reshape", "cumsum", "concat")
            ), equation
    assert "while" in names and not names & {"sort", "top_k", "approx_top_k"}


def test_nothing_of_the_size_of_the_weights_is_stored():
    rules = [agp.Rule("w", agp.element(), agp.one_shot(0.5, step=1))]
    weights = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    masks = {"w": jax.ShapeDtypeStruct((512, 512), bool)}
    make = jax.jit(lambda p, t, m: agp.make_masks(p, rules, t, m))
    compiled = make.lower(weights, jnp.int32(1), masks).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 512 // 8
