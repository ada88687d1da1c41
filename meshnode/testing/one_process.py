"""Room for a hundred nodes on real sockets in one process, whose one core they share.

What each would do alone is done once for all: to verify a signature; and what makes them late
together (handshakes, announcements, the garbage collector) is spread over more time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from meshnode.core import budget
from meshnode.core.belonging import by_keys
from meshnode.metrics import Metrics
from meshnode.net.dialler import DialLimits
from meshnode.net.mesh import Mesh

# Hearing one announcement takes about half a millisecond of the core: half of the core for this
# leaves the rest to links and pings.
_HEARD_PER_SECOND = 600.0  # announcements
# More handshakes at a time make each other late, and these join no node to the mesh.
_DIALS_AT_ONCE = 8
# Of a hundred nodes that join at once, each waits for the others at every step.
_HANDSHAKE_TIMEOUT = 15.0  # seconds
_MESSAGES_REMEMBERED = 4096
# Most of a swarm's objects live as long as it does; looking through them all every 700 new ones
# takes an eighth of its time.
_GC_THRESHOLDS = (100_000, 50, 100)


class OpenedEnvelopes:
    """What the nodes of one process opened last: the signature that one verified holds for all."""

    def __init__(self) -> None:
        self._opened: dict[bytes, tuple[str, bytes]] = {}

    def open(self, envelope: bytes, mesh: Mesh) -> tuple[str, bytes]:
        """Return (signer, payload); have ``mesh`` open it if none did. Raises as it does."""
        opened = self._opened.get(envelope)
        if opened is None:
            opened = mesh.open_sealed(envelope)
            if len(self._opened) >= _MESSAGES_REMEMBERED:
                del self._opened[next(iter(self._opened))]
            self._opened[envelope] = opened
        return opened


class OneProcess:
    """What ``n`` libp2p nodes of this process share. Loading libp2p takes most of a second.

    Attributes:
        announce_budget: announcements per second that each node shall hear at most.
        dial_limits: of all of them together.
    """

    def __init__(self, n: int) -> None:
        from meshnode.net.libp2p.limits import Limits
        from meshnode.net.libp2p.pubsub_wire import shared_verification

        self.announce_budget = min(budget.ANNOUNCEMENTS_PER_SECOND, _HEARD_PER_SECOND / n)
        self.dial_limits = DialLimits(trio.CapacityLimiter(_DIALS_AT_ONCE), _HANDSHAKE_TIMEOUT)
        self._n = n
        self._origin_of = shared_verification(_MESSAGES_REMEMBERED)
        self._limits = Limits(
            handshake_timeout=_HANDSHAKE_TIMEOUT, membership_timeout=_HANDSHAKE_TIMEOUT
        )

    def stretch(self, announce_interval: float) -> float:
        """Return how many times as long the interval has to be, so that all can be heard.

        Nodes come to it by themselves once they know how many they are; until then they would
        drown each other.
        """
        needed = budget.announce_interval(self._n, announce_interval, self.announce_budget)
        return needed / announce_interval

    def mesh(self, *, identity_seed: bytes, listen: str, key: bytes) -> Mesh:
        """Return a node of its own on real sockets."""
        from meshnode.net.libp2p.host import Libp2pMesh
        from meshnode.net.libp2p.identity import ephemeral_identity

        return Libp2pMesh(
            identity=ephemeral_identity(identity_seed),
            listen=(listen,),
            membership=by_keys((key,)),
            metrics=Metrics(),
            limits=self._limits,
            origin_of=self._origin_of,
        )


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Look for garbage seldom within the block; for this process, whatever else runs in it."""
    before = gc.get_threshold()
    gc.set_threshold(*_GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
