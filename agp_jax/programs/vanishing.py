"""Vanishing: which values are wholly zero once certain leaves are.

What is made of zeros alone is zero: a branch whose kernels are masked adds nothing, and
a step of a scan that only adds such branches hands on what it was given. A proof is the
set of leaves whose zeros make a value zero, whatever else holds; None where it need not
be zero.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from agp_jax.programs.elementwise import ELEMENTWISE, singular_operands, zeros_of
from agp_jax.programs.jaxprs import REMAT, Equation, Program, Variable, scan_counts
from agp_jax.programs.labels import all_proofs, any_proof

Proof = frozenset[int] | None

# Zero if the first operand is, whatever the others, such as places, are.
_OF_FIRST = set(
    "broadcast_in_dim cummax cummin cumprod cumsum dynamic_slice fft gather reduce_max "
    "reduce_min reduce_or reduce_prod reduce_sum reduce_window_sum reshape rev slice "
    "split squeeze tile transpose unstack".split()
)
# Zero if either of the first two is.
_PRODUCTS = {"conv_general_dilated", "dot_general", "ragged_dot_general"}
# Zero if all of these operands are.
_OF_SEVERAL = {
    "concatenate": slice(None),
    "stack": slice(None),
    "pad": slice(0, 2),
    "dynamic_update_slice": slice(0, 2),
    "scatter": slice(0, None, 2),
    "scatter-add": slice(0, None, 2),
    "scatter-sub": slice(0, None, 2),
}
# Each output is zero if its operand is.
_EACH = {"device_put", "optimization_barrier", "sort"}
# What comes out is what went in.
_HANDED_ON = set(
    "copy device_put name optimization_barrier pvary reshard "
    "sharding_constraint".split()
)
_CALLS = REMAT | {"custom_jvp_call", "custom_vjp_call"}


@dataclasses.dataclass(eq=False)
class Zeros:
    """Which values of a program vanish, and why.

    Attributes:
      proofs: of every value that has been followed, those in bodies too.
      singular: the equations that divide by what vanishes, or take another function of
        it that has no finite value or derivative there: zeros do not pass them.
    """

    proofs: dict[Variable, Proof] = dataclasses.field(default_factory=dict)
    singular: list[Equation] = dataclasses.field(default_factory=list)

    def of(self, variable: Variable) -> Proof:
        """The proof that a value is zero; a constant 0 needs no leaf."""
        return self.proofs.get(variable, frozenset() if variable.is_zero else None)

    def follow(self, program: Program, inputs: Sequence[Proof]) -> list[Proof]:
        """Notes the proofs of all values of `program`; returns those of its outputs."""
        self.proofs.update(zip(program.inputs, inputs, strict=True))
        for equation in program.equations:
            self.apply(equation)
        return [self.of(v) for v in program.outputs]

    def apply(self, equation: Equation) -> None:
        """Notes the proofs of what one equation makes."""
        proofs = self._outputs(equation, [self.of(v) for v in equation.inputs])
        self.proofs.update(zip(equation.outputs, proofs, strict=True))

    def _outputs(self, equation: Equation, ins: list[Proof]) -> list[Proof]:
        name, count = equation.name, len(equation.outputs)
        if name in ELEMENTWISE:
            is_singular = any(ins[k] is not None for k in singular_operands(equation))
            if is_singular or _selects_infinity(equation, ins):
                self.singular.append(equation)
                return [None]
            return [zeros_of(equation, ins, equation.inputs)]
        if name in _OF_FIRST:
            return ins[:1] * count
        if name in _PRODUCTS:
            return [any_proof(ins[:2])]
        if name in _OF_SEVERAL:
            return [all_proofs(ins[_OF_SEVERAL[name]])]
        if name in _EACH:
            return ins
        if name == "top_k":
            return [ins[0], None]
        if name in _CALLS:
            return self.follow(equation.bodies[0], ins)
        if name == "cond":
            results = [self.follow(body, ins[1:]) for body in equation.bodies]
            return [all_proofs(proofs) for proofs in zip(*results, strict=True)]
        if name == "scan":
            return self._scan(equation, ins)
        return [None] * count

    def _scan(self, equation: Equation, ins: list[Proof]) -> list[Proof]:
        """What is zero at the start, and after a step from zeros, is always zero."""
        num_consts, num_carry = scan_counts(equation)
        first = num_consts + num_carry
        carry = ins[num_consts:first]
        while True:
            outs = self.follow(
                equation.bodies[0], [*ins[:num_consts], *carry, *ins[first:]]
            )
            after = [
                all_proofs(pair) for pair in zip(carry, outs[:num_carry], strict=True)
            ]
            if after == carry:
                return [*carry, *outs[num_carry:]]
            carry = after


def _selects_infinity(equation: Equation, ins: Sequence[Proof]) -> bool:
    """Whether zeros make it infinite all over, as they do the logits of no experts."""
    if equation.name != "select_n" or ins[0] is None:
        return False
    case = equation.inputs[1]
    return case.is_uniform and not np.isfinite(np.asarray(case.constant, float))


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a value is but for zeros that are added to it.

    Attributes:
      variable: the value.
      proof: the leaves whose zeros make all that is added zero.
      dtypes: through which it is cast on the way.
    """

    variable: Variable
    proof: frozenset[int] = frozenset()
    dtypes: tuple = ()

    def after(self, other: "Origin") -> "Origin":
        """This origin, of what is the other's variable."""
        proof, dtypes = self.proof | other.proof, self.dtypes + other.dtypes
        return Origin(self.variable, proof, dtypes)


def handed_on(
    body: Program, zeros: Zeros, num_consts: int, num_carry: int
) -> list[Proof]:
    """For each value that a loop carries the leaves whose zeros make a step keep it.

    None where a step changes it otherwise, too.
    """
    found = []
    carried = body.inputs[num_consts : num_consts + num_carry]
    for before, after in zip(carried, body.outputs, strict=False):
        origin = _origin(body, zeros, after)
        is_same = origin.variable is before and all(
            _holds(dtype, before.aval.dtype) for dtype in origin.dtypes
        )
        found.append(origin.proof if is_same else None)
    return found


def summands(equation: Equation) -> tuple[int, ...]:
    """The operands that an equation adds up: either is all that is left if the other
    is zero."""
    if equation.name in ("add", "add_any"):
        return (0, 1)
    return (0,) if equation.name == "sub" else ()


def _origin(program: Program, zeros: Zeros, variable: Variable) -> Origin:
    """What a value of `program` is but for what vanishes."""
    makers = {v: equation for equation in program.equations for v in equation.outputs}
    return _trace_back(Origin(variable), makers, zeros)


def _trace_back(
    origin: Origin, makers: dict[Variable, Equation], zeros: Zeros
) -> Origin:
    while (maker := makers.get(origin.variable)) is not None:
        before = _before(maker, origin.variable, makers, zeros)
        if before is None:
            break
        origin = before.after(origin)
    return origin


def _before(
    maker: Equation,
    variable: Variable,
    makers: dict[Variable, Equation],
    zeros: Zeros,
) -> Origin | None:
    """What the equation that makes a value has made it from, if from one alone."""
    name, ins, place = maker.name, maker.inputs, maker.outputs.index(variable)
    if places := summands(maker):
        proofs = [zeros.of(v) for v in ins]
        for k in places:
            proof = proofs[1 - k]
            if proof is not None and proofs[k] is None:
                return Origin(ins[k], proof)
    elif name in _HANDED_ON:
        return Origin(ins[place])
    elif name == "convert_element_type":
        return Origin(ins[0], dtypes=(variable.aval.dtype,))
    elif name in REMAT:
        return _outside(maker, maker.bodies[0], ins, place, zeros)
    elif name == "select_n":
        return _common([_trace_back(Origin(v), makers, zeros) for v in ins[1:]])
    elif name == "cond":
        found = [_outside(maker, body, ins[1:], place, zeros) for body in maker.bodies]
        if None not in found:
            return _common([_trace_back(x, makers, zeros) for x in found if x])
    return None


def _outside(
    maker: Equation,
    body: Program,
    operands: Sequence[Variable],
    place: int,
    zeros: Zeros,
) -> Origin | None:
    """What an output of a body is of the operands that the body is called with."""
    inner = _origin(body, zeros, body.outputs[place])
    if inner.variable not in body.inputs:
        return None
    operand = operands[body.inputs.index(inner.variable)]
    return dataclasses.replace(inner, variable=operand)


def _common(origins: Sequence[Origin]) -> Origin | None:
    """The one origin of all cases."""
    first, *others = origins
    if any(other.variable is not first.variable for other in others):
        return None
    for other in others:
        first = Origin(
            first.variable, first.proof | other.proof, first.dtypes + other.dtypes
        )
    return first


def _holds(wide, narrow) -> bool:
    """Whether every number of dtype `narrow` is one of `wide`."""
    if wide == narrow:
        return True
    if not all(jnp.issubdtype(d, jnp.floating) for d in (wide, narrow)):
        return False
    w, n = jnp.finfo(wide), jnp.finfo(narrow)
    return w.nmant >= n.nmant and w.minexp <= n.minexp and w.maxexp >= n.maxexp
