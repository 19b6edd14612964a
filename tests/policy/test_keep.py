"""What retention keeps, and what it may never drop."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptengine.errors import UnusableRequest
from ckptengine.policy.keep import Keep, StepInfo


def infos(*steps: int, **common: object) -> list[StepInfo]:
    return [StepInfo(step, **common) for step in steps]  # type: ignore[arg-type]


def test_no_reason_keeps_everything() -> None:
    assert Keep().select(infos(1, 2, 3)) == {1, 2, 3}


def test_last_counts_good_ones_only() -> None:
    steps = [StepInfo(10), StepInfo(20), StepInfo(30, good=False), StepInfo(40)]
    assert Keep(last=2).select(steps) == {20, 40}


def test_every_keeps_divisible_steps_and_the_newest() -> None:
    assert Keep(every=100).select(infos(50, 100, 150, 200, 250)) == {100, 200, 250}


def test_best_takes_the_newer_of_equals_and_ignores_nan_and_missing() -> None:
    steps = [
        StepInfo(1, metrics={"loss": 0.5}),
        StepInfo(2, metrics={"loss": 0.5}),
        StepInfo(3, metrics={"loss": math.nan}),
        StepInfo(4),
        StepInfo(5, metrics={"loss": 0.9}),
    ]
    assert Keep(best=("loss", "min")).select(steps) == {2, 5}
    assert Keep(best=("loss", "max")).select(steps) == {5}
    assert Keep(best=("acc", "max")).select(steps) == {5}


def test_seconds_keeps_one_for_each_period() -> None:
    steps = [StepInfo(step, committed_s=step * 10.0) for step in range(13)]
    assert Keep(seconds=60).select(steps) == {0, 6, 12}


def test_a_clock_that_jumps_years_does_not_drop_the_new_line() -> None:
    times = [0.0, 1e9, 1e9 + 10, 50.0, 60.0, 120.0, 121.0]
    steps = [StepInfo(step, committed_s=at) for step, at in enumerate(times)]
    assert Keep(seconds=60).select(steps) == {0, 1, 3, 5, 6}


def test_what_is_newer_than_the_newest_good_one_stays() -> None:
    steps = [StepInfo(1), StepInfo(2), StepInfo(3, good=False), StepInfo(4, good=False)]
    assert Keep(last=1).select(steps) == {2, 3, 4}


keeps = st.builds(
    Keep,
    last=st.none() | st.integers(1, 5),
    every=st.none() | st.integers(1, 20),
    best=st.none() | st.tuples(st.just("loss"), st.sampled_from(["min", "max"])),
    seconds=st.none() | st.floats(0.1, 1e4),
)
steps_ = st.lists(
    st.builds(
        StepInfo,
        st.integers(0, 60),
        st.none() | st.floats(-1e9, 1e9),
        st.fixed_dictionaries({}, optional={"loss": st.floats(allow_nan=True)}),
        st.booleans(),
    ),
    unique_by=lambda info: info.step,
)


@given(keeps, steps_)
def test_never_the_last_good_one_and_never_anything_invented(keep: Keep, steps: list[StepInfo]) -> None:
    kept = keep.select(steps)
    assert kept <= {info.step for info in steps}
    good = [info.step for info in steps if info.good]
    if good:
        assert {info.step for info in steps if info.step >= max(good)} <= kept
        if keep.last is not None:
            assert set(sorted(good)[-keep.last :]) <= kept
    else:
        assert kept == {info.step for info in steps}


@given(keeps, steps_)
def test_the_order_given_does_not_matter_and_it_is_stable(keep: Keep, steps: list[StepInfo]) -> None:
    kept = keep.select(steps)
    assert keep.select(steps[::-1]) == kept
    survivors = [info for info in steps if info.step in kept]
    assert keep.select(survivors) == kept, "a second pass over what was kept drops nothing more"


@pytest.mark.parametrize(
    "bad",
    [{"last": 0}, {"last": 1.5}, {"every": -1}, {"best": ("loss", "least")}, {"best": "loss"}, {"seconds": math.inf}],
)
def test_nonsense_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UnusableRequest):
        Keep(**bad)  # type: ignore[arg-type]
