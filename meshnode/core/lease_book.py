"""Every open lease, and what leases told: the counts, the circuits, the retries, the ejections.

The law here: each lease is counted in once and out once, and gives its verdict to the circuit of
its peer and service once. Nothing here picks anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from meshnode.core.candidates import Candidates
from meshnode.core.circuit import Circuit, Grounds
from meshnode.core.lease import Lease, Record
from meshnode.core.retry_budget import RetryBudget
from meshnode.core.tries import NO_FAILURES
from meshnode.errors import RetriesSpent

_JITTER_STEPS = 1000


class Dice(Protocol):
    """Where chance comes from; ``random.Random`` is one."""

    def randrange(self, stop: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Ejection:
    """One service of a peer was put aside."""

    peer_id: str
    service_id: str
    seconds: float
    grounds: Grounds


class LeaseBook:
    """Counts leases and tells their verdicts to the circuits; implements ``lease.Told``.

    Args:
        rng: dice for the jitter of ejections.
    """

    def __init__(self, candidates: Candidates, rng: Dice) -> None:
        self.on_ejection: Callable[[Ejection], None] = lambda _: None
        self.on_use: Callable[[str], None] = lambda _: None
        self.own_total = 0  # open leases, over all peers and services
        self.retries = RetryBudget()
        self._candidates = candidates
        self._rng = rng

    def check_retry(self) -> None:
        """See that one more retry is within the budget.

        Raises:
            RetriesSpent: it is not.
        """
        if not self.retries.has_room(self.own_total):
            raise RetriesSpent(
                f"{self.retries.open} of {self.own_total} requests in flight are being retried "
                "already, and more would only add to the load; see `meshnode peers` for who fails"
            )

    def open(self, record: Record, peer_id: str) -> Lease:
        """Count a request on a peer and return its lease; the peer has a view."""
        decision = record.decision
        view = self._candidates.known(peer_id)
        assert view is not None
        is_trial = view.circuit(decision.service_id).begin(decision.at)
        lease = Lease(
            record,
            self,
            peer_id=peer_id,
            is_local=peer_id == self._candidates.self_id,
            is_trial=is_trial,
        )
        if lease.is_retry:
            self.retries.begin()
        self._count(lease, +1)
        return lease

    def returned(self, lease: Lease) -> None:
        """Count a lease out."""
        circuit = self._circuit(lease)
        if lease.verdict is None:
            self._know(lease)
            if lease.is_trial:
                circuit.abandon_trial()
        elif lease.verdict == "ok":
            self._forget_answer(lease)
        self._count(lease, -1)

    def served(self, lease: Lease, open_seconds: float, now: float) -> int:
        """Take a success in; return how many failures in a row it ended."""
        self._know(lease)
        circuit = self._circuit(lease)
        ended = circuit.succeed(open_seconds, now, is_trial=lease.is_trial)
        self._forget_answer(lease)
        if circuit.seems_slow():
            others = self._candidates.usual_opens(lease.service_id, except_for=lease.peer_id)
            self._eject(lease, circuit, circuit.compare(others), now)
        self._candidates.note(lease.peer_id)
        return ended

    def failed(self, lease: Lease, reason: str, now: float) -> None:
        """Take a failure in, and put the peer aside where that is due and leaves enough."""
        first_word = lease.ended_streak is None
        if first_word:
            self._know(lease)
        circuit = self._circuit(lease)
        if reason in NO_FAILURES:
            view = self._candidates.known(lease.peer_id)
            assert view is not None
            view.hold_back(lease.service_id, reason, now)
            if lease.is_trial:
                circuit.abandon_trial()
        else:
            grounds = circuit.fail(
                reason, is_trial=lease.is_trial and first_word, after=lease.ended_streak
            )
            self._eject(lease, circuit, grounds, now)
        self._candidates.note(lease.peer_id)

    def _eject(self, lease: Lease, circuit: Circuit, grounds: Grounds | None, now: float) -> None:
        if grounds is None or not self._candidates.may_eject(lease.service_id, now):
            return
        jitter = 2 * self._rng.randrange(_JITTER_STEPS) / (_JITTER_STEPS - 1) - 1
        seconds = circuit.eject(grounds, now, jitter)
        self.on_ejection(Ejection(lease.peer_id, lease.service_id, seconds, grounds))

    def _know(self, lease: Lease) -> None:
        """A retry whose outcome is known makes room for the next."""
        if lease.is_retry:
            self.retries.end()

    def _circuit(self, lease: Lease) -> Circuit:
        view = self._candidates.known(lease.peer_id)
        assert view is not None  # it is kept while a lease is open
        return view.circuit(lease.service_id)

    def _forget_answer(self, lease: Lease) -> None:
        """A request of ours was taken or has ended there: what it said of being busy is past."""
        view = self._candidates.known(lease.peer_id)
        if view is not None:
            view.slot(lease.service_id).answered = ""

    def _count(self, lease: Lease, change: int) -> None:
        view = self._candidates.known(lease.peer_id)
        assert view is not None
        view.count(lease.service_id, change)
        self.on_use(lease.peer_id)
        self.own_total += change
        self._candidates.note(lease.peer_id)
