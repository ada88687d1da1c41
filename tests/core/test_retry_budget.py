"""How many retries may be open at once."""

from __future__ import annotations

import pytest

from meshnode.core.retry_budget import RetryBudget


@pytest.mark.parametrize(
    ("in_flight", "allowed"), [(0, 3), (1, 3), (15, 3), (19, 3), (20, 4), (100, 20), (1004, 200)]
)
def test_a_fifth_of_what_is_in_flight_may_be_retries_and_three_at_least(
    in_flight: int, allowed: int
) -> None:
    assert RetryBudget().allowed(in_flight) == allowed


def test_there_is_room_until_the_share_is_open_and_again_when_one_ends() -> None:
    budget = RetryBudget()
    for _ in range(20):
        assert budget.has_room(100)
        budget.begin()
    assert not budget.has_room(100)
    budget.end()
    assert budget.has_room(100)
