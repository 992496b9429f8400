"""Structures against plain loops over boxes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from box_cases import BOXES, boxes, whole_numbers

import agp_jax as agp
from agp_jax.structures import box_shape, grid_shape, num_cells

each_box = pytest.mark.parametrize("structure, shape, box", BOXES.values(), ids=BOXES)


@each_box
def test_a_structure_cuts_into_these_boxes(structure, shape, box):
    assert box_shape(structure, shape) == box
    grid = grid_shape(box, shape)
    assert num_cells(structure, shape) == math.prod(grid) == len([*boxes(shape, box)])


def prune_by(structure, final, **options):
    """A jitted function (weights, step, mask) -> mask, events at 0, 1 and 2."""
    schedule = agp.polynomial_schedule(final, begin_step=0, end_step=2, power=1.0)
    rules = [agp.Rule("w", structure, schedule, **options)]

    @jax.jit
    def make(weights, step, mask):
        return agp.make_masks({"w": weights}, rules, step, {"w": mask})["w"]

    return make


def loop_mask(weights, box, num_removed, mask, score=np.abs):
    """What stays, by a loop over boxes and a stable sort of their scores."""
    cells = list(boxes(weights.shape, box))
    alive = [mask[where].any() for where in cells]
    scores = [score(np.where(mask, weights, 0)[where]).sum() for where in cells]
    order = np.lexsort((np.arange(len(cells)), -np.array(scores), ~np.array(alive)))
    kept = np.zeros(weights.shape, bool)
    for i in order[: len(cells) - num_removed]:
        kept[cells[i]] = True
    return kept & mask


N_OF_M = {  # n, m, axis, shape of the tensor
    "2:4": (2, 4, None, (8, 5)),
    "1:4 of conv": (1, 4, None, (3, 3, 8, 2)),
    "1:4 of 3d conv": (1, 4, None, (2, 1, 2, 4, 3)),
    "2:4 of 1d conv": (2, 4, -2, (2, 8, 3)),
    "2:4 along the last axis": (2, 4, -1, (3, 12)),
    "3:4 along the first axis": (3, 4, 0, (4, 3, 2)),
    "1:2 in the middle": (1, 2, 1, (3, 6, 2)),
    "4:8 of a vector": (4, 8, -1, (16,)),
    "1:1": (1, 1, -1, (5,)),
    "4:4": (4, 4, -2, (8, 5)),
}


def n_m_mask(weights, m, axis, num_removed, mask):
    """In every group of m the smallest go, later ones first among equals."""
    scores = np.where(mask, np.abs(weights), -1)
    scores = np.moveaxis(scores, axis, -1)
    groups = scores.reshape(*scores.shape[:-1], -1, m)
    kept = np.zeros(groups.shape, bool)
    best = np.argsort(-groups, axis=-1, kind="stable")[..., : m - num_removed]
    np.put_along_axis(kept, best, True, -1)
    return np.moveaxis(kept.reshape(scores.shape), -1, axis) & mask


@functools.cache
def prune_all(dtype):
    """[(level, weights, masks before, masks after)] of all tensors, event by event.

    The weights take few values: many scores are equal, and the first cell must win.
    """
    tensors = {
        name: (shape, structure, 0.75)
        for name, (structure, shape, _) in BOXES.items()
        if not structure.keep_n_of_m
    }
    tensors |= {
        name: (shape, agp.n_of_m(n, m, axis=axis), 1 - n / m)
        for name, (n, m, axis, shape) in N_OF_M.items()
    }
    rules = [
        agp.Rule(
            re.escape(name),
            structure,
            agp.polynomial_schedule(final, begin_step=0, end_step=2, power=1.0),
        )
        for name, (_, structure, final) in tensors.items()
    ]
    make = jax.jit(
        lambda weights, step, masks: agp.make_masks(weights, rules, step, masks)
    )
    history = []
    for seed in range(3):
        masks = {name: np.ones(shape, bool) for name, (shape, _, _) in tensors.items()}
        for step in range(3):
            weights = {
                name: jnp.asarray(
                    whole_numbers(10 * seed + step, x.shape, -3, 4), dtype
                )
                for name, x in masks.items()
            }
            after = jax.tree.map(np.asarray, make(weights, step, masks))
            values = {name: np.asarray(x, np.float32) for name, x in weights.items()}
            history.append((step / 2, values, masks, after))
            masks = after
    return history


each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


@each_dtype
@pytest.mark.parametrize("name", [x for x in BOXES if not BOXES[x][0].keep_n_of_m])
def test_the_mask_is_that_of_a_loop_over_boxes(name, dtype):
    structure, shape, box = BOXES[name]
    count = num_cells(structure, shape)
    for level, weights, before, after in prune_all(dtype):
        removed = min(int(0.75 * level * count), count - 1)
        expected = loop_mask(weights[name], box, removed, before[name])
        assert after[name].dtype == bool
        np.testing.assert_array_equal(after[name], expected)


@each_dtype
@pytest.mark.parametrize("name", N_OF_M)
def test_n_of_m_are_reached_gradually(name, dtype):
    n, m, axis, _ = N_OF_M[name]
    axis = -2 if axis is None else axis  # the input features
    for level, weights, before, after in prune_all(dtype):
        removed = int((1 - n / m) * level * m)
        expected = n_m_mask(weights[name], m, axis, removed, before[name])
        np.testing.assert_array_equal(after[name], expected)
        groups = np.moveaxis(after[name], axis, -1).reshape(-1, m)
        assert (groups.sum(-1) == m - removed).all()
    assert level == 1 and (groups.sum(-1) == n).all()


def test_1x1x8_blocks_prune_as_published():
    make = prune_by(agp.block((1, 1, 8, 1)), 0.7)
    weights = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    mask = np.asarray(make(weights, 2, np.ones(weights.shape, bool)))
    scores = np.zeros((3, 3, 8, 64))
    for h, w, i, o in np.ndindex(3, 3, 8, 64):
        scores[h, w, i, o] = np.abs(weights[h, w, 8 * i : 8 * i + 8, o]).sum()
        assert mask[h, w, 8 * i : 8 * i + 8, o].all() == mask[h, w, 8 * i, o]
    assert mask.sum() == 11_064  # of 4608 blocks int(0.7 * 4608) = 3225 are gone
    kept = mask[:, :, ::8]
    assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-6)


@pytest.mark.parametrize("score", [jnp.abs, jnp.square, lambda w: -w])
def test_a_cells_score_is_the_sum_over_its_weights(score):
    weights = whole_numbers(3, (6, 8), -9, 9)
    mask = prune_by(agp.filters(), 0.5, score=score)(weights, 2, np.ones((6, 8), bool))
    expected = loop_mask(
        weights, (6, 1), 4, np.ones((6, 8), bool), lambda w: np.asarray(score(w))
    )
    np.testing.assert_array_equal(mask, expected)


def test_scores_of_any_range_rank_filters():
    scales = np.float32(10) ** -np.arange(12, dtype=np.float32)
    weights = np.abs(whole_numbers(0, (8, 12), 1, 9)) * scales  # falling by tenths
    make = prune_by(agp.filters(), 0.17, score=jnp.square)  # two of twelve go
    for order in (slice(None), slice(None, None, -1)):
        mask = np.asarray(make(weights[:, order], 2, np.ones((8, 12), bool)))
        assert mask[0, order].tolist() == [True] * 10 + [False] * 2


@pytest.mark.parametrize(
    "structure, shape",
    [
        (agp.filters(), (4, 3)),
        (agp.channels(), (3, 4)),
        (agp.heads(3), (2, 6)),
        (agp.block((2, 2)), (2, 6)),
        (agp.filters(), (4, 1)),
        (agp.element(), (1,)),
    ],
    ids=str,
)
def test_the_last_cell_always_stays(structure, shape):
    mask = prune_by(structure, 0.9999999)(
        whole_numbers(0, shape, 1, 9), 2, np.ones(shape, bool)
    )
    box = box_shape(structure, shape)
    cells = [np.asarray(mask)[where] for where in boxes(shape, box)]
    assert sum(cell.all() for cell in cells) == 1
    assert sum(cell.any() for cell in cells) == 1


def test_a_partly_masked_cell_is_ranked_by_what_is_left_of_it():
    weights = np.array([[9, 1, 4], [9, 1, 4]], np.float32)
    mask = np.array([[False, True, True], [False, True, True]])
    mask = mask | np.array([[True, False, False], [False, False, False]])
    kept = prune_by(agp.filters(), 0.34)(weights, 2, mask)
    assert kept.tolist() == [[True, False, True], [False, False, True]]


def test_two_of_four_go_one_after_the_other():
    make = prune_by(agp.n_of_m(2, 4, axis=-1), 0.5)
    weights = np.array([[1, 2, 3, 4, 5, 5, 5, 5]], np.float32)
    mask = np.ones((1, 8), bool)
    for expected in ([1] * 8, [0, 1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0, 0]):
        mask = make(weights, expected.count(0) // 2, mask)
        assert mask[0].tolist() == [bool(x) for x in expected]


@pytest.mark.parametrize(
    "structure, shape, named",
    [
        (agp.block((4, 4)), (5, 8), r"block\(\(4, 4\)\).*\(5, 8\).*\(4, 4\)"),
        (agp.block((1, 8)), (3, 3, 16, 5), r"block\(\(1, 8\)\).*\(3, 3, 16, 5\)"),
        (agp.block((3,)), (), r"\(\)"),
        (agp.filters(axis=2), (5, 8), r"2.*\(5, 8\)"),
        (agp.filters(axis=-3), (5, 8), r"-3.*\(5, 8\)"),
        (agp.filters(), (), r"-1.*\(\)"),
        (agp.channels(), (5,), r"-2.*\(5,\)"),
        (agp.heads(3), (5, 8), r"1.*\(5, 8\).*3"),
        (agp.heads(9, axis=1), (5, 8), r"1.*\(5, 8\).*9"),
        (
            agp.heads(8),
            (64, 8, 16),
            r"\(64, 8, 16\).*heads\(8, axis=1\) if each.*axis=2 if 8 lie",
        ),
        (agp.n_of_m(2, 4), (6, 8), r"n_of_m\(2, 4\) .*\(6, 8\): axis 0 has 6 .*4"),
        (
            agp.n_of_m(2, 4),
            (8, 4, 4),
            r"\(8, 4, 4\).*n_of_m\(2, 4, axis=0\) for \(in, heads",
        ),
        (agp.n_of_m(2, 4), (8,), r"-2.*\(8,\)"),
        (agp.n_of_m(2, 4, axis=2), (8, 8), r"2.*\(8, 8\)"),
    ],
    ids=str,
)
def test_boxes_that_do_not_fit_are_an_error(structure, shape, named):
    with pytest.raises(ValueError, match=named):
        box_shape(structure, shape)


@pytest.mark.parametrize(
    "structure, shape, box",
    [
        (agp.heads(8, axis=1), (64, 8, 8), (64, 1, 8)),
        (agp.heads(8, axis=2), (64, 8, 16), (64, 8, 2)),
        (agp.heads(8), (64, 4, 16), (64, 4, 2)),
        (agp.heads(8), (8, 16), (8, 2)),
        (agp.heads(1), (64, 1, 16), (64, 1, 16)),
    ],
    ids=str,
)
def test_heads_lie_along_the_axis_that_is_named(structure, shape, box):
    assert box_shape(structure, shape) == box


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: agp.n_of_m(5, 4), "n=5, m=4"),
        (lambda: agp.n_of_m(0, 4), "n=0"),
        (lambda: agp.n_of_m(-1, 4), "n=-1"),
        (lambda: agp.heads(0), "0"),
        (lambda: agp.heads(-2), "-2"),
        (lambda: agp.block(()), r"\(\)"),
        (lambda: agp.block((2, 0)), r"\(2, 0\)"),
        (lambda: agp.block((1.5, 2)), "1.5"),
        (lambda: agp.heads(1.5), "1.5"),
    ],
)
def test_impossible_structures_are_an_error_that_names_the_value(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(
    "structure",
    [agp.element(), agp.block((1, 1)), agp.filters(), agp.channels(), agp.heads(2)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_an_empty_tensor_gets_an_empty_mask(structure, shape):
    box = box_shape(structure, shape)
    assert len(box) == len(shape)
    rules = [agp.Rule("w", structure, agp.one_shot(0.5))]
    mask = agp.make_masks({"w": jnp.zeros(shape)}, rules, 0)["w"]
    assert mask.shape == shape and mask.dtype == bool


def test_structures_are_values_with_names():
    assert agp.block([2, 3]) == agp.block((2, 3))
    assert hash(agp.filters()) == hash(agp.filters(axis=-1))
    assert agp.filters() != agp.filters(axis=0)
    assert agp.n_of_m(2, 4) != agp.n_of_m(1, 4)
    names = ["element()", "block((2, 3))", "n_of_m(2, 4)", "filters(axis=-1)"]
    made = [agp.element(), agp.block((2, 3)), agp.n_of_m(2, 4), agp.filters()]
    assert [str(structure) for structure in made] == names
    for structure in made:
        assert eval(f"agp.{structure}") == structure
