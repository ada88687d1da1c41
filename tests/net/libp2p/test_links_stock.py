"""What the unmended library does with its links; one that fails here names a remedy to delete."""

from __future__ import annotations

import gc
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from support.pubsub_nodes import TOPIC, until

pytestmark = pytest.mark.stock

LISTEN = [Multiaddr("/ip4/127.0.0.1/tcp/0")]


@pytest.fixture(autouse=True)
def leaked_sockets_collected() -> Iterator[None]:
    """The stock host leaves the sockets it dialled to the garbage collector."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@dataclass
class Stock:
    host: IHost
    pubsub: Pubsub
    router: GossipSub

    async def dial(self, other: Stock) -> None:
        """Connect without the quarter of a second that the library's connect waits."""
        addr, peer_id = other.host.get_addrs()[0], other.host.get_id()
        self.host.get_peerstore().add_addrs(peer_id, [addr], 3600)
        await self.host.get_network().dial_addr(addr, peer_id)  # type: ignore[attr-defined]

    def connections_to(self, other: Stock) -> int:
        return len(self.host.get_network().get_connections(other.host.get_id()))

    def knows_subscription_of(self, other: Stock) -> bool:
        return other.host.get_id() in self.pubsub.peer_topics.get(TOPIC, set())


@asynccontextmanager
async def running_stock() -> AsyncIterator[Stock]:
    host = new_host(key_pair=create_new_key_pair(), listen_addrs=LISTEN)
    router = GossipSub([PROTOCOL_ID_V11], degree=6, degree_low=4, degree_high=12)
    router.spam_protection_enabled = False
    pubsub = Pubsub(host, router)
    async with (
        host.run(listen_addrs=LISTEN),
        background_trio_service(pubsub),
        background_trio_service(router),
    ):
        await pubsub.wait_until_ready()
        await pubsub.subscribe(TOPIC)
        yield Stock(host, pubsub, router)
    pubsub.seen_messages.stop()


async def test_simultaneous_dials_leave_two_connections() -> None:
    with trio.fail_after(20):
        async with running_stock() as one, running_stock() as two:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.dial, two)
                nursery.start_soon(two.dial, one)
            assert one.connections_to(two) == two.connections_to(one) == 2


async def test_a_subscription_is_told_once_and_not_again_when_it_was_forgotten() -> None:
    with trio.fail_after(20):
        async with running_stock() as one, running_stock() as two:
            await one.dial(two)
            await until(lambda: one.knows_subscription_of(two) and two.knows_subscription_of(one))
            # As when the stream it came on dies and is opened anew while the connection lives.
            one.pubsub.peer_topics[TOPIC].discard(two.host.get_id())
            for _ in range(3):
                await two.pubsub.publish(TOPIC, b"I am still here")
                await trio.sleep(0.2)
            assert not one.knows_subscription_of(two)


async def test_the_hub_of_a_star_prunes_its_leaves_though_they_have_nobody_else() -> None:
    leaves = 14
    with trio.fail_after(40):
        async with AsyncExitStack() as stack:
            hub = await stack.enter_async_context(running_stock())
            others = [await stack.enter_async_context(running_stock()) for _ in range(leaves)]
            for leaf in others:
                await leaf.dial(hub)
            await until(lambda: all(hub.knows_subscription_of(leaf) for leaf in others))
            hub.router.mesh[TOPIC] = {leaf.host.get_id() for leaf in others}

            _, pruned = hub.router.mesh_heartbeat()

            assert len(hub.router.mesh[TOPIC]) == 6
            assert len(pruned) == leaves - 6
            # Linked and subscribed, and yet its heartbeat will send them nothing.
            assert all(hub.knows_subscription_of(leaf) for leaf in others)
