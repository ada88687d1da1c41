"""One request's claim on one peer, and the line it leaves in the list of decisions."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from meshnode.core.decision import Decision


class Record:
    """One line of the list of decisions; its end is filled in when the lease settles."""

    __slots__ = ("_end", "_picked")

    def __init__(self, decision: Decision) -> None:
        self._picked = decision
        self._end: tuple[str, float | None, int | None] | None = None

    @property
    def has_ended(self) -> bool:
        return self._end is not None

    @property
    def decision(self) -> Decision:
        """The decision, with its end if there is one; put together only for who looks at it."""
        if self._end is None:
            return self._picked
        outcome, duration, retries = self._end
        return self._picked._replace(outcome=outcome, duration=duration, retries=retries)

    def end(self, outcome: str, duration: float | None, retries: int | None) -> None:
        """Say how the request ended; the last word stays."""
        self._end = (outcome, duration, retries)


class Told(Protocol):
    """Who keeps count of leases and of how they went; ``core/lease_book`` does."""

    def returned(self, lease: Lease) -> None: ...

    def served(self, lease: Lease, open_seconds: float, now: float) -> int: ...

    def failed(self, lease: Lease, reason: str, now: float) -> None: ...


class Lease:
    """One request's claim on one peer, counted since ``Router.lease`` returned it.

    ``with router.lease(...) as lease:`` gives it back on every way out. How the request went is
    told by ``succeeded`` and ``failed``; neither of them gives the lease back.
    """

    __slots__ = (
        "_book",
        "_record",
        "ended_streak",
        "is_local",
        "is_retry",
        "is_trial",
        "peer_id",
        "released",
        "service_id",
        "verdict",
    )

    def __init__(
        self,
        record: Record,
        book: Told,
        *,
        peer_id: str,
        is_local: bool,
        is_trial: bool = False,
    ) -> None:
        self.peer_id = peer_id
        self.service_id = record.decision.service_id
        self.is_local = is_local  # whether the pick fell on this node itself
        self.is_retry = record.decision.is_retry
        self.is_trial = is_trial  # whether it decides if an ejected peer comes back
        self.released = False
        self.verdict: str | None = None  # "ok", or why the peer failed; None while nothing is known
        self.ended_streak: int | None = None  # failures in a row that its success ended
        self._record = record
        self._book = book

    @property
    def decision(self) -> Decision:
        """The decision that this lease came from, with its outcome once there is one."""
        return self._record.decision

    def succeeded(self, open_seconds: float, *, now: float) -> None:
        """Say that the peer serves: the first byte of its answer is here. Twice is once.

        Args:
            open_seconds: from the pick until the service was reached, without its thinking.
            now: seconds on the clock of ``Router.lease``.
        """
        if self.verdict is None:
            self.verdict = "ok"
            self.ended_streak = self._book.served(self, open_seconds, now)

    def failed(self, reason: str, *, now: float) -> None:
        """Say that the peer did not serve, or cut its answer short; the first reason stays.

        Never for what the client did. "busy" and "draining" are answers and no failures: they
        only hold the peer back until it has news.

        Args:
            reason: a short word, e.g. "unreachable", "timeout", "reset"; for people and metrics.
            now: seconds on the clock of ``Router.lease``.
        """
        if self.verdict in (None, "ok"):
            self.verdict = reason
            self._book.failed(self, reason, now)

    def settle(
        self, outcome: str, duration: float | None = None, retries: int | None = None
    ) -> None:
        """Write into the list of decisions how the request ended; the last word stays.

        Args:
            outcome: a short word, e.g. "ok", "busy", "reset".
            duration: seconds from the pick to the end.
            retries: peers given up before this one.
        """
        self._record.end(outcome, duration, retries)

    def release(self) -> None:
        """Give the claim back. Twice is once."""
        if self.released:
            return
        self.released = True
        self._book.returned(self)
        if not self._record.has_ended:
            self._record.end("released", None, None)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
