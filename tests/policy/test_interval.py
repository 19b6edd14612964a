"""When a save is due: grids, periods, resumed runs, jumping clocks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptengine.errors import UnusableRequest
from ckptengine.policy.cost import WINDOW, CostHistory, SaveCost
from ckptengine.policy.interval import AutoInterval, Every, LastSave, Soonest


def saves(interval: Every | AutoInterval, steps: range, last: LastSave | None, step_s: float = 1.0) -> list[int]:
    done: list[int] = []
    for step in steps:
        if interval.due(step, step * step_s, last):
            done.append(step)
            last = LastSave(step, step * step_s)
    return done


def test_steps_lie_on_the_absolute_grid() -> None:
    assert saves(Every(steps=50), range(1, 201), None) == [50, 100, 150, 200]


@given(st.integers(1, 40), st.integers(0, 200))
def test_a_resumed_run_saves_where_the_uninterrupted_one_does(every: int, resumed_at: int) -> None:
    whole = saves(Every(steps=every), range(1, 300), LastSave(0, 0.0))
    assert saves(Every(steps=every), range(resumed_at + 1, 300), LastSave(resumed_at, 0.0)) == [
        step for step in whole if step > resumed_at
    ]


def test_a_loop_that_jumps_over_a_grid_point_saves_right_after_it() -> None:
    assert saves(Every(steps=10), range(3, 60, 7), LastSave(0, 0.0)) == [10, 24, 31, 45, 52]


def test_seconds_count_from_the_last_save() -> None:
    assert saves(Every(seconds=3.0), range(1, 12), LastSave(0, 0.0)) == [3, 6, 9]
    assert saves(Every(seconds=3.0), range(5, 12), None) == [5, 8, 11]


def test_whichever_comes_first() -> None:
    assert saves(Every(steps=4, seconds=2.5), range(1, 9), LastSave(0, 0.0)) == [3, 4, 7, 8]


def test_the_soonest_of_several() -> None:
    both = Soonest((Every(steps=4), Every(steps=6)))
    assert saves(both, range(1, 25), LastSave(0, 0.0)) == [4, 6, 8, 12, 16, 18, 20, 24]  # type: ignore[arg-type]
    assert not both.needs_clock
    assert Soonest((Every(steps=4), Every(seconds=6))).needs_clock
    assert both.describe() == "every 4 steps; every 6 steps"


def test_a_clock_that_jumps_back_is_not_due_and_not_an_error() -> None:
    assert not Every(seconds=1.0).due(5, -1e9, LastSave(4, 0.0))
    assert Every(seconds=1.0).due(5, 1e12, LastSave(4, 0.0))


@given(st.integers(0, 100), st.floats(-1e9, 1e9))
def test_never_twice_for_one_step(step: int, now_s: float) -> None:
    for interval in (Every(steps=1), Every(seconds=1e-9), AutoInterval(min_s=0)):
        assert not interval.due(step, now_s, LastSave(step, -math.inf))


def test_only_time_needs_a_clock() -> None:
    assert not Every(steps=3).needs_clock
    assert Every(steps=3, seconds=1).needs_clock
    assert AutoInterval().needs_clock


@given(st.floats(1e-4, 100), st.floats(60, 1e7), st.floats(1e-4, 1), st.floats(0, 1e4))
def test_automatic_period_is_youngs_within_its_bounds(cost: float, mtbf: float, share: float, durable: float) -> None:
    auto = AutoInterval(mtbf_s=mtbf, max_overhead=share, min_s=0.0, max_s=1e9)
    period = auto.period_s(SaveCost(cost, durable))
    assert cost / period <= share * (1 + 1e-12)
    assert period >= durable
    assert period == max(math.sqrt(2 * cost * mtbf), cost / share, durable)


def test_young_is_the_minimum_of_the_expected_loss() -> None:
    cost, mtbf = 2.0, 7200.0
    best = AutoInterval(mtbf_s=mtbf, max_overhead=1.0, min_s=0).period_s(SaveCost(cost, 0.0))

    def loss(period: float) -> float:
        return cost / period + period / 2 / mtbf

    assert loss(best) <= min(loss(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_the_bound_on_overhead_wins_over_max_s() -> None:
    auto = AutoInterval(mtbf_s=100.0, max_overhead=0.01, max_s=10.0)
    assert auto.period_s(SaveCost(1.0, 0.0)) == 100.0


def test_the_period_follows_measured_costs_and_says_so() -> None:
    auto = AutoInterval(mtbf_s=3600.0, max_overhead=1.0, min_s=0.0)
    history = CostHistory()
    assert history.estimate() is None
    assert "assumed" in auto.describe(history.estimate())
    for cost in (0.5, 0.5, 90.0):
        history = history.add(cost, 1.0)
    assert history.estimate() == SaveCost(0.5, 1.0, 3)
    assert auto.period_s(history.estimate()) == pytest.approx(60.0)
    assert "median of 3 saves" in auto.describe(history.estimate())
    for _ in range(WINDOW):
        history = history.add(2.0, 1.0)
    assert history.estimate() == SaveCost(2.0, 1.0, WINDOW)


def test_a_measurement_that_a_clock_spoilt_is_left_out() -> None:
    history = CostHistory().add(1.0, 1.0)
    assert history.add(-5.0, 1.0) == history
    assert history.add(1.0, math.nan) == history


@pytest.mark.parametrize(
    "build",
    [
        lambda: Every(),
        lambda: Every(steps=0),
        lambda: Every(steps=1.5),  # type: ignore[arg-type]
        lambda: Every(seconds=0),
        lambda: Every(seconds=math.nan),
        lambda: AutoInterval(mtbf_s=-1),
        lambda: AutoInterval(max_overhead=0),
        lambda: AutoInterval(min_s=10, max_s=5),
    ],
)
def test_nonsense_is_refused(build: object) -> None:
    with pytest.raises(UnusableRequest):
        build()  # type: ignore[operator]
