"""The digits that come with scikit-learn."""

from typing import Any

import numpy as np

from agp_jax.data.sources import Source


def read_digits() -> tuple[dict[str, Source], list[str]]:
    """The 1,797 digits of scikit-learn, three quarters of each class for training.

    The examples are shuffled with `RandomState(0)`, sorted by class, and every fourth
    goes to the test split; both splits then keep scikit-learn's order. The values 0..16
    become 0..255 as `value * 255 // 16`.
    """
    from sklearn.datasets import load_digits

    digits: Any = load_digits()  # annotated by scikit-learn as what it seldom is
    images = (digits.images * 255 // 16).astype(np.uint8)[..., np.newaxis]
    labels = digits.target.astype(np.int32)
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    is_test = np.zeros(len(labels), bool)
    is_test[by_class[::4]] = True
    splits = {
        "train": Source(images[~is_test], labels[~is_test]),
        "test": Source(images[is_test], labels[is_test]),
    }
    return splits, [str(label) for label in range(10)]
