"""The announcement budget is arithmetic."""

from __future__ import annotations

import pytest

from meshnode.core.budget import announce_interval, online_window


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
