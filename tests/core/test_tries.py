"""How many peers may be tried for one request."""

from __future__ import annotations

import pytest

from meshnode.core.tries import Tries


def after(*reasons: str) -> Tries:
    tries = Tries()
    for number, reason in enumerate(reasons):
        tries = tries.after(f"peer{number}", reason, now=float(number))
    return tries


@pytest.mark.parametrize(
    ("reasons", "may_go_on"),
    [
        ((), True),
        (("reset", "cut"), True),
        (("reset", "cut", "status_503"), False),
        (("lost", "reset", "unreachable", "cut"), True),
        (("lost", "reset", "unreachable", "cut", "empty"), False),
        (("lost",) * 4, True),
        (("lost",) * 5, False),
        (("lost", "unreachable", "lost", "unreachable", "lost"), False),
        (("busy", "draining") * 20, True),
        (("busy",) * 20 + ("reset",) * 3, False),
    ],
)
def test_three_failures_end_it_and_five_peers_where_some_were_lost(
    reasons: tuple[str, ...], may_go_on: bool
) -> None:
    assert after(*reasons).may_go_on() is may_go_on


def test_the_peer_that_has_the_request_may_be_counted_as_failing() -> None:
    assert after("reset").may_go_on(failing=1)
    assert not after("reset", "reset").may_go_on(failing=1)
    assert after("lost", "lost", "lost").may_go_on(failing=1)
    assert not after("lost", "lost", "lost", "lost").may_go_on(failing=1)


def test_who_was_only_busy_is_asked_again_and_the_wait_counts_from_the_first() -> None:
    tries = after("reset", "busy", "draining", "lost")
    assert tries.passed_over == {"peer0": "reset", "peer3": "lost"}
    assert (tries.count, tries.waiting_since) == (4, 1.0)
    assert tries.waiting(9.0) is tries
    assert str(tries) == "reset, lost"


def test_a_request_that_waits_for_room_keeps_what_it_tried() -> None:
    tries = after("reset").waiting(5.0)
    assert (tries.waiting_since, tries.count) == (5.0, 1)
    assert tries.after("another", "busy", 7.0).waiting_since == 5.0
