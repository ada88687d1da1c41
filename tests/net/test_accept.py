"""How many clients are let in, and what happens when descriptors run out, on real sockets."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import contextmanager, suppress

import pytest
import trio

from meshnode.http import server
from meshnode.metrics import Metrics
from meshnode.net import local_services
from meshnode.net.accept import AcceptLimits, Acceptor, ClientCount
from meshnode.net.descriptors import DescriptorReserve
from meshnode.net.local_services import LocalService, LocalServices

LIMIT = 20.0


async def greet(stream):
    async with stream:
        await stream.send_all(b"hello")
        async for _ in stream:
            pass


@pytest.fixture
async def door(nursery):
    """Serve clients behind limits; returns the acceptor and how to connect."""

    async def door(limits):
        metrics = Metrics()
        acceptor = Acceptor(limits, metrics=metrics)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(acceptor.serve_forever, greet, listeners)
        acceptor.metrics = metrics
        return acceptor, port

    return door


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_one_address_cant_take_all_places_but_this_host_can() -> None:
    count = ClientCount(AcceptLimits(in_all=10, per_ip=3))
    for _ in range(3):
        assert count.why_not("192.0.2.7") is None
        count.enter("192.0.2.7")
    assert count.why_not("192.0.2.7") == "too_many_of_one_client"
    assert count.why_not("2001:db8::1") is None
    for ip in ("127.0.0.1", "::1", "127.0.0.1", "127.0.0.1", "127.0.0.1", "::1", "::1"):
        assert count.why_not(ip) is None
        count.enter(ip)
    assert count.why_not("127.0.0.1") == "too_many_clients"
    count.leave("192.0.2.7")
    assert count.why_not("192.0.2.7") is None


def test_addresses_that_have_gone_take_no_memory() -> None:
    count = ClientCount(AcceptLimits())
    for number in range(1000):
        count.enter(f"192.0.2.{number}")
        count.leave(f"192.0.2.{number}")
    assert len(count._by_ip) == count.total == 0


@pytest.mark.parametrize(
    ("soft_limit", "clients"), [(65_536, 4096), (1024, 384), (256, 96), (16, 6), (1, 1)]
)
def test_a_low_file_limit_leaves_a_part_to_everything_else(soft_limit: int, clients: int) -> None:
    assert AcceptLimits().within_descriptors(soft_limit).in_all == clients


async def test_a_client_too_many_is_refused_and_a_place_that_is_free_again_is_given(door):
    with trio.fail_after(LIMIT):
        acceptor, port = await door(AcceptLimits(in_all=2))
        clients = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]
        for client in clients:
            assert await client.receive_some() == b"hello"
        async with await trio.open_tcp_stream("127.0.0.1", port) as third:
            with pytest.raises(trio.BrokenResourceError):
                await third.receive_some()
        await clients[0].aclose()
        while acceptor.clients > 1:  # noqa: ASYNC110
            await trio.sleep(0.01)
        async with await trio.open_tcp_stream("127.0.0.1", port) as fourth:
            assert await fourth.receive_some() == b"hello"
        await clients[1].aclose()


async def test_after_close_who_is_in_is_served_and_who_comes_is_refused(door):
    with trio.fail_after(LIMIT):
        acceptor, port = await door(AcceptLimits())
        client = await trio.open_tcp_stream("127.0.0.1", port)
        assert await client.receive_some() == b"hello"
        acceptor.close()
        await trio.sleep(0.1)
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", port)
        assert acceptor.clients == 1
        await client.aclose()


async def test_two_thousand_short_connections_leave_nothing_behind(door):
    with trio.fail_after(60):
        acceptor, port = await door(AcceptLimits())
        before = descriptors()

        async def visit():
            for _ in range(100):
                async with await trio.open_tcp_stream("127.0.0.1", port) as client:
                    assert await client.receive_some() == b"hello"

        async with trio.open_nursery() as visitors:
            for _ in range(20):
                visitors.start_soon(visit)
        while acceptor.clients:  # noqa: ASYNC110
            await trio.sleep(0.01)
        assert descriptors() == before


@contextmanager
def no_descriptors():
    """Let this process open nothing more, until the block is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
    fill = []
    try:
        with suppress(OSError):
            while True:
                fill.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in fill:
            os.close(descriptor)


async def test_without_descriptors_accepting_pauses_and_goes_on_within_a_second(door):
    with trio.fail_after(LIMIT):
        _, port = await door(AcceptLimits())
        with trio.socket.socket() as waiting:
            with no_descriptors():
                await waiting.connect(("127.0.0.1", port))  # the kernel takes it in
                with trio.move_on_after(0.3) as pause:
                    await waiting.recv(5)
                assert pause.cancelled_caught
            freed = trio.current_time()
            assert await waiting.recv(5) == b"hello"
            assert trio.current_time() - freed < 1


async def test_a_node_without_descriptors_does_not_accuse_its_service(monkeypatch):
    monkeypatch.setattr(local_services, "_CONNECT_INTERVAL", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as backend:
        service = LocalService("llm", "127.0.0.1", backend.getsockname()[1])
        services = LocalServices([service], metrics=Metrics())
        with no_descriptors(), trio.move_on_after(0.5):
            await services.check_health_forever()
        assert services.is_healthy("llm")


async def test_the_control_api_answers_without_any_descriptor_left(nursery):
    async def hello(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"alive"})

    with trio.fail_after(LIMIT):
        sock = server.bind("127.0.0.1", 0, setting="api")
        port = sock.getsockname()[1]
        await nursery.start(server.serve_forever, hello, sock)
        clients = [trio.socket.socket() for _ in range(4)]
        before = descriptors()
        with no_descriptors():
            for client in clients:
                await client.connect(("127.0.0.1", port))
                await client.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                answer = b""
                while data := await client.recv(4096):
                    answer += data
                assert answer.startswith(b"HTTP/1.1 200") and b"alive" in answer
        for client in clients:
            client.close()
        while descriptors() != before - len(clients):  # noqa: ASYNC110
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


def test_a_reserve_gives_up_what_it_holds_and_takes_it_back() -> None:
    before = descriptors()
    reserve = DescriptorReserve(3)
    assert descriptors() == before + 3
    assert [reserve.give_one_up() for _ in range(4)] == [True, True, True, False]
    assert descriptors() == before
    reserve.refill()
    assert descriptors() == before + 3
    reserve.close()
    reserve.refill()
    assert descriptors() == before
