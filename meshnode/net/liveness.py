"""Who is still there: bytes are life, silence is asked about, a lost link is tried once more.

The law here: this node believes its own probe and nobody's report, and before it takes a peer for
dead it makes sure that it was not itself asleep.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from meshnode.core.ledger import Ledger
from meshnode.errors import MeshError, PeerUnreachable
from meshnode.metrics import Metrics
from meshnode.net.dialler import Dialler
from meshnode.net.mesh import LinkEvent, LinkState, Mesh

# Together: a peer that fell silent is found within 5 s of its last byte; one that was stopped for
# 3 s answers in time.
_TICK = 0.5  # seconds
PING_WHEN_IDLE = 1.0  # seconds without a byte from a peer
PING_TIMEOUT = 3.3  # seconds
# What came while this node slept is read before anybody is judged.
_GRACE = 0.1  # seconds
# A timer this late means that this node itself stood still: its misses prove nothing.
_STALL = 1.0  # seconds
# A closed connection gets one quick try, so that a flapping link evicts nobody.
REDIAL_TIMEOUT = 1.0  # seconds
# Bytes alone do not bring back, at once, a peer that answers pings but opens no streams.
_PENALTY = 5.0  # seconds
# Life signs are noted this coarsely: a finer grain tells nothing and costs a ledger write.
_TOUCH_STEP = 2.0  # seconds

log = structlog.get_logger(__name__)


class Liveness:
    """Keeps the ledger's idea of who is alive in step with the links.

    Args:
        forget_load: told the peer ID of who was taken out; the router drops its report.
    """

    def __init__(
        self,
        mesh: Mesh,
        ledger: Ledger,
        dialler: Dialler,
        *,
        forget_load: Callable[[str], None],
        metrics: Metrics,
    ) -> None:
        self._mesh = mesh
        self._ledger = ledger
        self._dialler = dialler
        self._forget_load = forget_load
        self._metrics = metrics
        self._probed: set[str] = set()
        self._last_stall = float("-inf")

    async def keep_alive_forever(self) -> None:
        """Ping whoever fell silent, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                due = trio.current_time() + _TICK
                for link in self._mesh.links():
                    self._note_life(link.peer_id, link.last_received)
                    idle = trio.current_time() - link.last_received
                    if idle >= PING_WHEN_IDLE and link.peer_id not in self._probed:
                        self._probed.add(link.peer_id)
                        nursery.start_soon(self._probe, link.peer_id)
                await trio.sleep_until(due)
                if trio.current_time() - due > _STALL:
                    self._last_stall = trio.current_time()
                    log.warning("loop_stalled", duration_s=round(trio.current_time() - due, 3))

    def link_came_up(self, event: LinkEvent) -> None:
        if self._ledger.touch(event.peer_id, trio.current_time()):
            log.info("peer_returned", peer_id=event.peer_id, reason="connected")

    async def link_went_down(self, event: LinkEvent) -> None:
        """Try the peer once more; take it out if it can't be reached."""
        if not self._is_online(event.peer_id):
            return  # it said goodbye, or was found dead already
        try:
            await self._dialler.connect(event.peer_id, timeout=REDIAL_TIMEOUT)
        except MeshError as exc:
            if not self._dialler.addrs_of(event.peer_id):
                await trio.sleep(REDIAL_TIMEOUT)  # only it can dial: let it
            if not self._dialler.is_linked(event.peer_id):
                self.take_out(event.peer_id, "link_lost", f"{event.reason}; {exc}")

    def take_out(self, peer_id: str, reason: str, error: str) -> None:
        """Drop the peer from the candidates at once; a life sign brings it back."""
        if self._ledger.mark_down(peer_id, f"{reason}: {error}", trio.current_time()):
            self._forget_load(peer_id)
            self._metrics.ejections.labels(reason=reason).inc()
            log.info("peer_offline", peer_id=peer_id, reason=reason, error=error)

    async def _probe(self, peer_id: str) -> None:
        """Ask a silent peer for a sign of life, and take it out if there is none."""
        try:
            await self._ping(peer_id)
        except PeerUnreachable as exc:
            await self._mesh.disconnect(peer_id, "no answer to a ping")
            self.take_out(peer_id, "ping_timeout", str(exc))
        finally:
            self._probed.discard(peer_id)

    async def _ping(self, peer_id: str) -> None:
        """Return once the peer showed life, or its link is gone (which is another's business).

        Raises:
            PeerUnreachable: it showed none, and this node was awake all the time.
        """
        while True:
            asked_at = trio.current_time()
            try:
                await self._mesh.ping(peer_id, timeout=PING_TIMEOUT)
            except PeerUnreachable:
                await trio.sleep(_GRACE)
                link = next((k for k in self._mesh.links() if k.peer_id == peer_id), None)
                if link is None or link.last_received >= asked_at:
                    return
                if self._last_stall < asked_at:
                    raise
            else:
                return

    def _note_life(self, peer_id: str, last_received: float) -> None:
        entry = self._ledger.get(peer_id)
        if entry is None:
            return
        if entry.down_reason is not None:
            if last_received > entry.down_at + _PENALTY:
                self.link_came_up(LinkEvent(LinkState.UP, peer_id, ""))
        elif last_received - entry.last_seen >= _TOUCH_STEP:
            self._ledger.touch(peer_id, last_received)

    def _is_online(self, peer_id: str) -> bool:
        entry = self._ledger.get(peer_id)
        return entry is not None and entry.is_online_at(trio.current_time())
