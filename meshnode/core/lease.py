"""One request's claim on one peer, and the line it leaves in the list of decisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

from meshnode.core.decision import Decision


class Record:
    """One line of the list of decisions; its end is filled in when the lease settles."""

    __slots__ = ("decision",)

    def __init__(self, decision: Decision) -> None:
        self.decision = decision


class Lease:
    """One request's claim on one peer, counted since ``Router.lease`` returned it.

    ``with router.lease(...) as lease:`` gives it back on every way out.
    """

    __slots__ = ("_give_back", "_record", "is_local", "peer_id", "released", "service_id")

    def __init__(
        self,
        record: Record,
        *,
        peer_id: str,
        service_id: str,
        is_local: bool,
        give_back: Callable[[], None],
    ) -> None:
        self.peer_id = peer_id
        self.service_id = service_id
        self.is_local = is_local  # whether the pick fell on this node itself
        self.released = False
        self._record = record
        self._give_back = give_back

    @property
    def decision(self) -> Decision:
        """The decision that this lease came from, with its outcome once there is one."""
        return self._record.decision

    def settle(
        self, outcome: str, duration: float | None = None, retries: int | None = None
    ) -> None:
        """Write into the list of decisions how the request ended; the last word stays.

        Args:
            outcome: a short word, e.g. "ok", "busy", "reset".
            duration: seconds from the pick to the end.
            retries: peers given up before this one.
        """
        self._record.decision = replace(
            self._record.decision, outcome=outcome, duration=duration, retries=retries
        )

    def release(self) -> None:
        """Give the claim back. Twice is once."""
        if self.released:
            return
        self.released = True
        self._give_back()
        if self._record.decision.outcome is None:
            self._record.decision = replace(self._record.decision, outcome="released")

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
