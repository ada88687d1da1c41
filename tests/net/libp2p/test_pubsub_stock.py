"""What the unmended library does; a test that fails here names a remedy to delete."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.validators import signature_validator
from libp2p.tools.anyio_service import TooManyChildrenException, background_trio_service
from multiaddr import Multiaddr

from support.pubsub_nodes import TOPIC, signed_message

pytestmark = pytest.mark.stock


@pytest.fixture(autouse=True)
def leaked_sockets_collected() -> Iterator[None]:
    """The stock host leaves the sockets it dialled to the garbage collector."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@asynccontextmanager
async def running_stock() -> AsyncIterator[tuple[Pubsub, GossipSub]]:
    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    host = new_host(key_pair=create_new_key_pair(), listen_addrs=listen)
    router = GossipSub([PROTOCOL_ID_V11], degree=6, degree_low=4, degree_high=12)
    pubsub = Pubsub(host, router)
    async with (
        host.run(listen_addrs=listen),
        background_trio_service(pubsub),
        background_trio_service(router),
    ):
        await pubsub.wait_until_ready()
        await pubsub.subscribe(TOPIC)
        yield pubsub, router
    pubsub.seen_messages.stop()


async def test_a_forwarder_of_thirty_origins_is_taken_for_a_spammer() -> None:
    with trio.fail_after(10):
        async with running_stock() as (pubsub, router):
            hub = ID.from_pubkey(create_new_key_pair().public_key)
            for number in range(30):
                message = signed_message(create_new_key_pair(), b"%d" % number)
                await pubsub.push_msg(hub, message)
            assert len(router.mcache.msgs) == 10


async def test_deliveries_are_remembered_for_ever() -> None:
    with trio.fail_after(10):
        async with running_stock() as (pubsub, router):
            router.spam_protection_enabled = False
            for number in range(200):
                await pubsub.publish(TOPIC, b"%d" % number)
            assert len(router.recent_message_deliveries[TOPIC]) == 200


async def test_numbers_begin_at_the_second_of_the_start_and_so_repeat_after_a_burst() -> None:
    with trio.fail_after(10):
        async with running_stock() as (pubsub, _):
            assert pubsub.counter <= time.time()
            for number in range(60):
                await pubsub.publish(TOPIC, b"%d" % number)
            assert pubsub.counter > time.time() + 30


async def test_a_junk_key_of_a_hash_type_peer_id_raises() -> None:
    message = signed_message(create_new_key_pair(), b"data")
    message.from_id = b"\x12\x20" + b"h" * 32
    message.key = b"junk"
    with pytest.raises(Exception, match=r".*"):
        signature_validator(message)


async def test_a_service_ends_at_a_thousand_tasks() -> None:
    with trio.fail_after(10):
        async with running_stock() as (pubsub, _):
            inner = next(iter(pubsub.manager._root_tasks))
            inner.children.update(range(1_000))
            with pytest.raises(TooManyChildrenException):
                inner.add_child(object())
            inner.children.difference_update(range(1_000))
