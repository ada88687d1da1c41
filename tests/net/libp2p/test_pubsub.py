"""Publish and subscribe over real loopback hosts; each trap of GossipSub has its test."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import aclosing

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.pubsub.pb import rpc_pb2

from meshnode.net.libp2p.pubsub_wire import encode_frame
from meshnode.net.mesh import Verdict
from support.pubsub_nodes import (
    TOPIC,
    connect,
    linked,
    raw_peer,
    rpcs_from,
    running,
    signed_message,
    star,
    subscribed,
    until,
)


@pytest.fixture(autouse=True)
def leaked_sockets_collected() -> Iterator[None]:
    """The stock host leaves the sockets it dialled to the garbage collector."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


async def test_a_message_reaches_a_linked_peer_and_names_its_sender() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await linked(a, b)
            await a.pubsub.publish(TOPIC, b"hello")
            await b.wait_heard(1)
            assert b.heard == [(a.peer_id, b"hello")]
            assert a.heard == []


async def test_a_hub_carries_every_leafs_message_to_every_other_leaf() -> None:
    with trio.fail_after(40):
        async with star(14) as (hub, leaves):
            await hub.pubsub._router.beat()  # would prune the hub's mesh from 14 to 6
            for leaf in leaves:
                await leaf.pubsub.publish(TOPIC, leaf.peer_id.encode())
            for leaf in leaves:
                await leaf.wait_heard(13)
                assert {sender for sender, _ in leaf.heard} == {
                    other.peer_id for other in leaves if other is not leaf
                }
            await hub.wait_heard(14)


async def test_an_own_message_goes_to_every_subscriber_without_a_mesh() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await linked(a, b)
            await a.pubsub.publish(TOPIC, b"by whatever way")
            await b.wait_heard(1)
            for node, other in ((a, b), (b, a)):
                node.pubsub._router.mesh[TOPIC].clear()
                # Neither graft nor gossip brings it to b while the two back off.
                node.pubsub._router._add_back_off(other.host.get_id(), TOPIC, False)
            await a.pubsub.publish(TOPIC, b"flooded")
            await b.wait_heard(2)


async def test_a_dead_stream_is_replaced_and_nobody_forgets_a_subscription() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await linked(a, b)
            inner = a.pubsub._pubsub
            dead = inner.peers[b.host.get_id()]
            await dead.reset()
            await a.pubsub.publish(TOPIC, b"sent while there is no stream")
            await b.wait_heard(1)
            assert inner.peers[b.host.get_id()] is not dead
            await subscribed(b, a)
            await b.pubsub.publish(TOPIC, b"and back")
            await a.wait_heard(1)


async def test_a_stream_that_the_peer_reset_is_replaced_before_anything_is_sent() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await linked(a, b)
            inbound, a_id = b.pubsub._pubsub._inbound, a.host.get_id()
            dead = inbound[a_id]
            await dead.reset()
            await until(lambda: inbound.get(a_id) not in (None, dead))
            await subscribed(b, a)
            await b.pubsub.publish(TOPIC, b"heard")
            await a.wait_heard(1)


async def test_a_hello_brings_a_forgotten_subscription_back() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await linked(a, b)
            a.pubsub._pubsub._forget_all_subscriptions(b.host.get_id())
            b.pubsub.say_hello()
            await subscribed(a, b)
            await a.pubsub.publish(TOPIC, b"heard again")
            await b.wait_heard(1)


async def test_a_message_published_before_the_link_reaches_the_new_peer() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await a.pubsub.publish(TOPIC, b"said to nobody")
            await linked(a, b)
            await b.wait_heard(1)


async def test_a_new_peer_is_offered_what_was_said_lately_and_gets_what_it_asks_for() -> None:
    """Sent unasked, all of it came again over each of fifty links that a restarted mesh makes."""
    with trio.fail_after(10):
        async with running() as a, raw_peer() as raw:
            for words in (b"said", b"to nobody"):
                await a.pubsub.publish(TOPIC, words)
            stream = await raw.open_stream(a)
            hello = rpc_pb2.RPC.SubOpts(subscribe=True, topicid=TOPIC)
            await stream.write(encode_frame(rpc_pb2.RPC(subscriptions=[hello])))
            async with aclosing(rpcs_from(raw)) as told:
                while not (rpc := await anext(told)).control.ihave:
                    assert not rpc.publish
                (ihave,) = rpc.control.ihave
                assert (ihave.topicID, len(ihave.messageIDs)) == (TOPIC, 2)
                iwant = rpc_pb2.ControlIWant(messageIDs=ihave.messageIDs[1:])
                control = rpc_pb2.ControlMessage(iwant=[iwant])
                await stream.write(encode_frame(rpc_pb2.RPC(control=control)))
                while not (rpc := await anext(told)).publish:
                    assert not rpc.control.ihave  # once is enough
                assert [message.data for message in rpc.publish] == [b"to nobody"]


async def test_thirty_origins_through_one_hub_within_a_second_all_arrive() -> None:
    with trio.fail_after(10):
        async with running() as hub, running() as b, raw_peer() as relay:
            await linked(hub, b)
            stream = await relay.open_stream(hub)
            for number in range(30):
                message = signed_message(create_new_key_pair(), b"%d" % number)
                await stream.write(encode_frame(rpc_pb2.RPC(publish=[message])))
            await b.wait_heard(30)


async def test_a_node_that_restarts_after_a_burst_is_heard_at_once() -> None:
    key_pair = create_new_key_pair()
    with trio.fail_after(15):
        async with running() as b:
            async with running(key_pair) as a:
                await linked(a, b)
                for number in range(60):
                    await a.pubsub.publish(TOPIC, b"%d" % number)
                await b.wait_heard(60)
            b.pubsub.dismiss(a.peer_id)
            # The stock host leaves its sockets open, so b can't see that a is gone.
            await b.host.get_network().close_peer(a.host.get_id())
            async with running(key_pair) as a:
                await linked(a, b)
                await a.pubsub.publish(TOPIC, b"back")
                await b.wait_heard(61)


async def test_a_burst_of_500_messages_arrives_whole_and_in_order() -> None:
    with trio.fail_after(20):
        async with running() as a, running() as b:
            await linked(a, b)
            for number in range(500):
                await a.pubsub.publish(TOPIC, b"%d" % number)
            await b.wait_heard(500)
            assert [data for _, data in b.heard] == [b"%d" % number for number in range(500)]


async def test_nothing_is_kept_for_ever_per_message() -> None:
    with trio.fail_after(20):
        async with running() as a, running() as b:
            await linked(a, b)
            for number in range(200):
                await a.pubsub.publish(TOPIC, b"%d" % number)
            await b.wait_heard(200)
            for node in (a, b):
                router = node.pubsub._router
                assert not router.recent_message_deliveries
                assert not router.equivocation_detection
                assert not router._pending_messages
                for _ in range(6):
                    await router.beat()
                assert not router.mcache.msgs


class ByTopic:
    """Says REJECT, IGNORE or raises, as the message asks."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def __call__(self, sender: str, data: bytes) -> Verdict:
        self.heard.append(data)
        return Verdict(data.decode())  # any other word raises


async def test_only_accepted_messages_are_forwarded() -> None:
    judge = ByTopic()
    with trio.fail_after(15):
        async with running() as a, running(listener=judge) as hub, running() as b:
            await linked(a, hub)
            await linked(hub, b)
            for data in (b"reject", b"ignore", b"raise", b"accept"):
                await a.pubsub.publish(TOPIC, data)
            await b.wait_heard(1)
            assert b.heard == [(a.peer_id, b"accept")]
            assert judge.heard == [b"reject", b"ignore", b"raise", b"accept"]
            assert hub.faults("listener_failed") == 1


async def test_a_topic_without_a_listener_is_not_forwarded() -> None:
    other = "/other"
    with trio.fail_after(15):
        async with (
            running(topics=(TOPIC, other)) as a,
            running() as hub,
            running(topics=(TOPIC, other)) as b,
        ):
            await linked(a, hub)
            await linked(hub, b)
            await a.pubsub.publish(other, b"not for the hub")
            await a.pubsub.publish(TOPIC, b"for all")
            await b.wait_heard(1)
            assert b.heard == [(a.peer_id, b"for all")]


async def test_an_unadmitted_peer_gets_no_message_and_gives_none() -> None:
    with trio.fail_after(15):
        async with running() as a, running() as b, running() as stranger:
            await linked(a, b)
            stranger.pubsub.admit(a.peer_id)
            await connect(stranger, a)
            await until(lambda: a.faults("not_a_member") > 0)
            await stranger.pubsub.publish(TOPIC, b"let me in")
            await a.pubsub.publish(TOPIC, b"for members")
            await b.wait_heard(1)
            assert (a.heard, stranger.heard) == ([], [])

            a.pubsub.admit(stranger.peer_id)
            await subscribed(stranger, a)
            await stranger.pubsub.publish(TOPIC, b"thank you")
            await until(lambda: (stranger.peer_id, b"thank you") in a.heard)


async def test_no_stream_is_opened_to_a_peer_before_it_is_admitted() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b, raw_peer() as stranger:
            await stranger.connect(a)
            await linked(a, b)
            await a.pubsub.publish(TOPIC, b"for members")
            await b.wait_heard(1)
            assert stranger.inbound == []
            a.pubsub.admit(stranger.host.get_id().to_base58())
            await until(lambda: len(stranger.inbound) == 1)


async def test_a_dismissed_peer_gets_and_gives_nothing_more() -> None:
    with trio.fail_after(15):
        async with running() as a, running() as b, running() as c:
            await linked(a, b)
            await linked(a, c)
            a.pubsub.dismiss(c.peer_id)
            await a.pubsub.publish(TOPIC, b"for b alone")
            await c.pubsub.publish(TOPIC, b"for nobody")
            await b.wait_heard(1)
            await until(lambda: a.faults("not_a_member") > 0)
            assert (a.heard, c.heard) == ([], [])
            for streams in (a.pubsub._pubsub.peers, a.pubsub._pubsub.peer_queues):
                assert list(streams) == [b.host.get_id()]


async def test_a_task_that_comes_after_the_end_starts_nothing() -> None:
    with trio.fail_after(10):
        async with running() as a:
            manager = a.pubsub._pubsub.manager
        manager.run_task(trio.sleep_forever)
        assert not manager.is_running


async def test_a_service_may_have_more_than_a_thousand_tasks() -> None:
    with trio.fail_after(15):
        async with running() as a, running() as b:
            for _ in range(1_100):
                a.pubsub._pubsub.manager.run_task(trio.sleep_forever)
            await linked(a, b)


async def test_twenty_teardowns_raise_nothing_and_log_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with trio.fail_after(60):
        for _ in range(20):
            with caplog.at_level(logging.WARNING):
                async with running() as a, running() as b:
                    await linked(a, b)
                    for number in range(5):
                        await a.pubsub.publish(TOPIC, b"%d" % number)
                        await b.pubsub.publish(TOPIC, b"%d" % number)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
