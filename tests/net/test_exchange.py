"""Requests one after another over kept tunnels and connections, to backends on loopback."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

import pytest
import trio

from meshnode.errors import StreamReset
from meshnode.net import exchange as exchanges
from meshnode.net.local_services import LocalService
from meshnode.net.upstream import AttemptError

LIMIT = 20.0  # seconds, for one test


@pytest.fixture(params=["memory", "libp2p"])
def any_node(request):
    kind = {"memory": "make_node", "libp2p": "make_libp2p_node"}[request.param]
    return request.getfixturevalue(kind)


class Backend:
    """Answers each line with what it is told; counts its connections and what they got."""

    def __init__(self):
        self.connections = 0
        self.open = 0
        self.lines = []
        self.broken = trio.Event()
        self.close_after = None  # answers per connection
        self.port = 0

    async def serve(self, stream):
        self.connections += 1
        self.open += 1
        answered = 0
        try:
            async with stream:
                async for data in stream:
                    for line in data.decode().splitlines():
                        self.lines.append(line)
                        if line == "hang":
                            continue
                        if line == "cut":
                            abort(stream)
                            return
                        answered += 1
                        # Before the answer leaves: who has it may set the limit anew.
                        is_last = self.close_after and answered >= self.close_after
                        await stream.send_all(f"{line}!".encode())
                        if is_last:
                            return
        except trio.BrokenResourceError:
            self.broken.set()
        finally:
            self.open -= 1


def abort(stream):
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


@pytest.fixture
async def backend(nursery):
    backend = Backend()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, backend.serve, listeners)
    backend.port = listeners[0].socket.getsockname()[1]
    return backend


@pytest.fixture
async def pair(any_node, start, wait_until, backend):
    """Two linked nodes: the first asks, the second serves ``llm``."""
    front = any_node("front")
    peer = any_node("peer", vram=5, services=[LocalService("llm", "127.0.0.1", backend.port)])
    await start(front, peer)
    await peer.mesh.dial(front.mesh.addrs[0], timeout=5)
    await wait_until(lambda: front.online() == {"front", "peer"}, within=10)
    return front, peer


def lease_of(node):
    return node.router.lease(now=trio.current_time(), service_id="llm")


async def begin(node, lease, text, **options):
    options = {"fresh": False} | options
    return await node.upstreams.begin(lease, text.encode() + b"\n", **options)


async def ask(node, text, **options):
    with lease_of(node) as lease:
        exchange = await begin(node, lease, text, **options)
        await exchange.wait_accepted()
        answer = await exchange.receive_some()
        await exchange.finish()
        return answer.decode()


async def test_a_hundred_requests_need_one_tunnel_and_one_connection(pair, backend, wait_until):
    front, peer = pair
    with trio.fail_after(LIMIT):
        for number in range(100):
            assert await ask(front, f"{number}") == f"{number}!"
        assert backend.connections == 1
        await wait_until(lambda: peer.services.total_in_flight == 0, within=5)
        assert len(front.upstreams._tunnels) == 1
        opened = front.metrics.registry.get_sample_value("meshnode_tunnel_open_seconds_count")
        assert opened == 1, "the requests over a tunnel that was kept open none"


async def test_a_quiet_tunnel_is_no_load_and_an_open_request_is(pair, backend, wait_until):
    front, peer = pair
    with trio.fail_after(LIMIT):
        assert await ask(front, "a") == "a!"
        await wait_until(lambda: peer.services.in_flight("llm") == 0, within=5)
        with lease_of(front) as lease:
            exchange = await begin(front, lease, "hang")
            await exchange.wait_accepted()
            assert peer.services.in_flight("llm") == 1
            exchange.reset()
        await wait_until(lambda: peer.services.in_flight("llm") == 0, within=5)


async def test_giving_up_cuts_the_backend_at_once(pair, backend):
    front, _ = pair
    with trio.fail_after(LIMIT):
        with lease_of(front) as lease:
            exchange = await begin(front, lease, "hang")
            await exchange.wait_accepted()
            while not backend.lines:  # noqa: ASYNC110
                await trio.sleep(0.001)
            given_up_at = trio.current_time()
            exchange.reset()
            await backend.broken.wait()
        assert trio.current_time() - given_up_at < 1


async def test_a_backend_that_closes_idle_connections_loses_no_request(pair, backend):
    front, _ = pair
    backend.close_after = 1
    with trio.fail_after(LIMIT):
        for number in range(30):
            assert await ask(front, f"{number}") == f"{number}!"
            while backend.open:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert backend.connections == 30
        assert len(front.upstreams._tunnels) == 1


async def test_a_request_that_must_not_be_sent_twice_gets_a_connection_of_its_own(pair, backend):
    front, _ = pair
    with trio.fail_after(LIMIT):
        assert await ask(front, "a") == "a!"
        assert await ask(front, "b", fresh=True) == "b!"
        assert await ask(front, "c") == "c!"
        assert backend.connections == 2


async def accepted_and_read(exchange):
    await exchange.wait_accepted()  # a backend that cuts at once may cut its promise too
    return await exchange.receive_some()


async def test_an_answer_that_is_cut_is_cut_here_too(pair, backend, wait_until):
    front, peer = pair
    with trio.fail_after(LIMIT):
        with lease_of(front) as lease:
            exchange = await begin(front, lease, "cut")
            with pytest.raises(StreamReset):
                await accepted_and_read(exchange)
            exchange.reset()
        assert await ask(front, "next") == "next!"
        await wait_until(lambda: peer.services.in_flight("llm") == 0, within=5)


async def test_a_refused_request_reaches_no_backend_and_leaves_the_tunnel_usable(pair, backend):
    front, peer = pair
    with trio.fail_after(LIMIT):
        assert await ask(front, "a") == "a!"
        peer.services.draining = True
        with lease_of(front) as lease:
            exchange = await begin(front, lease, "refused")
            with pytest.raises(AttemptError) as refused, front.upstreams.failures(lease):
                await exchange.receive_some()
            assert (refused.value.reason, refused.value.is_untouched) == ("draining", True)
            await exchange.finish()
        peer.services.draining = False
        assert await ask(front, "b") == "b!"
        assert backend.lines == ["a", "b"]
        assert backend.connections == 1


async def test_an_answer_longer_than_wanted_never_begins_the_next_one(pair, backend):
    front, _ = pair
    with trio.fail_after(LIMIT):
        with lease_of(front) as lease:
            exchange = await begin(front, lease, "a\nb\nc")
            assert await exchange.receive_some(2) == b"a!"
            await exchange.finish()
        # What comes late meets the next request, which is cut: it never gets another's answer.
        with suppress(StreamReset):
            assert await ask(front, "d") == "d!"
        assert await ask(front, "e") == "e!"


async def test_requests_at_once_each_have_their_tunnel_and_those_are_kept(pair, backend):
    front, _ = pair
    with trio.fail_after(LIMIT):
        for _ in range(3):
            leases = [lease_of(front) for _ in range(20)]
            begun = [await begin(front, lease, f"{n}") for n, lease in enumerate(leases)]
            for n, (exchange, lease) in enumerate(zip(begun, leases, strict=True)):
                assert await exchange.receive_some() == f"{n}!".encode()
                await exchange.finish()
                lease.release()
        assert backend.connections == 20
        assert len(front.upstreams._tunnels) == 20


async def test_no_more_tunnels_are_kept_than_the_bound(pair, backend, monkeypatch):
    monkeypatch.setattr(exchanges, "MAX_KEPT", 3)
    front, _ = pair
    with trio.fail_after(LIMIT):
        leases = [lease_of(front) for _ in range(8)]
        begun = [await begin(front, lease, "x") for lease in leases]
        for exchange, lease in zip(begun, leases, strict=True):
            assert await exchange.receive_some() == b"x!"
            await exchange.finish()
            lease.release()
        assert len(front.upstreams._tunnels) == 3


async def test_kept_tunnels_of_a_dead_peer_are_passed_over(
    any_node, pair, backend, wait_until, start
):
    front, peer = pair
    with trio.fail_after(LIMIT):
        assert await ask(front, "a") == "a!"
        peer.kill()
        await wait_until(lambda: peer.peer_id not in front.linked(), within=10)
        other = any_node("other", services=[LocalService("llm", "127.0.0.1", backend.port)])
        await start(other)
        await other.mesh.dial(front.mesh.addrs[0], timeout=5)
        await wait_until(lambda: "other" in front.online(), within=10)
        await wait_until(lambda: "peer" not in front.online(), within=10)
        assert await ask(front, "b") == "b!"


async def test_what_nobody_uses_for_a_minute_is_closed(make_node, start, autojump_clock):
    kept = exchanges.Kept()
    key = ("peer", "llm")
    for name in ("old", "older"):
        kept.put(key, name)
    await trio.sleep(50)
    kept.put(key, "young")
    assert kept.expired(trio.current_time()) == []
    await trio.sleep(10)
    assert kept.expired(trio.current_time()) == ["old", "older"]
    assert (len(kept), kept.take(key), kept.take(key), len(kept)) == (1, "young", None, 0)


async def test_a_nodes_own_service_is_asked_over_kept_connections(
    make_node, start, wait_until, backend
):
    with trio.fail_after(LIMIT):
        node = make_node("alone", services=[LocalService("llm", "127.0.0.1", backend.port)])
        await start(node)
        await wait_until(lambda: node.online() == {"alone"}, within=5)
        for number in range(10):
            assert await ask(node, f"{number}") == f"{number}!"
            assert node.services.total_in_flight == 0
        assert backend.connections == 1
        assert await ask(node, "b", fresh=True) == "b!"
        backend.close_after = 1
        for text in ("c", "d", "e"):
            still_open = backend.open
            assert await ask(node, text) == f"{text}!"
            await wait_until(lambda before=still_open: backend.open < max(before, 1), within=5)
            await trio.sleep(0.05)  # its FIN may still be on the way through the kernel
