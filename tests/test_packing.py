"""Packed masks lose nothing and take a bit per weight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agp_jax.packing import PackedMask, pack, unpack


@pytest.mark.parametrize(
    "shape",
    [
        *[(), (1,), (7,), (8,), (9,), (3, 5), (16, 3), (3, 16), (8, 24), (24, 8)],
        *[(3, 3, 16, 5), (1, 1, 1), (5, 1, 8, 1), (2, 3, 5, 7), (1001, 3)],
        *[(0,), (3, 0), (0, 3), (8, 0), (0, 8)],
    ],
    ids=str,
)
def test_packing_loses_nothing_and_takes_a_bit_per_weight(shape):
    mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)
    packed, again = jax.jit(lambda x: (pack(x), unpack(pack(x))))(mask)
    assert again.dtype == bool and again.shape == shape
    np.testing.assert_array_equal(again, mask)
    if shape:
        assert packed.bits.dtype == jnp.uint8
        if any(size % 8 == 0 for size in shape):
            assert packed.bits.nbytes * 8 == mask.size
        else:
            padded = math.prod(shape[:-1]) * math.ceil(shape[-1] / 8)
            assert packed.bits.nbytes <= padded
    abstract = jax.eval_shape(pack, jax.ShapeDtypeStruct(shape, bool))
    assert jax.eval_shape(unpack, abstract) == jax.ShapeDtypeStruct(shape, bool)
    assert abstract == jax.eval_shape(lambda: packed)


def test_packed_masks_are_trees_of_bytes():
    packed = pack(jnp.arange(32).reshape(4, 8) % 3 == 0)
    assert [x.shape for x in jax.tree.leaves(packed)] == [(4, 1)]
    moved = jax.tree.map(lambda x: x, packed)
    assert isinstance(moved, PackedMask) and (moved.axis, moved.size) == (1, 8)
    both = jax.lax.cond(True, lambda: packed, lambda: moved)
    np.testing.assert_array_equal(unpack(both), unpack(packed))


def test_unpacking_leaves_other_masks_alone():
    mask = jnp.ones((3, 8), bool)
    assert unpack(mask) is mask
