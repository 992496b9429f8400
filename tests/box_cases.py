"""Tensors with the boxes of their structures written by hand, and loops over boxes."""

import itertools

import numpy as np

import agp_jax as agp

# Structure, shape of the tensor, shape of its boxes written by hand.
BOXES = {
    "scalar": (agp.element(), (), ()),
    "vector": (agp.element(), (7,), (1,)),
    "conv elements": (agp.element(), (3, 2, 5, 4), (1, 1, 1, 1)),
    "1x1x8": (agp.block((1, 1, 8, 1)), (3, 3, 16, 5), (1, 1, 8, 1)),
    "blocks": (agp.block((2, 3)), (6, 9), (2, 3)),
    "one block": (agp.block((6, 9)), (6, 9), (6, 9)),
    "block of rows": (agp.block([4]), (12,), (4,)),
    "filters of conv": (agp.filters(), (3, 3, 4, 6), (3, 3, 4, 1)),
    "filters of dense": (agp.filters(), (5, 7), (5, 1)),
    "filters of bias": (agp.filters(), (7,), (1,)),
    "filters first": (agp.filters(axis=0), (5, 7), (1, 7)),
    "channels of conv": (agp.channels(), (3, 3, 4, 6), (3, 3, 1, 6)),
    "channels of dense": (agp.channels(), (5, 7), (1, 7)),
    "heads": (agp.heads(3), (5, 12), (5, 4)),
    "one head": (agp.heads(1), (5, 12), (5, 12)),
    "heads in the middle": (agp.heads(2, axis=1), (5, 4, 3), (5, 2, 3)),
    "heads of projections": (agp.heads(4, axis=-2), (5, 4, 3), (5, 1, 3)),
    "n:m": (agp.n_of_m(2, 4), (8, 3), (1, 1)),
}


def boxes(shape, box):
    """The slices of all boxes, in row-major order of the grid."""
    starts = [range(0, size, part) for size, part in zip(shape, box, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(x, x + b) for x, b in zip(corner, box, strict=True))


def whole_numbers(seed, shape, low=-50, high=50):
    """Weights whose sums are exact in float32 in any order."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.float32)
