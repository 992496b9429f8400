"""Calls that are wrong: each is a ValueError that says what was expected and came."""

import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agp_jax as agp

S = agp.polynomial_schedule
H = agp.one_shot(0.5)


def f(params, x):
    return jnp.maximum(x @ params["up"]["kernel"], 0) @ params["down"]["kernel"]


P = {
    "up": {"kernel": jnp.linspace(-1, 1, 32).reshape(4, 8)},
    "down": {"kernel": jnp.linspace(-1, 1, 16).reshape(8, 2)},
}
X = jnp.ones((3, 4))
C = agp.find_couplings(f, P, X)
R = agp.Rule("up/kernel", agp.element(), H)
F = agp.Rule("up/kernel", agp.filters(), H)
M = C.masks({"up/kernel[1]": [0, 1]})
CUT = agp.plan_cut(M, C)
TX = agp.prune(optax.sgd(0.1), [R])
STATE = TX.init(P)
G = jax.tree.map(jnp.ones_like, P)


def product(weights, gradients):
    return weights * gradients


CALLS = {
    "sched 80": (
        lambda: S(80, begin_step=0, end_step=10),
        "final_sparsity must be a fraction in [0, 1), got 80.0; a",
    ),
    "sched str": (
        lambda: S("0.8", begin_step=0, end_step=10),
        "final_sparsity must be a number, got '0.8'",
    ),
    "sched none": (
        lambda: S(None, begin_step=0, end_step=10),
        "final_sparsity must be a number, got None",
    ),
    "sched nan": (
        lambda: S(float("nan"), begin_step=0, end_step=10),
        "final_sparsity must be a number, got nan",
    ),
    "sched vec": (
        lambda: S(np.array([0.5, 0.6]), begin_step=0, end_step=10),
        "final_sparsity must be a number, got array([0.5, 0.6])",
    ),
    "sched bool": (
        lambda: S(True, begin_step=0, end_step=10),
        "final_sparsity must be a number, got True",
    ),
    "sched float step": (
        lambda: S(0.5, begin_step=0.5, end_step=10),
        "begin_step must be a whole number of steps, got 0.5",
    ),
    "sched whole float step": (
        lambda: S(0.5, begin_step=0.0, end_step=10),
        "begin_step must be a whole number of steps, got 0.0",
    ),
    "sched bool step": (
        lambda: S(0.5, begin_step=False, end_step=10),
        "begin_step must be a whole number of steps, got False",
    ),
    "sched neg": (
        lambda: S(0.5, begin_step=-1, end_step=10),
        "steps must satisfy 0 <= begin_step <= end_step <= 2147483647,",
    ),
    "sched rev": (
        lambda: S(0.5, begin_step=10, end_step=1),
        "steps must satisfy 0 <= begin_step <= end_step <= 2147483647,",
    ),
    "sched freq0": (
        lambda: S(0.5, begin_step=0, end_step=10, frequency=0),
        "frequency must be between 1 and end_step - begin_step = 10",
    ),
    "sched freqbig": (
        lambda: S(0.5, begin_step=0, end_step=10, frequency=11),
        "frequency must be between 1 and end_step - begin_step = 10",
    ),
    "sched power0": (
        lambda: S(0.5, begin_step=0, end_step=10, power=0),
        "power must be positive, got 0.0",
    ),
    "sched power inf": (
        lambda: S(0.5, begin_step=0, end_step=10, power=float("inf")),
        "power must be a number, got inf",
    ),
    "sched power str": (
        lambda: S(0.5, begin_step=0, end_step=10, power="cubic"),
        "power must be a number, got 'cubic'",
    ),
    "sched init>final": (
        lambda: S(0.5, begin_step=0, end_step=10, initial_sparsity=0.6),
        "final_sparsity 0.5 is below initial_sparsity 0.6; sparsity can",
    ),
    "sched 1.0": (
        lambda: agp.one_shot(1.0),
        "final_sparsity must be a fraction in [0, 1), got 1.0; a",
    ),
    "one_shot neg": (
        lambda: agp.one_shot(-0.1),
        "final_sparsity must be a fraction in [0, 1), got -0.1; a",
    ),
    "one_shot step str": (
        lambda: agp.one_shot(0.5, step="a"),
        "begin_step must be a whole number of steps, got 'a'",
    ),
    "one_shot huge step": (
        lambda: agp.one_shot(0.5, step=2**40),
        "steps must satisfy 0 <= begin_step <= end_step <= 2147483647,",
    ),
    "within begin>end": (
        lambda: agp.schedule_within(100, 0.5, begin=0.9, end=0.1),
        "a window must satisfy 0 <= begin <= end <= 1, fractions of the",
    ),
    "within 0 steps": (
        lambda: agp.schedule_within(0, 0.5),
        "num_steps must be at least 1, got 0",
    ),
    "within begin 2": (
        lambda: agp.schedule_within(100, 0.5, begin=2, end=3),
        "a window must satisfy 0 <= begin <= end <= 1, fractions of the",
    ),
    "within percent": (
        lambda: agp.schedule_within(100, 0.5, begin=25, end=75),
        "a window must satisfy 0 <= begin <= end <= 1, fractions of the",
    ),
    "within str": (
        lambda: agp.schedule_within("100", 0.5),
        "num_steps must be a whole number of steps, got '100'",
    ),
    "sched call str": (lambda: H("a"), "a step must be a whole number, got 'a'"),
    "sched call float": (lambda: H(1.5), "a step must be a whole number, got 1.5"),
    "sched call float arr": (
        lambda: H(jnp.float32(1.5)),
        "a step must be a whole number, got float32",
    ),
    "block none": (
        lambda: agp.block(None),
        "expected the sizes of a block, such as (1, 1, 8, 1), got",
    ),
    "block int": (
        lambda: agp.block(8),
        "expected the sizes of a block, such as (1, 1, 8, 1), got int 8",
    ),
    "block float": (
        lambda: agp.block((1, 8.5)),
        "the size of a block must be a whole number, got 8.5",
    ),
    "block 0": (
        lambda: agp.block((0, 1)),
        "a block needs sizes of at least 1, got (0, 1)",
    ),
    "block empty": (lambda: agp.block(()), "a block needs sizes of at least 1, got ()"),
    "block str": (
        lambda: agp.block("18"),
        "the size of a block must be a whole number, got '1'",
    ),
    "filters str": (lambda: agp.filters("a"), "axis must be a whole number, got 'a'"),
    "filters float": (lambda: agp.filters(1.0), "axis must be a whole number, got 1.0"),
    "heads 0": (lambda: agp.heads(0), "heads needs a count of at least 1, got 0"),
    "heads str": (lambda: agp.heads("8"), "count must be a whole number, got '8'"),
    "heads none": (lambda: agp.heads(None), "count must be a whole number, got None"),
    "heads bool": (lambda: agp.heads(True), "count must be a whole number, got True"),
    "n_of_m rev": (
        lambda: agp.n_of_m(4, 2),
        "n_of_m keeps n of m with 1 <= n <= m, got n=4, m=2",
    ),
    "n_of_m str": (lambda: agp.n_of_m("2", "4"), "n must be a whole number, got '2'"),
    "n_of_m axis str": (
        lambda: agp.n_of_m(2, 4, axis="in"),
        "axis must be a whole number, got 'in'",
    ),
    "channels None": (
        lambda: agp.channels(None),
        "axis must be a whole number, got None",
    ),
    "rule pattern int": (
        lambda: agp.Rule(3, agp.element(), H),
        "rule pattern 3 is not a regular expression: it must be a str",
    ),
    "rule bad regex": (
        lambda: agp.Rule("(", agp.element(), H),
        "rule pattern '(' is not a regular expression: missing ),",
    ),
    "rule glob": (
        lambda: agp.Rule("*/kernel", agp.element(), H),
        "rule pattern '*/kernel' is not a regular expression: nothing to",
    ),
    "rule structure fn": (
        lambda: agp.Rule("a", agp.element, H),
        "rule 'a': expected a structure made by agp.element() or another",
    ),
    "rule structure str": (
        lambda: agp.Rule("a", "element", H),
        "rule 'a': expected a structure made by agp.element() or another",
    ),
    "rule schedule float": (
        lambda: agp.Rule("a", agp.element(), 0.5),
        "rule 'a': expected a schedule made by agp.polynomial_schedule",
    ),
    "rule swapped": (
        lambda: agp.Rule("a", H, agp.element()),
        "rule 'a': expected a structure made by agp.element() or another",
    ),
    "rule schedule fn": (
        lambda: agp.Rule("a", agp.element(), optax.constant_schedule(0.5)),
        "rule 'a': expected a schedule made by agp.polynomial_schedule",
    ),
    "rule scope": (
        lambda: agp.Rule("a", agp.element(), H, scope="global"),
        "rule 'a': scope must be 'tensor' or 'rule', got 'global'",
    ),
    "rule stacked True": (
        lambda: agp.Rule("a", agp.element(), H, stacked_axes=True),
        "rule 'a': stacked_axes must be a number of leading axes, or a",
    ),
    "rule stacked neg": (
        lambda: agp.Rule("a", agp.element(), H, stacked_axes=-1),
        "rule 'a': stacked_axes must be a number of leading axes, or a",
    ),
    "rule stacked str": (
        lambda: agp.Rule("a", agp.element(), H, stacked_axes="1"),
        "rule 'a': stacked_axes must be a number of leading axes, or a",
    ),
    "rule stacked list": (
        lambda: agp.Rule("a", agp.element(), H, stacked_axes=[1]),
        "rule 'a': stacked_axes must be a number of leading axes, or a",
    ),
    "rule score str": (
        lambda: agp.Rule("a", agp.element(), H, score="l1"),
        "rule 'a': score must be a function, got 'l1'",
    ),
    "rule units elem": (
        lambda: agp.Rule("a", agp.element(), H, units="x"),
        "rule 'a': units names groups of filters, channels, heads",
    ),
    "rule units regex": (
        lambda: agp.Rule("a", agp.filters(), H, units="("),
        "rule 'a': units '(' is not a regular expression: missing ),",
    ),
    "rule nofm final": (
        lambda: agp.Rule("a", agp.n_of_m(2, 4), agp.one_shot(0.6)),
        "rule 'a': n_of_m(2, 4) ends at a sparsity of 0.5, but the",
    ),
    "rule nofm scope": (
        lambda: agp.Rule("a", agp.n_of_m(2, 4), H, scope="rule"),
        "rule 'a': n_of_m(2, 4) ranks within groups of 4, so scope must",
    ),
    "dense int": (
        lambda: agp.dense(3),
        "rule pattern 3 is not a regular expression: it must be a str",
    ),
    "match part": (
        lambda: agp.match_rules([agp.Rule("kernel", agp.element(), H)], P),
        "rule 'kernel' matches a part of down/kernel, but a pattern must",
    ),
    "match none": (
        lambda: agp.match_rules([agp.Rule("upp/kernel", agp.element(), H)], P),
        "rule 'upp/kernel' matches no parameter; nearest: up/kernel,",
    ),
    "match slash": (
        lambda: agp.match_rules([agp.Rule("/up/kernel", agp.element(), H)], P),
        "rule '/up/kernel' matches no parameter; nearest: up/kernel,",
    ),
    "match dots": (
        lambda: agp.match_rules([agp.Rule("up.kernel.", agp.element(), H)], P),
        "rule 'up.kernel.' matches no parameter; nearest: up/kernel,",
    ),
    "match params prefix": (
        lambda: agp.match_rules([agp.Rule("params/up/kernel", agp.element(), H)], P),
        "rule 'params/up/kernel' matches no parameter; nearest:",
    ),
    "match single": (
        lambda: agp.match_rules(R, P),
        "expected a list of rules, got one: [Rule('up/kernel',",
    ),
    "match str": (
        lambda: agp.match_rules("up/kernel", P),
        "expected a list of agp.Rule, got 'u' in it",
    ),
    "match swapped": (
        lambda: agp.match_rules(P, [R]),
        "expected a list of agp.Rule, got 'up' in it",
    ),
    "match None": (
        lambda: agp.match_rules(None, P),
        "expected a list of agp.Rule, got NoneType None",
    ),
    "match params none": (
        lambda: agp.match_rules([R], None),
        "rule 'up/kernel' matches no parameter, for there are none",
    ),
    "match params empty": (
        lambda: agp.match_rules([R], {}),
        "rule 'up/kernel' matches no parameter, for there are none",
    ),
    "match params fn": (
        lambda: agp.match_rules([R], f),
        "rule 'up/kernel' matches no parameter; nearest:",
    ),
    "match str leaf": (
        lambda: agp.match_rules([agp.Rule("a", agp.element(), H)], {"a": "x"}),
        "rule 'a' matches no floating point parameter, only a",
    ),
    "match no schedule": (
        lambda: agp.match_rules([agp.Rule("up/kernel", agp.element())], P),
        "rule 'up/kernel' has a structure but no schedule to follow",
    ),
    "match idle": (
        lambda: agp.match_rules([agp.dense(".*"), R], P),
        "rule 'up/kernel' has no effect: an earlier rule takes what it",
    ),
    "match block mism": (
        lambda: agp.match_rules([agp.Rule("up/kernel", agp.block((3, 3)), H)], P),
        "rule 'up/kernel' cannot prune up/kernel: block((3, 3)) does not",
    ),
    "match block rank": (
        lambda: agp.match_rules([agp.Rule("up/kernel", agp.block((1, 1, 8, 1)), H)], P),
        "rule 'up/kernel' cannot prune up/kernel: block((1, 1, 8, 1))",
    ),
    "match int": (
        lambda: agp.match_rules(
            [agp.Rule("a", agp.element(), H)], {"a": jnp.arange(3)}
        ),
        "rule 'a' matches no floating point parameter, only a",
    ),
    "match heads": (
        lambda: agp.match_rules([agp.Rule("up/kernel", agp.heads(3), H)], P),
        "rule 'up/kernel' cannot prune up/kernel: axis 1 of shape (4, 8)",
    ),
    "match stacked": (
        lambda: agp.match_rules(
            [agp.Rule("up/kernel", agp.element(), H, stacked_axes=3)], P
        ),
        "rule 'up/kernel' stacks 3 axes, but up/kernel has shape (4, 8)",
    ),
    "mm swapped": (
        lambda: agp.make_masks([R], P, 0),
        "expected a list of agp.Rule, got 'up' in it",
    ),
    "mm step float": (
        lambda: agp.make_masks(P, [R], 1.5),
        "step is the number of updates that are complete, a whole",
    ),
    "mm step none": (
        lambda: agp.make_masks(P, [R], None),
        "step is the number of updates that are complete, a whole",
    ),
    "mm step neg": (
        lambda: agp.make_masks(P, [R], -1),
        "step is the number of updates that are complete, a whole",
    ),
    "mm step vec": (
        lambda: agp.make_masks(P, [R], jnp.arange(3)),
        "step is the number of updates that are complete, a whole",
    ),
    "mm step f32": (
        lambda: agp.make_masks(P, [R], jnp.float32(1)),
        "step is the number of updates that are complete, a whole",
    ),
    "mm masks float": (
        lambda: agp.make_masks(
            P,
            [R],
            0,
            {
                "up": {"kernel": jnp.ones((4, 8))},
                "down": {"kernel": optax.MaskedNode()},
            },
        ),
        "expected bool masks, got float32 at up/kernel: pass",
    ),
    "mm masks shape": (
        lambda: agp.make_masks(
            P,
            [R],
            0,
            {
                "up": {"kernel": jnp.ones((1, 8), bool)},
                "down": {"kernel": optax.MaskedNode()},
            },
        ),
        "up/kernel has shape (4, 8), but its mask has shape (1, 8)",
    ),
    "mm masks bool": (
        lambda: agp.make_masks(P, [R], 0, True),
        "the masks have '', which is no parameter",
    ),
    "mm masks other tree": (
        lambda: agp.make_masks(P, [R], 0, {"x": jnp.ones(3, bool)}),
        "the masks have 'x', which is no parameter",
    ),
    "mm scores shape": (
        lambda: agp.make_masks(
            P,
            [R],
            0,
            scores={"up": {"kernel": jnp.ones((1, 8))}, "down": {"kernel": None}},
        ),
        "scores for up/kernel must have its shape (4, 8), got (1, 8)",
    ),
    "mm scores str": (
        lambda: agp.make_masks(P, [R], 0, scores="l1"),
        "the scores have '', which is no parameter",
    ),
    "mm grads missing": (
        lambda: agp.make_masks(
            P, [agp.Rule("up/kernel", agp.element(), H, score=product)], 0
        ),
        "rule 'up/kernel' ranks up/kernel by gradients, which there are",
    ),
    "mm grads shape": (
        lambda: agp.make_masks(
            P,
            [agp.Rule("up/kernel", agp.element(), H, score=product)],
            0,
            gradients={
                "up": {"kernel": jnp.ones((1, 8))},
                "down": {"kernel": jnp.ones((8, 2))},
            },
        ),
        "the gradient of up/kernel must have its shape (4, 8), got (1, 8)",
    ),
    "mm score scalar": (
        lambda: agp.make_masks(
            P, [agp.Rule("up/kernel", agp.element(), H, score=jnp.sum)], 0
        ),
        "scores for up/kernel must have its shape (4, 8), got",
    ),
    "mm score none": (
        lambda: agp.make_masks(
            P, [agp.Rule("up/kernel", agp.element(), H, score=lambda w: None)], 0
        ),
        "scores for up/kernel must have its shape (4, 8), got None",
    ),
    "mm score complex": (
        lambda: agp.make_masks(
            P, [agp.Rule("up/kernel", agp.element(), H, score=lambda w: w + 1j)], 0
        ),
        "scores for up/kernel must be real numbers, got complex64",
    ),
    "mm score bool": (
        lambda: agp.make_masks(
            P, [agp.Rule("up/kernel", agp.element(), H, score=lambda w: w > 0)], 0
        ),
        "scores for up/kernel must be real numbers, got bool",
    ),
    "mm couplings other": (
        lambda: agp.make_masks(
            {"a": jnp.ones((4, 8))}, [agp.Rule("a", agp.filters(), H)], 0, couplings=C
        ),
        "the couplings have 'down/kernel', which is no parameter: pass",
    ),
    "mm couplings dict": (
        lambda: agp.make_masks(P, [F], 0, couplings={}),
        "expected couplings from agp.find_couplings, got dict {}",
    ),
    "apply swapped": (
        lambda: agp.apply_masks(M, P),
        "expected bool masks, got float32 at down/kernel: pass",
    ),
    "apply shape": (
        lambda: agp.apply_masks(
            P,
            {
                "up": {"kernel": jnp.ones((1, 8), bool)},
                "down": {"kernel": jnp.ones((8, 2), bool)},
            },
        ),
        "up/kernel has shape (4, 8), but its mask has shape (1, 8)",
    ),
    "apply float": (
        lambda: agp.apply_masks(P, jax.tree.map(jnp.ones_like, P)),
        "expected bool masks, got float32 at down/kernel: pass",
    ),
    "apply state": (
        lambda: agp.apply_masks(P, STATE),
        "the masks have 'masks/up/kernel', which is no parameter",
    ),
    "apply none": (
        lambda: agp.apply_masks(P, None),
        "expected masks, got None: pass get_masks(opt_state)",
    ),
    "sparsity params": (
        lambda: agp.sparsity(P),
        "expected bool masks, got float32 at down/kernel: pass",
    ),
    "sparsity state": (
        lambda: agp.sparsity(STATE),
        "expected bool masks, got int32 at step: pass",
    ),
    "sparsity total": (
        lambda: agp.sparsity({"total": jnp.ones(3, bool)}),
        "a parameter at the path 'total' has the name of the sum: put",
    ),
    "sparsity str": (
        lambda: agp.sparsity("x"),
        "expected bool masks, got str at : pass get_masks(opt_state)",
    ),
    "sparsity python": (
        lambda: agp.sparsity({"a": [True, False]}),
        "expected bool masks, got bool at a/0: pass get_masks(opt_state)",
    ),
    "fingerprint params": (
        lambda: agp.fingerprint(P),
        "expected bool masks, got float32 at down/kernel: pass",
    ),
    "fingerprint state": (
        lambda: agp.fingerprint(STATE),
        "expected bool masks, got int32 at step: pass",
    ),
    "fingerprint none": (
        lambda: agp.fingerprint(None),
        "expected masks, got None: pass get_masks(opt_state)",
    ),
    "prune swapped": (
        lambda: agp.prune([R], optax.sgd(0.1)),
        "expected an optax optimizer first, as in",
    ),
    "prune sgd fn": (
        lambda: agp.prune(optax.sgd, [R]),
        "expected an optax optimizer first, as in",
    ),
    "prune none": (
        lambda: agp.prune(None, [R]),
        "expected an optax optimizer first, as in",
    ),
    "prune float": (
        lambda: agp.prune(0.1, [R]),
        "expected an optax optimizer first, as in",
    ),
    "prune single": (
        lambda: agp.prune(optax.sgd(0.1), R),
        "expected a list of rules, got one: [Rule('up/kernel',",
    ),
    "prune rules str": (
        lambda: agp.prune(optax.sgd(0.1), "kernel"),
        "expected a list of agp.Rule, got 'k' in it",
    ),
    "prune rules dict": (
        lambda: agp.prune(optax.sgd(0.1), {"kernel": H}),
        "expected a list of agp.Rule, got 'kernel' in it",
    ),
    "prune couplings fn": (
        lambda: agp.prune(optax.sgd(0.1), [F], couplings=f),
        "expected couplings from agp.find_couplings, got function",
    ),
    "prune packed str": (
        lambda: agp.prune(optax.sgd(0.1), [R], packed="yes"),
        "expected packed=True or False, got str 'yes'",
    ),
    "init none": (
        lambda: TX.init(None),
        "rule 'up/kernel' matches no parameter, for there are none",
    ),
    "init str": (
        lambda: TX.init({"up": {"kernel": "x"}}),
        "rule 'up/kernel' matches no floating point parameter, only",
    ),
    "update no params": (
        lambda: TX.update(G, STATE),
        "prune needs the parameters: call tx.update(grads, state, params)",
    ),
    "update swapped": (
        lambda: TX.update(G, P, STATE),
        "expected the state that tx.init gave: update(grads, state), got",
    ),
    "update grads shape": (
        lambda: TX.update(
            {"up": {"kernel": jnp.ones((1, 8))}, "down": {"kernel": jnp.ones((8, 2))}},
            STATE,
            P,
        ),
        "up/kernel has shape (1, 8), but its mask has shape (4, 8)",
    ),
    "update other grads": (
        lambda: TX.update({"a": jnp.ones(3)}, STATE, P),
        "prune needs gradients in a tree like the parameters, but only one",
    ),
    "update other state": (
        lambda: TX.update(G, optax.sgd(0.1).init(P), P),
        "expected the state that tx.init gave: update(grads, state), got",
    ),
    "update scores shape": (
        lambda: TX.update(
            G,
            STATE,
            P,
            scores={"up": {"kernel": jnp.ones((4, 1))}, "down": {"kernel": None}},
        ),
        "scores for up/kernel must have its shape (4, 8), got (4, 1)",
    ),
    "update other params": (
        lambda: TX.update(
            G,
            STATE,
            {
                "up": {"kernel": jnp.ones((4, 16))},
                "down": {"kernel": jnp.ones((16, 2))},
            },
        ),
        "up/kernel has shape (4, 16), but its mask has shape (4, 8)",
    ),
    "get_masks params": (
        lambda: agp.get_masks(P),
        "found no PruneState: pass the state of an optimizer made with",
    ),
    "get_masks sgd": (
        lambda: agp.get_masks(optax.sgd(0.1).init(P)),
        "found no PruneState: pass the state of an optimizer made with",
    ),
    "get_masks none": (
        lambda: agp.get_masks(None),
        "found no PruneState: pass the state of an optimizer made with",
    ),
    "fc swapped": (
        lambda: agp.find_couplings(P, f, X),
        "expected a function first, as in find_couplings(predict,",
    ),
    "fc none": (
        lambda: agp.find_couplings(None, P, X),
        "expected a function first, as in find_couplings(predict,",
    ),
    "C getitem": (
        lambda: C["nope"],
        "there is no group 'nope'; the groups are: up/kernel[1]",
    ),
    "C masks name": (
        lambda: C.masks({"nope": [0]}),
        "there is no group 'nope'; the groups are: up/kernel[1]",
    ),
    "C masks out": (
        lambda: C.masks({"up/kernel[1]": [99]}),
        "up/kernel[1] has units 0 to 7, got 99 to 99",
    ),
    "C masks float": (
        lambda: C.masks({"up/kernel[1]": [0.5]}),
        "up/kernel[1]: expected the numbers of the units to remove, got",
    ),
    "C masks bool": (
        lambda: C.masks({"up/kernel[1]": np.array([True] * 8)}),
        "up/kernel[1]: expected the numbers of the units to remove, got",
    ),
    "C masks list": (
        lambda: C.masks([0]),
        "expected the units to remove by group, as {name: numbers}, got",
    ),
    "C subtree": (
        lambda: C.subtree("params"),
        "nothing is under 'params'; there are ['down/kernel',",
    ),
    "pc swapped": (
        lambda: agp.plan_cut(C, M),
        "expected couplings from agp.find_couplings second, got dict",
    ),
    "pc prefix": (
        lambda: agp.plan_cut({"params": M}, C),
        "the masks have 'params/down/kernel', which the couplings have",
    ),
    "pc float": (
        lambda: agp.plan_cut(P, C),
        "the mask of down/kernel must be bool of shape (8, 2), got",
    ),
    "pc shape": (
        lambda: agp.plan_cut({"up": {"kernel": jnp.ones((4, 1), bool)}}, C),
        "the mask of up/kernel must be bool of shape (4, 8), got bool of",
    ),
    "pc round 0": (
        lambda: agp.plan_cut(M, C, round_to=0),
        "round_to must be a whole number from 1 on, got 0",
    ),
    "pc round float": (
        lambda: agp.plan_cut(M, C, round_to=1.5),
        "round_to must be a whole number from 1 on, got 1.5",
    ),
    "pc round str": (
        lambda: agp.plan_cut(M, C, round_to="8"),
        "round_to must be a whole number from 1 on, got '8'",
    ),
    "pc state": (
        lambda: agp.plan_cut(STATE, C),
        "the masks have 'step', which the couplings have not",
    ),
    "pc none": (
        lambda: agp.plan_cut(None, C),
        "expected masks, got None: pass get_masks(opt_state)",
    ),
    "pc couplings dict": (
        lambda: agp.plan_cut(M, {}),
        "expected couplings from agp.find_couplings second, got dict {}",
    ),
    "thin swapped": (
        lambda: agp.thin(CUT, P),
        "expected a cut from agp.plan_cut, got dict",
    ),
    "thin masks for cut": (
        lambda: agp.thin(P, M),
        "expected a cut from agp.plan_cut, got dict",
    ),
    "thin twice": (
        lambda: agp.thin(agp.thin(P, CUT), CUT),
        "down/kernel has shape (6, 2), but the cut is of (8, 2); has it",
    ),
    "functions among parameters": (
        lambda: agp.find_couplings(f, {**P, "act": jnp.tanh}, X),
        "act is no array but",
    ),
    "strings among parameters": (
        lambda: agp.find_couplings(f, {**P, "name": "mlp"}, X),
        "name is no array but 'mlp'",
    ),
    "a plan of layers without couplings": (
        lambda: agp.plan([agp.Rule("up/kernel", agp.layers(), H)], P),
        "prunes up/kernel by layers(), which only couplings know",
    ),
    "a plan with couplings of more than the parameters": (
        lambda: agp.plan(
            [F],
            P,
            agp.find_couplings(lambda v, x: f(v["params"], x), {"params": P}, X),
        ),
        "the couplings have 'params/down/kernel', which is no parameter",
    ),
    "a plan with couplings of other shapes": (
        lambda: agp.plan([F], {**P, "down": {"kernel": jnp.ones((8, 3))}}, C),
        "the couplings are of down/kernel with shape (8, 2), but it has",
    ),
    "layers without couplings": (
        lambda: agp.make_masks(P, [agp.Rule("up/kernel", agp.layers(), H)], 0),
        "prunes up/kernel by layers(), which only couplings know",
    ),
    "experts where there are none": (
        lambda: agp.make_masks(
            P, [agp.Rule("up/kernel", agp.experts(), H)], 0, couplings=C
        ),
        "but no such parts can be chosen between",
    ),
    "thin prefix": (
        lambda: agp.thin({"params": P}, CUT),
        "the cut has no 'params/down/kernel'; it has down/kernel,",
    ),
    "thin str": (
        lambda: agp.thin("x", CUT),
        "a leaf is no array but 'x'",
    ),
    "thin opt other": (
        lambda: agp.thin_opt_state(STATE, P, M),
        "expected a cut from agp.plan_cut, got dict",
    ),
    "thin opt thin params": (
        lambda: agp.thin_opt_state(STATE, agp.thin(P, CUT), CUT),
        "down/kernel has shape (6, 2), but the cut is of (8, 2); has it",
    ),
    "thin opt swapped": (
        lambda: agp.thin_opt_state(P, STATE, CUT),
        "the cut has no 'step'; it has down/kernel, up/kernel, ... For a",
    ),
    "tf swapped": (
        lambda: agp.thin_function(P, f, CUT),
        "expected a function first, as in thin_function(predict,",
    ),
    "tf thin vars": (
        lambda: agp.thin_function(f, agp.thin(P, CUT), CUT),
        "the variables have down/kernel of shape (6, 2), but the cut is",
    ),
    "tf call whole": (
        lambda: agp.thin_function(f, P, CUT)(P, X),
        "the thinned function expects down/kernel of shape (6, 2), got",
    ),
    "tf masks": (
        lambda: agp.thin_function(f, P, M),
        "expected a cut from agp.plan_cut, got dict",
    ),
    "cc swapped": (
        lambda: agp.check_cut(f, P, CUT, M, X),
        "the masks have '', which is no parameter",
    ),
    "mc swapped": (
        lambda: agp.measure_cost(P, f, X),
        "expected a function first, as in measure_cost(predict,",
    ),
    "cut from dict": (
        lambda: agp.Cut.from_dict({}),
        "expected a cut as Cut.to_dict() saves it, got dict {}",
    ),
    "cut from dict2": (
        lambda: agp.Cut.from_dict({"kept": {"a": {"x": [0]}}, "shapes": {"a": [3]}}),
        "expected a cut as Cut.to_dict() saves it, got dict {'kept':",
    ),
    "cut from dict3": (
        lambda: agp.Cut.from_dict({"kept": {"a": {"0": [5]}}, "shapes": {"a": [3]}}),
        "the cut keeps [5] of the 3 indices along axis 0 of a: expected",
    ),
    "cut from dict4": (
        lambda: agp.Cut.from_dict({"kept": {"a": {"4": [0]}}, "shapes": {"a": [3]}}),
        "the cut keeps [0] of the 0 indices along axis 4 of a: expected",
    ),
    "cut from dict5": (
        lambda: agp.Cut.from_dict({"kept": {"a": {"0": [2, 1]}}, "shapes": {"a": [3]}}),
        "the cut keeps [2, 1] of the 3 indices along axis 0 of a:",
    ),
    "cut from list": (
        lambda: agp.Cut.from_dict([1]),
        "expected a cut as Cut.to_dict() saves it, got list [1]",
    ),
    "cut then": (
        lambda: CUT.then(CUT),
        "the later cut is of down/kernel with shape (8, 2), but this cut",
    ),
    "cut then masks": (
        lambda: CUT.then(M),
        "expected a cut from agp.plan_cut, got dict",
    ),
    "cut subtree": (
        lambda: CUT.subtree("x"),
        "nothing is under 'x'; paths: ['down/kernel', 'up/kernel']",
    ),
    "plan swapped": (
        lambda: agp.plan(P, [R]),
        "expected a list of agp.Rule, got 'up' in it",
    ),
    "plan single": (
        lambda: agp.plan(R, P),
        "expected a list of rules, got one: [Rule('up/kernel',",
    ),
    "plan inputs bare": (
        lambda: agp.plan([R], P, None, f, X),
        "expected the inputs of fn as a tuple, such as (x,), got",
    ),
    "plan couplings fn": (
        lambda: agp.plan([F], P, f),
        "expected couplings from agp.find_couplings third, got function",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_told_what_was_expected(name):
    call, said = CALLS[name]
    with pytest.raises(ValueError) as error:
        call()
    assert said in str(error.value)
    where = Path(traceback.extract_tb(error.tb)[-1].filename)
    assert "agp_jax" in where.parts, "it comes from deeper inside"


def test_a_table_of_wrong_calls_has_many():
    assert len(CALLS) >= 170


def test_rules_may_come_one_after_the_other():
    masks = agp.make_masks(P, iter([R]), 0)
    tx = agp.prune(optax.sgd(0.1), iter([R]))
    for _ in range(2):  # init and update both read them
        state = tx.init(P)
        _, state = tx.update(G, state, P)
    assert agp.sparsity(masks) == agp.sparsity(agp.get_masks(state))
