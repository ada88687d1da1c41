"""When ledgers are compared, and with whom: on joining, when the lost return, and now and then.

What an exchange brings to light is passed on: a link that joins two halves of a mesh again tells
one node of each, and they tell the others.
"""

from __future__ import annotations

from itertools import chain, repeat

import structlog
import trio

from meshnode.errors import MeshError
from meshnode.net.ledger_sync import LedgerSync
from meshnode.net.mesh import Mesh
from meshnode.net.rng import Rng

# Soon after joining, when others may have joined unheard, then ever more rarely.
_FIRST_EXCHANGES = ((1.0, 2.0), (2.0, 4.0), (4.0, 8.0))  # seconds, from and to
_NEXT_EXCHANGE = (45.0, 75.0)
_AFTER_FAILURE = (0.5, 1.0)
# Peers that one exchange showed; a single one is a newcomer, who announces itself to all.
_WORTH_PASSING_ON = 2
# Gossip, where it gets through, is faster than this and leaves nothing to pass on.
_BEFORE_PASSING_ON = (0.3, 0.9)
_PASS_ON_TO = 2
_BETWEEN_PASSING_ON = 2.0  # seconds

log = structlog.get_logger(__name__)


class AntiEntropy:
    """Keeps this node's ledger and those of its peers the same, where gossip did not."""

    def __init__(self, mesh: Mesh, sync: LedgerSync, rng: Rng) -> None:
        self._mesh = mesh
        self._sync = sync
        self._rng = rng
        self._needs_ledger = True
        self._has_news = trio.Event()
        self._nursery: trio.Nursery | None = None
        sync.on_discovery = self._on_discovery

    async def run_forever(self, joined: trio.Event) -> None:
        """Compare ledgers until cancelled.

        Args:
            joined: set when there may be peers to compare with.
        """
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._pass_on_forever)
                if self._mesh.links():
                    self._needs_ledger = False
                    self._nursery.start_soon(self._exchange_with_anyone)
                await joined.wait()
                for wait in chain(_FIRST_EXCHANGES, repeat(_NEXT_EXCHANGE)):
                    await trio.sleep(self._rng.uniform(*wait))
                    await self._exchange_with_anyone()
        finally:
            self._nursery = None

    def link_went_down(self) -> None:
        """Ask anew once there is a link, if this was the last one."""
        self._needs_ledger = self._needs_ledger or not self._mesh.links()

    def link_came_up(self, peer_id: str, *, was_lost: bool) -> None:
        """Compare ledgers at once, if this is the first link or leads to one that was lost.

        Args:
            was_lost: the peer was offline until now; of its two ends only one need care.
        """
        if self._nursery is None:
            return
        if self._needs_ledger:
            self._needs_ledger = False
            self._nursery.start_soon(self._exchange_with_anyone)
        elif was_lost:
            self._nursery.start_soon(self._exchange, peer_id)

    def _on_discovery(self, peers: int) -> None:
        if peers >= _WORTH_PASSING_ON:
            self._has_news.set()

    async def _pass_on_forever(self) -> None:
        while True:
            await self._has_news.wait()
            await trio.sleep(self._rng.uniform(*_BEFORE_PASSING_ON))
            self._has_news = trio.Event()
            links = self._mesh.links()
            for link in self._rng.sample(links, min(_PASS_ON_TO, len(links))):
                await self._exchange(link.peer_id)
            await trio.sleep(_BETWEEN_PASSING_ON)

    async def _exchange_with_anyone(self) -> None:
        """Ask one peer after another until one has compared its ledger with ours."""
        while links := self._mesh.links():
            if await self._exchange(self._rng.choice(links).peer_id):
                return
            await trio.sleep(self._rng.uniform(*_AFTER_FAILURE))
        self._needs_ledger = True

    async def _exchange(self, peer_id: str) -> bool:
        try:
            await self._sync.exchange(peer_id)
        except MeshError as exc:
            log.info("ledgers_not_compared", peer_id=peer_id, error=str(exc))
            return False
        return True
