"""Who is still there: bytes are life, silence is asked about, a lost link is tried once more.

The law here: this node believes its own probe and nobody's report, and before it takes a peer for
dead it makes sure that it was not itself asleep or cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog
import trio

from meshnode.core.ledger import Ledger
from meshnode.core.self_check import seems_to_be_us, silent_links
from meshnode.errors import MeshError, PeerLate, PeerUnreachable
from meshnode.metrics import Metrics
from meshnode.net.dialler import Dialler
from meshnode.net.mesh import LinkEvent, LinkState, Mesh

# Together: a peer that fell silent is found within 5 s of its last byte; one that was stopped for
# 3 s answers in time.
_TICK = 0.5  # seconds
PING_WHEN_IDLE = 1.0  # seconds without a byte from a peer
# A ping this late makes the peer suspect: whoever else can serve is asked first.
SUSPECT_AFTER = 1.0  # seconds
PING_TIMEOUT = 3.3  # seconds, those included
# Whoever lives and could not be dialled once may be busy, and is heard meanwhile.
_BEFORE_DOUBTING = 0.5  # seconds
# Of a peer's window: whoever was not heard for so long has missed an announcement.
_OVERDUE = 1 / 3
# What came while this node slept is read before anybody is judged.
_GRACE = 0.1  # seconds
# A timer this late means that this node itself stood still: its misses prove nothing.
_STALL = 1.0  # seconds
# A closed connection is tried again twice, so that a flapping link evicts nobody.
_SECOND_TRY = 0.2  # seconds after the first
# Whoever takes a connection after that, but is too busy to prove itself, has so long in all.
_LATE_LIMIT = 8.0  # seconds since its link ended
# Who told no address can only dial itself; it gets this long to do so.
_LET_IT_DIAL = 1.0  # seconds
# Bytes alone do not bring back, at once, a peer that answers pings but opens no streams.
_PENALTY = 5.0  # seconds
# Life signs are noted this coarsely: a finer grain tells nothing and costs a ledger write.
_TOUCH_STEP = 2.0  # seconds
# How much longer a peer has if most links fell silent together with it: a cable that is plugged
# in again, a switch that restarts a port, a laptop that changes its access point.
SELF_SUSPICION = 5.0  # seconds
# A link that falls silent this soon after the others belongs to the same event.
_SAME_EVENT = 10.0  # seconds
_SELF_CHECK_INTERVAL = 0.25  # seconds

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Silence:
    """A peer that gave no sign of life though it was asked."""

    since: float  # when it was first asked
    error: str


@dataclass(frozen=True, slots=True)
class _SelfSuspicion:
    """Most links are silent, so no silent peer is judged before ``until``."""

    until: float
    reason: str


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
        # Told (peer ID, reason) of each peer that this node itself found dead.
        self.on_loss: Callable[[str, str], None] = lambda _peer_id, _reason: None
        # Says what is wrong with this host's own network, if it can tell.
        self.own_fault: Callable[[], str | None] = lambda: None
        self._probed: set[str] = set()
        self._doubted: set[str] = set()
        self._last_stall = float("-inf")
        self._self_suspicion: _SelfSuspicion | None = None

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

    def link_came_up(self, event: LinkEvent) -> bool:
        """Take a link as a sign of life; say whether it brought the peer back online."""
        has_returned = self._ledger.touch(event.peer_id, trio.current_time())
        if has_returned:
            log.info("peer_returned", peer_id=event.peer_id, reason="connected")
        return has_returned

    async def link_went_down(self, event: LinkEvent) -> None:
        """Try the peer again; take it out if it can't be reached.

        Twice, as one failure may be a busy host's: whoever is dead refuses twice within
        milliseconds, and whoever is only late is suspected meanwhile. Who takes the connection
        and gives no answer is alive or stopped: it gets longer, and may be heard meanwhile.
        """
        peer_id = event.peer_id
        if not self._is_online(peer_id):
            return  # it said goodbye, or was found dead already
        lost_at = trio.current_time()
        failure = await self._redial(peer_id)
        if failure is not None:
            self._ledger.suspect(peer_id, f"{event.reason}; {failure}", trio.current_time())
            await trio.sleep(_SECOND_TRY)
            failure = await self._redial(peer_id)
        while failure is not None and self._may_be_there(peer_id, failure, lost_at):
            if self._suspects_itself():
                self._suspect(peer_id, self._self_suspicion)
            await trio.sleep(_SELF_CHECK_INTERVAL)
            failure = await self._redial(peer_id)
        # What is heard of one that refuses was under way when it died.
        is_heard = isinstance(failure, PeerLate) and self._heard_since(peer_id, lost_at)
        if failure is not None and not is_heard:
            self._lose(peer_id, "link_lost", f"{event.reason}; {failure}")

    def _may_be_there(self, peer_id: str, failure: MeshError, lost_at: float) -> bool:
        """Whether a peer that can't be dialled now may still answer, or this node is at fault."""
        if self._suspects_itself():
            return True
        if not isinstance(failure, PeerLate) or self._heard_since(peer_id, lost_at):
            return False
        return trio.current_time() < max(lost_at, self._last_stall) + _LATE_LIMIT

    def take_out(self, peer_id: str, reason: str, error: str) -> None:
        """Drop the peer from the candidates at once; a life sign brings it back."""
        if self._ledger.mark_down(peer_id, f"{reason}: {error}", trio.current_time()):
            self._forget_load(peer_id)
            self._metrics.ejections.labels(reason=reason).inc()
            log.info("peer_offline", peer_id=peer_id, reason=reason, error=error)

    async def _redial(self, peer_id: str) -> MeshError | None:
        """Return why there is no link to the peer, after one try; None if there is."""
        try:
            # Not ``connect``: its failure may be that of a dial that waits for its turn.
            await self._dialler.probe(peer_id)
        except MeshError as exc:
            if not self._dialler.addrs_of(peer_id):
                await trio.sleep(_LET_IT_DIAL)  # only it can dial: let it
            return None if self._dialler.is_linked(peer_id) else exc
        return None

    # Peers that others say are lost

    def is_linked(self, peer_id: str) -> bool:
        return self._dialler.is_linked(peer_id)

    async def ask(self, peer_id: str) -> bool:
        """Ask a linked peer for a sign of life, and take it out if there is none.

        Returns whether it is there.
        """
        if peer_id not in self._probed:
            self._probed.add(peer_id)
            await self._probe(peer_id)
        return self._is_online(peer_id)

    async def dial(self, peer_id: str, reporter: str) -> bool:
        """Look for a peer that another reported lost, and take it out if it can't be reached.

        Returns whether it is there. One that tells no address can't be looked for: it stays
        suspect until it is heard, or its window ends.
        """
        if not self._dialler.addrs_of(peer_id):
            reason = f"{reporter} lost it, and it tells no address to look for it"
            self._ledger.suspect(peer_id, reason, trio.current_time())
            return False
        return await self._find(peer_id, "reported_lost", f"{reporter} lost it")

    async def doubt(self, peer_id: str, error: str) -> None:
        """Look again for a peer that could not be dialled, unless it is heard itself.

        If others alone say that it lives, it may have died just before they told: their records
        then keep it online for a window, and the report of its loss went out before this node
        could hear it. If it was heard, it may have been lost together with all who had a link to
        it, so that nobody is left to report it.
        """
        if peer_id in self._doubted or not self._dialler.addrs_of(peer_id):
            return
        self._doubted.add(peer_id)
        try:
            if self._is_hearsay(peer_id):
                await self._look_again(peer_id, "never_met", "only others speak of it", error)
            elif await self._falls_silent(peer_id):
                await self._look_again(peer_id, "silent", "it is not heard any more", error)
        finally:
            self._doubted.discard(peer_id)

    async def _look_again(self, peer_id: str, reason: str, why: str, error: str) -> None:
        now = trio.current_time()
        self._ledger.suspect(peer_id, f"{why}, and a dial failed: {error}", now)
        await trio.sleep(_BEFORE_DOUBTING)
        is_unheard = self._is_online(peer_id) and not self._heard_since(peer_id, now)
        if is_unheard or self._is_hearsay(peer_id):
            await self._find(peer_id, reason, why)

    async def _falls_silent(self, peer_id: str) -> bool:
        """Wait until a peer is heard, or should have been; return whether it was not.

        Whoever is heard though it can't be dialled is behind a NAT, and lives.
        """
        entry = self._ledger.get(peer_id)
        if entry is None or not self._is_online(peer_id):
            return False
        due = entry.last_seen + entry.node.window_s * _OVERDUE
        await trio.sleep_until(due)
        slept_through_it = trio.current_time() - due > _STALL
        is_unheard = self._is_online(peer_id) and not self._heard_since(peer_id, entry.last_seen)
        return is_unheard and not slept_through_it

    def _is_hearsay(self, peer_id: str) -> bool:
        entry = self._ledger.get(peer_id)
        return entry is not None and entry.proof == "relayed" and self._is_online(peer_id)

    async def _find(self, peer_id: str, reason: str, why: str) -> bool:
        """Look for a peer until there is an answer that counts; take it out if that is no."""
        while True:
            asked_at = trio.current_time()
            error = await self._look_for(peer_id, why)
            if error is None or self._heard_since(peer_id, asked_at):
                return True
            if self._suspects_itself():
                self._suspect(peer_id, self._self_suspicion)
                await trio.sleep(_SELF_CHECK_INTERVAL)
            elif self._last_stall < asked_at:
                self.take_out(peer_id, reason, f"{why}; {error}")
                return False

    async def _look_for(self, peer_id: str, why: str) -> str | None:
        """Return why the peer can't be reached, or None if it can; it is suspect while late."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._suspect_when_late, peer_id, why)
            try:
                await self._dialler.probe(peer_id)
            except MeshError as exc:
                return str(exc)
            finally:
                nursery.cancel_scope.cancel()
        return None

    async def _suspect_when_late(self, peer_id: str, why: str) -> None:
        await trio.sleep(SUSPECT_AFTER)
        reason = f"{why}, and it has not answered for {SUSPECT_AFTER:g} s"
        self._ledger.suspect(peer_id, reason, trio.current_time())

    def _heard_since(self, peer_id: str, at: float) -> bool:
        entry = self._ledger.get(peer_id)
        return entry is None or entry.last_seen > at

    # Silence

    async def _probe(self, peer_id: str) -> None:
        """Ask a silent peer for a sign of life, and take it out if there is none."""
        try:
            silence = await self._ping(peer_id)
            if silence is not None and seems_to_be_us(self._last_heard(), silence.since):
                silence = await self._suspect_ourselves_first(peer_id, silence)
            if silence is not None:
                # First, as a goodbye on a dead link takes its time.
                self._lose(peer_id, "ping_timeout", silence.error)
                await self._mesh.disconnect(peer_id, "no answer to a ping")
        finally:
            self._probed.discard(peer_id)

    def _lose(self, peer_id: str, reason: str, error: str) -> None:
        if self._is_online(peer_id):
            self.take_out(peer_id, reason, error)
            self.on_loss(peer_id, reason)

    async def _ping(self, peer_id: str) -> _Silence | None:
        """Return None once the peer showed life, or its link is gone, which is another's business.

        Its silence counts only if this node was awake all the time.
        """
        while True:
            asked_at = trio.current_time()
            error = ""
            for wait in (SUSPECT_AFTER, PING_TIMEOUT - SUSPECT_AFTER):
                try:
                    await self._mesh.ping(peer_id, timeout=wait)
                except PeerUnreachable as exc:
                    error = str(exc)
                    await trio.sleep(_GRACE / 2)
                if self._showed_life(peer_id, asked_at):
                    return None
                now = trio.current_time()
                reason = f"no answer to a ping for {now - asked_at:.1f} s"
                self._ledger.suspect(peer_id, reason, now)
            if self._last_stall < asked_at:
                return _Silence(asked_at, error)

    def _showed_life(self, peer_id: str, since: float) -> bool:
        """Whether bytes came from the peer; a link that is gone is judged where it went down."""
        link = self._mesh.link_to(peer_id)
        if link is not None and link.last_received >= since:
            self._note_life(peer_id, link.last_received)
        return link is None or link.last_received >= since

    # Ourselves

    async def _suspect_ourselves_first(self, peer_id: str, silence: _Silence) -> _Silence | None:
        """Wait whether the silence of most links ends; return that of this peer if it stays."""
        now = trio.current_time()
        ours = self._self_suspicion
        if ours is None or now >= ours.until + _SAME_EVENT:
            ours = self._self_suspicion = self._begin_self_suspicion(silence.since, now)
        while not self._showed_life(peer_id, silence.since):
            now = trio.current_time()
            if now >= ours.until:
                if silent_links(self._last_heard(), silence.since) == len(self._mesh.links()):
                    return _Silence(silence.since, f"{silence.error}; {ours.reason}")
                return silence
            if not seems_to_be_us(self._last_heard(), silence.since):
                # The others are heard again: this one gets a chance of its own.
                self._self_suspicion = None
                return await self._ping(peer_id)
            self._suspect(peer_id, ours)
            await trio.sleep(_SELF_CHECK_INTERVAL)
        return None

    def _begin_self_suspicion(self, since: float, now: float) -> _SelfSuspicion:
        heard = self._last_heard()
        silent = silent_links(heard, since)
        fault = self.own_fault()
        why = fault or f"{silent} of {len(heard)} links fell silent at once"
        log.warning("self_suspected", silent=silent, links=len(heard), own_fault=fault)
        return _SelfSuspicion(now + SELF_SUSPICION, f"this node may be cut off itself: {why}")

    def _suspects_itself(self) -> bool:
        ours = self._self_suspicion
        return ours is not None and trio.current_time() < ours.until

    def _suspect(self, peer_id: str, ours: _SelfSuspicion | None) -> None:
        if ours is not None:
            self._ledger.suspect(peer_id, ours.reason, trio.current_time())

    # Links and ledger

    def _last_heard(self) -> list[float]:
        return [link.last_received for link in self._mesh.links()]

    def _note_life(self, peer_id: str, last_received: float) -> None:
        entry = self._ledger.get(peer_id)
        if entry is None:
            return
        if entry.down_reason is not None:
            if last_received > entry.down_at + _PENALTY:
                self.link_came_up(LinkEvent(LinkState.UP, peer_id, ""))
        elif last_received - entry.last_seen >= _TOUCH_STEP or (
            entry.suspicion is not None and last_received >= entry.suspected_at
        ):
            self._ledger.touch(peer_id, last_received)

    def _is_online(self, peer_id: str) -> bool:
        entry = self._ledger.get(peer_id)
        return entry is not None and entry.is_online_at(trio.current_time())
