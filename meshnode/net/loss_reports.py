"""Losses told and heard: in a large mesh most nodes have no link to a peer that dies.

The law here: a report makes this node look for itself, at once, and does nothing else. Who reports
what is not so is soon heard no more, so that nobody can be talked out of the mesh, and nobody can
have the whole mesh dial somebody for long.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import structlog
import trio

from meshnode.core.ledger import Ledger
from meshnode.core.loss_report import MAX_LOST, LossReport, LostPeer, decode, encode
from meshnode.core.rate import RateLimit
from meshnode.errors import WireError
from meshnode.metrics import Metrics
from meshnode.net.liveness import Liveness
from meshnode.net.mesh import Mesh, Verdict
from meshnode.net.rng import Rng

# All neighbours of a dead peer notice at once; after this wait most of them find it reported.
_BEFORE_REPORTING = 0.1  # seconds, at most
# Two reports of a loss are enough: one of them may get lost, or be of one who is not heard.
_ENOUGH_REPORTS = 2
_RECENT = 5.0  # seconds for which a report that was heard counts as such
_BETWEEN_REPORTS = 0.5  # seconds
# A peer with no link to this node is dialled after a while: that spreads the dials, and a peer that
# lives, and hears the report, has told everybody so before most of them have begun.
_BEFORE_DIALLING = (0.03, 0.3)  # seconds, from and to
# Dials under way for this reason alone, and peers that wait for theirs.
_DIALS_AT_ONCE = 6
_MAX_WAITING = 512
# Per reporter: twice what one that reports at its fastest sends.
_REPORTS_PER_SECOND = 4.0
_REPORT_BURST = 12.0
# Looks that a reporter may have cost in vain, or whose outcome is open: it may be wrong, as one
# side of a broken path is about all behind it. Then rarely.
_VAIN_PER_SECOND = 0.1
_VAIN_AT_ONCE = float(MAX_LOST)
_MAX_REPORTERS = 20_000  # twice as many as a ledger holds

log = structlog.get_logger(__name__)


def loss_topic(network: str) -> str:
    """Return the topic on which the nodes of ``network`` say whom they lost."""
    return f"/meshnode/{network}/loss/1.0.0"


class LossReports:
    """Says whom this node lost, and looks for those whom others say they lost.

    Args:
        answer: tells all that this node lives; called when it is reported lost itself.
    """

    def __init__(
        self,
        mesh: Mesh,
        ledger: Ledger,
        liveness: Liveness,
        *,
        topic: str,
        answer: Callable[[], None],
        rng: Rng,
        metrics: Metrics,
    ) -> None:
        self._mesh = mesh
        self._ledger = ledger
        self._liveness = liveness
        self._topic = topic
        self._answer = answer
        self._rng = rng
        self._metrics = metrics
        self._rates = RateLimit(
            per_s=_REPORTS_PER_SECOND, burst=_REPORT_BURST, max_keys=_MAX_REPORTERS
        )
        self._credit = RateLimit(
            per_s=_VAIN_PER_SECOND, burst=_VAIN_AT_ONCE, max_keys=_MAX_REPORTERS
        )
        self._to_report: dict[str, str] = {}  # peer ID -> reason
        self._reported = trio.Event()  # something is to be reported
        self._heard: OrderedDict[str, list[float]] = OrderedDict()  # when each was reported lost
        self._checking: set[str] = set()
        self._slots = trio.CapacityLimiter(_DIALS_AT_ONCE)
        self._nursery: trio.Nursery | None = None
        liveness.on_loss = self._lost
        mesh.subscribe(topic, self.hear)

    async def run_forever(self) -> None:
        """Report and look until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                await self._report_forever()
        finally:
            self._nursery = None

    def settle(self, asker: str, peer_ids: Sequence[str]) -> None:
        """Have it found out who is right about peers that only one of two ledgers has online.

        Whoever was lost here is reported once more: the asker, and all who missed the report, look
        for themselves. Whoever is gone there is looked for here, as if the asker had reported it.
        """
        now = trio.current_time()
        for peer_id in peer_ids[:MAX_LOST]:  # more wait for the next comparison
            entry = self._ledger.get(peer_id)
            if entry is None or peer_id in (asker, self._mesh.peer_id):
                continue
            if entry.is_online_at(now):
                self._take(asker, LostPeer(id=peer_id, seq=entry.node.seq), now)
            elif entry.state_at(now) == "offline":
                self._lost(peer_id, "still_online_elsewhere")

    # Telling

    def _lost(self, peer_id: str, reason: str) -> None:
        self._to_report[peer_id] = reason
        self._reported.set()

    async def _report_forever(self) -> None:
        while True:
            await self._reported.wait()
            await trio.sleep(self._rng.uniform(0.0, _BEFORE_REPORTING))
            self._reported = trio.Event()
            due, self._to_report = self._to_report, {}
            lost = [(p, why) for p, why in due.items() if self._is_worth_telling(p)]
            for first in range(0, len(lost), MAX_LOST):
                await self._report(lost[first : first + MAX_LOST])
                await trio.sleep(_BETWEEN_REPORTS)

    def _is_worth_telling(self, peer_id: str) -> bool:
        entry = self._ledger.get(peer_id)
        now = trio.current_time()
        if entry is None or entry.state_at(now) != "offline":
            return False  # it came back, or said goodbye
        heard = [at for at in self._heard.get(peer_id, ()) if now - at < _RECENT]
        return len(heard) < _ENOUGH_REPORTS

    async def _report(self, lost: list[tuple[str, str]]) -> None:
        entries = [entry for peer_id, _ in lost if (entry := self._ledger.get(peer_id))]
        if entries:
            peers = tuple(LostPeer(id=e.peer_id, seq=e.node.seq) for e in entries)
            report = LossReport(lost=peers, reason=lost[0][1])
            await self._mesh.publish(self._topic, encode(report))
            self._metrics.loss_reports.labels(outcome="sent").inc()

    # Hearing

    def hear(self, sender: str, data: bytes) -> Verdict:
        """Judge one gossiped report; ``sender`` is its proven origin, not who forwarded it."""
        now = trio.current_time()
        try:
            report = decode(data)
        except WireError as exc:
            self._metrics.protocol_faults.labels(protocol="loss", code=exc.code).inc()
            return Verdict.REJECT
        if self._credit.is_spent(sender, now) or not self._rates.allows(sender, now):
            self._metrics.loss_reports.labels(outcome="ignored").inc()
            return Verdict.IGNORE
        for lost in report.lost:
            self._take(sender, lost, now)
        return Verdict.ACCEPT

    def _take(self, sender: str, lost: LostPeer, now: float) -> None:
        if lost.id == self._mesh.peer_id:
            log.info("reported_lost", by=sender)
            self._answer()
            return
        entry = self._ledger.get(lost.id)
        if entry is None or lost.seq < entry.node.seq:
            return  # nobody that we know, or older news than ours
        self._note_heard(lost.id, now)
        if not entry.is_online_at(now) or lost.id in self._checking or self._nursery is None:
            return
        if len(self._checking) < _MAX_WAITING and self._credit.allows(sender, now):
            self._checking.add(lost.id)
            self._nursery.start_soon(self._check, sender, lost, now)

    def _note_heard(self, peer_id: str, now: float) -> None:
        self._heard[peer_id] = [*self._heard.pop(peer_id, ())[-1:], now]
        if len(self._heard) > _MAX_WAITING:
            self._heard.popitem(last=False)

    async def _check(self, sender: str, lost: LostPeer, heard_at: float) -> None:
        """Ask a peer itself whether it is there, and keep count of who was wrong about it."""
        peer_id = lost.id
        try:
            if self._liveness.is_linked(peer_id):
                is_there = await self._liveness.ask(peer_id)
            else:
                await trio.sleep(self._rng.uniform(*_BEFORE_DIALLING))
                async with self._slots:
                    is_there = self._has_spoken(lost, heard_at)
                    is_there = is_there or await self._liveness.dial(peer_id, self._named(sender))
        finally:
            self._checking.discard(peer_id)
        self._metrics.loss_reports.labels(outcome="wrong" if is_there else "confirmed").inc()
        if is_there:
            log.info("loss_report_wrong", peer_id=peer_id, by=sender)
        else:
            self._credit.give_back(sender, trio.current_time())

    def _has_spoken(self, lost: LostPeer, since: float) -> bool:
        """Whether the peer showed life after it was reported lost."""
        entry = self._ledger.get(lost.id)
        return entry is None or entry.node.seq > lost.seq or entry.last_seen > since

    def _named(self, peer_id: str) -> str:
        entry = self._ledger.get(peer_id)
        return (entry.node.name if entry is not None else "") or peer_id
