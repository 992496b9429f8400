"""Rules: which parameter is pruned by what, and what a mistaken rule is told."""

import dataclasses
import functools
import re
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import agp_jax as agp
from agp_jax.trees import flatten_with_paths

HALF = agp.one_shot(0.5)


def rule(pattern, structure=None, schedule=HALF, **options):
    return agp.Rule(pattern, structure or agp.element(), schedule, **options)


def patterns(rules, params):
    """{path: pattern of the rule that prunes it}, without the dense ones."""
    paths, found, _ = flatten_with_paths(agp.match_rules(rules, params))
    return {path: x.pattern for path, x in zip(paths, found, strict=True)}


def arrays(*paths, shape=(4, 4), dtype=jnp.float32):
    """A nested dict with one abstract array at each path."""
    tree = {}
    for path in paths:
        *parents, last = path.split("/")
        functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[
            last
        ] = jax.ShapeDtypeStruct(shape, dtype)
    return tree


def test_a_pattern_matches_the_whole_path():
    params = arrays("a/kernel", "a/kernel_scale", "b/a/kernel", "kernel")
    assert patterns([rule("a/kernel")], params) == {"a/kernel": "a/kernel"}
    assert patterns([rule("kernel")], params) == {"kernel": "kernel"}
    assert set(patterns([rule(".*/kernel")], params)) == {"a/kernel", "b/a/kernel"}
    assert set(patterns([rule("kernel|b/.*")], params)) == {"kernel", "b/a/kernel"}
    assert set(patterns([rule(".*")], params)) == {*flatten_with_paths(params)[0]}
    assert set(patterns([rule("(?i)A/KERNEL")], params)) == {"a/kernel"}


def test_the_first_match_wins_and_none_keeps_dense():
    params = arrays("stem/kernel", "body/0/kernel", "body/1/kernel", "body/1/bias")
    rules = [agp.dense("stem/.*"), rule("body/0/kernel"), rule(".*/kernel")]
    assert patterns(rules, params) == {
        "body/0/kernel": "body/0/kernel",
        "body/1/kernel": ".*/kernel",
    }
    tree = agp.match_rules(rules, params)
    assert tree["stem"]["kernel"] is None and tree["body"]["1"]["bias"] is None
    assert tree["body"]["0"]["kernel"] is rules[1]


def test_no_rules_and_tuples_of_rules_are_fine():
    params = arrays("a", "b")
    assert patterns((rule("a"), rule(".")), params) == {"a": "a", "b": "."}
    assert agp.match_rules([], params) == {"a": None, "b": None}


class Attention(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


def test_queries_keys_and_values_are_parameters_of_their_own():
    attention = Attention(jnp.ones(2), jnp.ones(2), jnp.ones(2))
    every = rule("attn/(query|key|value)")
    matched = agp.match_rules([every], {"attn": attention, "bias": jnp.ones(2)})
    assert matched == {"attn": Attention(every, every, every), "bias": None}


def test_only_real_floats_are_pruned():
    params = {
        "f32": jnp.ones(4),
        "bf16": jnp.ones(4, jnp.bfloat16),
        "f8": jnp.ones(4, jnp.float8_e4m3fn),
        "f64": np.ones(4),
        "float": 3.0,
        "int": jnp.arange(4),
        "uint8": jnp.arange(4, dtype=jnp.uint8),
        "bool": jnp.ones(4, bool),
        "complex": jnp.ones(4, jnp.complex64),
        "key": jax.random.key(0),
        "count": 7,
    }
    assert set(patterns([rule(".*")], params)) == {"f32", "bf16", "f8", "f64", "float"}
    masks = jax.jit(lambda: agp.make_masks(params, [rule(".*")], 0))()
    assert {path: float(s) for path, s in agp.sparsity(masks).items()} == {
        **dict.fromkeys(["f32", "bf16", "f8", "f64"], 0.5),
        **{"float": 0.0, "total": pytest.approx(8 / 17)},
    }


class Layer(NamedTuple):
    bias: jax.Array
    kernel: jax.Array


class EquinoxNet(eqx.Module):
    first: Layer
    last: Layer


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2, name="last")(linen.Dense(4, name="first")(x))


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)


def make_layers():
    sizes = {"first": (3, 4), "last": (4, 2)}
    return {name: Layer(jnp.zeros(x[1]), jnp.ones(x)) for name, x in sizes.items()}


NETS = {
    "dict": lambda: {name: x._asdict() for name, x in make_layers().items()},
    "NamedTuple": make_layers,
    "equinox": lambda: EquinoxNet(**make_layers()),
    "linen": lambda: LinenNet().init(jax.random.key(0), jnp.ones((1, 3)))["params"],
    "nnx": lambda: nnx.state(NnxNet(), nnx.Param),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
@pytest.mark.parametrize("abstract", [False, True])
def test_a_rule_means_the_same_in_every_framework(make, abstract):
    params = jax.eval_shape(make) if abstract else make()
    rules = [agp.dense("first/.*"), rule(".*/kernel", agp.filters())]
    assert patterns(rules, params) == {"last/kernel": ".*/kernel"}
    tree = agp.match_rules(rules, params)
    is_end = lambda x: x is None or isinstance(x, agp.Rule)  # noqa: E731
    leaves = jax.tree.leaves(tree, is_leaf=is_end)
    assert leaves == [None, None, None, rules[1]]
    assert jax.tree.structure(tree, is_leaf=is_end) == jax.tree.structure(params)


def test_lists_and_bare_arrays_have_paths_to_match():
    params = [jnp.ones(2), (jnp.ones(2), {"w": jnp.ones(2)})]
    assert patterns([rule(r"1/.*")], params) == {"1/0": "1/.*", "1/1/w": "1/.*"}
    assert patterns([rule("")], jnp.ones(2)) == {"": ""}


def test_a_rule_that_matches_nothing_hears_the_nearest_paths():
    params = arrays("stage1/conv/kernel", "stage2/conv/kernel")
    with pytest.raises(ValueError) as error:
        agp.match_rules([rule("stage1/con/kernel")], params)
    assert str(error.value) == (
        "rule 'stage1/con/kernel' matches no parameter; nearest: "
        "stage1/conv/kernel, stage2/conv/kernel"
    )


def test_of_many_paths_only_the_nearest_are_named_nearest_first():
    params = arrays(*(f"stage{i}/conv{j}/kernel" for i in range(5) for j in range(5)))
    with pytest.raises(ValueError, match="nearest: stage3/conv4/kernel") as error:
        agp.match_rules([rule("stage3/convs4/kernel")], params)
    assert str(error.value).count("conv") == 4  # the rule's and three paths


def test_a_dense_rule_that_matches_nothing_is_an_error_too():
    with pytest.raises(ValueError, match=r"'stem' matches no parameter; nearest: a"):
        agp.match_rules([agp.dense("stem"), rule("a")], arrays("a"))


def test_a_path_that_two_parameters_share_is_an_error():
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}}
    with pytest.raises(ValueError, match="a/b"):
        agp.match_rules([rule("a/b")], params)


def test_no_parameters_at_all_are_an_error_that_says_so():
    with pytest.raises(ValueError, match="rule 'a' matches no parameter"):
        agp.match_rules([rule("a")], {})


def test_a_rule_that_earlier_ones_leave_nothing_is_an_error():
    params = arrays("a/kernel", "b/kernel")
    with pytest.raises(ValueError, match="no effect.*a/kernel.*rule 'a/.*'"):
        agp.match_rules([rule("a/.*"), rule("a/kernel")], params)
    with pytest.raises(ValueError, match="no effect"):
        agp.match_rules([rule(".*"), rule(".*")], params)
    with pytest.raises(ValueError, match="no effect.*rule 'a.*'"):
        agp.match_rules([agp.dense("a.*"), rule("b.*"), agp.dense(".*/kernel")], params)


def test_a_rule_that_matches_no_floats_is_an_error_that_names_them():
    params = {"step": jnp.int32(0), "w": jnp.ones(2)}
    with pytest.raises(ValueError, match="'s.*' matches no floating point.*step"):
        agp.match_rules([rule("s.*"), rule("w")], params)


def test_what_was_taken_is_named_with_the_rule_that_took_it():
    params = {"a": jnp.arange(2), "b": jnp.ones(2)}  # 'a' is no float, 'b' is taken
    with pytest.raises(ValueError) as error:
        agp.match_rules([rule("b"), rule("a|b")], params)
    assert "b by rule 'b'" in str(error.value)
    assert "a by rule 'b'" not in str(error.value)


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(pattern="conv[/kernel"), r"conv\[/kernel.*regular expression"),
        (dict(pattern="*"), r"'\*'.*regular expression"),
        (dict(pattern=3), "3.*regular expression"),
        (dict(pattern=None), "None.*regular expression"),
        (dict(pattern=b"kernel"), "kernel"),
        (dict(pattern=re.compile("kernel")), "kernel"),
        (dict(structure="filters"), "rule 'kernel'.*structure.*'filters'"),
        (dict(structure=agp.element), "structure.*function element"),
        (dict(structure=HALF), "structure.*one_shot"),
        (dict(schedule=0.8), "rule 'kernel'.*schedule.*0.8"),
        (dict(schedule=lambda step: 0.8), "schedule.*function"),
        (dict(structure=None), "schedule but no structure"),
        (dict(score="l1"), "score.*'l1'"),
        (dict(scope="global"), "'tensor' or 'rule'.*'global'"),
        (dict(scope=None), "None"),
        (dict(stacked_axes=-1), "stacked_axes.*-1"),
        (dict(stacked_axes=1.0), "stacked_axes.*1.0"),
        (dict(stacked_axes=None), "stacked_axes.*None"),
        (dict(stacked_axes=True), "stacked_axes.*True"),
        (dict(stacked_axes=[1]), "stacked_axes.*tuple.*[1]"),
        (dict(stacked_axes=(1, False)), "stacked_axes.*(1, False)"),
    ],
)
def test_a_rule_of_the_wrong_kind_is_an_error_that_names_the_value(options, named):
    good = dict(pattern="kernel", structure=agp.element(), schedule=HALF)
    with pytest.raises(ValueError, match=named):
        agp.Rule(**good | options)


@pytest.mark.parametrize(
    "rules, named",
    [
        (rule("a"), "list of rules.*Rule.'a'"),
        (["kernel"], "'kernel'"),
        ([rule("a"), None], "None"),
        ("a", "'a'"),
        ({"a": HALF}, "a"),
        ([agp.Rule("a", agp.element())], "rule 'a'.*no schedule"),
    ],
)
def test_what_is_no_list_of_rules_is_an_error(rules, named):
    with pytest.raises(ValueError, match=named):
        agp.match_rules(rules, arrays("a"))


@pytest.mark.parametrize(
    "made, named",
    [
        (rule("w", agp.block((8, 1))), r"rule 'w'.*w.*block\(\(8, 1\)\).*\(6, 4\)"),
        (rule("w", agp.filters(axis=2)), r"rule 'w'.*w: axis 2.*\(6, 4\)"),
        (rule("w", agp.heads(5)), r"rule 'w'.*w: .*\(6, 4\).*5"),
        (rule("w", agp.n_of_m(2, 4)), r"rule 'w'.*w: n_of_m\(2, 4.*\(6, 4\).*6.*4"),
        (rule("w", stacked_axes=3), r"rule 'w' stacks 3.*w.*\(6, 4\)"),
        (rule("w", stacked_axes=(0, 2)), r"rule 'w' stacks axes \(0, 2\).*w.*\(6, 4\)"),
        (rule("w", stacked_axes=(1, -1)), r"stacks axes \(1, -1\).*w.*\(6, 4\)"),
        (rule("w", agp.filters(axis=1), stacked_axes=(1,)), r"axis 1.*\(6,\)"),
        (rule("w", agp.channels(), stacked_axes=1), r"rule 'w'.*w: axis -2.*\(4,\)"),
    ],
)
def test_a_structure_that_does_not_fit_names_rule_path_and_shape(made, named):
    with pytest.raises(ValueError, match=named):
        agp.match_rules([made], arrays("w", shape=(6, 4)))


def test_structures_apply_to_the_slice_behind_the_stacked_axes():
    params = arrays("w", shape=(3, 5, 8, 4))
    for structure in (agp.block((8, 2)), agp.n_of_m(2, 4), agp.filters(axis=1)):
        assert patterns([rule("w", structure, stacked_axes=2)], params)
    with pytest.raises(ValueError, match="axis 2"):
        agp.match_rules([rule("w", agp.filters(axis=2), stacked_axes=2)], params)


@pytest.mark.parametrize("final", [0.0, 0.49, 0.75, 0.9])
def test_a_schedule_that_does_not_end_at_n_of_m_is_an_error(final):
    with pytest.raises(ValueError, match="rule 'w'.*n_of_m.*0.5.*final_sparsity"):
        rule("w", agp.n_of_m(2, 4), agp.one_shot(final))


@pytest.mark.parametrize("m", [*range(1, 17), 32, 64])
def test_a_schedule_may_end_at_any_n_of_m(m):
    for n in range(1, m + 1):
        schedule = agp.one_shot((m - n) / m)
        assert rule("w", agp.n_of_m(n, m), schedule).schedule is schedule


def test_a_rounded_final_sparsity_is_refused_with_the_digits_that_tell_them_apart():
    with pytest.raises(ValueError) as error:
        rule("w", agp.n_of_m(2, 3), agp.one_shot(0.3333))
    wanted, given = re.findall(r"0\.3+\d*", str(error.value))[:2]
    assert wanted != given


def test_n_of_m_cannot_be_ranked_over_a_whole_rule():
    with pytest.raises(ValueError, match="rule 'w'.*n_of_m.*scope must be 'tensor'"):
        rule("w", agp.n_of_m(2, 4), scope="rule")


def test_a_tensor_of_too_many_cells_is_told_of_stacked_axes():
    params = arrays("w", shape=(2, 2**10, 2**20))
    with pytest.raises(ValueError, match="rule 'w'.*w.*2147483647.*stacked_axes"):
        agp.match_rules([rule("w")], params)
    assert patterns([rule("w", stacked_axes=1)], params)
    assert patterns([rule("w", agp.filters())], params)  # 2**20 cells
    assert patterns([rule("w")], arrays("w", shape=(2**31 - 1,)))
    with pytest.raises(ValueError, match="stacked_axes"):
        agp.match_rules([rule("w")], arrays("w", shape=(2**31,)))


def test_too_many_cells_in_one_ranking_are_an_error():
    params = arrays("a", "b", shape=(2**15, 2**15))
    together = [rule(".", scope="rule")]
    agp.match_rules(together, {"a": params["a"]})
    with pytest.raises(ValueError, match=r"rule '\.'.*2147483648.*2147483647"):
        jax.eval_shape(lambda x: agp.make_masks(x, together, 0), params)


def two(weights, gradients):
    return weights * gradients


class Scorer:
    def __call__(self, weights, gradients):
        return weights * gradients


@pytest.mark.parametrize(
    "score, needs_gradients",
    [
        *((jnp.abs, False), (jnp.square, False), (jnp.multiply, True), (two, True)),
        *((lambda w: w, False), (lambda w, g: g, True), (lambda w, g=None: w, False)),
        *((lambda w, *, scale=2: w, False), (lambda *all: all[0], False)),
        *((jax.jit(two), True), (Scorer(), True), (Scorer().__call__, True)),
        *((functools.partial(two, gradients=1), False), (functools.partial(two), True)),
        (functools.partial(two, 2.0), False),
    ],
)
def test_a_score_of_two_arguments_asks_for_gradients(score, needs_gradients):
    assert rule("w", score=score).scores_gradients == needs_gradients


def test_rules_are_values():
    assert rule("a") == rule("a") and hash(rule("a")) == hash(rule("a"))
    assert rule("a") != rule("a", score=jnp.square)
    assert str(rule("a/b")) == "rule 'a/b'"
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule("a").pattern = "b"
    with pytest.raises(TypeError):
        agp.Rule("a", agp.element(), HALF, jnp.abs)  # options go by keyword


def test_cells_beyond_exact_sums_are_an_error():
    params = arrays("w", shape=(2**15, 2**14, 2))
    with pytest.raises(ValueError, match="268435456, up to which sums are exact"):
        agp.match_rules([rule("w", agp.block((2**15, 2**14, 1)))], params)
    assert patterns([rule("w", agp.block((2**14, 2**14, 1)))], params)


@pytest.mark.parametrize(
    "made",
    [
        agp.dense("stem/.*"),
        agp.Rule("a", agp.filters(), agp.one_shot(0.5, step=3)),
        agp.Rule(
            "b",
            agp.block((1, 8)),
            agp.polynomial_schedule(
                0.8, begin_step=1, end_step=9, frequency=4, initial_sparsity=0.1
            ),
            scope="rule",
            stacked_axes=(1,),
        ),
        agp.Rule("c", agp.n_of_m(2, 4, axis=0)),
        agp.polynomial_schedule(0.75, begin_step=0, end_step=4, power=1.0),
    ],
    ids=repr,
)
def test_what_is_printed_makes_the_same_again(made):
    assert eval(repr(made), vars(agp)) == made
    assert len(repr(made)) < 160


def test_a_rule_names_its_score():
    assert repr(agp.Rule("a", agp.element(), score=jnp.square)).endswith(
        "score=square)"
    )
