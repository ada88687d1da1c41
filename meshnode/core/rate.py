"""How often each of many may do something: a token bucket per key."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class RateLimit:
    """Token buckets, the one unused for longest dropped when there are too many.

    Args:
        per_s: how many each key may do per second, in the long run.
        burst: how many at once, after a rest.
        max_keys: keys remembered; whoever is forgotten begins with a whole burst.
    """

    def __init__(self, *, per_s: float, burst: float, max_keys: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._max_keys = max_keys
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def allows(self, key: str, now: float, cost: float = 1.0) -> bool:
        """Count ``cost``, unless that is more than is left of the share of ``key``.

        ``now`` is in seconds on any clock.
        """
        bucket = self._buckets.pop(key, None) or _Bucket(self._burst, now)
        self._buckets[key] = bucket  # the latest stands last
        if len(self._buckets) > self._max_keys:
            self._buckets.popitem(last=False)
        bucket.tokens = self._tokens(bucket, now)
        bucket.at = now
        if bucket.tokens < cost:
            return False
        bucket.tokens -= cost
        return True

    def is_spent(self, key: str, now: float) -> bool:
        """Say whether ``key`` has had its share; counts nothing."""
        bucket = self._buckets.get(key)
        return bucket is not None and self._tokens(bucket, now) < 1.0

    def give_back(self, key: str, now: float) -> None:
        """Take back one that was counted."""
        bucket = self._buckets.get(key)
        if bucket is not None:
            bucket.tokens = min(self._burst, self._tokens(bucket, now) + 1.0)
            bucket.at = now

    def _tokens(self, bucket: _Bucket, now: float) -> float:
        return min(self._burst, bucket.tokens + (now - bucket.at) * self._per_s)
