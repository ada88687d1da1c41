from __future__ import annotations

from meshnode.core.rate import RateLimit


def test_after_a_burst_there_is_one_for_each_that_was_earned():
    limit = RateLimit(per_s=2.0, burst=3.0, max_keys=10)
    assert [limit.allows("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert not limit.allows("a", 0.4)
    assert limit.allows("a", 0.5)
    assert not limit.allows("a", 0.6)


def test_a_rest_earns_no_more_than_a_burst():
    limit = RateLimit(per_s=2.0, burst=3.0, max_keys=10)
    limit.allows("a", 0.0)
    assert [limit.allows("a", 1e6) for _ in range(4)] == [True, True, True, False]


def test_one_takes_nothing_from_another():
    limit = RateLimit(per_s=1.0, burst=1.0, max_keys=10)
    assert limit.allows("a", 0.0)
    assert not limit.allows("a", 0.0)
    assert limit.allows("b", 0.0)


def test_of_too_many_the_one_unused_for_longest_is_forgotten():
    limit = RateLimit(per_s=1.0, burst=1.0, max_keys=2)
    for key in ("a", "b", "a", "c"):  # the third is refused, and still counts as use
        limit.allows(key, 0.0)
    assert not limit.allows("a", 0.0)
    assert limit.allows("b", 0.0)


def test_asking_whether_a_share_is_spent_counts_nothing() -> None:
    limit = RateLimit(per_s=1.0, burst=1.0, max_keys=10)
    assert not limit.is_spent("a", 0.0)
    assert limit.allows("a", 0.0)
    assert limit.is_spent("a", 0.5)
    assert not limit.is_spent("a", 1.0)


def test_what_is_taken_back_can_be_had_again_and_no_more_than_the_burst() -> None:
    limit = RateLimit(per_s=0.001, burst=2.0, max_keys=10)
    limit.give_back("a", 0.0)
    assert [limit.allows("a", 0.0) for _ in range(3)] == [True, True, False]
    for _ in range(5):
        limit.give_back("a", 0.0)
    assert [limit.allows("a", 0.0) for _ in range(3)] == [True, True, False]
