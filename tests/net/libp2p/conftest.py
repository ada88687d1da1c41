from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import structlog
import trio
from structlog.typing import EventDict

from meshnode.core.belonging import by_keys
from meshnode.metrics import Metrics
from meshnode.net.libp2p.host import Libp2pMesh
from meshnode.net.libp2p.identity import ephemeral_identity
from meshnode.net.libp2p.limits import DEFAULT_LIMITS, Limits
from meshnode.net.libp2p.relay.limits import DEFAULT_RELAY_LIMITS, RelayLimits
from meshnode.net.mesh import LinkEvent

KEY = b"k" * 32
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


class Node(Libp2pMesh):
    """A mesh node that remembers what its watchers were told, and what was counted."""

    metrics: Metrics
    events: list[LinkEvent]

    def faults(self, protocol: str) -> float:
        return sum(
            sample.value
            for metric in self.metrics.protocol_faults.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.labels["protocol"] == protocol
        )

    def memberships(self, outcome: str) -> float:
        return self.metrics.memberships.labels(outcome=outcome)._value.get()


MakeNode = Callable[..., Node]
RunNodes = Callable[..., AbstractAsyncContextManager[None]]


@pytest.fixture
def make_node() -> MakeNode:
    """Build a node on loopback that is not running yet."""

    def make(
        *,
        seed: bytes | None = None,
        keys: tuple[bytes, ...] = (KEY,),
        listen: tuple[str, ...] = LOOPBACK,
        limits: Limits = DEFAULT_LIMITS,
        announce_addrs: tuple[str, ...] = (),
        relay: RelayLimits | None = None,  # of a node that is one
    ) -> Node:
        metrics, membership = Metrics(), by_keys(keys)
        node = Node(
            identity=ephemeral_identity(seed),
            listen=listen,
            membership=membership,
            metrics=metrics,
            limits=limits,
            announce_addrs=announce_addrs,
            is_relay=relay is not None,
            relay_limits=relay or DEFAULT_RELAY_LIMITS,
        )
        node.metrics = metrics
        node.membership = membership
        node.events = []
        node.watch_links(node.events.append)
        return node

    return make


@pytest.fixture
def run_nodes() -> RunNodes:
    """Run nodes inside the block, each linked to all others if ``linked``."""

    @asynccontextmanager
    async def run(*nodes: Node, linked: bool = True) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            for node in nodes:
                await nursery.start(node.run_forever)
            if linked:
                for number, node in enumerate(nodes):
                    for earlier in nodes[:number]:
                        await node.dial(earlier.addrs[0], timeout=5)
            yield
            nursery.cancel_scope.cancel()

    return run


@pytest.fixture
def logged() -> Iterator[list[EventDict]]:
    """Collect what our own code logs; stdlib logging is pytest's caplog."""
    with structlog.testing.capture_logs() as entries:
        yield entries
