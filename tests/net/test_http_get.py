"""A GET to servers that may be anything, on real sockets."""

from __future__ import annotations

import contextlib
import socket

import pytest
import trio

from meshnode.errors import ProbeFailed
from meshnode.net.http_get import NotHttp, http_get
from meshnode.values import HostPort

LIMIT = 10.0


@pytest.fixture
def server(nursery):
    """Serve TCP with a handler; return the address."""

    async def server(handler):
        async def guarded(stream):
            async with stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await handler(stream)

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, guarded, listeners)
        return HostPort("127.0.0.1", listeners[0].socket.getsockname()[1])

    return server


def sends(*pieces, pause=0.0, then=trio.lowlevel.checkpoint):
    async def handler(stream):
        await stream.receive_some()
        for piece in pieces:
            await stream.send_all(piece)
            await trio.sleep(pause)
        await then()

    return handler


def endless(piece, first=b""):
    async def handler(stream):
        await stream.receive_some()
        await stream.send_all(first)
        while True:
            await stream.send_all(piece)

    return handler


async def get(address, path="/health", *, timeout=2.0, max_bytes=10_000):
    with trio.fail_after(LIMIT):
        return await http_get(address, path, timeout=timeout, max_bytes=max_bytes)


async def test_an_answer_is_read_whole(server):
    async def handler(stream):
        request = await stream.receive_some()
        assert request.startswith(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:")
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\no")
        await stream.send_all(b"kay")

    answer = await get(await server(handler))
    assert (answer.status, answer.body) == (200, b"okay")


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.0 200 OK\r\n\r\n", b"until the end"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"d\r\nuntil the end\r\n0\r\n\r\n",
        ),
        (
            b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n",
            b"until the end",
        ),
    ],
)
async def test_every_framing_of_a_body_is_understood(server, pieces):
    assert (await get(await server(sends(*pieces)))).body == b"until the end"


async def test_nobody_there_is_certain():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = HostPort("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ProbeFailed) as caught:
            await get(address)
    assert caught.value.is_certain


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (sends(then=trio.sleep_forever), "not answered within 0.3 s"),
        (sends(*[b"H"] * 100, pause=0.05), "not answered within 0.3 s"),
        (
            sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", then=trio.sleep_forever),
            "not answered",
        ),
        (endless(b"x" * 5000, b"HTTP/1.1 200 OK\r\n\r\n"), "longer than 10000 bytes"),
        (endless(b"HTTP/1.1 102 Wait\r\n\r\n"), "longer than 10000 bytes"),
        (sends(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 20_000), "longer"),
        (endless(b"X-Header: y\r\n", b"HTTP/1.1 200 OK\r\n"), "is no HTTP"),
        (sends(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"), "is no HTTP"),
        (sends(b"SSH-2.0-OpenSSH_9.2\r\n"), "is no HTTP"),
        (sends(b"\x15\x03\x01\x00\x02\x02F"), "is no HTTP"),
        (sends(b"HTTP/1.1 banana\r\n\r\n"), "is no HTTP"),
        (sends(), "no HTTP|without an answer|cut off"),
    ],
)
async def test_whatever_answers_ends_in_time_and_is_only_a_doubt(server, handler, why):
    address = await server(handler)
    started = trio.current_time()
    with pytest.raises(ProbeFailed, match=why) as caught:
        await get(address, timeout=0.3)
    assert not caught.value.is_certain
    assert trio.current_time() - started < 3


async def test_what_speaks_no_http_is_told_from_what_is_late(server):
    with pytest.raises(NotHttp):
        await get(await server(sends(b"+PONG\r\n")))
    with pytest.raises(ProbeFailed) as caught:
        await get(await server(sends(then=trio.sleep_forever)), timeout=0.1)
    assert not isinstance(caught.value, NotHttp)
