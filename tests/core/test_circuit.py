"""The circuit as arithmetic: what opens it, for how long, and what closes it again."""

from __future__ import annotations

import pytest

from meshnode.core.circuit import (
    FAILURES_IN_A_ROW,
    FORGIVEN_AFTER,
    MAX_EJECTION,
    OPEN_SAMPLES,
    PROVEN_AFTER,
    Circuit,
    Grounds,
)

GROUNDS = Grounds("failures", "5 failures in a row (reset)")


def failing(times: int, circuit: Circuit | None = None) -> tuple[Circuit, list[Grounds | None]]:
    circuit = circuit or Circuit()
    return circuit, [circuit.fail("reset", is_trial=False) for _ in range(times)]


def served(circuit: Circuit, *opens: float, now: float = 0.0) -> Circuit:
    for seconds in opens:
        circuit.succeed(seconds, now, is_trial=False)
    return circuit


def test_the_fifth_failure_in_a_row_is_grounds_for_an_ejection() -> None:
    _, grounds = failing(FAILURES_IN_A_ROW)
    assert grounds == [None, None, None, None, GROUNDS]


def test_a_success_in_between_begins_the_row_anew() -> None:
    circuit, _ = failing(4)
    assert circuit.succeed(0.01, 1.0, is_trial=False) == 4
    assert failing(4, circuit)[1] == [None] * 4


def test_answers_that_begin_and_are_cut_are_failures_in_a_row() -> None:
    circuit = Circuit()
    grounds = None
    for _ in range(FAILURES_IN_A_ROW):
        ended = circuit.succeed(0.01, 1.0, is_trial=False)
        grounds = circuit.fail("cut", is_trial=False, after=ended)
    assert grounds == Grounds("failures", "5 failures in a row (cut)")
    assert circuit.successes == 0


def test_an_ejection_ends_in_a_half_open_circuit_with_one_trial_at_a_time() -> None:
    circuit = Circuit()
    assert circuit.eject(GROUNDS, 100.0, jitter=0.0) == 5.0
    assert circuit.state_at(104.9) == "open"
    assert not circuit.begin(104.9)
    assert circuit.state_at(105.0) == "half_open"
    assert circuit.begin(105.0)
    assert not circuit.begin(105.1)
    circuit.abandon_trial()
    assert circuit.begin(105.2)


def test_a_trial_that_succeeds_closes_the_circuit() -> None:
    circuit = Circuit()
    circuit.eject(GROUNDS, 100.0, jitter=0.0)
    circuit.begin(105.0)
    circuit.succeed(0.01, 105.1, is_trial=True)
    assert circuit.state_at(105.1) == "closed"
    assert circuit.failures == 0


def test_an_older_requests_success_does_not_close_an_open_circuit() -> None:
    circuit, _ = failing(5)
    circuit.eject(GROUNDS, 100.0, jitter=0.0)
    circuit.succeed(0.01, 101.0, is_trial=False)
    assert circuit.state_at(101.0) == "open"
    assert circuit.failures == 5


def test_each_failed_trial_doubles_the_time_up_to_five_minutes() -> None:
    circuit, now, times = Circuit(), 0.0, []
    circuit.eject(GROUNDS, now, jitter=0.0)
    for _ in range(8):
        assert circuit.until is not None
        now = circuit.until
        assert circuit.begin(now)
        grounds = circuit.fail("timeout", is_trial=True)
        assert grounds == Grounds("failed_trial", "its trial failed (timeout)")
        times.append(circuit.eject(grounds, now, jitter=0.0))
    assert times == [10, 20, 40, 80, 160, 300, 300, 300]


def test_jitter_is_a_tenth_either_way() -> None:
    assert Circuit().eject(GROUNDS, 0.0, jitter=-1.0) == pytest.approx(4.5)
    assert Circuit().eject(GROUNDS, 0.0, jitter=1.0) == pytest.approx(5.5)


def test_ejections_in_short_succession_grow_and_old_ones_are_forgiven() -> None:
    circuit = Circuit()
    circuit.eject(GROUNDS, 0.0, jitter=0.0)
    circuit.begin(5.0)
    circuit.succeed(0.01, 5.0, is_trial=True)
    assert circuit.eject(GROUNDS, 6.0, jitter=0.0) == 10.0
    circuit.begin(16.0)
    circuit.succeed(0.01, 16.0, is_trial=True)
    assert circuit.eject(GROUNDS, 16.0 + FORGIVEN_AFTER, jitter=0.0) == 5.0


def test_the_time_stays_bounded_however_often_trials_fail() -> None:
    circuit, now = Circuit(), 0.0
    for _ in range(3000):
        now += circuit.eject(GROUNDS, now, jitter=1.0)
    assert circuit.until == pytest.approx(now)
    assert circuit.eject(GROUNDS, now, jitter=1.0) <= MAX_EJECTION * 1.1


def test_three_successes_make_a_peer_proven() -> None:
    circuit = served(Circuit(), *[0.01] * (PROVEN_AFTER - 1))
    assert not circuit.is_proven
    assert served(circuit, 0.01).is_proven


@pytest.mark.parametrize(
    ("opens", "others", "is_far_slower"),
    [
        ([2.0] * OPEN_SAMPLES, [0.01, 0.02, 0.03], True),
        ([2.0] * OPEN_SAMPLES, [0.01, 0.02], True),
        ([2.0] * OPEN_SAMPLES, [0.01], False),  # one other is no measure
        ([2.0] * OPEN_SAMPLES, [], False),
        ([2.0] * (OPEN_SAMPLES - 1), [0.01, 0.02, 0.03], False),  # too few samples
        ([2.0] * OPEN_SAMPLES, [0.5, 0.5, 0.5], False),  # everybody is slow here
        ([0.9] * OPEN_SAMPLES, [0.01, 0.02, 0.03], False),  # far away, and well
        ([0.1, 0.1, 0.1, 2.9, 2.9], [0.01, 0.02, 0.03], False),  # two slow ones happen
        ([2.0] * OPEN_SAMPLES, [0.01, 0.02, 2.0, 2.5, 2.7], False),  # it is the common way
    ],
)
def test_far_slower_is_judged_by_medians(
    opens: list[float], others: list[float], is_far_slower: bool
) -> None:
    assert (served(Circuit(), *opens).compare(others) is not None) == is_far_slower


def test_slow_opens_from_before_an_ejection_do_not_count_after_it() -> None:
    circuit = served(Circuit(), *[2.0] * OPEN_SAMPLES)
    grounds = circuit.compare([0.01, 0.02])
    assert grounds == Grounds("slow_opens", "opens take 2.0 s, and the others' 15 ms")
    circuit.eject(grounds, 0.0, jitter=0.0)
    circuit.begin(5.0)
    circuit.succeed(0.01, 5.0, is_trial=True)
    served(circuit, *[0.01] * 3, now=6.0)
    assert not circuit.seems_slow()


def test_letting_back_early_leads_to_a_trial_and_never_prolongs() -> None:
    circuit = Circuit()
    circuit.let_back(1.0)
    assert circuit.state_at(1.0) == "closed"
    circuit.eject(GROUNDS, 100.0, jitter=0.0)
    circuit.let_back(102.0)
    assert circuit.state_at(102.0) == "half_open"
    circuit.let_back(200.0)
    assert circuit.state_at(102.0) == "half_open"
