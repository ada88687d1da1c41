from __future__ import annotations

import pytest

from meshnode.core.health import BUSY_GRACE, Health


def fail(health: Health, now: float, *, certain: bool = False, busy: bool = False) -> bool:
    return health.failed("late", is_certain=certain, is_busy=busy, now=now)


def test_a_service_is_well_until_it_was_looked_at() -> None:
    assert Health().is_healthy


def test_a_refusal_takes_it_out_at_once_even_in_the_middle_of_requests() -> None:
    health = Health()
    health.saw_life(9.9)
    assert fail(health, 10.0, certain=True, busy=True)
    assert (health.is_healthy, health.reason) == (False, "late")


def test_one_late_answer_is_an_accident_and_two_are_not() -> None:
    health = Health()
    assert not fail(health, 0.0)
    assert health.is_healthy
    assert fail(health, 1.0)
    assert not health.is_healthy


def test_a_good_answer_wipes_out_a_doubt() -> None:
    health = Health()
    for now in (0.0, 2.0, 4.0, 6.0):
        assert not fail(health, now)
        assert not health.answered(now + 1)
    assert health.is_healthy


def test_a_busy_service_from_which_bytes_flow_is_never_declared_dead() -> None:
    health = Health()
    for second in range(600):
        health.saw_life(float(second))
        assert not fail(health, second + 0.5, busy=True)
    assert health.is_healthy


def test_requests_that_show_no_life_excuse_silence_only_for_a_while() -> None:
    health = Health()
    health.answered(100.0)
    late = 100.0
    while health.is_healthy:
        late += 1.0
        fail(health, late, busy=True)
    assert BUSY_GRACE < late - 100.0 <= BUSY_GRACE + 2


def test_bytes_of_former_requests_excuse_nobody_without_requests() -> None:
    health = Health()
    health.saw_life(0.0)
    assert not fail(health, 1.0)
    assert fail(health, 2.0)


@pytest.mark.parametrize("certain", [True, False])
def test_it_comes_back_with_its_first_good_answer(certain: bool) -> None:
    health = Health()
    fail(health, 0.0, certain=True)
    assert not fail(health, 1.0, certain=certain)  # no further news
    assert health.answered(2.0)
    assert (health.is_healthy, health.reason) == (True, None)
    assert not fail(health, 3.0)  # and begins without old doubts


def test_what_ails_it_is_told_anew() -> None:
    health = Health()
    health.failed("refused", is_certain=True, is_busy=False, now=0.0)
    health.failed("answers 503", is_certain=True, is_busy=False, now=1.0)
    assert health.reason == "answers 503"
