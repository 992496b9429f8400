"""Random programs: what is flagged exact, is.

`AGP_RANDOM_PROGRAMS=1000` in the environment tries as many programs instead of 100.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_programs import random_program

import agp_jax as agp

NUM_PROGRAMS = int(os.environ.get("AGP_RANDOM_PROGRAMS", "100"))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def cut_in_half(couplings, seed):
    """Removes half the units of each exact group: the masks and the cut.

    Groups are added one at a time, as a cut that would leave some array empty is
    refused.
    """
    rng = np.random.default_rng(seed)
    removed = {
        group.name: np.argsort(rng.random(group.shape))[..., : group.num_units // 2]
        for group in couplings.groups
        if group.exact and group.num_units > 1
    }
    try:
        return masks_and_cut(couplings, removed)
    except ValueError:
        accepted = {}
        for name, units in removed.items():
            try:
                masks_and_cut(couplings, accepted | {name: units})
            except ValueError as error:
                assert "empty" in str(error)
            else:
                accepted[name] = units
        return masks_and_cut(couplings, accepted)


def masks_and_cut(couplings, removed):
    masks = couplings.masks(removed)
    return masks, agp.plan_cut(masks, couplings)


@pytest.mark.parametrize("seed", range(NUM_PROGRAMS))
def test_a_thinned_program_is_the_masked_one(seed):
    fn, variables, inputs = random_program(seed)
    couplings = agp.find_couplings(fn, variables, *inputs)
    masks, cut = cut_in_half(couplings, seed)
    masked = jax.tree.map(lambda x, kept: x * kept, variables, masks)
    thinned = agp.thin(masked, cut)
    thin_fn = agp.thin_function(fn, variables, cut)

    @jax.jit
    def both(masked, thinned):
        return fn(masked, *inputs), thin_fn(thinned, *inputs)

    for expected, found in zip(*both(masked, thinned), strict=True):
        assert expected.dtype == found.dtype == jnp.float64
        assert expected.shape == found.shape
        scale = np.max(np.abs(expected), initial=1e-3)
        assert np.isfinite(scale)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * scale)


def test_most_programs_can_be_thinned():
    """An analysis that finds nothing would pass the other test."""
    num_exact = []
    for seed in range(30):
        fn, variables, inputs = random_program(seed)
        groups = agp.find_couplings(fn, variables, *inputs).groups
        num_exact.append(sum(group.exact for group in groups))
    assert np.mean(np.array(num_exact) > 0) >= 0.8
    assert sum(num_exact) >= 60
