"""What others have published of an experiment, held against what ours ends with."""

import dataclasses
from typing import NamedTuple

from agp_jax.costs import Cost


@dataclasses.dataclass(frozen=True)
class Published:
    """What others have published of an experiment, to compare a plan with.

    Numbers are as printed there; None where there is none. Not part of the experiment.

    Attributes:
      source: where.
      sparsity: percent of zeros among the convolution and dense weights that are left.
      params_kept: percent of them that are left.
      compute_kept: percent of the multiply-adds that are left.
      params: how many convolution and dense weights are left.
      nonzero: how many of them are not zero.
      macs: how many multiply-adds per image are left.
      top1: percent of test images classified correctly.
      base_top1: the same before pruning.
      perplexity: of the test text.
      base_perplexity: the same of the dense model.
      errata: what is wrong in these figures, a sentence each.
    """

    source: str
    sparsity: str | None = None
    params_kept: str | None = None
    compute_kept: str | None = None
    params: int | None = None
    nonzero: int | None = None
    macs: int | None = None
    top1: str | None = None
    base_top1: str | None = None
    perplexity: str | None = None
    base_perplexity: str | None = None
    errata: tuple[str, ...] = ()


class Comparison(NamedTuple):
    """A published figure and ours, written alike."""

    quantity: str
    published: str
    here: str

    @property
    def agrees(self) -> bool:
        return self.published == self.here


def compare(published: Published, before: Cost, after: Cost) -> list[Comparison]:
    """The published figures that can be held against ours.

    Args:
      published: what others have.
      before: the cost of our model before any cut.
      after: its cost in the end, with non-zeros.
    """
    nonzero = after.nonzero_weights
    assert nonzero is not None  # it was counted
    params_kept = after.weight_params / before.weight_params
    percentages = {
        "zero weights (%)": (published.sparsity, 1 - nonzero / after.weight_params),
        "weights kept (%)": (published.params_kept, params_kept),
        "multiply-adds kept (%)": (published.compute_kept, after.macs / before.macs),
    }
    counts = {
        "weights": (published.params, after.weight_params),
        "non-zero weights": (published.nonzero, nonzero),
        "multiply-adds": (published.macs, after.macs),
    }
    rows = []
    for quantity, (theirs, ours) in percentages.items():
        if theirs is not None:
            decimals = len(theirs.partition(".")[2])
            rows.append(Comparison(quantity, theirs, f"{100 * ours:.{decimals}f}"))
    for quantity, (theirs, ours) in counts.items():
        if theirs is not None:
            rows.append(Comparison(quantity, f"{theirs:,}", f"{ours:,}"))
    return rows
