"""When to prune how much: the cubic curve of gradual pruning, in optimizer steps."""

import dataclasses
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

_MAX_STEP = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A sparsity curve that rises at events and holds its value between them.

    Equation 1 of arXiv:1710.01878, with s_i = `initial_sparsity`, s_f =
    `final_sparsity`, t_0 = `begin_step`, dt = `frequency` and the paper's 3 =
    `power`. The events are the steps `begin_step + j * frequency` for j = 0..n,
    n = (end_step - begin_step) // frequency, and at event j the sparsity becomes

        s_f + (s_i - s_f) * (1 - j / n) ** power

    computed in float64. The last event sets `final_sparsity` exactly, whether or not
    the frequency divides the span; before the first nothing is pruned.

    Calling it with a step (an int or a traced integer array) gives the float32
    sparsity that holds at that step.

    Raises:
      ValueError: for a curve that cannot be followed: a sparsity outside [0, 1), a
        final one below the initial one, negative steps, an end before the beginning,
        or a frequency longer than the span.
    """

    final_sparsity: float
    begin_step: int
    end_step: int
    frequency: int = 1
    initial_sparsity: float = 0.0
    power: float = 3.0

    def __post_init__(self):
        for name in ("begin_step", "end_step", "frequency"):
            try:
                value = operator.index(getattr(self, name))
            except TypeError:
                raise ValueError(
                    f"{name} must be a whole number of steps, got "
                    f"{getattr(self, name)!r}"
                ) from None
            object.__setattr__(self, name, value)
        for name in ("initial_sparsity", "final_sparsity", "power"):
            try:
                value = float(getattr(self, name))
            except (TypeError, ValueError):
                raise ValueError(
                    f"{name} must be a number, got {getattr(self, name)!r}"
                ) from None
            if name != "power" and not 0.0 <= value < 1.0:
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
        return self.begin_step + j * self.frequency, self._sparsities_of(j)

    def levels(self) -> np.ndarray:
        """The float64 sparsity after 0, 1, 2, ... events; 0 after none."""
        return np.concatenate([[0.0], self.events()[1]])

    def _sparsities_of(self, j: np.ndarray) -> np.ndarray:
        """The float64 sparsities of the events number `j`."""
        if self.num_events == 1:
            return np.full(len(j), self.final_sparsity)
        rest = 1.0 - j / (self.num_events - 1)
        drop = (self.initial_sparsity - self.final_sparsity) * rest**self.power
        return self.final_sparsity + drop

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
        passed = self.num_events_until(step)
        return float(self._sparsities_of(np.array([passed - 1]))[0]) if passed else 0.0

    def is_event(self, step: int | jax.Array) -> bool | jax.Array:
        """Whether the sparsity is set anew at `step`: jit-safe."""
        since = _as_step(step) - self.begin_step
        last = (self.num_events - 1) * self.frequency
        return (since >= 0) & (since <= last) & (since % self.frequency == 0)

    def __call__(self, step: int | jax.Array) -> jax.Array:
        levels = jnp.asarray(self.levels().astype(np.float32))
        return levels[self.num_events_until(step)]

    def __str__(self) -> str:
        if self.num_events == 1:
            return f"sparsity {self.final_sparsity:.4g} from step {self.begin_step} on"
        last = self.num_events - 1
        shown = sorted({0, *(self.num_events * k // 5 for k in range(1, 5)), last})
        curve = ", ".join(
            f"{level:.4g} at {self.begin_step + j * self.frequency}"
            for j, level in zip(
                shown, self._sparsities_of(np.array(shown)), strict=True
            )
        )
        return (
            f"{self.num_events} events from step {self.begin_step} to "
            f"{self.begin_step + last * self.frequency}, every {self.frequency}: "
            f"sparsity {curve}"
        )


def _as_step(step: int | jax.Array) -> int | jax.Array:
    """An int, or int32 of at least -1, from which any step can be subtracted."""
    if not isinstance(step, (jax.Array, np.ndarray)):
        return operator.index(step)
    step = jnp.asarray(step)
    if step.dtype.itemsize < 4:
        return jnp.maximum(step.astype(jnp.int32), -1)
    lowest = 0 if jnp.issubdtype(step.dtype, jnp.unsignedinteger) else -1
    return jnp.clip(step, lowest, _MAX_STEP).astype(jnp.int32)


def polynomial_schedule(
    final_sparsity: float,
    *,
    begin_step: int,
    end_step: int,
    frequency: int = 1,
    initial_sparsity: float = 0.0,
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


def one_shot(sparsity: float, *, step: int = 0) -> Schedule:
    """Prunes once, at `step`.

    >>> print(one_shot(0.5, step=100))
    sparsity 0.5 from step 100 on
    """
    return Schedule(sparsity, begin_step=step, end_step=step)
