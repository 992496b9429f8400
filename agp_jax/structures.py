"""How a tensor divides into cells, the smallest things pruning can remove.

A structure cuts a tensor into equal boxes, and a box is a cell. Layouts are Flax's:
convolution kernels are (height, width, in, out), dense kernels (in, out).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from agp_jax.trees import Shape, expect, expect_whole


@dataclasses.dataclass(frozen=True)
class Structure:
    """A way to divide tensors into cells.

    Attributes:
      name: how it was made, as printed in reports; structures of one name are equal.
      box: gives, for a tensor's shape, the shape of its boxes.
      keep_n_of_m: `(n, m, axis)` where cells compete only in groups of m neighbours
        along `axis`, of which the last event keeps n; None where all cells compete. An
        axis of None is that of the input features.
      axis: the one axis that is divided, where cells span all others; else None.
      is_of_layers: whether cells are whole layers, of many tensors.
      chosen: whether cells are what the model chooses between, along an axis that only
        couplings tell.

    >>> filters(), filters() == filters(axis=-1), filters().axis
    (filters(axis=-1), True, -1)
    """

    name: str
    box: Callable[[Shape], Shape] = dataclasses.field(compare=False, repr=False)
    keep_n_of_m: tuple[int, int, int | None] | None = None
    axis: int | None = None
    is_of_layers: bool = False
    chosen: bool = False

    def __repr__(self) -> str:
        return self.name


def element() -> Structure:
    """Every weight is a cell of its own.

    It makes a model easier to compress and no faster: XLA multiplies by zeros, too.

    >>> element().box((3, 3, 16, 32))
    (1, 1, 1, 1)
    """
    return Structure("element()", lambda shape: (1,) * len(shape))


def block(shape: Sequence[int]) -> Structure:
    """Boxes of the given shape.

    `block((1, 1, 8, 1))` on a convolution kernel is 8 consecutive input channels of
    one filter at one position, the "1x1x8" of published block-pruning results.

    Such blocks are for kernels and formats that skip them; XLA multiplies by zeros.

    Args:
      shape: whole numbers, one for each axis of the tensors that a rule matches, by
        whose sizes they divide.

    Raises:
      ValueError: for sizes below 1; and when a rule meets a tensor that the boxes do
        not tile.

    >>> block((1, 1, 8, 1)).box((3, 3, 16, 32))
    (1, 1, 8, 1)
    """
    expect(shape, Iterable, "the sizes of a block, such as (1, 1, 8, 1)")
    sizes = tuple(_whole("the size of a block", size) for size in shape)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"a block needs sizes of at least 1, got {sizes}")
    return Structure(f"block({sizes})", lambda _: sizes)


def n_of_m(n: int, m: int, axis: int | None = None) -> Structure:
    """Keeps n of every m neighbours along `axis`, by default the input features.

    Those are the axis before the last in kernels of products (in, out) and of
    convolutions (height, width, in, out). Of three axes it may be another one, as in
    (in, heads, features of a head), so these need an axis.

    Under a schedule it gets there gradually: at sparsity s each group of m has lost
    floor(s * m), for 2:4 first none, then one, then two. The schedule must therefore
    end where n of m are left.

    Sparse tensor cores of GPUs are twice as fast at 2:4; XLA does not use them.

    Raises:
      ValueError: unless 1 <= n <= m; and when a rule meets a tensor whose axis is no
        multiple of m.

    >>> import agp_jax as agp
    >>> import jax.numpy as jnp
    >>> rules = [agp.Rule("w", n_of_m(2, 4, axis=-1), agp.one_shot(0.5))]
    >>> agp.make_masks({"w": jnp.array([[5.0, 1, 2, 4]])}, rules, step=0)["w"]
    Array([[ True, False, False,  True]], dtype=bool)
    """
    n, m = _whole("n", n), _whole("m", m)
    axis = None if axis is None else _whole("axis", axis)
    if not 1 <= n <= m:
        raise ValueError(f"n_of_m keeps n of m with 1 <= n <= m, got n={n}, m={m}")
    along = "" if axis is None else f", axis={axis}"
    return Structure(
        f"n_of_m({n}, {m}{along})", lambda shape: (1,) * len(shape), (n, m, axis)
    )


def filters(axis: int = -1) -> Structure:
    """One cell per output feature: the whole filter that makes it.

    Args:
      axis: that of the output features: the last one in kernels of Flax, Haiku and
        Keras; `axis=0` in those of Equinox and PyTorch, (out, in, ...).

    >>> filters().box((3, 3, 16, 32))
    (3, 3, 16, 1)
    """
    axis = _whole("axis", axis)
    return Structure(
        f"filters(axis={axis})", lambda shape: _slabs(shape, axis), axis=axis
    )


def channels(axis: int = -2) -> Structure:
    """One cell per input feature: all weights that read it.

    Args:
      axis: that of the input features: the last but one in kernels of Flax, Haiku and
        Keras; `axis=1` in those of Equinox and PyTorch, (out, in, ...).

    >>> channels().box((3, 3, 16, 32))
    (3, 3, 1, 32)
    """
    axis = _whole("axis", axis)
    return Structure(
        f"channels(axis={axis})", lambda shape: _slabs(shape, axis), axis=axis
    )


def heads(count: int, axis: int = -1) -> Structure:
    """`count` equal runs of consecutive features along `axis`, as in attention.

    Args:
      count: how many heads there are.
      axis: along which they lie: the last one of kernels (in, heads * features of a
        head). Flax's attention has kernels (in, heads, features of a head), whose heads
        are `axis=1`, and (heads, features, out) behind it, with `axis=0`.

    Raises:
      ValueError: when a rule meets a tensor whose axis does not divide into `count`,
        or, with `axis=-1`, whose axis before the last has `count` entries, as the heads
        of Flax's kernels: then name the axis from the front.

    >>> heads(8).box((64, 512)), heads(8, axis=1).box((64, 8, 32))
    ((64, 64), (64, 1, 32))
    """
    count, axis = _whole("count", count), _whole("axis", axis)
    if count < 1:
        raise ValueError(f"heads needs a count of at least 1, got {count}")

    def box(shape: Shape) -> Shape:
        last = len(shape) - 1
        if axis == -1 and last > 1 and shape[-2] == count > 1:
            raise ValueError(
                f"which axis of shape {shape} is that of the heads? Use heads({count}, "
                f"axis={last - 1}) if each of its {count} entries is one, axis={last} "
                f"if {count} lie along the last axis"
            )
        return _slabs(shape, axis, count)

    return Structure(f"heads({count}, axis={axis})", box, axis=axis)


def layers() -> Structure:
    """One cell per layer: what it adds to a residual stream, in all its parameters.

    For rules with couplings. Where layers are stacked for a `scan`, they are the
    entries of the first axis. In a Python loop a layer is the residual branches of
    which the pattern's parentheses capture the same text, as in `(h_\\d+)/.*`; without
    parentheses it goes by the path up to its first name with a number, such as `h_3`
    or `blocks/3`.

    >>> import agp_jax as agp
    >>> import jax.numpy as jnp
    >>> def net(params, x):
    ...     for name in sorted(params):
    ...         x = x + jnp.maximum(x @ params[name]["up"], 0) @ params[name]["down"]
    ...     return x
    >>> params = {
    ...     f"h_{i}": {"up": jnp.full((2, 4), i + 1.0), "down": jnp.ones((4, 2))}
    ...     for i in range(2)
    ... }
    >>> couplings = agp.find_couplings(net, params, jnp.ones((1, 2)))
    >>> rules = [agp.Rule("h_.*/up", layers(), agp.one_shot(0.5))]
    >>> masks = agp.make_masks(params, rules, 0, couplings=couplings)
    >>> agp.thin(params, agp.plan_cut(masks, couplings))["h_0"]
    {'down': None, 'up': None}
    """
    return Structure("layers()", lambda shape: shape, is_of_layers=True)


def experts() -> Structure:
    """One cell per expert, of which a router chooses some for each token.

    A rule names stacked kernels of experts, the router, or both; couplings tell along
    which axis the experts lie, so `prune` and `make_masks` need them.

    >>> import agp_jax as agp
    >>> agp.Rule("blocks/experts/.*", experts(), agp.one_shot(0.25), stacked_axes=1)
    Rule('blocks/experts/.*', experts(), one_shot(0.25, step=0), stacked_axes=1)
    """
    return Structure("experts()", lambda shape: shape, chosen=True)


def box_shape(structure: Structure, shape: Shape) -> Shape:
    """The shape of a cell of `structure` in a tensor of `shape`.

    Raises:
      ValueError: if the boxes do not tile the tensor, or an axis is out of range.
    """
    box = structure.box(shape)
    if len(box) != len(shape) or any(
        size % part for size, part in zip(shape, box, strict=True)
    ):
        raise ValueError(
            f"{structure} does not tile shape {shape}: every axis must be a multiple "
            f"of the box {box}"
        )
    if structure.keep_n_of_m:
        _, m, _ = structure.keep_n_of_m
        axis = axis_of_groups(structure, shape)
        if shape[axis] % m:
            raise ValueError(
                f"{structure} does not tile shape {shape}: axis {axis} has "
                f"{shape[axis]} entries, not a multiple of {m}"
            )
    return box


def axis_of_groups(structure: Structure, shape: Shape) -> int:
    """The axis along which m neighbours compete, not negative.

    Raises:
      ValueError: if it is out of range, or not given where it could be several.
    """
    assert structure.keep_n_of_m is not None
    n, m, axis = structure.keep_n_of_m
    if axis is None and len(shape) == 3:
        raise ValueError(
            f"which axis of shape {shape} is that of the input features? Use "
            f"n_of_m({n}, {m}, axis=0) for (in, heads, features of a head), axis=1 for "
            f"(heads, features of a head, out) or (width, in, out); if the first axis "
            f"is that of stacked layers, set stacked_axes=1"
        )
    return _checked_axis(shape, -2 if axis is None else axis)


def grid_shape(box: Shape, shape: Shape) -> Shape:
    """How many boxes lie along each axis."""
    return tuple(size // part for size, part in zip(shape, box, strict=True))


def num_cells(structure: Structure, shape: Shape) -> int:
    """How many cells a tensor of `shape` has."""
    return math.prod(grid_shape(box_shape(structure, shape), shape))


def _slabs(shape: Shape, axis: int, count: int | None = None) -> Shape:
    """Boxes that span all axes but `axis`, of which each takes 1/`count`."""
    axis = _checked_axis(shape, axis)
    size = shape[axis]
    if count is not None and size % count:
        raise ValueError(f"axis {axis} of shape {shape} does not divide into {count}")
    box = (*shape[:axis], size // count if count else 1, *shape[axis + 1 :])
    return tuple(max(part, 1) for part in box)  # an empty tensor has no cells


def _whole(name: str, value: Any) -> int:
    return expect_whole(value, f"{name} must be a whole number")


def _checked_axis(shape: Shape, axis: int) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} is out of range for shape {shape}")
    return axis % len(shape)
