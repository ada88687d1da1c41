from __future__ import annotations

import pytest

from meshnode.core.self_check import seems_to_be_us, silent_links


@pytest.mark.parametrize(
    ("last_heard", "ours"),
    [
        ([], False),
        ([1.0], False),  # one link alone can't tell
        ([1.0, 2.0], True),
        ([1.0, 5.0], False),  # somebody is heard
        ([1.0, 2.0, 5.0], True),  # a node on the same host is heard through any cut
        ([1.0, 2.0, 5.0, 6.0], False),  # no more than half
        ([1.0] + [6.0] * 29, False),
    ],
)
def test_most_links_silent_at_once_are_our_own_fault(last_heard: list[float], ours: bool) -> None:
    assert seems_to_be_us(last_heard, 5.0) is ours


def test_a_link_heard_at_that_very_moment_is_not_silent() -> None:
    assert silent_links([4.9, 5.0, 5.1], 5.0) == 1
