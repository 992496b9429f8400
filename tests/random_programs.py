"""Random programs: a numbered seed gives a function of random variables and inputs.

A program grows from its input by random steps, each of which reads values made so far
and appends one. Steps choose by shapes and the seed alone, so the function can be
traced again and takes the same way.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WIDTHS = (4, 6, 8, 12)
MAX_SIZE = 3000


def random_program(seed, num_steps=12):
    """A program of about `num_steps` operations: (fn, variables, inputs) in float64."""
    rng = np.random.default_rng(seed)
    shape = [(3, 8), (2, 5, 6), (2, 4, 4, 6)][rng.integers(3)]
    x = rng.standard_normal(shape)
    declared = {}

    def declare(path, shape):
        return jnp.zeros(declared.setdefault(path, shape))

    jax.eval_shape(lambda x: _run(seed, num_steps, declare, x), x)
    variables = {
        path: rng.standard_normal(shape) / math.sqrt(max(1, math.prod(shape[:-1])))
        + (1.0 if path.startswith("scale") else 0.0)
        for path, shape in declared.items()
    }
    fn = lambda variables, x: _run(  # noqa: E731
        seed, num_steps, lambda path, shape: variables[path], x
    )
    return fn, variables, (x,)


def _run(seed, num_steps, read, x):
    draft = Draft(np.random.default_rng((seed, 1)), read)
    values = [jnp.tanh(draft.dense(x))]
    while num_steps > 0:
        step = draft.choose(STEPS)
        num_steps -= 1
        # Mostly from the last value on: deep rather than wide.
        index = len(values) - 1
        if draft.happens(0.25):
            index = int(draft.rng.integers(len(values)))
        value = step(draft, values[index], values)
        if value is not None and value.size <= MAX_SIZE and value.ndim <= 5:
            values.append(value)
    return [_finish(draft, value) for value in values[-1:] + values[-4:-3]]


def _finish(draft, x):
    """Mostly a last product, so that the features before it can be cut."""
    if x.ndim and draft.happens(0.8):
        x = draft.dense(x, width=3, axis=int(draft.rng.integers(x.ndim)))
    return x


class Draft:
    """A program in the making: its choices, and the variables it has so far."""

    def __init__(self, rng, read):
        self.rng = rng
        self.read = read
        self.shapes = []

    def happens(self, probability):
        return self.rng.random() < probability

    def choose(self, options):
        return options[int(self.rng.integers(len(options)))]

    def axis(self, x):
        """Mostly the last one."""
        return x.ndim - 1 if self.happens(0.6) else int(self.rng.integers(x.ndim))

    def variable(self, *shape, kind="w"):
        """A new variable, or now and then an old one of the same shape."""
        same = [
            path for path, old in self.shapes if old == shape and path[0] == kind[0]
        ]
        if same and self.happens(0.2):
            return self.read(self.choose(same), shape)
        path = f"{kind}{len(self.shapes)}"
        self.shapes.append((path, shape))
        return self.read(path, shape)

    def along(self, x, axis, kind="w"):
        """A variable with a number for each index of `axis`, in the rank of `x`."""
        shape = [1] * x.ndim
        if self.happens(0.5):
            shape[axis] = x.shape[axis]
            return self.variable(*shape, kind=kind)
        flat = self.variable(x.shape[axis], kind=kind)
        return lax.broadcast_in_dim(flat, x.shape, (axis,))

    def dense(self, x, width=None, axis=None):
        axis = self.axis(x) if axis is None else axis
        kernel = self.variable(x.shape[axis], width or self.choose(WIDTHS))
        out = jnp.tensordot(x, kernel, ((axis,), (0,)))
        return jnp.moveaxis(out, -1, axis)


# --- Layers ------------------------------------------------------------------


def dense(draft, x, values):
    if not x.ndim:
        return None
    axis = draft.axis(x)
    x = draft.dense(x, axis=axis)
    return x + draft.along(x, axis) if draft.happens(0.5) else x


def perceptron(draft, x, values):
    """A residual branch."""
    if not x.ndim:
        return None
    axis = draft.axis(x)
    hidden = jnp.maximum(draft.dense(x, axis=axis), 0)
    return x + draft.dense(hidden, width=x.shape[axis], axis=axis)


def convolution(draft, x, values):
    if x.ndim not in (3, 4):
        return None
    spatial, channels = x.ndim - 2, x.shape[-1]
    options = [1, channels] + [g for g in (2, 3) if channels % g == 0]
    groups = draft.choose(options)
    width = groups * draft.choose((1, 2, 3))
    kernel = draft.variable(
        *(draft.choose((1, 2, 3)),) * spatial, channels // groups, width
    )
    letters = "HW"[:spatial]
    upsample = groups == 1 and draft.happens(0.2)
    return lax.conv_general_dilated(
        x,
        kernel,
        (1 if upsample else draft.choose((1, 1, 2)),) * spatial,
        [(1, 1)] * spatial,
        lhs_dilation=(2 if upsample else 1,) * spatial,
        rhs_dilation=(draft.choose((1, 1, 2)),) * spatial
        if min(x.shape[1:-1]) > 3
        else None,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
    )


def batch_norm(draft, x, values):
    if not x.ndim:
        return None
    axis = draft.axis(x)
    mean, bias, scale = (draft.along(x, axis) for _ in range(3))
    var = jnp.abs(draft.along(x, axis, kind="scale"))
    return (x - mean) * lax.rsqrt(var + 1e-2) * scale + bias


def layer_norm(draft, x, values):
    if not x.ndim:
        return None
    axis = draft.axis(x)
    if draft.happens(0.5):
        x = x - x.mean(axis, keepdims=True)
    x = x * lax.rsqrt(jnp.mean(x * x, axis, keepdims=True) + 1e-2)
    return x * draft.along(x, axis, kind="scale")


def group_norm(draft, x, values):
    if not x.ndim or x.shape[-1] % 2:
        return None
    y = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-2)
    return y.reshape(x.shape) * draft.along(x, x.ndim - 1, kind="scale")


def low_rank(draft, x, values):
    if not x.ndim:
        return None
    width, rank = draft.choose(WIDTHS), 4
    kernel = draft.variable(x.shape[-1], rank) @ draft.variable(rank, width)
    if draft.happens(0.5):
        kernel = kernel + draft.variable(x.shape[-1], width)
    return x @ kernel


def standardised_dense(draft, x, values):
    if not x.ndim:
        return None
    kernel = draft.variable(x.shape[-1], draft.choose(WIDTHS))
    axis = draft.choose((0, 0, 1))
    kernel = kernel - kernel.mean(axis, keepdims=True)
    return x @ (kernel * lax.rsqrt(jnp.mean(kernel**2, axis, keepdims=True) + 1e-2))


def attention(draft, x, values):
    if x.ndim == 2:
        x = x[None]
    if x.ndim != 3 or x.shape[-1] % 2:
        return None
    split = (*x.shape[:2], 2, x.shape[-1] // 2)
    query, key, value = (
        draft.dense(x, width=x.shape[-1], axis=2).reshape(split) for _ in range(3)
    )
    if draft.happens(0.3):  # not zero where the weights are
        query, key = jnp.exp(jnp.tanh(query)), jax.nn.sigmoid(key)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    if draft.happens(0.7):
        scores = jax.nn.softmax(scores)
    return jnp.einsum("bhqk,bkhd->bqhd", scores, value).reshape(x.shape)


def embedding(draft, x, values):
    """Rows of a table, found by the signs of a value."""
    if not x.ndim:
        return None
    table = draft.variable(4, draft.choose(WIDTHS))
    found = table[jnp.where(x.sum(-1) > 0, 1, 3)]
    return found + table[0].reshape((1,) * (found.ndim - 1) + (-1,))


# --- Elementwise -------------------------------------------------------------


@jax.custom_jvp
def _squash(x):
    return x / (1 + jnp.abs(x))


@_squash.defjvp
def _squash_jvp(primals, tangents):
    return _squash(primals[0]), tangents[0] / (1 + jnp.abs(primals[0])) ** 2


FUNCTIONS = [
    jax.nn.relu,
    jnp.tanh,
    jax.nn.sigmoid,
    jax.nn.gelu,
    jax.nn.silu,
    jax.nn.elu,
    jnp.cos,
    jnp.abs,
    _squash,
    jax.jit(lambda x: jnp.minimum(x, 1.0) * 2 - 0.5),
    jax.checkpoint(lambda x: jnp.sin(x) * x),
    lambda x: jnp.exp(jnp.tanh(x)),
    lambda x: jnp.tanh(x) ** 2,
    lambda x: lax.clamp(-1.0, x, 2.0),
    lambda x: jnp.where(x > 0, x, 0.1 * x),
    lambda x: jnp.where(x == 0, 1.0, x),
    lambda x: jnp.sign(x) * 0.5,
    lambda x: (x >= 0).astype(x.dtype),
    lambda x: jnp.log1p(jnp.abs(x)),
    lambda x: 1 / (1 + x**2),
    lambda x: jnp.array([0.3, -0.7])[(x > 0).astype(jnp.int32)],
    jax.jit(lambda x: 0.5 + jax.nn.relu(x)),
]


def elementwise(draft, x, values):
    return draft.choose(FUNCTIONS)(x)


def weighted(draft, x, values):
    if not x.ndim:
        return None
    w = draft.along(x, draft.axis(x))
    return [
        lambda: x * w,
        lambda: x + w,
        lambda: jnp.maximum(x, w),
        lambda: jnp.where(w > 0, x, w * 0.5),
        lambda: x / (1 + jnp.abs(w)),
        lambda: jnp.tanh(x / w),  # not a number where both are zero
    ][int(draft.rng.choice(6, p=[0.3, 0.3, 0.1, 0.1, 0.15, 0.05]))]()


def combine(draft, x, values):
    """With another value of the same shape."""
    same = [y for y in values if y.shape == x.shape]
    y = draft.choose(same)
    return [
        lambda: x + y,
        lambda: x - 0.5 * y,
        lambda: x * jnp.tanh(y),
        lambda: x * jax.nn.sigmoid(y),
        lambda: jnp.maximum(x, y),
        lambda: jnp.where(y > 0, x, y),
    ][int(draft.rng.integers(6))]()


def dropout(draft, x, values):
    kept = jax.random.bernoulli(jax.random.key(len(values)), 0.7, x.shape)
    return jnp.where(kept, x / 0.7, 0)


def constant(draft, x, values):
    noise = np.random.default_rng(len(values)).standard_normal(x.shape)
    return x + noise if draft.happens(0.5) else x * noise


def normalise(draft, x, values):
    """By a sum or a norm over one axis."""
    if not x.ndim:
        return None
    axis = draft.axis(x)
    total = jnp.sum(draft.choose([jnp.abs, jnp.square])(x), axis, keepdims=True)
    return x / (1 + total)


def outer(draft, x, values):
    if x.ndim != 2:
        return None
    return jnp.tanh(x[:, :, None] * draft.choose([x, x + 1])[:, None, :])


# --- Shapes ------------------------------------------------------------------


def merge(draft, x, values):
    if x.ndim < 3:
        return None
    at = int(draft.rng.integers(1, x.ndim - 1))
    return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])


def split(draft, x, values):
    if not x.ndim:
        return None
    at = draft.axis(x)
    factors = [f for f in (2, 3, 4) if x.shape[at] % f == 0]
    if not factors:
        return None
    factor = draft.choose(factors)
    parts = [factor, x.shape[at] // factor]
    return x.reshape(
        *x.shape[:at], *parts[:: draft.choose((1, -1))], *x.shape[at + 1 :]
    )


def shuffle(draft, x, values):
    if not x.ndim or x.shape[-1] % 2:
        return None
    parts = x.reshape(*x.shape[:-1], 2, -1)
    return jnp.swapaxes(parts, -1, -2).reshape(x.shape)


def regroup(draft, x, values):
    """A reshape that follows no axis."""
    if x.ndim < 2 or x.shape[-1] % 2:
        return None
    return x.reshape(*x.shape[:-2], x.shape[-2] * 2, x.shape[-1] // 2)


def transpose(draft, x, values):
    return jnp.transpose(x, draft.rng.permutation(x.ndim)) if x.ndim > 1 else None


def concatenate(draft, x, values):
    if not x.ndim:
        return None
    axis = draft.axis(x)
    others = [
        y
        for y in values
        if y.ndim == x.ndim
        and y.shape[:axis] + y.shape[axis + 1 :] == x.shape[:axis] + x.shape[axis + 1 :]
    ]
    parts = [x, draft.choose(others)]
    if draft.happens(0.2):
        parts.append(jnp.full_like(x, 0.5))
    return jnp.concatenate(parts[:: draft.choose((1, -1))], axis)


def stack(draft, x, values):
    return jnp.stack([x, jnp.tanh(x)], int(draft.rng.integers(x.ndim + 1)))


def cut_out(draft, x, values):
    if not x.ndim:
        return None
    axis = draft.axis(x)
    size = x.shape[axis]
    if size < 4:
        return None
    start = int(draft.rng.integers(size // 2))
    return lax.slice_in_dim(x, start, size, draft.choose((1, 1, 2)), axis)


def halves(draft, x, values):
    if not x.ndim or x.shape[-1] % 2:
        return None
    left, right = jnp.split(x, 2, axis=-1)
    return left * jax.nn.sigmoid(right) if draft.happens(0.7) else right


def pad(draft, x, values):
    if not x.ndim:
        return None
    widths = [(0, 0)] * x.ndim
    widths[draft.axis(x)] = draft.choose([(1, 2), (0, 3), (2, 0)])
    return jnp.pad(x, widths, constant_values=draft.choose((0.0, 0.5)))


def roll(draft, x, values):
    if not x.ndim:
        return None
    axis = draft.axis(x)
    return jnp.roll(x, 1, axis) if draft.happens(0.5) else jnp.flip(x, axis)


def nothing(draft, x, values):
    """Slices and sums of no entries, and moves by no place."""
    if not x.ndim:
        return None
    axis = draft.axis(x)
    none = lax.slice_in_dim(x, 0, 0, axis=axis)
    return [
        lambda: jnp.concatenate([none, x], axis),
        lambda: jnp.roll(x, draft.choose((0, x.shape[axis])), axis),
        lambda: x + jnp.tanh(none).sum(axis, keepdims=True),
        lambda: jnp.concatenate(
            jnp.split(x, [0, x.shape[axis] // 2], axis)[::-1], axis
        ),
    ][int(draft.rng.integers(4))]()


def bits(draft, x, values):
    """Exponents of numbers, read as integers, and all bits back again."""
    parts = lax.bitcast_convert_type(x, jnp.uint32)
    whole = lax.bitcast_convert_type(parts, x.dtype)
    return whole + (parts[..., 1] << 1).astype(x.dtype) * 2.0**-32


def repeat(draft, x, values):
    if not x.ndim:
        return None
    if draft.happens(0.5):
        return jnp.repeat(x, 2, draft.axis(x))
    return jnp.tile(x, (2,) + (1,) * (x.ndim - 1))


def expand(draft, x, values):
    at = int(draft.rng.integers(x.ndim + 1))
    return jnp.broadcast_to(
        jnp.expand_dims(x, at), (*x.shape[:at], draft.choose((1, 3)), *x.shape[at:])
    )


def squeeze(draft, x, values):
    return jnp.squeeze(x) if 1 in x.shape else None


def take(draft, x, values):
    """By indices known when tracing: a permutation, or some with repeats."""
    if not x.ndim:
        return None
    axis = draft.axis(x)
    size = x.shape[axis]
    if draft.happens(0.4):
        return jnp.take(x, draft.rng.permutation(size), axis)
    shape = draft.choose([(5,), (2, 3), (1, 4), (3, 1)])
    picks = draft.rng.integers(0, size, shape)
    return jnp.take(x, picks if draft.happens(0.5) else jnp.asarray(picks), axis)


def take_pairs(draft, x, values):
    """Of two axes at once, by indices known when tracing."""
    if x.ndim < 2:
        return None
    shape = draft.choose([(4,), (2, 3), (2, 1)])
    rows, columns = (draft.rng.integers(0, size, shape) for size in x.shape[-2:])
    return x[..., rows, columns]


def table(draft, x, values):
    """Positions that are known when tracing, of rows of a table."""
    if x.ndim < 2:
        return None
    length, width = x.shape[-2:]
    read = draft.variable(2 * length, width)
    positions = draft.rng.integers(0, 2 * length, (draft.choose((1, 2)), length))
    return x + read[positions].sum(0).reshape((1,) * (x.ndim - 2) + (length, width))


def scatter(draft, x, values):
    """Into known columns of a wider array, added or instead of what is there."""
    if x.ndim < 2:
        return None
    size = x.shape[-1]
    columns = draft.rng.permutation(size + 2)[:size]
    wide = jnp.full((*x.shape[:-1], size + 2), draft.choose((0.0, 0.0, 0.5)))
    place = wide.at[..., columns]
    return draft.choose([place.add, place.add, place.set, place.max])(x)


def update(draft, x, values):
    """Writes over a part, at a place that depends on the values."""
    if not x.ndim:
        return None
    axis = int(draft.rng.integers(x.ndim))
    row = lax.slice_in_dim(x, 0, 1, axis=axis) * 0.5 + draft.choose((0.0, 0.5))
    start = jnp.where(x.sum() > 0, 0, x.shape[axis] - 1)
    return lax.dynamic_update_slice_in_dim(x, row, start, axis)


def window(draft, x, values):
    """Starts at a place that depends on the values."""
    if not x.ndim:
        return None
    axis = int(draft.rng.integers(x.ndim))
    size = x.shape[axis]
    start = jnp.where(x.sum() > 0, 0, 1)
    return lax.dynamic_slice_in_dim(x, start, max(1, size - 1), axis)


def look_up(draft, x, values):
    """Each index along an axis takes values from places that depend on values."""
    if x.ndim < 2:
        return None
    axis = int(draft.rng.integers(x.ndim))
    order = jnp.argsort(x, axis) if draft.happens(0.5) else (x > 0).astype(int)
    return jnp.take_along_axis(x, order % x.shape[axis], axis)


def pool(draft, x, values):
    if x.ndim != 4:
        return None
    window = [(1, 2, 2, 1), (1, 2, 1, 1), (1, 1, 1, 2)][int(draft.rng.integers(3))]
    start, function = draft.choose([(0.0, lax.add), (-jnp.inf, lax.max)])
    return lax.reduce_window(x, start, function, window, window, "VALID")


# --- Reductions and control flow ---------------------------------------------


def reduce(draft, x, values):
    if x.ndim < 2:
        return None
    function = draft.choose(
        [jnp.sum, jnp.sum, jnp.mean, jnp.max, jnp.min, jnp.prod, jax.nn.logsumexp]
    )
    axis = int(draft.rng.integers(x.ndim))
    return function(x, axis, keepdims=draft.happens(0.5))


def scale_by_total(draft, x, values):
    """By a number: a norm of all entries, or of all weights of a kernel."""
    total = draft.choose([jnp.abs, jnp.square])(x).sum()
    if x.ndim and draft.happens(0.5):
        kernel = draft.variable(x.shape[-1], x.shape[-1])
        total, x = jnp.square(kernel).sum(), x @ kernel
    return x / (1 + total)


def scale_by_reduction(draft, x, values):
    """Squeeze and excite."""
    if x.ndim < 2:
        return None
    axis = int(draft.rng.integers(x.ndim))
    return x * jax.nn.sigmoid(x.mean(axis, keepdims=True))


def along_axis(draft, x, values):
    if not x.ndim:
        return None
    axis = int(draft.rng.integers(x.ndim))
    return draft.choose(
        [
            lambda: jnp.cumsum(x, axis) / x.shape[axis],
            lambda: jax.nn.softmax(x, axis),
            lambda: jnp.sort(x, axis),
            lambda: lax.cummax(x, axis),
            lambda: lax.associative_scan(jnp.maximum, x, axis=axis),
            lambda: lax.top_k(x, x.shape[axis], axis=axis)[0],
            lambda: jnp.fft.fft(x, axis=axis).real / x.shape[axis],
            lambda: (
                jnp.broadcast_to(jnp.argmax(x, axis, keepdims=True), x.shape).astype(
                    x.dtype
                )
                * 0.1
            ),
        ]
    )()


def top_k(draft, x, values):
    return lax.top_k(x, 3)[0] if x.ndim and x.shape[-1] > 3 else None


def recurrence(draft, x, values):
    """A scan over the first axis, forwards or backwards."""
    if x.ndim < 2:
        return None
    width = x.shape[-1]
    recurrent, bias = draft.variable(width, width), draft.variable(width)
    bias = lax.broadcast_in_dim(bias, x.shape[1:], (x.ndim - 2,))

    function = draft.choose(
        [
            lambda state, now: jnp.tanh(state @ recurrent + bias + now),
            lambda state, now: state * 0.5 + now * bias,
            lambda state, now: state * jax.nn.sigmoid(bias) + 0.1,
        ]
    )

    def step(state, now):
        state = function(state, now)
        return state, state * 0.5

    start = jnp.zeros(x.shape[1:]) if draft.happens(0.5) else x[0]
    last, all_ = lax.scan(step, start, x, reverse=draft.happens(0.5))
    return all_ if draft.happens(0.7) else last


def layers(draft, x, values):
    """A scan over stacked kernels, whose channels may be moved in part."""
    if not x.ndim:
        return None
    hidden = draft.choose(WIDTHS)
    function, move = draft.choose(FUNCTIONS), draft.choose(MOVES)
    width = jax.eval_shape(move, jax.ShapeDtypeStruct((hidden,), x.dtype)).shape[-1]
    stacked = (
        draft.variable(3, x.shape[-1], hidden),
        draft.variable(3, width, x.shape[-1]),
    )
    normed = draft.happens(0.5)

    def layer(x, kernels):
        up, down = kernels
        y = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-2) if normed else x
        return x + move(function(y @ up)) @ down, None

    return lax.scan(layer, x, stacked)[0]


MOVES = [
    lambda h: h,
    lambda h: jnp.roll(h, 1, -1),
    lambda h: jnp.roll(h, h.shape[-1] // 2, -1),
    lambda h: jnp.concatenate([jnp.cos(h[..., :2]), h[..., 2:]], -1),
    lambda h: jnp.concatenate([h[..., ::2], h[..., 1::2]], -1),
    lambda h: h[..., ::-1] * h[..., np.arange(h.shape[-1]) ^ 1],
    lambda h: h[..., np.array([[0, 1], [2, 3], [0, 3]])].sum(-2),
    lambda h: jnp.concatenate([jnp.full_like(h[..., :2], 0.5), h], -1),
    lambda h: h[..., 1:],
]


def condition(draft, x, values):
    if not x.ndim:
        return None
    kernel = draft.variable(x.shape[-1], x.shape[-1])
    test = x.sum() > 0 if draft.happens(0.5) else jnp.bool_(draft.happens(0.5))
    other = draft.choose([jnp.tanh, lambda x: x * 0.5, lambda x: x + 1])
    return lax.cond(test, lambda x: jax.nn.relu(x @ kernel), other, x)


def loop(draft, x, values):
    if not x.ndim:
        return None
    kernel = draft.variable(x.shape[-1], x.shape[-1])

    def goes_on(carry):
        return carry[0] < 2

    def step(carry):
        return carry[0] + 1, jnp.tanh(carry[1] @ kernel + x)

    return lax.while_loop(goes_on, step, (0, x))[1]


def mapped(draft, x, values):
    if x.ndim < 2:
        return None
    kernel = draft.variable(x.shape[0], x.shape[-1], draft.choose(WIDTHS))
    return jax.vmap(lambda x, kernel: jnp.tanh(x @ kernel))(x, kernel)


LAYERS = [
    dense,
    perceptron,
    convolution,
    batch_norm,
    layer_norm,
    group_norm,
    low_rank,
    standardised_dense,
    attention,
    embedding,
]
POINTWISE = [elementwise, weighted, combine, dropout, constant, normalise, outer]
SHAPES = [
    merge,
    split,
    shuffle,
    regroup,
    transpose,
    concatenate,
    stack,
    cut_out,
    halves,
    pad,
    roll,
    repeat,
    expand,
    squeeze,
    take,
    take_pairs,
    table,
    nothing,
    bits,
    scatter,
    update,
    window,
    look_up,
    pool,
]
OTHERS = [
    reduce,
    scale_by_total,
    scale_by_reduction,
    along_axis,
    top_k,
    recurrence,
    layers,
    condition,
    loop,
    mapped,
]
STEPS = 3 * LAYERS + [dense] * 15 + 5 * POINTWISE + 2 * SHAPES + 2 * OTHERS
STEPS += [attention] * 4 + [convolution] * 4 + [reduce] * 4 + [elementwise] * 5
