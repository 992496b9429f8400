"""Keys: int32 numbers that order as floats do."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LOWEST = np.int32(np.iinfo(np.int32).min)
INFINITY = np.float32(np.inf).view(np.int32)


def ordered_bits(scores: jax.Array) -> jax.Array:
    """int32 keys that order as the float32 `scores` do; both zeros are equal.

    Every finite score has a key above `LOWEST` and below that of infinity; a score that
    is not finite has at least that.
    """
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    magnitude = bits & np.int32(2**31 - 1)
    ordered = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude >= INFINITY, INFINITY, ordered)


def magnitude_bits(values: jax.Array) -> jax.Array:
    """`ordered_bits(jnp.abs(values))`, in a single operation."""
    bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    return bits & np.int32(2**31 - 1)
