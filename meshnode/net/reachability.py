"""How others reach this node: by dialling it, or through relays where they can't.

The law here: reachability is asked of each relay by itself and never concluded from an address. A
laptop is reached from its own network and not from outside; so whichever relay can't dial this
node back is asked for a reservation, and a direct way is tried first by everybody anyway.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import structlog
import trio

from meshnode.core.ledger import Ledger
from meshnode.errors import MeshError
from meshnode.net.dialler import Backoff
from meshnode.net.mesh import Link, LinkEvent, LinkState, Mesh
from meshnode.net.rng import Rng

# One relay may die; a third would add nothing but addresses.
MAX_RESERVED = 2
# Beyond these, another relay that can dial this node back tells nothing new.
MAX_ASKED = 4
# How often a relay is asked again, and its reservation renewed with it. Expiry is an hour away.
RENEW_INTERVAL = 300.0  # seconds
# While reservations are missing, and for noticing that one is due.
_TICK = 1.0  # seconds
# Of a relay that refused or failed.
_FIRST_RETRY, _LAST_RETRY = 2.0, 120.0  # seconds
_STEP_TIMEOUT = 6.0  # seconds; a dial-back takes 3 s to fail
# A relayed link is tried without its relay this often, and at once when the peer has new addresses.
STRAIGHTEN_INTERVAL = 60.0  # seconds
# Relays and relayed links remembered; forgotten ones are asked once too often, no more.
_MAX_REMEMBERED = 10_000

log = structlog.get_logger(__name__)


class Relays(Protocol):
    """What is asked of the mesh here, beyond ``net/mesh.Mesh``."""

    @property
    def reserved(self) -> tuple[str, ...]:
        """Peer IDs of the relays through which this node can be reached now."""

    async def is_dialable_from(self, peer_id: str, *, timeout: float) -> bool:
        """Ask a linked peer to dial back. Raises PeerUnreachable or PeerRefused."""

    async def reserve(self, relay_id: str, *, timeout: float) -> float:
        """Reserve or renew; return the seconds it stands. Raises as above."""

    def release(self, relay_id: str) -> None:
        """Give up a reservation."""


class Connecting(Protocol):
    """What is asked of peering."""

    async def connect(self, peer_id: str, *, timeout: float) -> None: ...

    async def connect_directly(self, peer_id: str, *, timeout: float) -> None: ...

    def direct_addrs_of(self, peer_id: str) -> tuple[str, ...]: ...


@dataclass(slots=True)
class _Asked:
    """What became of one relay."""

    backoff: Backoff
    again_at: float = -math.inf
    dials_back: bool = False


@dataclass(slots=True)
class _Straightened:
    again_at: float
    addrs: tuple[str, ...]


class Reachability:
    """Keeps reservations while they are needed, and replaces relayed links by direct ones.

    Args:
        on_change: told when the addresses of this node changed.
        seeks_relays: False for a relay, which must be reachable by itself.
    """

    def __init__(
        self,
        mesh: Mesh,
        relays: Relays,
        ledger: Ledger,
        peering: Connecting,
        *,
        rng: Rng,
        on_change: Callable[[], None],
        seeks_relays: bool = True,
    ) -> None:
        self._mesh = mesh
        self._relays = relays
        self._ledger = ledger
        self._peering = peering
        self._rng = rng
        self._on_change = on_change
        self._seeks_relays = seeks_relays
        self._asked: dict[str, _Asked] = {}
        self._straightened: dict[str, _Straightened] = {}
        self._under_way: set[str] = set()
        self._wake = trio.Event()
        self._announced: tuple[str, ...] = ()
        mesh.watch_links(self._on_link)
        ledger.watch(self._on_news)

    async def keep_forever(self) -> None:
        """Ask, reserve, renew and straighten until cancelled. Start it once the mesh runs."""
        async with trio.open_nursery() as nursery:
            while True:
                self._wake = trio.Event()
                now = trio.current_time()
                if self._seeks_relays:
                    self._tell_changes()
                    for peer_id in self._whom_to_ask(now):
                        self._start(nursery, self._ask, peer_id)
                for link in self._mesh.links():
                    if link.via is not None and self._may_straighten(link, now):
                        self._start(nursery, self._straighten, link.peer_id)
                with trio.move_on_after(_TICK):
                    await self._wake.wait()

    def _on_link(self, event: LinkEvent) -> None:
        asked = self._asked.get(event.peer_id)
        if asked is not None and event.state is not LinkState.REFUSED:
            # A new link may come another way, and the reservation went with the old one.
            asked.again_at = -math.inf
            asked.dials_back = False
        self._wake.set()

    def _on_news(self, peer_id: str) -> None:
        entry = self._ledger.get(peer_id)
        if entry is not None and entry.node.relay and peer_id not in self._asked:
            self._wake.set()

    def _start(
        self, nursery: trio.Nursery, step: Callable[[str], Awaitable[None]], peer_id: str
    ) -> None:
        if peer_id not in self._under_way:
            self._under_way.add(peer_id)
            nursery.start_soon(self._finish, step, peer_id)

    async def _finish(self, step: Callable[[str], Awaitable[None]], peer_id: str) -> None:
        try:
            await step(peer_id)
        finally:
            self._under_way.discard(peer_id)

    # Relays

    def _whom_to_ask(self, now: float) -> list[str]:
        """Return the relays that are due: those reserved at first, then as many as are missing."""
        reserved = self._relays.reserved
        due = [peer_id for peer_id in reserved if self._is_due(peer_id, now)]
        missing = MAX_RESERVED - len(reserved)
        online = [
            entry.peer_id
            for entry in self._ledger.online(now)
            if entry.node.relay and entry.peer_id not in (self._mesh.peer_id, *reserved)
        ]
        fine = [peer for peer in online if (a := self._asked.get(peer)) and a.dials_back]
        due += [peer_id for peer_id in fine if self._is_due(peer_id, now)]
        if missing > 0 and len(reserved) + len(fine) < MAX_ASKED:
            others = [peer for peer in online if peer not in fine and self._is_due(peer, now)]
            due += self._rng.sample(others, min(missing, len(others)))
        return due

    def _is_due(self, peer_id: str, now: float) -> bool:
        asked = self._asked.get(peer_id)
        return asked is None or now >= asked.again_at

    async def _ask(self, peer_id: str) -> None:
        """Have one relay dial back, and reserve there if it can't."""
        asked = self._asked.get(peer_id)
        if asked is None:
            if len(self._asked) >= _MAX_REMEMBERED:
                self._asked.pop(next(iter(self._asked)))
            asked = self._asked[peer_id] = _Asked(Backoff(self._rng, _FIRST_RETRY, _LAST_RETRY))
        try:
            await self._peering.connect(peer_id, timeout=_STEP_TIMEOUT)
            asked.dials_back = await self._relays.is_dialable_from(peer_id, timeout=_STEP_TIMEOUT)
            seconds = math.inf
            if asked.dials_back:
                self._relays.release(peer_id)
            else:
                seconds = await self._relays.reserve(peer_id, timeout=_STEP_TIMEOUT)
        except MeshError as exc:
            asked.dials_back = False
            wait = asked.backoff.after_failure(at_most=_LAST_RETRY)
            asked.again_at = trio.current_time() + wait
            log.info("relay_failed", peer_id=peer_id, error=str(exc))
        else:
            asked.backoff.reset()
            # Half the time it stands, so that one lost renewal costs nothing.
            wait = min(RENEW_INTERVAL, seconds / 2) * self._rng.uniform(0.9, 1.1)
            asked.again_at = trio.current_time() + wait
        self._tell_changes()
        self._wake.set()

    def _tell_changes(self) -> None:
        reserved = self._relays.reserved
        if reserved == self._announced:
            return
        for peer_id in set(reserved) - set(self._announced):
            log.info("reached_through_relay", peer_id=peer_id)
        for peer_id in set(self._announced) - set(reserved):
            log.info("relay_left", peer_id=peer_id)
        self._announced = reserved
        self._on_change()

    # Relayed links

    def _may_straighten(self, link: Link, now: float) -> bool:
        last = self._straightened.get(link.peer_id)
        addrs = self._peering.direct_addrs_of(link.peer_id)
        if not addrs:
            return False
        if last is not None and now < last.again_at and addrs == last.addrs:
            return False
        if last is None and len(self._straightened) >= _MAX_REMEMBERED:
            self._straightened.pop(next(iter(self._straightened)))
        # A dial has just failed where a relay was needed at first: the next one comes later.
        wait = STRAIGHTEN_INTERVAL * self._rng.uniform(0.5, 1.0)
        self._straightened[link.peer_id] = _Straightened(now + wait, addrs)
        return last is not None

    async def _straighten(self, peer_id: str) -> None:
        try:
            await self._peering.connect_directly(peer_id, timeout=_STEP_TIMEOUT)
        except MeshError as exc:
            log.debug("still_relayed", peer_id=peer_id, error=str(exc))
