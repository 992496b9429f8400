"""When to prune how much: the cubic curve of gradual pruning, in optimizer steps."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agp_jax.trees import expect, expect_whole

_MAX_STEP = 2**31 - 1
_MAX_EXACT_POWER = 64  # the integers of exact levels grow with the power
_PLACES = 10**12  # levels of other powers are rounded to multiples of its inverse
_NEAR = Fraction(1, 10**9)  # a float this close to k / m was meant as that


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A sparsity curve that rises at events and holds its value between them.

    Equation 1 of arXiv:1710.01878, with s_i = `initial_sparsity`, s_f =
    `final_sparsity`, t_0 = `begin_step`, dt = `frequency` and the paper's 3 =
    `power`. The events are the steps `begin_step + j * frequency` for j = 0..n,
    n = (end_step - begin_step) // frequency, and at event j the sparsity becomes

        s_f + (s_i - s_f) * (1 - j / n) ** power

    The first event sets `initial_sparsity` and the last `final_sparsity` exactly,
    whether or not the frequency divides the span; before the first nothing is pruned.

    Levels are fractions: a float is the decimal that it prints as, so 0.1 means 1/10,
    but 1 / 3 means a third; a `Fraction` is itself. Between the ends they are exact for
    whole powers up to 64, and of other powers float64 rounded to 12 decimal places.

    Calling it with a step (an int or a traced integer array) gives the float32
    sparsity that holds at that step.

    Raises:
      ValueError: for a curve that cannot be followed: a sparsity outside [0, 1), a
        final one below the initial one, negative steps, an end before the beginning,
        or a frequency longer than the span.

    >>> curve = polynomial_schedule(0.8, begin_step=0, end_step=4, frequency=2)
    >>> curve.events()
    (array([0, 2, 4]), array([0. , 0.7, 0.8]))
    >>> curve(3)
    Array(0.7, dtype=float32)
    """

    final_sparsity: float | Fraction
    begin_step: int
    end_step: int
    frequency: int = 1
    initial_sparsity: float | Fraction = 0.0
    power: float = 3.0

    def __post_init__(self):
        for name in ("begin_step", "end_step", "frequency"):
            value = expect_whole(
                getattr(self, name), f"{name} must be a whole number of steps"
            )
            object.__setattr__(self, name, value)
        for name in ("initial_sparsity", "final_sparsity", "power"):
            try:
                value = _as_written(getattr(self, name))
            except (TypeError, ValueError, OverflowError):
                raise ValueError(
                    f"{name} must be a number, got {getattr(self, name)!r}"
                ) from None
            if name == "power":
                value = float(value)
            elif not 0 <= value < 1:
                raise ValueError(
                    f"{name} must be a fraction in [0, 1), got {value}; a sparsity of "
                    f"80 % is 0.8"
                )
            object.__setattr__(self, name, value)
        if self.final_sparsity < self.initial_sparsity:
            raise ValueError(
                f"final_sparsity {self.final_sparsity} is below initial_sparsity "
                f"{self.initial_sparsity}; sparsity can only rise"
            )
        if not 0 <= self.begin_step <= self.end_step <= _MAX_STEP:
            raise ValueError(
                f"steps must satisfy 0 <= begin_step <= end_step <= {_MAX_STEP}, got "
                f"begin_step={self.begin_step}, end_step={self.end_step}"
            )
        span = self.end_step - self.begin_step
        if self.frequency < 1 or (span and self.frequency > span):
            raise ValueError(
                f"frequency must be between 1 and end_step - begin_step = {span} "
                f"steps, got {self.frequency}"
            )
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"power must be positive, got {self.power}")

    @property
    def num_events(self) -> int:
        return (self.end_step - self.begin_step) // self.frequency + 1

    def events(self) -> tuple[np.ndarray, np.ndarray]:
        """The steps (int64) and the sparsities (float64) of all events, in order."""
        j = np.arange(self.num_events)
        return self.begin_step + j * self.frequency, self.levels()[1:]

    def levels(self) -> np.ndarray:
        """The float64 sparsity after 0, 1, 2, ... events; 0 after none."""
        quotients = self._quotients(range(self.num_events))
        return np.array([0.0, *(above / below for above, below in quotients)])

    def exact_level(self, num_events: int) -> Fraction:
        """The sparsity after so many events, to which `levels()` is the nearest.

        >>> one_shot(0.1).exact_level(1)
        Fraction(1, 10)
        """
        if num_events == 0:
            return Fraction(0)
        (quotient,) = self._quotients([num_events - 1])
        return Fraction(*quotient)

    def _quotients(self, j: Iterable[int]) -> Iterator[tuple[int, int]]:
        """The sparsities of the events number `j`, exact: two integers for each.

        These are not in lowest terms, so that thousands of them take milliseconds.
        """
        low, high = _exact(self.initial_sparsity), _exact(self.final_sparsity)
        unit = math.lcm(low.denominator, high.denominator, _PLACES)
        first, final = int(low * unit), int(high * unit)
        last = self.num_events - 1
        span = max(last, 1)  # a single event is the last
        if self.power.is_integer() and self.power <= _MAX_EXACT_POWER:
            power = int(self.power)
            scale = span**power
            for k in j:
                drop = (final - first) * (last - k) ** power
                yield final * scale - drop, unit * scale
            return
        top, rise = float(high), float(high - low)
        for k in j:
            rest = (last - k) / span
            level = final - (final - first) * int(rest)  # of the ends
            if 0 < rest < 1:
                level = round((top - rise * rest**self.power) * _PLACES)
                level = min(max(level * (unit // _PLACES), first), final)
            yield level, unit

    def num_events_until(self, step: int | jax.Array) -> int | jax.Array:
        """How many events lie at or before `step`: an int for an int, else traced."""
        step = _as_step(step)
        passed = (step - self.begin_step) // self.frequency  # -1 or less: none
        last = self.num_events - 1
        if isinstance(passed, int):
            return min(max(passed, -1), last) + 1
        return jnp.clip(passed, -1, last) + 1

    def sparsity_at(self, step: int) -> float:
        """The float64 sparsity that holds at `step`, 0 before the first event."""
        return float(self.exact_level(int(self.num_events_until(step))))

    def is_event(self, step: int | jax.Array) -> bool | jax.Array:
        """Whether the sparsity is set anew at `step`: jit-safe."""
        since = _as_step(step) - self.begin_step
        last = (self.num_events - 1) * self.frequency
        return (since >= 0) & (since <= last) & (since % self.frequency == 0)

    def __call__(self, step: int | jax.Array) -> jax.Array:
        passed = self.num_events_until(step)
        if isinstance(passed, int):
            return jnp.float32(self.exact_level(passed))
        return jnp.asarray(self.levels().astype(np.float32))[passed]

    def __repr__(self) -> str:
        if self == one_shot(self.final_sparsity, step=self.begin_step):
            return f"one_shot({self.final_sparsity!r}, step={self.begin_step})"
        given = [repr(self.final_sparsity)]
        given += [f"{n}={getattr(self, n)!r}" for n in ("begin_step", "end_step")]
        for name in ("frequency", "initial_sparsity", "power"):
            if (value := getattr(self, name)) != getattr(type(self), name):
                given.append(f"{name}={value!r}")
        return f"polynomial_schedule({', '.join(given)})"

    def __str__(self) -> str:
        if self.num_events == 1:
            level = float(self.final_sparsity)
            return f"sparsity {level:.4g} from step {self.begin_step} on"
        last = self.num_events - 1
        shown = sorted({0, *(self.num_events * k // 5 for k in range(1, 5)), last})
        curve = ", ".join(
            f"{above / below:.4g} at {self.begin_step + j * self.frequency}"
            for j, (above, below) in zip(shown, self._quotients(shown), strict=True)
        )
        return (
            f"{self.num_events} events from step {self.begin_step} to "
            f"{self.begin_step + last * self.frequency}, every {self.frequency}: "
            f"sparsity {curve}"
        )


def _as_written(number: Any) -> float | Fraction:
    """The float that prints as `number` does; a `Fraction` where none does, as of 1/3.

    Narrow types print what was written, too: 0.1 in float32 is 0.1, whatever its bits.
    """
    if isinstance(number, str | bool):
        raise TypeError
    exact_types = numbers.Rational | Decimal
    written = Fraction(number if isinstance(number, exact_types) else str(number))
    nearest = float(written)
    meant = written in (_exact(nearest), Fraction(repr(nearest)))
    return nearest if meant else written


def _exact(number: float | Fraction) -> Fraction:
    """What was written: a simple fraction that a float is nearest to, as 1 / 3, or else
    the decimal that it prints as."""
    if isinstance(number, Fraction):
        return number
    simple = Fraction(number).limit_denominator(1000)
    return simple if float(simple) == number else Fraction(repr(number))


def in_parts(sparsity: float | Fraction, m: int) -> float | Fraction:
    """k / m where a float that no decimal is, as 2 / 3, comes close; else `sparsity`.

    >>> in_parts(2 / 3, 3)
    Fraction(2, 3)
    """
    nearest = Fraction(round(_exact(sparsity) * m), m)
    return nearest if abs(nearest - _exact(sparsity)) <= _NEAR else sparsity


def _as_step(step: int | jax.Array) -> int | jax.Array:
    """An int, or int32 of at least -1, from which any step can be subtracted."""
    if not isinstance(step, (jax.Array, np.ndarray)):
        return expect_whole(step, "a step must be a whole number")
    step = jnp.asarray(step)
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise ValueError(f"a step must be a whole number, got {step.dtype}")
    if step.dtype.itemsize < 4:
        return jnp.maximum(step.astype(jnp.int32), -1)
    lowest = 0 if jnp.issubdtype(step.dtype, jnp.unsignedinteger) else -1
    return jnp.clip(step, lowest, _MAX_STEP).astype(jnp.int32)


def polynomial_schedule(
    final_sparsity: float | Fraction,
    *,
    begin_step: int,
    end_step: int,
    frequency: int = 1,
    initial_sparsity: float | Fraction = 0.0,
    power: float = 3.0,
) -> Schedule:
    """The schedule of Automated Gradual Pruning (arXiv:1710.01878, eq. 1).

    See `Schedule` for the exact events and for what is refused. A schedule written in
    epochs, with an exclusive last epoch as in Intel Distiller, has the same levels
    with `begin_step = start * n`, `end_step = (end - 1) * n` and
    `frequency = every * n` for n steps per epoch.

    >>> schedule = polynomial_schedule(0.8, begin_step=0, end_step=4, frequency=2)
    >>> print(schedule)
    3 events from step 0 to 4, every 2: sparsity 0 at 0, 0.7 at 2, 0.8 at 4
    """
    return Schedule(
        final_sparsity, begin_step, end_step, frequency, initial_sparsity, power
    )


def schedule_within(
    num_steps: int,
    final_sparsity: float | Fraction,
    *,
    begin: float = 0.25,
    end: float = 0.75,
    frequency: int = 0,
    initial_sparsity: float | Fraction = 0.0,
    power: float = 3.0,
) -> Schedule:
    """A polynomial schedule whose window is given in fractions of a run.

    Args:
      num_steps: of the whole run.
      final_sparsity: see `polynomial_schedule`, as the others.
      begin: where in the run the first event lies, rounded to a step.
      end: where the last one may lie at the latest.
      frequency: steps between events; by default a hundredth of the window.

    >>> print(schedule_within(1000, 0.8, begin=0.25, end=0.75, frequency=250))
    3 events from step 250 to 750, every 250: sparsity 0 at 250, 0.7 at 500, 0.8 at 750
    """
    if expect_whole(num_steps, "num_steps must be a whole number of steps") < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    expect(begin, numbers.Real, "begin as a fraction of the run")
    expect(end, numbers.Real, "end as a fraction of the run")
    if not 0 <= begin <= end <= 1:
        raise ValueError(
            f"a window must satisfy 0 <= begin <= end <= 1, fractions of the run, got "
            f"begin={begin}, end={end}"
        )
    first, last = round(begin * num_steps), round(end * num_steps)
    return polynomial_schedule(
        final_sparsity,
        begin_step=first,
        end_step=last,
        frequency=frequency or max((last - first) // 100, 1),
        initial_sparsity=initial_sparsity,
        power=power,
    )


def one_shot(sparsity: float | Fraction, *, step: int = 0) -> Schedule:
    """Prunes once, at `step`.

    >>> print(one_shot(0.5, step=100))
    sparsity 0.5 from step 100 on
    """
    return Schedule(sparsity, begin_step=step, end_step=step)
