"""How many links this node keeps, and to whom: bootstraps first, then whomever the ledger names.

All of them while the mesh is small, some chosen at random once it is large, and beside those the
ones that requests go over: a random graph of six links each stays whole though a third of its nodes
die, and needs its bootstraps no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog
import trio

from meshnode.core.known_peers import MAX_KNOWN_PEERS, KnownPeers
from meshnode.core.ledger import Ledger, LedgerEntry
from meshnode.errors import MeshError, PeerUnreachable, TokenRefused
from meshnode.metrics import Metrics
from meshnode.net.anti_entropy import AntiEntropy
from meshnode.net.dialler import LAST_RETRY, Backoff, Dialler, DialLimits
from meshnode.net.ledger_sync import LedgerSync
from meshnode.net.liveness import Liveness
from meshnode.net.mesh import LinkEvent, LinkState, Mesh
from meshnode.net.parting import DEFAULT_TARGETS, LinkTargets, Parting
from meshnode.net.rng import Rng

_FILL_INTERVAL = 0.5  # seconds
# While others join, each so soon after the last, only few links are made: made by all at once, the
# rest would take the time of those that still join. Fewer, or for longer, and the next deaths part
# the mesh; one that grows for longer makes as many as keep it whole.
_SETTLES = 1.0  # seconds
_LINKS_AT_FIRST = 4
_AT_FIRST = 15.0  # seconds
# Of two that find each other at once, the one with the larger peer ID lets the other begin.
_YIELD_FIRST = 0.3  # seconds
# Whether a bootstrap that is heard through others needs a link after all is looked at this often.
_SPARED_INTERVAL = 5.0  # seconds
# While alone, a bootstrap that comes back is found within this time.
_ALONE_RETRY = 1.5  # seconds
# The lost are tried again a few at a time, so that two halves of a mesh find each other.
_REUNITE_INTERVAL = (3.0, 5.0)
_REUNITE_AT_ONCE = 3
_REUNITE_WITHIN = 3600.0  # seconds since the last life sign
# Of those known from earlier lives, whom to dial while alone: the latest are likeliest to be there,
# and few at a time leave room for bootstraps.
_RECALL_AT_ONCE = 4
_RECALL_AMONG = 16
# Where linked peers can be dialled is looked up this often, once they had time to announce it.
_NOTE_INTERVAL = 5.0  # seconds
# Peers found on the local network that wait to be dialled; more come again with their next answer.
_MAX_FOUND_WAITING = 64
# Strangers whose refusal was logged; enough not to fill a log with one misconfigured rack.
_MAX_REFUSALS_LOGGED = 256

log = structlog.get_logger(__name__)


class Peering:
    """Joins a mesh by its bootstraps, and keeps enough links to stay in it without them.

    Args:
        bootstraps: multiaddrs that end in ``/p2p/<peer ID>``; this node's own is skipped.
        forget_load: told the peer ID of who was taken out of the candidates.
        known: peers of earlier lives, dialled while nobody is linked; kept up to date.
        is_in_use: whether requests are open now to a peer or from it.
        dial_limits: of this node alone, unless members share a process.
    """

    def __init__(
        self,
        mesh: Mesh,
        ledger: Ledger,
        sync: LedgerSync,
        *,
        bootstraps: Sequence[str],
        forget_load: Callable[[str], None],
        rng: Rng,
        metrics: Metrics,
        known: KnownPeers | None = None,
        is_in_use: Callable[[str], bool] = lambda _: False,
        targets: LinkTargets = DEFAULT_TARGETS,
        dial_limits: DialLimits | None = None,
    ) -> None:
        self.joined = trio.Event()  # the first link stood, or no bootstrap was named
        self._mesh = mesh
        self._ledger = ledger
        self._anti_entropy = AntiEntropy(mesh, sync, rng)
        self._rng = rng
        self._targets = targets
        self._bootstraps = tuple(
            addr for addr in dict.fromkeys(bootstraps) if not addr.endswith(f"/p2p/{mesh.peer_id}")
        )
        self._known = known if known is not None else KnownPeers()
        self._dialler = Dialler(mesh, ledger, self._known, rng, dial_limits)
        self.liveness = Liveness(
            mesh, ledger, self._dialler, forget_load=forget_load, metrics=metrics
        )
        self._parting = Parting(
            mesh, targets, others=self._others, is_in_use=is_in_use, rng=rng, metrics=metrics
        )
        self._events, self._heard_events = trio.open_memory_channel[LinkEvent](float("inf"))
        self._found, self._heard_found = trio.open_memory_channel[str](_MAX_FOUND_WAITING)
        self._links_changed = trio.Event()
        self._others_counted = 0
        self._grew_at = float("-inf")  # when there were more others than before
        self._grows_since: float | None = None  # None: not now, so that all links may be made
        self._refused_by: dict[str, TokenRefused] = {}  # bootstraps, by address
        self._refusals_logged: set[str] = set()
        self._fatal: TokenRefused | None = None
        self._nursery: trio.Nursery
        mesh.watch_links(self._on_link)

    async def run_forever(self) -> None:
        """Join, and keep links until cancelled. Start it once the mesh runs.

        Raises:
            TokenRefused: no link ever stood, and every bootstrap refused this node's token.
        """
        async with trio.open_nursery() as self._nursery:
            if not self._bootstraps:
                self.joined.set()
            for addr in self._bootstraps:
                self._nursery.start_soon(self._keep_bootstrap_forever, addr)
            self._nursery.start_soon(self._follow_links_forever)
            self._nursery.start_soon(self._fill_links_forever)
            self._nursery.start_soon(self._reunite_forever)
            self._nursery.start_soon(self._recall_forever)
            self._nursery.start_soon(self._note_links_forever)
            self._nursery.start_soon(self._dial_found_forever)
            self._nursery.start_soon(self._anti_entropy.run_forever, self.joined)
            self._nursery.start_soon(self.liveness.keep_alive_forever)
            self._nursery.start_soon(self._parting.part_forever)
        if self._fatal is not None:
            raise self._fatal

    async def connect(self, peer_id: str, *, timeout: float) -> None:
        """Make a link to a peer of the ledger unless there is one.

        Raises:
            PeerUnreachable: none of its addresses led to it in time.
            TokenRefused: it has another token.
        """
        await self._dialler.connect(peer_id, timeout=timeout)

    async def connect_directly(self, peer_id: str, *, timeout: float) -> None:
        """Make a link that needs no relay, though a relayed one stands. Raises as ``connect``."""
        await self._dialler.connect_directly(peer_id, timeout=timeout)

    def direct_addrs_of(self, peer_id: str) -> tuple[str, ...]:
        """Return where a peer of the ledger says it can be dialled without a relay."""
        return self._dialler.direct_addrs_of(peer_id)

    def report_unreachable(self, peer_id: str, error: str) -> None:
        """Take a peer out of the candidates at once: a stream to it could not be opened."""
        self.liveness.take_out(peer_id, "open_failed", error)

    def part_with(self, peer_id: str, why: str) -> None:
        """Take a peer out of the candidates that is kept out from now on."""
        self.liveness.take_out(peer_id, "blocked", why)

    def note_use(self, peer_id: str) -> None:
        """Keep the link to a peer warm: a request to it, or from it, began or ended."""
        self._parting.note_use(peer_id)

    def found(self, addrs: tuple[str, ...]) -> None:
        """Dial a peer that another discovery found, unless links are enough; never waits.

        Args:
            addrs: its multiaddrs, best first, each ending in the same ``/p2p/<peer ID>``.
        """
        peer_id = addrs[0].rpartition("/p2p/")[2]
        if (
            peer_id == self._mesh.peer_id
            or len(self._mesh.links()) >= self._targets.all_links_up_to
        ):
            return
        self._dialler.learn(peer_id, addrs)
        entry = self._ledger.get(peer_id)
        # One that is online for us is in this mesh already, and gets a link if links are few.
        if entry is None or not entry.is_online_at(trio.current_time()):
            with suppress(trio.WouldBlock):
                self._found.send_nowait(peer_id)

    # Links

    def _on_link(self, event: LinkEvent) -> None:
        match event.state:
            case LinkState.UP:
                log.info("link_up", peer_id=event.peer_id, addr=event.addr, dialled=event.dialled)
                self.joined.set()
                was_lost = self.liveness.link_came_up(event)
                # One exchange serves both ends.
                was_lost = was_lost and event.dialled
                self._anti_entropy.link_came_up(event.peer_id, was_lost=was_lost)
            case LinkState.DOWN:
                log.info("link_down", peer_id=event.peer_id, reason=event.reason)
            case LinkState.REFUSED:
                self._log_refusal(event)
        self._links_changed.set()
        self._links_changed = trio.Event()
        self._events.send_nowait(event)

    async def _follow_links_forever(self) -> None:
        async for event in self._heard_events:
            if event.state is LinkState.DOWN:
                self._anti_entropy.link_went_down()
                if not self._parting.take_agreement(event.peer_id):
                    self._nursery.start_soon(self.liveness.link_went_down, event)

    def _log_refusal(self, event: LinkEvent) -> None:
        if event.peer_id not in self._refusals_logged:
            if len(self._refusals_logged) < _MAX_REFUSALS_LOGGED:
                self._refusals_logged.add(event.peer_id)
            log.warning(
                "membership_refused", peer_id=event.peer_id, addr=event.addr, reason=event.reason
            )

    # Bootstraps

    async def _keep_bootstrap_forever(self, addr: str) -> None:
        backoff = Backoff(self._rng)
        reached = True  # so that the first failure is told
        while True:
            try:
                peer_id = await self._dialler.dial(addr)
            except TokenRefused as exc:
                self._note_refusal(addr, exc)
            except PeerUnreachable as exc:
                self._refused_by.pop(addr, None)
                if reached:
                    log.warning("bootstrap_unreachable", addr=addr, error=str(exc))
                reached = False
            else:
                self._refused_by.pop(addr, None)
                reached = True
                backoff.reset()
                await self._link_needed(peer_id)
            await self._back_off(backoff)

    async def _link_needed(self, peer_id: str) -> None:
        """Wait until a bootstrap has neither a link nor a place in this mesh without one."""
        while self._dialler.is_linked(peer_id) or self._is_spared(peer_id):
            with trio.move_on_after(_SPARED_INTERVAL):
                await self._links_changed.wait()

    def _is_spared(self, peer_id: str) -> bool:
        """Whether a peer is heard through others, and links are enough without it."""
        entry = self._ledger.get(peer_id)
        is_heard = entry is not None and entry.is_online_at(trio.current_time())
        return is_heard and self._missing_links() <= 0

    async def _back_off(self, backoff: Backoff) -> None:
        """Wait before a bootstrap's next try: long in company, shortly when alone."""
        now = trio.current_time()
        in_company = now + backoff.after_failure(at_most=LAST_RETRY)
        alone = now + self._rng.uniform(0.5, 1.0) * _ALONE_RETRY
        while True:
            until = in_company if self._mesh.links() else min(alone, in_company)
            if until <= trio.current_time():
                return
            with trio.move_on_at(until):
                await self._links_changed.wait()

    def _note_refusal(self, addr: str, refusal: TokenRefused) -> None:
        self._refused_by[addr] = refusal
        # Once joined, a bootstrap with another token is a stranger like any other.
        if not self.joined.is_set() and len(self._refused_by) == len(self._bootstraps):
            self._fatal = refusal
            self._nursery.cancel_scope.cancel()

    # Enough links

    async def _fill_links_forever(self) -> None:
        while True:
            now = trio.current_time()
            self._note_growth(now)
            for peer_id in self._whom_to_dial(now):
                self._nursery.start_soon(
                    self._try_to_connect, peer_id, lambda: self._missing_links() > 0
                )
            await trio.sleep(_FILL_INTERVAL * self._rng.uniform(0.8, 1.2))

    def _note_growth(self, now: float) -> None:
        others = self._others()
        if others > self._others_counted:
            self._grew_at = now
        self._others_counted = others
        if now - self._grew_at >= _SETTLES:
            self._grows_since = None
        elif self._grows_since is None:
            self._grows_since = now

    def _whom_to_dial(self, now: float) -> list[str]:
        """Return peers to dial now, chosen at random, so that links after them are enough."""
        missing = self._missing_links() - self._dialler.waiting
        if self._grows_since is not None:
            is_new = now - self._grows_since < _AT_FIRST
            enough = _LINKS_AT_FIRST if is_new else self._targets.min_links
            missing = min(missing, enough - len(self._mesh.links()))
        if missing <= 0:
            return []
        others = [e.peer_id for e in self._ledger.online(now) if e.peer_id != self._mesh.peer_id]
        linked = {link.peer_id for link in self._mesh.links()}
        free = [p for p in others if p not in linked and self._dialler.may_try(p, now)]
        return self._rng.sample(free, min(missing, len(free)))

    def _missing_links(self) -> int:
        return self._targets.missing(self._others(), len(self._mesh.links()))

    def _others(self) -> int:
        """Return how many other nodes are online."""
        online = self._ledger.online(trio.current_time())
        return sum(entry.peer_id != self._mesh.peer_id for entry in online)

    async def _try_to_connect(
        self, peer_id: str, wanted: Callable[[], bool] = lambda: True
    ) -> None:
        if self._mesh.peer_id > peer_id:
            await trio.sleep(self._rng.uniform(0.5, 1.0) * _YIELD_FIRST)
        try:
            await self._dialler.connect_in_turn(peer_id, wanted=wanted)
        except TokenRefused as exc:
            self._known.forget(peer_id)  # it is of another network now
            log.debug("dial_refused", peer_id=peer_id, error=str(exc))
        except MeshError as exc:
            log.debug("dial_failed", peer_id=peer_id, error=str(exc))
            self._nursery.start_soon(self.liveness.doubt, peer_id, str(exc))

    async def _dial_found_forever(self) -> None:
        async for peer_id in self._heard_found:
            # Whoever can't be reached now is found again by a later answer of its own.
            if self._dialler.may_try(peer_id, trio.current_time()):
                self._nursery.start_soon(self._try_to_connect, peer_id)

    async def _reunite_forever(self) -> None:
        began = trio.current_time()
        while True:
            await trio.sleep(self._rng.uniform(*_REUNITE_INTERVAL))
            now = trio.current_time()
            lost = [e.peer_id for e in self._ledger.entries() if self._is_lost(e, now)]
            if now - began < _REUNITE_WITHIN:
                # After a power cut a mesh may come back in parts that have not met in this life.
                lost += [p for p in self._unmet(now) if self._ledger.get(p) is None]
            for peer_id in self._rng.sample(lost, min(_REUNITE_AT_ONCE, len(lost))):
                self._nursery.start_soon(self._try_to_connect, peer_id)

    def _is_lost(self, entry: LedgerEntry, now: float) -> bool:
        return (
            entry.state_at(now) == "offline"
            and now - entry.last_seen < _REUNITE_WITHIN
            and not self._dialler.is_linked(entry.peer_id)
        )

    # Earlier lives

    async def _recall_forever(self) -> None:
        """While nobody is linked, dial peers that were, so that no bootstrap is needed."""
        tried: set[str] = set()
        while True:
            while self._mesh.links() or not self._known:
                await self._links_changed.wait()
                tried.clear()
            unmet = self._unmet(trio.current_time())
            # Each once before any again: the dead of last year must not hide who lives.
            if not (latest := [p for p in unmet if p not in tried][:_RECALL_AMONG]):
                tried.clear()
            chosen = self._rng.sample(latest, min(_RECALL_AT_ONCE, len(latest)))
            tried.update(chosen)
            async with trio.open_nursery() as nursery:
                for peer_id in chosen:
                    nursery.start_soon(self._try_to_connect, peer_id)
            await trio.sleep(self._rng.uniform(0.5, 1.0) * _FILL_INTERVAL)

    def _unmet(self, now: float) -> list[str]:
        """Return peers of earlier lives that may be dialled now, the latest first."""
        return [
            peer.peer_id
            for peer in self._known.latest_first()
            if self._dialler.may_try(peer.peer_id, now)
            and not self._dialler.is_linked(peer.peer_id)
            and peer.peer_id != self._mesh.peer_id
        ]

    async def _note_links_forever(self) -> None:
        while True:
            await trio.sleep(_NOTE_INTERVAL)
            # No more than can be kept, or each round would push out what the last one noted.
            for link in self._mesh.links()[:MAX_KNOWN_PEERS]:
                self._dialler.note_addrs(link.peer_id)
