"""What passed through this node in the last ten minutes, second by second.

It is read off the node's own metrics once a second, so nothing on a request's way has to know of
it, and the page can't disagree with Prometheus. Quantiles are estimated from the buckets of the
histogram as Prometheus's ``histogram_quantile`` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import trio
from prometheus_client import Metric

# Ten minutes of seconds: what a person still remembers when they come to look.
KEPT_SECONDS = 600
# How a request ended that did not go wrong here: whole, given up by its client, or not to be
# served as the client put it.
_FINE = frozenset({"complete", "client_gone", "refused"})


class _Collected(Protocol):
    """A metric that can be read."""

    def collect(self) -> Iterable[Metric]: ...


@dataclass(frozen=True, slots=True)
class Second:
    """One second: requests that ended, those of them that failed, and times to first byte."""

    ended: int
    failed: int
    first_bytes: int
    ttft_p50: float | None  # seconds; None where no answer began
    ttft_p95: float | None


@dataclass(frozen=True, slots=True)
class _Reading:
    """The counters at one moment."""

    ended: float
    failed: float
    buckets: tuple[tuple[float, float], ...]  # upper bound in seconds, answers at or below it


class Traffic:
    """A ring of the last seconds, fed by ``sample``.

    Args:
        requests: counters with the label ``outcome``, one for each kind of entry; where one has
            ``role``, entries alone count.
        ttft: a histogram of seconds to the first byte.
    """

    def __init__(self, requests: Sequence[_Collected], ttft: _Collected) -> None:
        self._requests = requests
        self._ttft = ttft
        self._seconds: deque[Second] = deque(maxlen=KEPT_SECONDS)
        self._sampled = 0
        self._last = self._read()

    async def sample_forever(self) -> None:
        """Sample once a second until cancelled; seconds slept through are not made up."""
        due = trio.current_time()
        while True:
            due = max(due + 1.0, trio.current_time())
            await trio.sleep_until(due)
            self.sample()

    def sample(self) -> Second:
        """Close the running second and return it."""
        now = self._read()
        second = _between(self._last, now)
        self._last = now
        self._seconds.append(second)
        self._sampled += 1
        return second

    def view(self) -> dict[str, object]:
        """Return the ring in columns, the oldest second first; unknown values are null.

        ``upto`` counts the seconds sampled so far, so that a reader knows which it has.
        """
        return {"upto": self._sampled, **columns(self._seconds)}

    def latest(self) -> dict[str, object]:
        """Return the last second alone, in the same columns."""
        last = [self._seconds[-1]] if self._seconds else []
        return {"upto": self._sampled, **columns(last)}

    def _read(self) -> _Reading:
        ended = failed = 0.0
        for labels, name, value in chain.from_iterable(map(_samples, self._requests)):
            if name.endswith("_total") and labels.get("role", "entry") == "entry":
                ended += value
                failed += value if labels.get("outcome") not in _FINE else 0
        buckets: dict[float, float] = {}
        for labels, name, value in _samples(self._ttft):
            if name.endswith("_bucket"):
                bound = float(labels["le"])
                buckets[bound] = buckets.get(bound, 0.0) + value
        return _Reading(ended, failed, tuple(sorted(buckets.items())))


def columns(seconds: Iterable[Second]) -> dict[str, object]:
    """Return seconds as one list for each figure, which is a fifth of the size in JSON."""
    kept = list(seconds)
    return {
        "step_s": 1,
        "requests": [second.ended for second in kept],
        "failures": [second.failed for second in kept],
        "ttft_p50_ms": [_milliseconds(second.ttft_p50) for second in kept],
        "ttft_p95_ms": [_milliseconds(second.ttft_p95) for second in kept],
    }


def quantile(share: float, counts: Sequence[tuple[float, float]]) -> float | None:
    """Return the value below which ``share`` of the observations lie; None without any.

    Args:
        share: 0 to 1.
        counts: for each upper bound, ascending, the observations at or below it; the last bound
            is infinite. Within a bucket they are taken to lie evenly.
    """
    total = counts[-1][1] if counts else 0
    if total <= 0:
        return None
    wanted = share * total
    below_bound = below = 0.0
    for bound, count in counts:
        if count >= wanted and count > below:
            if bound == float("inf"):
                return below_bound
            return below_bound + (bound - below_bound) * (wanted - below) / (count - below)
        below_bound, below = bound, count
    return below_bound


def _between(before: _Reading, after: _Reading) -> Second:
    old = dict(before.buckets)
    counts = [(bound, count - old.get(bound, 0.0)) for bound, count in after.buckets]
    return Second(
        ended=round(after.ended - before.ended),
        failed=round(after.failed - before.failed),
        first_bytes=round(counts[-1][1]) if counts else 0,
        ttft_p50=quantile(0.5, counts),
        ttft_p95=quantile(0.95, counts),
    )


def _samples(metric: _Collected) -> Iterable[tuple[Mapping[str, str], str, float]]:
    for family in metric.collect():
        for sample in family.samples:
            yield sample.labels, sample.name, sample.value


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)
