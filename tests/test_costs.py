"""What is counted, against counts by hand and published totals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

import agp_jax as agp

abstract = jax.ShapeDtypeStruct


def kernels(*shapes, make=abstract):
    return {f"w{i}": make(shape, jnp.float32) for i, shape in enumerate(shapes)}


def macs_of(fn, variables, *inputs):
    """MACs per leaf that is a kernel, and of products without one under ''."""
    cost = agp.measure_cost(fn, variables, *inputs)
    found = {leaf.path: leaf.macs for leaf in cost.weights}
    assert cost.macs == sum(found.values()) + cost.other_macs
    return found | ({"": cost.other_macs} if cost.other_macs else {})


def conv(x, kernel, **options):
    """NHWC, and HWIO kernels."""
    spatial = x.ndim - 2
    letters = "DHW"[-spatial:]
    options = {"window_strides": (1,) * spatial, "padding": "SAME"} | options
    return lax.conv_general_dilated(
        x,
        kernel,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        **options,
    )


# --- Parameters --------------------------------------------------------------


def two_layers(variables, x):
    hidden = conv(x, variables["conv"]["kernel"]) + variables["conv"]["bias"]
    hidden = nn.relu(hidden).reshape(x.shape[0], -1)
    return hidden @ variables["dense"]["kernel"]


def two_layer_variables(make):
    return {
        "conv": {"kernel": make((3, 3, 2, 4)), "bias": make((1, 1, 1, 4))},
        "dense": {"kernel": make((5 * 5 * 4, 7))},
    }


def test_two_layers_counted_by_hand():
    variables = two_layer_variables(jnp.ones)
    variables["dense"]["kernel"] = variables["dense"]["kernel"].at[:, :3].set(0)
    cost = agp.measure_cost(two_layers, variables, jnp.ones((2, 5, 5, 2)))
    found = [
        (x.path, x.shape, x.params, x.nonzero, x.macs, x.is_weight) for x in cost.leaves
    ]
    assert found == [
        ("conv/bias", (1, 1, 1, 4), 4, 4, None, False),
        ("conv/kernel", (3, 3, 2, 4), 72, 72, 2 * 25 * 72, True),
        ("dense/kernel", (100, 7), 700, 400, 2 * 700, True),
    ]
    assert (cost.params, cost.nonzero) == (776, 476)
    assert (cost.weight_params, cost.nonzero_weights) == (772, 472)
    assert (cost.macs, cost.other_macs, cost.notes) == (5000, 0, ())


def test_shapes_alone_have_the_same_cost_but_unknown_zeros():
    make = lambda shape: abstract(shape, jnp.bfloat16)  # noqa: E731
    cost = agp.measure_cost(two_layers, two_layer_variables(make), make((2, 5, 5, 2)))
    assert (cost.params, cost.weight_params, cost.macs) == (776, 772, 5000)
    assert cost.nonzero is None and cost.nonzero_weights is None


def test_the_table_has_a_line_per_layer():
    variables = two_layer_variables(jnp.ones)
    cost = agp.measure_cost(two_layers, variables, jnp.ones((2, 5, 5, 2)))
    assert [line.split() for line in cost.table().splitlines()] == [
        ["layer", "shape", "params", "nonzero", "MACs"],
        ["conv/kernel", "3x3x2x4", "72", "72", "3,600"],
        ["dense/kernel", "100x7", "700", "700", "1,400"],
        ["weights", "772", "772"],
        ["other", "parameters", "4", "4"],
        ["without", "parameters", "0"],
        ["total", "776", "776", "5,000"],
    ]
    assert str(cost) == cost.table()


def test_a_subtree_leaves_out_batch_statistics():
    variables = {"params": {"w": jnp.ones((3, 4))}, "batch_stats": jnp.ones(3)}
    cost = agp.measure_cost(
        lambda v, x: (x - v["batch_stats"]) @ v["params"]["w"], variables, jnp.ones(3)
    )
    assert (cost.params, cost.subtree("params").params) == (15, 12)
    assert [leaf.path for leaf in cost.subtree("params").leaves] == ["w"]
    assert cost.subtree("params").macs == cost.macs == 12


def test_leaves_without_numbers_cost_nothing():
    variables = {
        "w": jnp.ones((3, 4)),
        "mask": jnp.ones((3, 4), bool),
        "key": jax.random.key(0),
        "count": jnp.ones((), jnp.int32),
        "empty": jnp.ones((0, 4)),
    }
    cost = agp.measure_cost(
        lambda v, x: x @ jnp.where(v["mask"], v["w"], 0), variables, jnp.ones((1, 3))
    )
    assert [leaf.path for leaf in cost.leaves] == ["empty", "w"]
    assert (cost.params, cost.macs) == (12, 12)


def test_nnx_models_are_trees_too():
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1))
    )
    graph, state = nnx.split(model)
    found = macs_of(lambda s, x: nnx.merge(graph, s)(x), state, jnp.ones((3, 4)))
    assert found == {"layers/0/kernel": 96, "layers/2/kernel": 48}


# --- Products ----------------------------------------------------------------


UPSAMPLING = {"lhs_dilation": (2, 2), "padding": ((1, 2), (1, 2))}


@pytest.mark.parametrize(
    ("lhs", "rhs", "options", "macs"),
    [
        ((2, 8, 8, 4), (3, 3, 4, 6), {}, 2 * 64 * 9 * 4 * 6),
        ((2, 8, 4), (3, 4, 6), {}, 2 * 8 * 3 * 4 * 6),
        ((1, 4, 4, 4, 2), (2, 2, 2, 2, 3), {}, 64 * 8 * 2 * 3),
        ((2, 8, 8, 4), (3, 3, 4, 6), {"window_strides": (2, 2)}, 2 * 16 * 9 * 4 * 6),
        ((2, 8, 8, 4), (3, 3, 4, 6), {"padding": "VALID"}, 2 * 36 * 9 * 4 * 6),
        ((2, 8, 8, 4), (3, 3, 2, 6), {"feature_group_count": 2}, 2 * 64 * 9 * 2 * 6),
        ((2, 8, 8, 4), (3, 3, 1, 4), {"feature_group_count": 4}, 2 * 64 * 9 * 4),
        ((2, 8, 8, 4), (3, 3, 4, 6), {"rhs_dilation": (2, 2)}, 2 * 64 * 9 * 4 * 6),
        ((4, 8, 8, 3), (3, 3, 3, 6), {"batch_group_count": 2}, 2 * 64 * 9 * 3 * 6),
        # transposed: every input meets the whole kernel
        ((2, 8, 8, 4), (3, 3, 4, 6), UPSAMPLING, 2 * 64 * 9 * 4 * 6),
    ],
)
def test_convolutions(lhs, rhs, options, macs):
    x = abstract(lhs, jnp.float32)
    found = macs_of(lambda v, x: conv(x, v["w0"], **options), kernels(rhs), x)
    assert found == {"w0": macs}


def test_channels_may_come_first():
    def fn(variables, x):
        return lax.conv(x, variables["w0"], (1, 1), "SAME")

    x = abstract((2, 3, 8, 8), jnp.float32)
    assert macs_of(fn, kernels((5, 3, 3, 3)), x) == {"w0": 2 * 64 * 27 * 5}


@pytest.mark.parametrize(
    ("subscripts", "lhs", "rhs", "macs"),
    [
        ("ij,jk->ik", (2, 3), (3, 4), 24),
        ("j,jk->k", (3,), (3, 4), 12),
        ("bij,bjk->bik", (5, 2, 3), (5, 3, 4), 120),
        ("bij,hjd->bhid", (5, 2, 3), (6, 3, 4), 5 * 2 * 3 * 6 * 4),
        ("ij,kl->ijkl", (2, 3), (4, 5), 120),
    ],
)
def test_products_of_matrices(subscripts, lhs, rhs, macs):
    fn = lambda v, x: jnp.einsum(subscripts, x, v["w0"])  # noqa: E731
    assert macs_of(fn, kernels(rhs), abstract(lhs, jnp.float32)) == {"w0": macs}


def test_a_ragged_product_takes_every_row_to_one_group():
    x, sizes = abstract((10, 3), jnp.float32), abstract((6,), jnp.int32)
    fn = lambda v, x, sizes: lax.ragged_dot(x, v["w0"], sizes)  # noqa: E731
    assert macs_of(fn, kernels((6, 3, 4)), x, sizes) == {"w0": 10 * 3 * 4}


def test_products_of_activations_have_no_layer():
    def attention(variables, x):
        query, key, value = jnp.split(x @ variables["w0"], 3, axis=-1)
        return nn.softmax(query @ key.T) @ value

    found = macs_of(attention, kernels((4, 12)), abstract((5, 4), jnp.float32))
    assert found == {"w0": 5 * 4 * 12, "": 2 * 5 * 5 * 4}


# --- Which leaf is the kernel ------------------------------------------------


def masked(variables, x):
    mask = np.eye(3, 4, dtype=np.float32)
    return x @ (variables["w0"] * mask).astype(jnp.bfloat16)


def standardised(variables, x):
    kernel, gain = variables["w0"], variables["w1"]
    kernel = (kernel - kernel.mean(0, keepdims=True)) / kernel.std(0, keepdims=True)
    return x @ (kernel * gain)


def transposed(variables, x):
    return x @ variables["w0"].T.reshape(4, 3).T[:, :2]


def sliced_stack(variables, x):
    return x @ variables["w0"][1]


def tied(variables, tokens):
    x = variables["w0"][tokens]
    return x @ variables["w0"].T


def left(variables, x):
    return jnp.einsum("ji,kj->ik", variables["w0"], x)


@pytest.mark.parametrize(
    ("fn", "shapes", "x", "macs"),
    [
        (masked, [(3, 4)], jnp.ones((2, 3)), 24),
        (standardised, [(3, 4), (1, 4)], jnp.ones((2, 3)), 24),
        (transposed, [(3, 4)], jnp.ones((2, 3)), 12),
        (sliced_stack, [(5, 3, 4)], jnp.ones((2, 3)), 24),
        (tied, [(9, 3)], jnp.zeros(2, jnp.int32), 54),
        (left, [(3, 4)], jnp.ones((2, 3)), 24),
    ],
)
def test_a_kernel_is_followed_to_its_leaf(fn, shapes, x, macs):
    assert macs_of(fn, kernels(*shapes), x) == {"w0": macs}


def test_a_low_rank_update_counts_both_its_factors():
    def lora(variables, x):
        return x @ (variables["w0"] + variables["w1"] @ variables["w2"])

    found = macs_of(lora, kernels((8, 8), (8, 2), (2, 8)), abstract((3, 8), "float32"))
    assert found == {"w0": 3 * 64, "w1": 0, "w2": 8 * 2 * 8}


def test_concatenated_kernels_share_by_size():
    def fn(variables, x):
        return x @ jnp.concatenate([variables["w0"], variables["w1"]], axis=1)

    found = macs_of(fn, kernels((3, 4), (3, 8)), abstract((2, 3), jnp.float32))
    assert found == {"w0": 24, "w1": 48}


# --- Tables ------------------------------------------------------------------


TOKENS = np.zeros(4, np.int32)
LOOKUPS = {
    "indices": lambda v, t: v["w0"][t],
    "take": lambda v, t: jnp.take(v["w0"], t, axis=0),
    "columns": lambda v, t: v["w0"][:, t],
    "a grid": lambda v, t: v["w0"][t.reshape(2, 2)],
    "narrow": lambda v, t: v["w0"].astype(jnp.bfloat16)[t],
    "masked": lambda v, t: jnp.where(np.eye(9, 3) > 0, v["w0"], 0)[t],
    "one": lambda v, t: v["w0"][t[0]],
    "vmap": lambda v, t: jax.vmap(lambda i: v["w0"][i])(t),
    "scan": lambda v, t: lax.scan(lambda c, i: (c, v["w0"][i]), 0.0, t)[1],
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_table_of_rows_is_a_weight_without_macs(name):
    assert macs_of(LOOKUPS[name], kernels((9, 3)), TOKENS) == {"w0": 0}


NO_TABLES = {
    "sliced": lambda v, t: v["w0"][:4] + t[:, None],
    "positions": lambda v, t: v["w0"][jnp.arange(len(t))] + t[:, None],
    "a window": lambda v, t: lax.dynamic_slice(v["w0"], (t[0], 0), (2, 3)),
    "numbers": lambda v, t: v["w0"][t, t],
    "numbers of rows": lambda v, t: jnp.take_along_axis(v["w0"], t[:, None], 1),
    "a vector": lambda v, t: v["w0"][:, 0][t],
}


@pytest.mark.parametrize("name", NO_TABLES)
def test_not_every_pick_makes_a_table(name):
    shape = (4, 3) if name == "numbers of rows" else (9, 3)
    assert macs_of(NO_TABLES[name], kernels(shape), TOKENS) == {}


def test_one_hot_lookups_are_products():
    found = macs_of(
        lambda v, t: jax.nn.one_hot(t, 9) @ v["w0"], kernels((9, 3)), TOKENS
    )
    assert found == {"w0": 4 * 9 * 3}


def test_an_ensemble_of_tables_is_a_weight():
    fn = jax.vmap(lambda v, t: v["w0"][t], in_axes=(0, None))
    assert macs_of(fn, kernels((5, 9, 3)), TOKENS) == {"w0": 0}


class Language(nn.Module):
    tied: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(9, 3)
        x = embed(tokens) + self.param("positions", nn.zeros_init(), (6, 3))[:4]
        return embed.attend(x) if self.tied else nn.Dense(9)(x)


@pytest.mark.parametrize(
    "tied, macs",
    [
        (True, {"Embed_0/embedding": 4 * 27}),
        (False, {"Dense_0/kernel": 4 * 27, "Embed_0/embedding": 0}),
    ],
)
def test_an_embedding_counts_once_and_positions_do_not(tied, macs):
    model = Language(tied)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    cost = agp.measure_cost(model.apply, variables, TOKENS).subtree("params")
    assert {x.path: x.macs for x in cost.weights} == macs
    assert (cost.weight_params, cost.macs) == (27 * len(macs), 4 * 27)
    lines = [line.split() for line in cost.table().splitlines()]
    embedding = macs["Embed_0/embedding"]
    assert ["Embed_0/embedding", "9x3", "27", str(embedding)] in lines
    assert ["weights", str(27 * len(macs))] in lines


def test_nnx_embeddings_are_tables():
    graph, state = nnx.split(nnx.Embed(9, 3, rngs=nnx.Rngs(0)))
    fn = lambda state, tokens: nnx.merge(graph, state)(tokens)  # noqa: E731
    assert macs_of(fn, state, TOKENS) == {"embedding": 0}


# --- Nesting -----------------------------------------------------------------


def custom_derivative(kind):
    @kind
    def double(x, kernel):
        return 2 * (x @ kernel)

    if kind is jax.custom_vjp:
        double.defvjp(lambda x, w: (double(x, w), (x, w)), lambda r, g: (g, g))
    else:
        double.defjvps(lambda g, out, x, w: g, None)
    return lambda v, x: double(x, v["w0"])


CALLS = {
    "jit": jax.jit(lambda v, x: x @ v["w0"]),
    "jit twice": jax.jit(jax.jit(lambda v, x: x @ v["w0"])),
    "remat": jax.checkpoint(lambda v, x: x @ v["w0"]),
    "custom_jvp": custom_derivative(jax.custom_jvp),
    "custom_vjp": custom_derivative(jax.custom_vjp),
    "vmap": jax.vmap(lambda v, x: x @ v["w0"], in_axes=(None, 0)),
    "named": jax.named_call(lambda v, x: x @ v["w0"], name="layer"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_count_what_is_inside(name):
    assert macs_of(CALLS[name], kernels((3, 3)), jnp.ones((2, 3))) == {"w0": 18}


def test_one_function_called_on_two_kernels_counts_each():
    layer = jax.jit(lambda x, kernel: x @ kernel)

    def fn(variables, x):
        return layer(layer(x, variables["w0"]), variables["w1"])

    found = macs_of(fn, kernels((3, 3), (3, 3)), abstract((2, 3), jnp.float32))
    assert found == {"w0": 18, "w1": 18}


def test_an_ensemble_counts_every_member():
    fn = jax.vmap(lambda v, x: x @ v["w0"], in_axes=(0, None))
    assert macs_of(fn, kernels((5, 3, 4)), jnp.ones((2, 3))) == {"w0": 5 * 24}


def test_a_scan_counts_its_length():
    def fn(variables, x):
        def layer(x, kernel):
            return nn.relu(x @ kernel @ variables["w1"]), x @ x.T

        return lax.scan(layer, x, variables["w0"])

    found = macs_of(fn, kernels((5, 3, 3), (3, 3)), abstract((2, 3), jnp.float32))
    assert found == {"w0": 5 * 18, "w1": 5 * 18, "": 5 * 12}


def test_a_loop_with_a_known_count_is_a_scan():
    def fn(variables, x):
        return lax.fori_loop(0, 4, lambda i, x: x @ variables["w0"], x)

    assert macs_of(fn, kernels((3, 3)), jnp.ones((2, 3))) == {"w0": 4 * 18}


def test_a_kernel_may_be_carried():
    def fn(variables, x):
        def step(carry, _):
            x, kernel = carry
            return (x @ kernel, kernel), None

        return lax.scan(step, (x, variables["w0"]), length=4)[0][0]

    assert macs_of(fn, kernels((3, 3)), jnp.ones((2, 3))) == {"w0": 4 * 18}


def test_a_while_loop_counts_once_and_says_so():
    def fn(variables, x):
        return lax.while_loop(
            lambda x: jnp.sum(x @ variables["w0"]) < 9, lambda x: x @ variables["w1"], x
        )

    cost = agp.measure_cost(fn, kernels((3, 4), (3, 3)), jnp.ones((2, 3)))
    assert [leaf.macs for leaf in cost.weights] == [24, 18]
    (note,) = cost.notes
    assert "while" in note and "test_costs.py" in note
    assert cost.table().splitlines()[-1] == f"note: {note}"


def test_a_loop_without_products_needs_no_note():
    fn = lambda v, x: lax.while_loop(lambda x: x < 9, lambda x: x + 1, v["w0"])  # noqa: E731
    cost = agp.measure_cost(fn, kernels(()), 1)
    assert (cost.macs, cost.notes) == (0, ())

    def walk(variables, start):
        step = lambda i: jnp.argmax(variables["w0"][i])  # noqa: E731
        return lax.while_loop(lambda i: i < 3, step, start)

    cost = agp.measure_cost(walk, kernels((4, 5)), jnp.int32(0))
    assert ([x.macs for x in cost.weights], cost.notes) == ([0], ())


def test_a_conditional_counts_its_dearest_branch():
    def fn(variables, x, i):
        return lax.switch(
            i,
            [
                lambda x: x @ variables["w0"],
                lambda x: x @ variables["w1"] @ variables["w2"],
                lambda x: x,
            ],
            x,
        )

    shapes = [(3, 3), (3, 4), (4, 3)]
    found = macs_of(fn, kernels(*shapes), jnp.ones((2, 3)), 0)
    assert found == {"w0": 0, "w1": 24, "w2": 24}


def test_products_that_cannot_be_counted_are_noted():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    fn = jax.shard_map(
        lambda v, x: x @ v["w0"],
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    cost = agp.measure_cost(fn, kernels((3, 4)), jnp.ones((8, 3)))
    assert cost.macs == 0
    assert cost.notes == ("shard_map is not counted",)


def test_gradients_cost_twice_the_forward_pass():
    def loss(variables, x):
        return jnp.sum(jnp.tanh(nn.relu(x @ variables["w0"]) @ variables["w1"]))

    variables, x = kernels((3, 4), (4, 5)), abstract((2, 3), jnp.float32)
    forward = agp.measure_cost(loss, variables, x)
    both = agp.measure_cost(jax.grad(loss, argnums=(0, 1)), variables, x)
    assert both.macs == 3 * forward.macs
