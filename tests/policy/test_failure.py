"""What a failure does: raise, retry with back-off, go on, raise when too old."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptengine.errors import UnusableRequest
from ckptengine.policy.failure import GoOn, Raise, RaiseAtOnce, Retry, Tolerate, Trouble, failure_policy


def test_raise_at_once() -> None:
    policy = failure_policy("raise")
    assert policy == RaiseAtOnce()
    assert isinstance(policy.decide(Trouble(1, 0, 0.0)), Raise)
    assert policy.decide(Trouble(0, 10**6, 1e9)) == GoOn()


def test_retries_with_doubling_back_off_then_goes_on() -> None:
    policy = Tolerate(max_age_steps=100, retries=4, backoff_s=1.0, max_backoff_s=5.0)
    decisions = [policy.decide(Trouble(attempts, 10, 10.0)) for attempts in range(1, 7)]
    assert decisions == [Retry(1.0), Retry(2.0), Retry(4.0), Retry(5.0), GoOn(), GoOn()]


def test_raises_when_the_newest_durable_one_is_too_old() -> None:
    policy = Tolerate(max_age_steps=100, max_age_s=60.0)
    assert isinstance(policy.decide(Trouble(1, 101, 0.0)), Raise)
    assert isinstance(policy.decide(Trouble(0, 0, 61.0)), Raise), "also at a hook where nothing failed just now"
    assert policy.decide(Trouble(0, 100, 60.0)) == GoOn()


def test_what_cannot_be_sent_again_is_not_retried() -> None:
    assert Tolerate(retries=5).decide(Trouble(1, 0, 0.0, can_retry=False)) == GoOn()


@given(st.integers(0, 10**9))
def test_back_off_is_bounded_for_any_count(attempts: int) -> None:
    assert 0.5 <= Tolerate(backoff_s=0.5, max_backoff_s=30.0).wait_s(attempts) <= 30.0


@pytest.mark.parametrize(
    "bad", [{"max_age_steps": 0}, {"max_age_s": -1.0}, {"retries": -1}, {"backoff_s": 10.0, "max_backoff_s": 1.0}]
)
def test_nonsense_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UnusableRequest):
        Tolerate(**bad)  # type: ignore[arg-type]
    with pytest.raises(UnusableRequest):
        failure_policy("ignore")  # type: ignore[arg-type]
