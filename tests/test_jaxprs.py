"""Programs: run equation by equation they give what their function gives."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from agp_jax.programs.jaxprs import (
    bind,
    differentiable,
    equations,
    jvp_program,
    program_of,
    scan_counts,
    source_line,
    trace,
    vjp_programs,
)

TABLE = np.arange(6.0, dtype=np.float32).reshape(2, 3)


def run(program, arrays):
    """The outputs of a program: each equation is applied to what is known so far."""
    known = dict(zip(program.inputs, arrays, strict=True))

    def read(v):
        return known[v] if v in known else jnp.broadcast_to(v.constant, v.shape)

    for equation in program.equations:
        made = bind(equation, [read(v) for v in equation.inputs])
        known.update(zip(equation.outputs, made, strict=True))
    return [read(v) for v in program.outputs]


@jax.jit
def double(x):
    return x + x


@jax.jit
def twice_doubled(x):
    return double(double(x)) * 3.0


@jax.custom_jvp
def halved(x):
    return x / 2


@halved.defjvp
def _(primals, tangents):
    return halved(*primals), 7.0 * tangents[0]  # a derivative that nobody would guess


@jax.custom_vjp
def tripled(x, count):
    return x * count


tripled.defvjp(
    lambda x, count: (x * count, (x, count)),
    lambda rest, g: (11.0 * g * rest[0], None),
)


def loops(x):
    def step(carry, row):
        return carry + row @ TABLE, carry.sum()

    carry, sums = lax.scan(step, x[0], jnp.stack([x[1, :2], x[0, 1:]]))
    carry = lax.while_loop(lambda c: c.sum() < 100, lambda c: c * 2 + 1, carry)
    return lax.cond(sums[0] > 0, lambda c: c, lambda c: -c, carry), sums


FUNCTIONS = {
    "jitted in jitted": twice_doubled,
    "called from two places": lambda x: double(x) - double(x[::-1]),
    "constants": lambda x: (x * TABLE + 2.0, TABLE),
    "inputs and literals as outputs": lambda x: (x, 1.0, x),
    "loops and branches": loops,
    "derivatives of their own": lambda x: tripled(halved(x), 3),
    "remat": jax.checkpoint(lambda x: jnp.sin(double(x))),
}


@pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_program_computes_what_its_function_does(fn):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    program, out = trace(fn, jax.ShapeDtypeStruct(x.shape, x.dtype))
    expected = jax.tree.leaves(fn(x))
    for found, wanted in zip(run(program, [x]), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert [x.shape for x in jax.tree.leaves(out)] == [np.shape(x) for x in expected]


@pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_call_site_has_variables_of_its_own(fn):
    program, _ = trace(fn, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    made = [v for e, _ in equations(program) for v in e.outputs]
    assert len(set(made)) == len(made)
    assert not {e.name for e, _ in equations(program)} & {"jit", "pjit"}


def test_nothing_is_computed():
    huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)
    program, out = trace(lambda x: double(x) @ x, huge)
    assert [e.name for e in program.equations] == ["add", "dot_general"]
    assert out.shape == huge.shape


def test_equations_in_loops_count_as_often_as_they_run():
    def fn(x):
        def outer(carry, _):
            return lax.fori_loop(0, 5, lambda i, c: jnp.sin(c), carry), jnp.cos(carry)

        return lax.scan(outer, x, length=4)

    program, _ = trace(fn, jnp.ones(3))
    times = {e.name: count for e, count in equations(program)}
    assert (times["sin"], times["cos"]) == (20, 4)
    program, _ = trace(lambda x: lax.while_loop(jnp.all, jnp.sin, x), jnp.ones(()))
    assert {e.name: n for e, n in equations(program)}["sin"] == 1  # it is not known


def test_the_inputs_of_a_scan_are_its_constants_its_carry_and_what_it_steps_along():
    def fn(x, y, xs):
        def step(carry, row):
            return (carry[0] + x * y, carry[1] * row), row * x

        return lax.scan(step, (x, y), xs)

    program, _ = trace(fn, jnp.ones(2), jnp.ones(2), jnp.ones((5, 2)))
    (scan,) = (e for e in program.equations if e.name == "scan")
    num_consts, num_carry = scan_counts(scan)
    assert num_carry == 2
    shapes = [v.shape for v in scan.inputs]
    assert shapes == [(2,)] * (num_consts + num_carry) + [(5, 2)]


def line_here():
    return f"test_jaxprs.py:{inspect.currentframe().f_back.f_lineno}"


def test_an_equation_knows_its_line():
    def fn(x):
        x = x * 2.0
        lines.append(line_here())
        return jax.nn.relu(x)

    lines = []
    program, _ = trace(fn, jnp.ones(3))
    (product,) = (e for e in program.equations if e.name == "mul")
    number = int(lines[0].split(":")[1])
    assert f"test_jaxprs.py:{number - 1}" in source_line(product)
    # What JAX has jitted itself is at the line that calls it, in bodies too.
    inside = [e for e, _ in equations(program) if e.name == "max"]
    assert inside
    for equation in inside:
        assert f"test_jaxprs.py:{number + 1}" in source_line(equation)


def test_a_primitive_is_applied_with_other_parameters():
    program, _ = trace(lambda x: lax.broadcast_in_dim(x, (4, 3), (1,)), jnp.ones(3))
    (equation,) = program.equations
    (made,) = bind(equation, [jnp.arange(2.0)], shape=(5, 2))
    np.testing.assert_array_equal(made, np.tile([0.0, 1.0], (5, 1)))


def test_open_jaxprs_are_read_too():
    closed = jax.make_jaxpr(lambda x: jnp.sin(x) + 1)(jnp.ones(2))
    for jaxpr in (closed, closed.jaxpr):
        (found,) = run(program_of(jaxpr), [jnp.ones(2)])
        np.testing.assert_allclose(found, np.sin(np.ones(2)) + 1, rtol=1e-6)


def equation_of(fn, name, *args):
    program, _ = trace(fn, *args)
    (equation,) = (e for e in program.equations if e.name == name)
    return equation


def test_a_custom_jvp_is_the_one_that_was_written():
    x, tangent = jnp.arange(3.0), jnp.array([1.0, 2.0, 4.0])
    equation = equation_of(halved, "custom_jvp_call", x)
    assert differentiable(equation) == [0]
    out, moved = run(jvp_program(equation), [x, tangent])
    np.testing.assert_array_equal(out, x / 2)
    np.testing.assert_array_equal(moved, 7 * tangent)


def test_a_custom_vjp_is_the_one_that_was_written():
    x, cotangent = jnp.arange(3.0), jnp.array([1.0, 2.0, 4.0])
    count = jnp.int32(3)
    equation = equation_of(tripled, "custom_vjp_call", x, count)
    assert [equation.inputs[i].shape for i in differentiable(equation)] == [(3,)]
    forward, backward = vjp_programs(equation)
    out, *residuals = run(forward, [x, count])
    (pulled,) = run(backward, [*residuals, cotangent])
    np.testing.assert_array_equal(out, 3 * x)
    np.testing.assert_array_equal(pulled, 11 * cotangent * x)
