"""Whether one service on one peer is still worth asking: a circuit for each, that failures open.

The law here: everything that puts a peer aside for its deeds, and everything that brings it back,
lives here; who may be put aside without leaving too few is the caller's to say.

- closed: it is asked like any other.
- open: it was put aside ("ejected") and is not asked, for a time that grows with each return.
- half-open: the time is over. One request at a time is its trial; a success closes the circuit, a
  failure opens it again for longer.

Ejection after failures in a row, with a growing time, is what Envoy and HAProxy call outlier
detection and what Nygard named the circuit breaker.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal

# Two or three fail together when a link hiccups; five in a row, each sent on to somebody else
# at no cost but time, mean that the next would fail too.
FAILURES_IN_A_ROW = 5
# What a restarted backend needs, so that the first trial seldom comes too early.
FIRST_EJECTION = 5.0  # seconds
# A peer that is down for hours is tried every five minutes: that costs nobody anything.
MAX_EJECTION = 300.0  # seconds
# Without jitter, the peers that one broken switch took out would all be tried at once.
JITTER = 0.1
# After so long without one, the next ejection is short again.
FORGIVEN_AFTER = 600.0  # seconds

# A newcomer's claims are trusted once so many of its requests have succeeded.
PROVEN_AFTER = 3

# A median of fewer opens would be the luck of one or two.
OPEN_SAMPLES = 5
# Opens below this are never far too slow, whoever is faster: a peer on another continent, behind
# a relay, answers within half a second.
SLOW_OPEN = 1.0  # seconds
# "Far slower than the others" means by this factor, median to median.
SLOW_FACTOR = 5.0
# The others' median needs a few peers, or two slow ones would judge each other.
SLOW_PEERS = 2

CircuitState = Literal["closed", "open", "half_open"]
# Fit for a metric label.
EjectionReason = Literal["failures", "slow_opens", "failed_trial"]


@dataclass(frozen=True, slots=True)
class Grounds:
    """Why a peer should be put aside."""

    reason: EjectionReason
    text: str  # for people, e.g. "5 failures in a row (reset)"


@dataclass(slots=True)
class Circuit:
    """What one service on one peer did lately. Times are seconds on this node's clock."""

    failures: int = 0  # in a row, up to now
    last_failure: str = ""
    successes: int = 0  # not counted beyond PROVEN_AFTER
    until: float | None = None  # when the ejection ends; None while closed
    why: str = ""  # the last ejection's grounds
    in_trial: bool = False  # half-open, and its one request is under way
    _ejections: int = 0  # in short succession
    _closed_at: float = 0.0
    _opens: tuple[float, ...] = ()  # seconds that the last OPEN_SAMPLES opens took

    def state_at(self, now: float) -> CircuitState:
        """Return whether it is closed, open, or half-open."""
        if self.until is None:
            return "closed"
        return "open" if now < self.until else "half_open"

    @property
    def is_proven(self) -> bool:
        """Whether so much succeeded that the peer is no newcomer any more."""
        return self.successes >= PROVEN_AFTER

    @property
    def usual_open(self) -> float | None:
        """The median of the last opens, in seconds; None while there are too few."""
        return median(self._opens) if len(self._opens) == OPEN_SAMPLES else None

    def begin(self, now: float) -> bool:
        """Take note of a request; say whether it is the trial of a half-open circuit."""
        if self.in_trial or self.state_at(now) != "half_open":
            return False
        self.in_trial = True
        return True

    def succeed(self, open_seconds: float, now: float, *, is_trial: bool) -> int:
        """Take note that a request was served; return how many failures in a row that ended.

        While the circuit is not closed only the trial's success counts: an older request may
        have been sent before the peer failed.
        """
        self.successes = min(PROVEN_AFTER, self.successes + 1)
        ended = self.failures
        if is_trial:
            self._close(now)
        if self.until is None:
            self.failures = 0
            self._opens = (*self._opens, open_seconds)[-OPEN_SAMPLES:]
        return ended

    def fail(self, reason: str, *, is_trial: bool, after: int | None = None) -> Grounds | None:
        """Take note of a failure; return the grounds for an ejection, if it amounts to that.

        Args:
            reason: short, e.g. "unreachable".
            after: where the same request was told a success first, what ``succeed`` returned;
                that success is taken back.
        """
        if after is not None:
            self.successes = max(0, self.successes - 1)
            self.failures = max(self.failures, after)
        self.failures += 1
        self.last_failure = reason
        if is_trial:
            self.in_trial = False
            return Grounds("failed_trial", f"its trial failed ({reason})")
        if self.until is None and self.failures >= FAILURES_IN_A_ROW:
            return Grounds("failures", f"{self.failures} failures in a row ({reason})")
        return None

    def abandon_trial(self) -> None:
        """The trial ended without telling anything: its client went away."""
        self.in_trial = False

    def seems_slow(self) -> bool:
        """Whether its opens take so long that they should be compared with the others'."""
        if self.until is not None or max(self._opens, default=0.0) <= SLOW_OPEN:
            return False  # without the median, which is asked after every success
        usual = self.usual_open
        return usual is not None and usual > SLOW_OPEN

    def compare(self, others: list[float]) -> Grounds | None:
        """Return the grounds for an ejection, if opens are far slower than the ``others``'.

        Args:
            others: what opens usually take at other peers, in seconds, one for each.
        """
        usual = self.usual_open
        if usual is None or not self.seems_slow() or len(others) < SLOW_PEERS:
            return None
        theirs = median(others)
        if usual <= SLOW_FACTOR * theirs:
            return None
        return Grounds(
            "slow_opens", f"opens take {usual:.1f} s, and the others' {theirs * 1000:.0f} ms"
        )

    def eject(self, grounds: Grounds, now: float, jitter: float) -> float:
        """Put the peer aside; return for how many seconds.

        Args:
            jitter: from -1 to 1, for a tenth less or more.
        """
        if self.until is None and now - self._closed_at >= FORGIVEN_AFTER:
            self._ejections = 0
        seconds = min(MAX_EJECTION, FIRST_EJECTION * 2.0**self._ejections)
        seconds *= 1 + JITTER * jitter
        # Past the longest time there is nothing to grow, and 2 ** 1,024 is no float.
        self._ejections = min(self._ejections + 1, 10)
        self.until = now + seconds
        self.why = grounds.text
        self._opens = ()
        return seconds

    def let_back(self, now: float) -> None:
        """End the ejection early: from ``now`` on the peer has its trial."""
        if self.until is not None:
            self.until = min(self.until, now)

    def _close(self, now: float) -> None:
        self.until = None
        self.in_trial = False
        self._closed_at = now
        self._opens = ()
