"""The announcement budget is arithmetic."""

from __future__ import annotations

import heapq
import random

import pytest

from meshnode.core.budget import ChangePacer, announce_interval, online_window


@pytest.mark.parametrize(
    ("nodes", "interval", "window"),
    [
        (1, 10.0, 40.0),
        (100, 10.0, 40.0),
        (200, 10.0, 40.0),
        (201, 10.05, 40.2),
        (1_000, 50.0, 200.0),
        (10_000, 500.0, 2_000.0),
    ],
)
def test_interval_and_window_stretch_together_past_two_hundred_nodes(
    nodes: int, interval: float, window: float
) -> None:
    assert announce_interval(nodes, 10.0) == pytest.approx(interval)
    assert online_window(announce_interval(nodes, 10.0), 10.0, 40.0) == pytest.approx(window)


@pytest.mark.parametrize("nodes", [200, 1_000, 5_000, 10_000, 18_000])
def test_all_nodes_together_stay_within_what_one_may_hear(nodes: int) -> None:
    assert nodes / announce_interval(nodes, 10.0) <= 20.0


def test_another_budget_is_kept_too() -> None:
    assert announce_interval(1_000, 10.0, budget=5.0) == 200.0
    assert announce_interval(1_000, 2.0, budget=500.0) == 2.0


def test_a_mesh_beyond_all_bounds_still_announces_thrice_within_the_longest_window() -> None:
    interval = announce_interval(1_000_000, 10.0)
    assert online_window(interval, 10.0, 40.0) == 3_600.0
    assert interval * 3.3 <= 3_600.0


def test_the_window_never_leaves_what_readers_grant() -> None:
    assert online_window(1.0, 1.0, 4.0) == 10.0
    assert online_window(500.0, 1.0, 40.0) == 3_600.0


def heard_per_second(
    nodes: int, seconds: int, *, change_every: float, begin_at_once: bool = False
) -> list[int]:
    """Return how many announcements each second brought to every node of a mesh.

    Each node's load changes all the time; news take 0.2 s to reach everybody.
    """
    rng = random.Random(1)
    pacers = [ChangePacer(rng) for _ in range(nodes)]
    first = (lambda: 0.0) if begin_at_once else (lambda: rng.uniform(0.0, change_every))
    due: list[tuple[float, int, str]] = [(first(), n, "change") for n in range(nodes)]
    waiting: set[int] = set()
    said: list[int] = [0] * (seconds + 1)
    heapq.heapify(due)
    while due and due[0][0] < seconds:
        now, node, what = heapq.heappop(due)
        pacer = pacers[node]
        if what == "news":
            for other in pacers:
                other.heard(now)
        elif what == "change":
            heapq.heappush(due, (now + change_every, node, "change"))
            if node not in waiting:
                waiting.add(node)
                heapq.heappush(due, (pacer.first_try(nodes, now), node, "try"))
        elif (again := pacer.try_again(nodes, now)) > now:
            heapq.heappush(due, (again, node, "try"))
        else:
            waiting.discard(node)
            pacer.said(nodes, now)
            said[int(now)] += 1
            heapq.heappush(due, (now + 0.2, node, "news"))
    return said[:seconds]


def test_a_thousand_nodes_whose_load_changes_all_the_time_stay_within_the_budget() -> None:
    heard = heard_per_second(1_000, 200, change_every=1.0)
    settled = heard[20:]
    assert sum(settled) / len(settled) <= 25
    assert max(sum(settled[at : at + 10]) / 10 for at in range(len(settled) - 10)) <= 27
    assert max(heard) <= 120  # the first second, before anybody has heard how many speak
    assert sum(settled) / len(settled) >= 10  # and they do speak


def test_a_thousand_nodes_that_change_in_the_same_moment_do_not_speak_in_the_same_second() -> None:
    heard = heard_per_second(1_000, 100, change_every=1_000.0, begin_at_once=True)
    assert sum(heard) == 1_000  # each told its change
    assert max(heard) <= 120
    assert max(heard[3:]) <= 50


def test_a_change_in_a_quiet_mesh_is_told_at_once() -> None:
    for nodes, latest in ((2, 0.0), (200, 0.0), (1_000, 4.0), (10_000, 5.0)):
        pacer = ChangePacer(random.Random(1))
        assert 100.0 <= pacer.first_try(nodes, 100.0) <= 100.0 + latest
        assert pacer.try_again(nodes, 101.0) == 101.0


def test_the_share_of_a_node_is_a_second_up_to_twenty_five_nodes_and_grows_with_them() -> None:
    pacer = ChangePacer(random.Random(1))
    assert [pacer.share(nodes) for nodes in (1, 25, 100, 1_000)] == [1.0, 1.0, 4.0, 40.0]
    pacer.said(10, 50.0)
    assert pacer.first_try(10, 50.5) == 51.0
    pacer.said(100, 50.0)
    assert 52.0 <= pacer.first_try(100, 50.5) <= 56.0


def test_in_a_small_mesh_nobody_waits_for_others() -> None:
    pacer = ChangePacer(random.Random(1))
    for _ in range(100):
        pacer.heard(10.0)
    assert pacer.try_again(25, 10.1) == 10.1
    assert pacer.try_again(100, 10.1) > 10.1
