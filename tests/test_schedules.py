"""Schedules against the formula of arXiv:1710.01878, computed here in plain floats."""

import dataclasses
import math
import re
from decimal import Decimal
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agp_jax as agp

LAST_STEP = 2**31 - 1

SCHEDULES = [
    agp.polynomial_schedule(0.8, begin_step=0, end_step=10),
    agp.polynomial_schedule(0.8, begin_step=4, end_step=20, frequency=4),
    agp.polynomial_schedule(0.9, begin_step=3, end_step=23, frequency=7),
    agp.polynomial_schedule(
        0.91, begin_step=5, end_step=17, frequency=5, initial_sparsity=0.05, power=1.0
    ),
    agp.polynomial_schedule(
        0.5, begin_step=1, end_step=9, frequency=8, initial_sparsity=0.5, power=0.5
    ),
    agp.one_shot(0.7),
    agp.one_shot(0.3, step=6),
    agp.one_shot(0.0, step=2),
]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def formula(schedule):
    """{step: sparsity} at the events, by the definition."""
    s_i, s_f = schedule.initial_sparsity, schedule.final_sparsity
    n = (schedule.end_step - schedule.begin_step) // schedule.frequency
    if n == 0:
        return {schedule.begin_step: s_f}
    return {
        schedule.begin_step + j * schedule.frequency: s_f
        + (s_i - s_f) * math.pow(1 - j / n, schedule.power)
        for j in range(n + 1)
    }


def held_at(schedule, step):
    """The sparsity that holds at `step`: that of the last event so far."""
    so_far = [level for event, level in formula(schedule).items() if event <= step]
    return so_far[-1] if so_far else 0.0


@each_schedule
def test_events_are_those_of_the_formula(schedule):
    steps, levels = schedule.events()
    expected = formula(schedule)
    assert steps.tolist() == list(expected)
    assert levels.dtype == np.float64
    np.testing.assert_allclose(levels, list(expected.values()), rtol=1e-15, atol=1e-16)
    assert levels[-1] == schedule.final_sparsity
    assert schedule.num_events == len(expected)


@pytest.mark.parametrize("s_i, s_f", [("0.05", "0.8"), ("0", "0.995"), ("1/3", "2/3")])
@pytest.mark.parametrize("n", [1, 7, 100, 1024])
@pytest.mark.parametrize("power", [1, 2, 3, 5])
def test_levels_are_exact_to_the_last_bits_of_float64(s_i, s_f, n, power):
    schedule = agp.polynomial_schedule(
        float(Fraction(s_f)),
        begin_step=0,
        end_step=n,
        initial_sparsity=float(Fraction(s_i)),
        power=power,
    )
    low, high = Fraction(schedule.initial_sparsity), Fraction(schedule.final_sparsity)
    for j, level in enumerate(schedule.events()[1]):
        exact = high + (low - high) * (1 - Fraction(j, n)) ** power
        assert abs(Fraction(float(level)) - exact) < Fraction(1, 10**15)


DECIMALS = st.integers(1, 6).flatmap(
    lambda digits: st.integers(0, 10**digits - 1).map(lambda x: x / 10**digits)
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.tuples(DECIMALS, DECIMALS).map(sorted), st.integers(1, 4), st.integers(1, 200)
)
def test_levels_are_those_of_the_decimals_written(ends, power, n):
    schedule = agp.polynomial_schedule(
        ends[1], begin_step=0, end_step=n, initial_sparsity=ends[0], power=power
    )
    low, high = (Fraction(str(x)) for x in ends)
    exact = [high + (low - high) * (1 - Fraction(j, n)) ** power for j in range(n + 1)]
    assert [schedule.exact_level(j) for j in range(n + 2)] == [0, *exact]
    assert schedule.events()[1].tolist() == [float(level) for level in exact]


@pytest.mark.parametrize("power", [0.3, 2.5, 65, 1e9])
def test_levels_of_other_powers_are_rounded_between_ends_that_are_exact(power):
    low, high = Fraction(1, 3), Fraction("0.80000000000000001")
    schedule = agp.polynomial_schedule(
        high, begin_step=0, end_step=50, initial_sparsity=low, power=power
    )
    first, *between, last = [schedule.exact_level(j) for j in range(1, 52)]
    assert (first, last) == (low, high)
    for j, level in enumerate(between, start=1):
        exact = float(high) + float(low - high) * (1 - j / 50) ** power
        assert level == min(Fraction(round(exact * 10**12), 10**12), high)


WRITTEN = [0.1, Decimal("0.10"), Fraction(1, 10), np.float64(0.1)]
WRITTEN += [np.float32(0.1), np.float16(0.1), np.array(0.1), jnp.float32(0.1)]


@pytest.mark.parametrize("number", WRITTEN, ids=repr)
def test_a_tenth_is_a_tenth_in_any_type(number):
    assert agp.one_shot(number) == agp.one_shot(0.1)
    assert type(agp.one_shot(number).final_sparsity) is float
    assert agp.one_shot(number).exact_level(1) == Fraction(1, 10)


def test_a_third_is_a_third_as_a_fraction_or_a_float():
    third = agp.one_shot(Fraction(1, 3))
    assert third.exact_level(1) == Fraction(1, 3)
    assert third.events()[1].tolist() == [1 / 3]
    assert third == agp.one_shot(1 / 3)  # the float that is nearest to it
    assert agp.one_shot(0.333).exact_level(1) == Fraction("0.333")
    assert agp.one_shot(0.3333).exact_level(1) == Fraction("0.3333")
    assert str(third) == "sparsity 0.3333 from step 0 on"


# Recipes of Intel Distiller's agp-pruning examples: first epoch, exclusive last epoch,
# frequency, then the sparsity set at every epoch that prunes.
DISTILLER = {
    "alexnet fc": (
        (0, 18, 2),
        [
            *(0.05, 0.3338671875, 0.5471875, 0.7000390625, 0.8025),
            *(0.8646484375, 0.8965625, 0.9083203125, 0.91),
        ],
    ),
    "alexnet conv2": ((1, 11, 2), [0.03, 0.37109375, 0.54625, 0.61078125, 0.62]),
    "mobilenet conv50": (
        (0, 20, 2),
        [
            *(0.15, 0.254183813443, 0.335322359396, 0.396296296296, 0.439986282579),
            *(0.46927297668, 0.487037037037, 0.496159122085, 0.499519890261, 0.5),
        ],
    ),
    "resnet18 mid": ((4, 16, 2), [0.05, 0.35256, 0.53608, 0.63032, 0.66504, 0.67]),
    "resnet50 fc": (
        (0, 30, 3),
        [
            *(0.05, 0.243484224966, 0.394170096022, 0.507407407407, 0.588545953361),
            *(0.642935528121, 0.675925925926, 0.692866941015, 0.699108367627, 0.7),
        ],
    ),
    "resnet50 filters": (
        (0, 30, 2),
        [
            *(0.05, 0.139704810496, 0.216618075802, 0.281723760933, 0.336005830904),
            *(0.380448250729, 0.416034985423, 0.44375, 0.464577259475, 0.479500728863),
            *(0.489504373178, 0.495572157434, 0.498688046647, 0.499836005831, 0.5),
        ],
    ),
    "lstm embedding": (
        (3, 26, 3),
        [
            *(0.05, 0.346209912536, 0.558454810496, 0.700728862974),
            *(0.787026239067, 0.831341107872, 0.847667638484, 0.85),
        ],
    ),
    "resnet20 fine": (
        (30, 50, 2),
        [
            *(0.05, 0.243484224966, 0.394170096022, 0.507407407407, 0.588545953361),
            *(0.642935528121, 0.675925925926, 0.692866941015, 0.699108367627, 0.7),
        ],
    ),
}


@pytest.mark.parametrize("epochs, levels", DISTILLER.values(), ids=DISTILLER)
@pytest.mark.parametrize("steps_per_epoch", [1, 391, 5005])
def test_distillers_recipes_keep_their_trajectories(epochs, levels, steps_per_epoch):
    start, end, every = epochs
    schedule = agp.polynomial_schedule(
        levels[-1],
        begin_step=start * steps_per_epoch,
        end_step=(end - 1) * steps_per_epoch,
        frequency=every * steps_per_epoch,
        initial_sparsity=levels[0],
    )
    steps, ours = schedule.events()
    assert steps.tolist() == [e * steps_per_epoch for e in range(start, end, every)]
    np.testing.assert_allclose(ours, levels, rtol=0, atol=6e-13)
    assert ours[-1] == levels[-1]


@st.composite
def schedules(draw):
    begin = draw(st.integers(0, LAST_STEP - 1) | st.integers(0, 100))
    num_events = draw(st.integers(2, 300))
    frequency = draw(
        st.integers(1, max((LAST_STEP - begin) // num_events, 1))
        | st.integers(1, min(50, LAST_STEP - begin))
    )
    span = frequency * (num_events - 1) + draw(st.integers(0, frequency - 1))
    end = min(begin + span, LAST_STEP)
    sparsity = st.floats(0.0, 1.0, exclude_max=True)
    low, high = sorted([draw(sparsity), draw(sparsity)])
    return agp.polynomial_schedule(
        high,
        begin_step=begin,
        end_step=end,
        frequency=min(frequency, end - begin),
        initial_sparsity=low,
        power=draw(st.floats(0.05, 20.0)),
    )


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(schedules())
def test_every_schedule_lands_on_its_final_sparsity(schedule):
    steps, levels = schedule.events()
    assert levels[-1] == schedule.final_sparsity
    assert steps[0] == schedule.begin_step
    assert schedule.end_step - schedule.frequency < steps[-1] <= schedule.end_step
    assert (np.diff(steps) == schedule.frequency).all()
    assert (np.diff(levels) >= 0).all()
    assert levels[0] == schedule.initial_sparsity
    assert (levels >= 0).all() and (levels <= schedule.final_sparsity).all()
    last = int(steps[-1])
    assert schedule.sparsity_at(last) == schedule.final_sparsity
    assert schedule.sparsity_at(LAST_STEP) == schedule.final_sparsity
    assert schedule.is_event(last)
    assert schedule(last) == np.float32(schedule.final_sparsity)
    assert schedule.num_events_until(jnp.int32(LAST_STEP)) == len(steps)


@each_schedule
@pytest.mark.parametrize("transform", [jax.jit, lambda f: jax.jit(jax.vmap(f))])
def test_a_schedule_is_a_function_of_traced_steps(schedule, transform):
    steps = np.arange(-3, schedule.end_step + 4, dtype=np.int32)
    expected = np.float32([held_at(schedule, step) for step in steps])
    held = transform(schedule)(jnp.asarray(steps))
    assert held.dtype == jnp.float32
    np.testing.assert_array_max_ulp(np.asarray(held), expected, 1)
    assert (np.asarray(held)[steps < schedule.begin_step] == 0).all()


@each_schedule
def test_int_steps_give_what_traced_ones_do(schedule):
    steps = range(-3, schedule.end_step + 4)
    traced = jax.jit(schedule.num_events_until)
    for step in steps:
        expected = sum(event <= step for event in formula(schedule))
        assert schedule.num_events_until(step) == expected == traced(step)
        assert isinstance(schedule.num_events_until(step), int)
        level = schedule.sparsity_at(step)
        assert level == pytest.approx(held_at(schedule, step), rel=1e-15, abs=1e-16)
        assert schedule(step) == np.float32(level)


@each_schedule
def test_is_event_is_true_at_the_events_alone(schedule):
    steps = np.arange(-3, schedule.end_step + 12)
    expected = [int(step) in formula(schedule) for step in steps]
    assert jax.jit(jax.vmap(schedule.is_event))(jnp.asarray(steps)).tolist() == expected
    assert [bool(schedule.is_event(int(step))) for step in steps] == expected


@pytest.mark.parametrize(
    "step",
    [
        *(
            np.int8(3),
            np.int16(3),
            np.int64(3),
            np.uint8(3),
            np.uint16(3),
            np.uint32(3),
        ),
        *(jnp.int8(3), jnp.int16(3), jnp.uint8(3), jnp.uint32(3), np.array(3)),
    ],
    ids=lambda step: f"{type(step).__module__}.{step.dtype}",
)
def test_a_step_may_be_any_integer_type(step):
    schedule = agp.polynomial_schedule(
        0.8, begin_step=5, end_step=1005, frequency=100, initial_sparsity=0.1
    )
    assert schedule(step) == 0.0
    assert not schedule.is_event(step)
    with_begin = dataclasses.replace(schedule, begin_step=3, end_step=1003)
    assert with_begin(step) == np.float32(with_begin.events()[1][0])


def test_the_far_ends_of_the_step_counter_are_safe():
    schedule = agp.polynomial_schedule(
        0.8, begin_step=LAST_STEP - 7, end_step=LAST_STEP, frequency=3
    )
    steps = [-1, 0, 1, LAST_STEP - 8, LAST_STEP - 7, LAST_STEP - 1, LAST_STEP]
    held = jax.vmap(schedule)(jnp.asarray(steps, jnp.int32))
    expected = np.float32([held_at(schedule, step) for step in steps])
    np.testing.assert_array_max_ulp(np.asarray(held), expected, 1)
    events = jax.vmap(schedule.is_event)(jnp.asarray(steps, jnp.int32))
    assert events.tolist() == [False] * 4 + [True, True, False]


def test_one_shot_prunes_once_and_holds():
    schedule = agp.one_shot(0.6, step=12)
    steps, levels = schedule.events()
    assert (steps.tolist(), levels.tolist()) == ([12], [0.6])
    assert [float(schedule(step)) for step in (0, 11, 12, 13, LAST_STEP)] == [
        *(0.0, 0.0),
        *[float(np.float32(0.6))] * 3,
    ]
    assert agp.one_shot(0.6).events()[0].tolist() == [0]
    assert schedule == agp.polynomial_schedule(0.6, begin_step=12, end_step=12)


@pytest.mark.parametrize(
    "options, named",
    [
        *((dict(final_sparsity=s), str(s)) for s in (-0.1, 1.0, 1.5, 80.0)),
        *((dict(final_sparsity=s), str(s)) for s in (math.nan, math.inf, -math.inf)),
        *((dict(initial_sparsity=s), str(s)) for s in (-0.1, 1.0, 5.0, math.nan)),
        (dict(initial_sparsity=0.6), "0.5.*0.6"),
        (dict(begin_step=-1), "-1"),
        (dict(begin_step=101), "101"),
        (dict(end_step=-5, begin_step=-7), "-5"),
        (dict(end_step=2**31), "2147483648"),
        (dict(begin_step=1.5), "1.5"),
        (dict(end_step=1e4), "10000.0"),
        (dict(frequency=2.0), "2.0"),
        (dict(begin_step="3"), "3"),
        (dict(end_step=None), "None"),
        (dict(frequency=0), "0"),
        (dict(frequency=-4), "-4"),
        (dict(frequency=101), "101"),
        *((dict(power=p), str(p)) for p in (0, -1.0, math.nan, math.inf)),
        (dict(final_sparsity="most"), "most"),
        (dict(final_sparsity=Decimal("Infinity")), "Infinity"),
        (dict(final_sparsity=Fraction(1)), "1"),
        (dict(final_sparsity=None), "None"),
        (dict(initial_sparsity=None), "None"),
        (dict(power="three"), "three"),
        (dict(power=None), "None"),
    ],
    ids=str,
)
def test_an_impossible_schedule_is_an_error_that_names_the_value(options, named):
    possible = dict(final_sparsity=0.5, begin_step=0, end_step=100, frequency=10)
    with pytest.raises(ValueError, match=named):
        agp.Schedule(**possible | options)


def test_a_percentage_is_refused_with_what_to_write():
    with pytest.raises(ValueError, match=r"80 % is 0\.8"):
        agp.one_shot(80)


def test_a_frequency_as_long_as_the_span_gives_two_events():
    schedule = agp.polynomial_schedule(0.5, begin_step=3, end_step=8, frequency=5)
    assert [x.tolist() for x in schedule.events()] == [[3, 8], [0.0, 0.5]]


def test_schedules_are_values():
    make = lambda power: agp.polynomial_schedule(  # noqa: E731
        np.float64(0.5), begin_step=np.int64(0), end_step=10, power=power
    )
    assert make(3) == make(3.0) and hash(make(3)) == hash(make(3.0))
    assert make(3) != make(2)
    assert isinstance(make(3).begin_step, int)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make(3).power = 2


@pytest.mark.parametrize(
    "schedule, text",
    [
        (agp.one_shot(0.5, step=100), "sparsity 0.5 from step 100 on"),
        (
            agp.polynomial_schedule(0.8, begin_step=0, end_step=5, frequency=2),
            "3 events from step 0 to 4, every 2: sparsity 0 at 0, 0.7 at 2, 0.8 at 4",
        ),
        (
            agp.polynomial_schedule(
                0.9, begin_step=7, end_step=8, initial_sparsity=1 / 3
            ),
            "2 events from step 7 to 8, every 1: sparsity 0.3333 at 7, 0.9 at 8",
        ),
    ],
)
def test_a_schedule_prints_itself(schedule, text):
    assert str(schedule) == text


def test_a_long_schedule_prints_a_few_true_points():
    schedule = agp.polynomial_schedule(
        0.8, begin_step=500, end_step=40_200, frequency=400, initial_sparsity=0.05
    )
    text = str(schedule)
    assert text.startswith("100 events from step 500 to 40100, every 400: ")
    points = re.findall(r"([\d.]+) at (\d+)", text)
    assert 4 <= len(points) <= 8
    assert (points[0][1], points[-1][1]) == ("500", "40100")
    for level, step in points:
        assert level == f"{formula(schedule)[int(step)]:.4g}"


# Windows


def test_a_window_is_given_in_fractions_of_a_run():
    schedule = agp.schedule_within(40_000, 0.8, begin=0.25, end=0.75, power=1.0)
    assert (schedule.begin_step, schedule.end_step) == (10_000, 30_000)
    assert schedule.frequency == 200
    assert schedule.sparsity_at(20_000) == 0.4
    once = agp.schedule_within(1000, 0.5, begin=0.5, end=0.5)
    assert once == agp.one_shot(0.5, step=500)


@pytest.mark.parametrize("window", [(0.5, 0.25), (-0.1, 0.5), (0.5, 1.5)])
def test_a_window_lies_within_the_run(window):
    begin, end = window
    with pytest.raises(ValueError, match="0 <= begin <= end <= 1"):
        agp.schedule_within(1000, 0.5, begin=begin, end=end)
