"""Clients' TCP connections, carried over both meshes to services that listen on loopback."""

from __future__ import annotations

import hashlib
import socket
import struct
from contextlib import ExitStack

import pytest
import trio

from meshnode.core import tunnel
from meshnode.core.node_data import ServiceData
from meshnode.net import upstream
from meshnode.net.accept import AcceptLimits
from meshnode.net.federation_entry import EntrySettings
from meshnode.net.local_services import LocalService

LIMIT = 20.0  # seconds, for one test


async def echo(stream):
    async for data in stream:
        await stream.send_all(data)


def says(text):
    async def say(stream):
        async for _ in stream:
            pass
        await stream.send_all(text)

    return say


async def hold(stream):
    await stream.send_all(b"begun")
    async for _ in stream:
        pass
    await trio.sleep_forever()


async def receive_all(stream):
    received = b""
    async for data in stream:
        received += data
    return received


async def settle(node):
    """Wait until the last tunnel of ``node`` is over, which its client may know a moment before."""
    while node.router.own_total or node.router.decisions()[0].outcome is None:  # noqa: ASYNC110
        await trio.sleep(0.001)


async def ask(connect, request=b"request"):
    async with await connect() as client:
        await client.send_all(request)
        await client.send_eof()
        return await receive_all(client)


def llm(port, **options):
    return [LocalService("llm", "127.0.0.1", port, **options)]


def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def abort(client):
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.close()


async def test_a_client_reaches_the_peer_with_most_free_vram(any_node, link, backend, proxy):
    with trio.fail_after(LIMIT):
        front = any_node("front")
        small = any_node("small", vram=8, services=llm(await backend(says(b"small"))))
        big = any_node("big", vram=24, services=llm(await backend(says(b"big"))))
        await link(front, small, big)

        connect = await proxy(front)

        assert await ask(connect) == b"big"
        await settle(front)
        assert await ask(connect) == b"big"
        await settle(front)
        (last, first) = front.router.decisions()
        assert (first.outcome, first.picked, first.tier) == ("complete", big.peer_id, "vram")
        assert last.retries == 0
        assert front.router.own_total == 0
        assert front.counted("tunnels_total", role="entry", outcome="complete") == 2
        assert front.counted("tunnel_bytes_total", direction="to_service") == 14
        assert front.counted("tunnel_bytes_total", direction="to_client") == 6
        assert front.counted("request_ttft_seconds_count") == 2
        assert front.counted("tunnel_open_seconds_count") == 2
        assert front.counted("routing_decisions_total", tier="vram") == 2


async def test_simultaneous_clients_spread_over_all_peers(
    any_node, link, backend, proxy, wait_until
):
    with trio.fail_after(LIMIT):
        front = any_node("front")
        peers = [
            any_node(name, vram=vram, services=llm(await backend(hold)))
            for name, vram in [("a", 8), ("b", 16), ("c", 24)]
        ]
        await link(front, *peers)
        connect = await proxy(front)

        clients = [await connect() for _ in range(9)]
        for client in clients:
            assert await client.receive_some() == b"begun"

        assert [front.router.own_in_flight(p.peer_id, "llm") for p in peers] == [3, 3, 3]
        assert [p.services.in_flight("llm") for p in peers] == [3, 3, 3]
        assert [p.services.in_flight_of_others("llm", front.peer_id) for p in peers] == [0] * 3
        for client in clients:
            abort(client)
        await wait_until(lambda: front.router.own_total == 0, within=5)
        await wait_until(lambda: sum(p.services.total_in_flight for p in peers) == 0, within=5)


async def test_a_reply_tells_what_others_hold_on_the_peer(
    any_node, link, backend, proxy, wait_until
):
    with trio.fail_after(LIMIT):
        front = any_node("front")
        peer = any_node("peer", vram=5, services=llm(await backend(hold)))
        await link(front, peer)
        peer.services.on_change = lambda: None
        peer.vram = 3
        connect = await proxy(front)

        with peer.services.claim("llm", "another"), peer.services.claim("llm", "another"):
            async with await connect() as client:
                assert await client.receive_some() == b"begun"
                assert front.router.in_flight(peer.peer_id, "llm") == 3
                (row,) = front.router.explain(now=trio.current_time(), service_id="llm").candidates
                assert (row.others_in_flight, row.available_vram) == (2, 3)


async def test_a_client_that_half_closes_still_gets_its_answer(any_node, link, backend, proxy):
    async def count(stream):
        size = len(await receive_all(stream))
        await stream.send_all(b"%d" % size)

    with trio.fail_after(LIMIT):
        front, peer = any_node("front"), any_node("peer", services=llm(await backend(count)))
        await link(front, peer)
        assert await ask(await proxy(front), bytes(1_000_000)) == b"1000000"


async def test_a_backend_that_half_closes_still_hears_the_client(any_node, link, backend, proxy):
    heard = trio.Event()

    async def finish_first(stream):
        await stream.send_all(b"all I have to say")
        await stream.send_eof()
        if await receive_all(stream) == b"late words":
            heard.set()

    with trio.fail_after(LIMIT):
        front, peer = any_node("front"), any_node("peer", services=llm(await backend(finish_first)))
        await link(front, peer)
        async with await (await proxy(front))() as client:
            assert await receive_all(client) == b"all I have to say"
            await client.send_all(b"late words")
            await client.send_eof()
            await heard.wait()


async def test_ten_megabytes_arrive_whole_both_ways(any_node, link, backend, proxy):
    data = bytes(range(256)) * 40_000

    with trio.fail_after(LIMIT):
        front, peer = any_node("front"), any_node("peer", services=llm(await backend(echo)))
        await link(front, peer)
        async with await (await proxy(front))() as client, trio.open_nursery() as nursery:

            async def send():
                await client.send_all(data)
                await client.send_eof()

            nursery.start_soon(send)
            digest = hashlib.sha256()
            async for piece in client:
                digest.update(piece)
        assert digest.digest() == hashlib.sha256(data).digest()


async def test_an_answer_cut_by_the_backend_resets_the_client(any_node, link, backend, proxy):
    async def cut(stream):
        await stream.send_all(b"half of the ans")
        await stream.receive_some()
        abort(stream)

    with trio.fail_after(LIMIT):
        front, peer = any_node("front"), any_node("peer", services=llm(await backend(cut)))
        await link(front, peer)
        async with await (await proxy(front))() as client:
            assert await client.receive_some() == b"half of the ans"
            await client.send_all(b"go on")
            with pytest.raises(trio.BrokenResourceError):
                await receive_all(client)
        await settle(front)
        assert front.router.decisions()[0].outcome == "upstream_cut"


async def test_an_answer_cut_by_the_peers_death_resets_the_client(any_node, link, backend, proxy):
    with trio.fail_after(LIMIT):
        front, peer = any_node("front"), any_node("peer", services=llm(await backend(hold)))
        await link(front, peer)
        async with await (await proxy(front))() as client:
            assert await client.receive_some() == b"begun"
            peer.kill()
            with pytest.raises(trio.BrokenResourceError):
                await receive_all(client)


async def test_two_hundred_clients_at_once_are_all_served(
    any_node, link, backend, proxy, wait_until
):
    with trio.fail_after(LIMIT):
        front = any_node("front")
        peers = [any_node(name, services=llm(await backend(echo))) for name in "ab"]
        await link(front, *peers)
        connect = await proxy(front)
        answers = {}

        async def client(number):
            answers[number] = await ask(connect, b"%d" % number * 100)

        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(client, number)

        assert answers == {number: b"%d" % number * 100 for number in range(200)}
        await wait_until(lambda: front.router.own_total == 0, within=5)
        await wait_until(lambda: sum(p.services.total_in_flight for p in peers) == 0, within=5)


async def test_a_client_gone_early_releases_everything(any_node, link, backend, proxy, wait_until):
    with trio.fail_after(LIMIT):
        front, peer = any_node("front"), any_node("peer", services=llm(await backend(hold)))
        await link(front, peer)
        client = await (await proxy(front))()
        assert await client.receive_some() == b"begun"

        abort(client)

        await backend.broken.wait()
        await wait_until(lambda: front.router.own_total == 0, within=5)
        await wait_until(lambda: peer.services.in_flight("llm") == 0, within=5)
        assert front.router.decisions()[0].outcome == "client_gone"


async def test_a_tunnel_that_carries_nothing_ends(any_node, link, backend, proxy, wait_until):
    with trio.fail_after(LIMIT):
        front, peer = any_node("front"), any_node("peer", services=llm(await backend(hold)))
        await link(front, peer)
        connect = await proxy(front, EntrySettings(idle_timeout=0.2))
        async with await connect() as client:
            assert await client.receive_some() == b"begun"
            with pytest.raises(trio.BrokenResourceError):
                await client.receive_some()
        await wait_until(lambda: peer.services.in_flight("llm") == 0, within=5)
        assert front.router.decisions()[0].outcome == "idle"


# A peer that fails costs the client nothing: the next one serves


async def refuse_backend(bad, _network):
    pass  # its port is closed


async def be_busy(bad, _network):
    bad.services.on_change = lambda: None
    bad.kept = ExitStack()  # lives as long as the node: a claim that is dropped is given back
    bad.kept.enter_context(bad.services.claim("llm", "another"))


async def drain(bad, _network):
    bad.services.draining = True


async def die(bad, _network):
    bad.kill()


async def fall_silent(bad, network):
    network.isolate(bad.memory_mesh)


async def forget_service(bad, _network):
    bad.services._slots.clear()


async def serve_no_tunnels(bad, _network):
    del bad.mesh._handlers[tunnel.PROTOCOL_ID]


async def serve_garbage(bad, _network):
    async def garbage(stream):
        await stream.send_all(b"\0\0\0\1garbage")

    bad.mesh.serve(tunnel.PROTOCOL_ID, garbage)


async def reset_every_stream(bad, _network):
    async def reset(stream):
        stream.reset()

    bad.mesh.serve(tunnel.PROTOCOL_ID, reset)


async def say_nothing(bad, _network):
    async def silence(_stream):
        await trio.sleep_forever()

    bad.mesh.serve(tunnel.PROTOCOL_ID, silence)


@pytest.mark.parametrize(
    ("go_bad", "reason"),
    [
        (refuse_backend, "backend_unreachable"),
        (be_busy, "busy"),
        (drain, "draining"),
        (die, "unreachable"),
        (fall_silent, "timeout"),
        (forget_service, "no_such_service"),
        (serve_no_tunnels, "refused"),
        (serve_garbage, "protocol_error"),
        (reset_every_stream, "reset"),
        (say_nothing, "timeout"),
    ],
)
async def test_a_peer_that_fails_costs_the_client_nothing(
    make_node, network, link, backend, proxy, monkeypatch, go_bad, reason
):
    monkeypatch.setattr(upstream, "OPEN_TIMEOUT", 0.5)
    with trio.fail_after(LIMIT):
        front = make_node("front")
        port = closed_port() if go_bad is refuse_backend else await backend(says(b"bad"))
        bad = make_node("bad", vram=99, services=llm(port, max_in_flight=1))
        good = make_node("good", vram=1, services=llm(await backend(says(b"good"))))
        await link(front, bad, good)
        connect = await proxy(front)

        await go_bad(bad, network)

        assert await ask(connect) == b"good"
        await settle(front)
        assert front.counted("retries_total", reason=reason) == 1
        served, given_up = front.router.decisions()
        assert (given_up.picked, given_up.outcome) == (bad.peer_id, reason)
        assert (served.picked, served.outcome) == (good.peer_id, "complete")
        assert (served.attempt, served.retries) == (2, 1)
        assert front.router.own_total == 0


async def test_a_peer_gone_from_real_sockets_costs_the_client_nothing(
    make_libp2p_node, link, backend, proxy
):
    with trio.fail_after(LIMIT):
        front = make_libp2p_node("front")
        bad = make_libp2p_node("bad", vram=99, services=llm(await backend(says(b"bad"))))
        good = make_libp2p_node("good", vram=1, services=llm(await backend(says(b"good"))))
        await link(front, bad, good)
        connect = await proxy(front)
        assert await ask(connect) == b"bad"

        bad.kill()

        for _ in range(50):
            assert await ask(connect) == b"good"


async def test_a_peer_that_opens_no_streams_is_no_candidate_for_a_while(
    make_node, link, backend, proxy, network, monkeypatch
):
    monkeypatch.setattr(upstream, "OPEN_TIMEOUT", 0.5)
    with trio.fail_after(LIMIT):
        front = make_node("front")
        bad = make_node("bad", vram=99, services=llm(await backend(says(b"bad"))))
        good = make_node("good", vram=1, services=llm(await backend(says(b"good"))))
        await link(front, bad, good)
        await say_nothing(bad, network)
        connect = await proxy(front)

        for _ in range(10):
            assert await ask(connect) == b"good"

        assert front.counted("retries_total", reason="timeout") == 1
        assert front.counted("ejections_total", reason="open_failed") == 1


async def test_three_peers_are_tried_and_no_more(make_node, link, proxy):
    with trio.fail_after(LIMIT):
        front = make_node("front")
        bad = [make_node(f"bad{i}", services=llm(closed_port())) for i in range(5)]
        await link(front, *bad)

        assert await ask(await proxy(front)) == b""

        (reason,) = front.refused
        assert "backend_unreachable" in reason
        assert front.counted("retries_total", reason="backend_unreachable") == 3
        assert front.counted("tunnels_total", role="entry", outcome="unserved") == 1
        assert len({d.picked for d in front.router.decisions()}) == 3


async def test_a_client_that_nobody_can_serve_is_told_why(make_node, start, proxy):
    with trio.fail_after(LIMIT):
        front = make_node("front")
        await start(front)
        assert await ask(await proxy(front)) == b""
        (reason,) = front.refused
        assert "no peer offers a service yet" in reason


async def test_a_node_serves_its_own_clients_from_its_own_service(
    make_node, start, wait_until, backend, proxy
):
    with trio.fail_after(LIMIT):
        node = make_node("alone", services=llm(await backend(says(b"mine"))))
        await start(node)
        await wait_until(lambda: node.online() == {"alone"}, within=5)
        assert await ask(await proxy(node)) == b"mine"
        await settle(node)
        assert node.services.total_in_flight == 0
        assert node.router.decisions()[0].picked == node.peer_id


async def test_a_node_whose_own_service_is_down_uses_a_peers(make_node, link, backend, proxy):
    with trio.fail_after(LIMIT):
        front = make_node("front", vram=99, services=llm(closed_port()))
        peer = make_node("peer", services=llm(await backend(says(b"peer"))))
        await link(front, peer)
        connect = await proxy(front)
        assert await ask(connect) == b"peer"
        await settle(front)
        assert not front.services.is_healthy("llm")
        assert front.services.total_in_flight == 0


async def test_a_target_is_reached_by_name_and_nobody_else_serves(make_node, link, backend, proxy):
    with trio.fail_after(LIMIT):
        front = make_node("front")
        small = make_node("small", vram=1, services=llm(await backend(says(b"small"))))
        big = make_node("big", vram=99, services=llm(await backend(says(b"big"))))
        await link(front, small, big)
        by_name = await proxy(front, EntrySettings(target="small"))
        by_id = await proxy(front, EntrySettings(target=small.peer_id))
        assert await ask(by_name) == await ask(by_id) == b"small"

        small.kill()
        assert await ask(by_name) == b""
        assert front.refused


async def test_too_many_clients_are_cut_off_and_the_others_served(make_node, link, backend, proxy):
    with trio.fail_after(LIMIT):
        front, peer = make_node("front"), make_node("peer", services=llm(await backend(hold)))
        await link(front, peer)
        connect = await proxy(front, EntrySettings(limits=AcceptLimits(in_all=2)))
        clients = [await connect(), await connect()]
        for client in clients:
            assert await client.receive_some() == b"begun"
        async with await connect() as one_more:
            with pytest.raises(trio.BrokenResourceError):
                await receive_all(one_more)
        for client in clients:
            abort(client)


async def test_several_services_want_a_choice(make_node, link, backend, proxy):
    with trio.fail_after(LIMIT):
        front = make_node("front")
        port = await backend(says(b"x"))
        two = [LocalService("llm", "127.0.0.1", port), LocalService("tts", "127.0.0.1", port)]
        await link(front, make_node("peer", services=two))
        assert await ask(await proxy(front)) == b""
        assert "llm, tts" in front.refused[0]


async def test_a_stream_can_never_name_an_address(make_node, link, backend, proxy):
    with trio.fail_after(LIMIT):
        port = await backend(says(b"secret"))
        front, peer = make_node("front"), make_node("peer", services=llm(port))
        compose = peer.compose

        def lie(seq, state):
            address = ServiceData(service_id=f"127.0.0.1:{port}")
            return compose(seq, state).model_copy(update={"services": (address,)})

        peer.announcer._compose = lie
        await link(front, peer)
        assert await ask(await proxy(front)) == b""
        assert front.counted("retries_total", reason="no_such_service") == 1
