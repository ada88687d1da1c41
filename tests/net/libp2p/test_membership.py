"""Who holds the token is let in; who does not is told so at once, and gets nothing else."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from meshnode.errors import PeerRefused, PeerUnreachable, StreamReset, TokenRefused
from meshnode.net.libp2p import gate, membership
from meshnode.net.libp2p.limits import Limits
from meshnode.net.libp2p.negotiate import propose
from meshnode.net.libp2p.swarm import open_negotiated
from meshnode.net.libp2p.tcp import TcpStream, open_tcp, parse_tcp_addr
from meshnode.net.mesh import LinkState, MeshStream
from support.pubsub_nodes import until

KEY = b"k" * 32
OTHER = b"o" * 32
SERVED = "/test/served/1.0.0"


async def pending_connection(node, target):
    """Connect as ``node.dial`` does, and stop where membership would be proven."""
    socket = await open_tcp(parse_tcp_addr(target.addrs[0]))
    return await node._swarm.upgrade(TcpStream(socket), target.peer_id)


async def test_a_wrong_token_is_named_at_once_on_both_sides(make_node, run_nodes):
    one, two = make_node(keys=(KEY,)), make_node(keys=(OTHER,))
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            began = trio.current_time()
            with pytest.raises(TokenRefused, match="token"):
                await two.dial(one.addrs[0], timeout=5)
            assert trio.current_time() - began < 1
            assert not one.links()
            assert not two.links()
            while one._swarm.all_conns:
                await trio.lowlevel.checkpoint()
    for node, other in ((one, two), (two, one)):
        (event,) = node.events
        assert (event.state, event.peer_id) == (LinkState.REFUSED, other.peer_id)
        assert "token" in event.reason
        assert node.memberships("wrong_token") == 1


async def test_any_of_several_keys_will_do_while_a_token_is_rotated(make_node, run_nodes):
    old, both, new = (make_node(keys=k) for k in ((KEY,), (OTHER, KEY), (OTHER,)))
    with trio.fail_after(5):
        async with run_nodes(old, both, new, linked=False):
            await both.dial(old.addrs[0], timeout=3)
            await new.dial(both.addrs[0], timeout=3)
            with pytest.raises(TokenRefused):
                await new.dial(old.addrs[0], timeout=3)
            assert len(both.links()) == 2


async def test_a_listener_that_only_pretends_to_know_the_key_is_refused(make_node, run_nodes):
    # It names the right key, which it has seen on the wire, and sends a proof of nothing.
    one, two = make_node(keys=(OTHER,)), make_node(keys=(KEY,))

    async def pretend(conn, stream) -> None:
        channel = membership._Channel(stream)
        hello = await channel.receive()
        forged = {"nonce": b"n" * 32, "key_id": hello.key_ids[0], "proof": b"p" * 32}
        await channel.send(membership.protocol.Challenge(**forged))
        assert isinstance(await channel.receive(), membership.protocol.Refusal)
        refused.set()

    refused = trio.Event()
    one._serving.add_for_conns(membership.PROTOCOL_ID, pretend)
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            with pytest.raises(TokenRefused):
                await two.dial(one.addrs[0], timeout=3)
            await refused.wait()
            assert not two.links()


async def test_nothing_is_served_before_membership_is_proven(make_node, run_nodes):
    one, two = make_node(limits=Limits(membership_timeout=0.2)), make_node()
    served = []

    async def note(stream: MeshStream) -> None:
        served.append(stream)

    one.serve(SERVED, note)
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            conn = await pending_connection(two, one)
            async with trio.open_nursery() as nursery:
                for protocol_id in (SERVED, "/ipfs/ping/1.0.0", "/meshsub/1.1.0"):
                    stream = await conn.muxed_conn.open_stream()
                    nursery.start_soon(_expect_reset, stream, protocol_id)
            await conn.event_closed.wait()
    assert not served
    assert one.memberships("timeout") == 1
    assert [event.state for event in one.events] == [LinkState.REFUSED]
    assert "in time" in one.events[0].reason


async def test_the_dialled_side_gets_nothing_before_it_proved_itself_either(make_node, run_nodes):
    one, two = make_node(), make_node()
    two.serve(SERVED, lambda stream: stream.send_all(b"secret"))
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            conn = await pending_connection(two, one)
            while not one._swarm.all_conns:
                await trio.lowlevel.checkpoint()
            (theirs,) = one._swarm.all_conns
            stream = await theirs.muxed_conn.open_stream()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_expect_reset, stream)
                await trio.testing.wait_all_tasks_blocked(0.05)
                await conn.close()


async def _expect_reset(stream, protocol_id: str = SERVED) -> None:
    with pytest.raises(StreamReset):
        await propose(stream, (protocol_id,))


async def test_a_stream_that_overtakes_the_welcome_waits_and_is_served(make_node, run_nodes):
    one, two = make_node(), make_node()

    async def greet(stream: MeshStream) -> None:
        await stream.send_all(b"welcome")

    two.serve(SERVED, greet)
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            conn = await pending_connection(two, one)
            while not one._swarm.all_conns:
                await trio.lowlevel.checkpoint()
            (theirs,) = one._swarm.all_conns
            stream = await theirs.muxed_conn.open_stream()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(propose, stream, (SERVED,))
                await trio.testing.wait_all_tasks_blocked(0.05)
                await two._gate._prove(conn)
            assert await stream.receive_some() == b"welcome"


async def test_streams_that_wait_for_membership_are_few(make_node, run_nodes):
    one, two = make_node(limits=Limits(max_waiting_streams=2)), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            conn = await pending_connection(two, one)
            refused = []

            async def knock() -> None:
                stream = await conn.muxed_conn.open_stream()
                try:
                    await propose(stream, (SERVED,))
                except StreamReset:
                    refused.append(stream)

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(knock)
                while len(refused) < 3:
                    await trio.lowlevel.checkpoint()
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert len(refused) == 3
                await conn.close()


async def test_between_members_one_renewal_at_a_time_is_answered_whoever_dialled(
    make_node, run_nodes
):
    one, two = make_node(), make_node()
    with trio.fail_after(10):
        async with run_nodes(one, two):
            for node, other in ((one, two), (two, one)):
                first = await node.open_stream(other.peer_id, membership.PROTOCOL_ID, timeout=1)
                with pytest.raises(PeerRefused, match="does not serve"):
                    await node.open_stream(other.peer_id, membership.PROTOCOL_ID, timeout=1)
                await membership.prove_as_dialler(first, (KEY,), node.peer_id)
                await first.aclose()
                assert node.links() and other.links()


async def test_a_member_that_proves_nothing_anew_is_cut_off(make_node, run_nodes):
    one, two = make_node(limits=Limits(renewal_timeout=0.2)), make_node()
    with trio.fail_after(10):
        async with run_nodes(one, two):
            await two.open_stream(one.peer_id, membership.PROTOCOL_ID, timeout=1)
            while one.links():
                await trio.lowlevel.checkpoint()
            assert "not proven anew" in one.events[-1].reason


@pytest.mark.parametrize(
    "garbage", [b"\x00\x00\x00\x05junk!", b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\x80", b""]
)
async def test_garbage_for_a_proof_ends_the_connection_and_is_counted(
    make_node, run_nodes, garbage
):
    one, two = make_node(), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            conn = await pending_connection(two, one)
            stream = await conn.muxed_conn.open_stream()
            await propose(stream, (membership.PROTOCOL_ID,))
            await stream.send_all(garbage)
            await stream.send_eof()
            await conn.event_closed.wait()
            assert not one.links()
            await two.dial(one.addrs[0], timeout=3)
    assert one.memberships("member") == 1


async def test_a_dialler_that_dies_while_it_proves_membership_is_not_called_refused(
    make_node, run_nodes, monkeypatch
):
    """Its token was right: a warning would send somebody to compare tokens."""
    one, two = make_node(), make_node()
    told: list[LinkState] = []
    one.watch_links(lambda event: told.append(event.state))

    async def prove_and_lose(*args: object, **options: object) -> bytes:
        proven_by = await membership.prove_as_listener(*args, **options)
        for conn in tuple(one._swarm.all_conns):
            await conn.close("it was killed")
        return proven_by

    monkeypatch.setattr(gate, "prove_as_listener", prove_and_lose)
    with trio.fail_after(10):
        async with run_nodes(one, two, linked=False):
            with suppress(PeerUnreachable):  # or it took itself for a member for a moment
                await two.dial(one.addrs[0], timeout=1)
            await until(lambda: one.memberships("broken") == 1)
    assert LinkState.REFUSED not in told


async def test_a_listener_that_never_answers_is_given_up(make_node, run_nodes):
    one, two = make_node(), make_node(limits=Limits(membership_timeout=0.1))

    async def stall(*args: object) -> None:
        await trio.sleep_forever()

    one._serving.add_for_conns(membership.PROTOCOL_ID, stall)
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            with pytest.raises(PeerUnreachable, match="membership"):
                await two.dial(one.addrs[0], timeout=3)
            assert not two._swarm.all_conns
            assert not two._gate._proving


async def test_a_dialler_that_asks_for_identify_first_is_not_kept_waiting(make_node, run_nodes):
    """go-libp2p opens no stream of its own, membership's included, before that is answered."""
    one, two = make_node(), make_node()
    pushed = trio.Event()

    async def take_push(stream: MeshStream) -> None:
        assert await stream.receive_some()
        pushed.set()

    two.serve("/ipfs/id/push/1.0.0", take_push)
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            conn = await pending_connection(two, one)
            began = trio.current_time()
            with pytest.raises(PeerRefused):
                await open_negotiated(conn, ("/ipfs/id/1.0.0",))
            assert trio.current_time() - began < 1
            # The same connection may still become a member's, who is then told unasked.
            await two._gate._prove(conn)
            await pushed.wait()
            stream = await two.open_stream(one.peer_id, "/ipfs/id/1.0.0", timeout=2)
            assert await stream.receive_some()
            stream.reset()
