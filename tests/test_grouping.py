"""find_couplings of programs whose groups are known by hand."""

import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coupling_cases import (
    ATTENTION,
    IMAGES,
    PERCEPTRON,
    RESIDUAL,
    STACKED,
    attention,
    conv,
    find,
    indices_of,
    perceptron,
    residual,
    shaped,
    stacked,
)

import agp_jax as agp

# Groups known by hand


def test_a_hidden_layer_is_made_biased_and_read():
    couplings, groups = find(perceptron, PERCEPTRON, shaped(1, 3))
    members = {("up", 1, "out"), ("bias", 0, "each"), ("down", 0, "in")}
    assert groups == {"up[1]": (5, members)}
    (group,) = couplings.groups
    assert group.exact and group.inexact is None and group.num_layers is None
    for path in PERCEPTRON:
        assert indices_of(group, path) == [[0], [1], [2], [3], [4]]


def test_all_that_is_added_to_a_residual_stream_is_one_group():
    _, groups = find(residual, RESIDUAL, IMAGES)

    def norm(name):
        return {
            (f"params/{name}/bias", 0, "each"),
            (f"params/{name}/scale", 0, "each"),
            (f"batch_stats/{name}/mean", 0, "each"),
            (f"batch_stats/{name}/var", 0, "each"),
        }

    assert groups == {
        "params/conv0[3]": (
            4,
            {
                ("params/conv0", 3, "out"),
                ("params/conv2", 3, "out"),
                ("params/conv1", 2, "in"),
                ("params/head", 0, "in"),
            }
            | norm("norm0")
            | norm("norm2"),
        ),
        "params/conv1[3]": (
            6,
            {("params/conv1", 3, "out"), ("params/conv2", 2, "in")} | norm("norm1"),
        ),
    }


def test_concatenated_features_keep_their_places_in_the_reader():
    def fn(params, x):
        parts = [jnp.tanh(x @ params[name]) for name in ("left", "right")]
        return jnp.concatenate(parts, axis=-1) @ params["out"]

    variables = {"left": shaped(3, 4), "right": shaped(3, 2), "out": shaped(6, 2)}
    couplings, groups = find(fn, variables, shaped(2, 3))
    assert groups == {
        "left[1]": (4, {("left", 1, "out"), ("out", 0, "in")}),
        "right[1]": (2, {("right", 1, "out"), ("out", 0, "in")}),
    }
    assert indices_of(couplings["left[1]"], "out") == [[0], [1], [2], [3]]
    assert indices_of(couplings["right[1]"], "out") == [[4], [5]]


def test_a_depthwise_kernel_goes_with_its_channels():
    def fn(params, x):
        x = conv(conv(x, params["first"]), params["depthwise"], groups=4)
        return conv(x, params["last"])

    variables = {
        "first": shaped(3, 3, 2, 4),
        "depthwise": shaped(3, 3, 1, 4),
        "last": shaped(1, 1, 4, 2),
    }
    _, groups = find(fn, variables, IMAGES)
    assert groups == {
        "depthwise[3]": (
            4,
            {("first", 3, "out"), ("depthwise", 3, "out"), ("last", 2, "in")},
        )
    }


def test_flattening_spreads_a_channel_over_the_rows_of_a_dense_kernel():
    def fn(params, x):
        x = jnp.tanh(conv(x, params["conv"]))
        return x.reshape(x.shape[0], -1) @ params["dense"]

    variables = {"conv": shaped(3, 3, 2, 5), "dense": shaped(2 * 3 * 5, 4)}
    couplings, groups = find(fn, variables, shaped(1, 2, 3, 2))
    assert groups == {"conv[3]": (5, {("conv", 3, "out"), ("dense", 0, "in")})}
    rows = [[channel + 5 * position for position in range(6)] for channel in range(5)]
    assert indices_of(couplings["conv[3]"], "dense") == rows


def test_a_fused_kernel_has_heads_and_features_of_heads():
    couplings, _ = find(attention, ATTENTION, shaped(2, 5, 6))
    heads, features = couplings.groups
    assert (heads.num_units, features.num_units) == (2, 4)
    assert heads.exact and features.exact
    # Columns are counted as (query, key or value; head; feature), 3 * 2 * 4.
    columns = np.arange(24).reshape(3, 2, 4)
    rows = np.arange(8).reshape(2, 4)
    for head in range(2):
        assert indices_of(heads, "qkv")[head] == columns[:, head].ravel().tolist()
        assert indices_of(heads, "out")[head] == rows[head].tolist()
    for i in range(4):
        assert indices_of(features, "qkv")[i] == columns[..., i].ravel().tolist()
        assert indices_of(features, "out")[i] == rows[:, i].tolist()


def test_stacked_layers_have_units_of_their_own():
    couplings, groups = find(stacked, STACKED, shaped(2, 3))
    assert groups == {
        "layers/down[2]": (
            4,
            {
                ("stem", 1, "out"),
                ("layers/up", 1, "in"),
                ("layers/down", 2, "out"),
                ("head", 0, "in"),
            },
        ),
        "layers/up[2]": (5, {("layers/up", 2, "out"), ("layers/down", 1, "in")}),
        "layers/down[0]": (
            3,
            {("layers/up", 0, "layer"), ("layers/down", 0, "layer")},
        ),
    }
    assert couplings["layers/up[2]"].num_layers == 3
    assert couplings["layers/down[0]"].is_stack
    assert couplings["layers/down[2]"].num_layers is None
    assert "layers/up[2]: 3 x 5 units, exact" in couplings.table()


# What cannot be removed, or not exactly


def test_inputs_and_outputs_keep_their_shapes():
    couplings = agp.find_couplings(
        lambda params, batch: {"logits": perceptron(params, batch["image"])},
        PERCEPTRON,
        {"image": shaped(1, 3)},
    )
    up, down = couplings.frozen["up", 0], couplings.frozen["down", 1]
    assert [run[:2] for run in up + down] == [(0, 3), (0, 2)]
    assert "input" in up[0][2] and "image" in up[0][2]
    assert "output" in down[0][2] and "logits" in down[0][2]
    assert couplings.frozen.keys() == {("up", 0), ("down", 1)}


def line_of(function, text):
    """The number of the line of a function that holds a text."""
    lines, start = inspect.getsourcelines(function)
    (number,) = (i for i, line in enumerate(lines) if text in line)
    return start + number


def through_fft(params, x):
    return jnp.real(jnp.fft.fft(x @ params["up"])) @ params["down"]


def through_sums(params, x):
    return jnp.cumsum(1 + x @ params["up"], axis=1) @ params["down"]


@pytest.mark.parametrize(
    "fn, primitive, text",
    [(through_fft, "fft", "fft.fft"), (through_sums, "cumsum", "cumsum")],
)
def test_what_fixes_an_axis_is_named_with_its_line(fn, primitive, text):
    variables = {"up": shaped(3, 6), "down": shaped(6, 2)}
    couplings = agp.find_couplings(fn, variables, shaped(1, 3))
    assert couplings.groups == ()
    (run,) = couplings.frozen["up", 1]
    assert run[:2] == (0, 6)
    assert run[2].startswith(f"{primitive} at ")
    assert f"{os.path.basename(__file__)}:{line_of(fn, text)}" in run[2]


def test_an_axis_can_be_fixed_in_part():
    def fn(params, x):
        x = x @ params["up"]
        return (
            jnp.concatenate([jnp.real(jnp.fft.fft(x[:, 2:5])), x[:, :2]], 1)
            @ (params["down"])
        )

    variables = {"up": shaped(3, 5), "down": shaped(5, 2)}
    couplings = agp.find_couplings(fn, variables, shaped(1, 3))
    (run,) = couplings.frozen["up", 1]
    assert run[:2] == (2, 5)
    (group,) = couplings.groups
    assert indices_of(group, "up") == [[0], [1]]
    assert indices_of(group, "down") == [[3], [4]]


def layer_norm(params, x):
    x = x @ params["up"]
    x = x - x.mean(-1, keepdims=True)
    variance = jnp.mean(x * x, -1, keepdims=True)
    return (x / variance) @ params["down"]


def counted_mean(params, x):
    x = x @ params["up"]
    return x.mean(-1, where=x <= 1, keepdims=True) * params["down"][:1]


def softmax(params, x):
    return jax.nn.softmax(x @ params["up"]) @ params["down"]


def greatest(params, x):
    return jnp.max(x @ params["up"] - 1, axis=-1, keepdims=True) * params["down"][:1]


@pytest.mark.parametrize(
    "fn, primitive, text",
    [
        (layer_norm, "reduce_sum", "jnp.mean(x * x"),
        (counted_mean, "reduce_sum", "where="),
        (softmax, "reduce_max", "jax.nn.softmax"),
        (greatest, "reduce_max", "jnp.max"),
    ],
)
def test_what_is_normalised_over_is_not_exact_and_says_where(fn, primitive, text):
    variables = {"up": shaped(3, 6), "down": shaped(6, 2)}
    couplings = agp.find_couplings(fn, variables, shaped(1, 3))
    group = couplings["up[1]"]
    assert not group.exact
    assert group.inexact.startswith(f"{primitive} at ")
    assert f"{os.path.basename(__file__)}:{line_of(fn, text)}" in group.inexact
    assert str(group).splitlines()[0] == f"up[1]: 6 units, not exact: {group.inexact}"


def test_what_is_not_read_is_fixed():
    """Later positions than the input has, and a part of the model that is left out."""

    def fn(params, x):
        table = params["positions"].astype(jnp.float32)
        hidden = jnp.tanh(x @ params["up"] + table[:2])
        return hidden @ params["down"]

    variables = {"up": shaped(3, 6), "down": shaped(6, 2), "positions": shaped(5, 6)}
    variables["decoder"] = {"kernel": shaped(4, 7), "seed": shaped(2)}
    couplings = agp.find_couplings(fn, variables, shaped(2, 3))
    assert [group.name for group in couplings.groups] == ["up[1]"]
    assert couplings.frozen["positions", 0][1] == (2, 5, "not read")
    for path, axis in [("decoder/kernel", 0), ("decoder/kernel", 1)]:
        ((_, _, reason),) = couplings.frozen[path, axis]
        assert reason == "not read"
    assert couplings.frozen["decoder/seed", 0] == ((0, 2, "not read"),)


# Names and numbers


def test_names_are_unique_and_say_what_makes_the_units():
    couplings = agp.find_couplings(attention, ATTENTION, shaped(2, 5, 6))
    assert [group.name for group in couplings.groups] == ["qkv[1]", "qkv[1]#2"]
    for group in couplings.groups:
        assert couplings[group.name] is group


def describe_all():
    cases = [
        (residual, RESIDUAL, IMAGES),
        (attention, ATTENTION, shaped(2, 5, 6)),
        (stacked, STACKED, shaped(2, 3)),
    ]
    groups = [group for case in cases for group in agp.find_couplings(*case).groups]
    members = [m.indices.tolist() for group in groups for m in group.members]
    return "\n".join([*map(str, groups), str(members)])


def test_groups_are_the_same_in_every_run():
    """Python hashes strings differently in each process."""
    code = "import test_grouping as t; print(t.describe_all())"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "JAX_PLATFORMS": "cpu"}
    root = os.path.dirname(os.path.abspath(__file__))
    search = os.pathsep.join([os.path.dirname(root), root])
    environment["PYTHONPATH"] = os.pathsep.join(
        [search, environment.get("PYTHONPATH", "")]
    )
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, env=environment, check=True, stdout=subprocess.PIPE)
    assert out.stdout.decode().strip() == describe_all()


def test_shapes_are_enough_and_no_weight_is_made():
    """The kernels would fill 64 GiB each."""
    width = 2**17
    huge = {"up": shaped(width, width), "bias": shaped(width)}
    huge["down"] = shaped(width, width)
    before = len(jax.live_arrays())
    couplings = agp.find_couplings(perceptron, huge, shaped(1, width))
    assert couplings["up[1]"].num_units == width
    assert len(jax.live_arrays()) == before


def test_variables_of_one_path_are_refused():
    variables = {"a/b": shaped(3, 4), "a": {"b": shaped(4, 5)}}
    with pytest.raises(ValueError, match="several leaves have the path 'a/b'"):
        agp.find_couplings(
            lambda v, x: x @ v["a/b"] @ v["a"]["b"], variables, shaped(2, 3)
        )


def test_arrays_and_shapes_give_the_same_couplings():
    arrays = jax.tree.map(lambda x: jnp.ones(x.shape), RESIDUAL)
    by_shape = agp.find_couplings(residual, RESIDUAL, IMAGES)
    by_array = agp.find_couplings(residual, arrays, jnp.ones(IMAGES.shape))
    assert str(by_array) == str(by_shape)
    assert by_array.variables == RESIDUAL


def test_what_one_product_ties_to_something_fixed_is_fixed():
    """Both halves have the same features; those of the first half are an input's."""

    def fn(params, x):
        twice = jnp.concatenate([params["once"], params["once"]], axis=1)
        mixed = jnp.concatenate([x, params["other"]], axis=1)
        return (twice * mixed) @ params["out"]

    params = {"once": shaped(2, 3), "other": shaped(2, 3), "out": shaped(6, 2)}
    couplings, groups = find(fn, params, shaped(2, 3))
    assert not groups
    ((start, stop, reason),) = couplings.frozen["other", 1]
    assert (start, stop) == (0, 3) and reason.startswith("input")
