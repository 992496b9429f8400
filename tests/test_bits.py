"""Keys against the order of floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agp_jax.bits import INFINITY, LOWEST, magnitude_bits, ordered_bits

SMALLEST = np.float32(2**-126)  # the smallest normal number
FLOATS = np.float32(
    [
        *(-3.4e38, -1.0, -np.nextafter(SMALLEST, 1), -SMALLEST),
        *(-SMALLEST / 2, -1e-45, 0.0, 1e-45, 3e-45, SMALLEST / 2, SMALLEST),
        *(0.5, np.nextafter(np.float32(1), 0), 1.0, np.nextafter(np.float32(1), 2)),
        *(3.4e38, np.finfo(np.float32).max, np.inf),
    ]
)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_keys_order_as_the_floats_do_denormals_included(transform):
    assert (np.diff(FLOATS) > 0).all()
    keys = np.asarray(transform(ordered_bits)(jnp.asarray(FLOATS)), np.int64)
    assert (np.diff(keys) > 0).all(), keys


def test_keys_of_random_floats_order_as_they_do():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    floats = np.sort(bits[np.isfinite(bits) & (np.abs(bits) >= SMALLEST)])
    keys = np.asarray(ordered_bits(jnp.asarray(floats)), np.int64)
    assert ((np.diff(keys) > 0) == (np.diff(floats) > 0)).all()
    assert (np.diff(keys) >= 0).all()


def test_both_zeros_have_one_key_and_finite_keys_lie_above_the_lowest():
    plus, minus = ordered_bits(jnp.float32([0.0, -0.0]))
    assert plus == minus
    assert ordered_bits(jnp.float32(-np.finfo(np.float32).max)) > LOWEST
    assert ordered_bits(jnp.ones(3)).dtype == jnp.int32


def test_what_is_not_finite_ranks_as_infinity_or_above():
    negative_nan = np.uint32(0xFFC00000).view(np.float32)
    values = jnp.float32([np.inf, -np.inf, np.nan, negative_nan])
    assert (ordered_bits(values) >= INFINITY).all()
    assert (magnitude_bits(values) >= INFINITY).all()
    assert ordered_bits(jnp.finfo(jnp.float32).max) < INFINITY


def test_magnitudes_have_the_keys_of_absolute_values():
    values = jnp.asarray(FLOATS)
    expected = ordered_bits(jnp.abs(values))
    np.testing.assert_array_equal(magnitude_bits(values), expected)
    narrow = values.astype(jnp.bfloat16)
    np.testing.assert_array_equal(magnitude_bits(narrow) % 2**16, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_ranked_as_the_float32_they_are(dtype):
    values = jnp.asarray(np.random.default_rng(1).normal(size=500), dtype)
    expected = ordered_bits(jnp.asarray(np.asarray(values, np.float32)))
    np.testing.assert_array_equal(ordered_bits(values), expected)
