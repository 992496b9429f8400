"""Axes in parts, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from agp_jax.shardings import split_axis


def test_an_axis_splits_into_groups_of_neighbours():
    split = split_axis(jnp.arange(12).reshape(2, 6), 1, 3)
    assert split.tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


@pytest.mark.parametrize("parts, is_divided", [(4, True), (16, False)])
def test_groups_of_one_device_stay_there_and_others_are_brought_together(
    parts, is_divided
):
    values = np.arange(2 * 48).reshape(2, 48)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh) as _:
        placed = jax.device_put(values, NamedSharding(mesh, PartitionSpec("x", "y")))
        split = split_axis(placed, 1, parts)
    np.testing.assert_array_equal(split, values.reshape(2, -1, parts))
    assert split.sharding.spec[0] == "x"
    assert (split.sharding.spec[1] == "y") == is_divided
