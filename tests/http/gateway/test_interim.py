"""Interim answers (1xx) of engines: which the client gets, and what they change (nothing)."""

from __future__ import annotations

import pytest
import trio

from meshnode.http.gateway.attempts import MAX_INTERIM
from support.gateway_mesh import CHAT, answering, chat, exchange, get, post, read_to_end, until

LIMIT = 20.0  # seconds, for one test
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
HINT = b"HTTP/1.1 103 Early Hints\r\nlink: </x.css>; rel=preload\r\n"


def saying(*pieces: bytes):
    """An engine that answers every request with these pieces, one after another."""

    async def serve(connection):
        while await connection.request() is not None:
            for piece in pieces:
                await connection.send(piece)

    return serve


def heads_of(answer: bytes) -> list[bytes]:
    return [line for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


@pytest.mark.parametrize("request_", [get(), chat()], ids=["get", "chat"])
async def test_hints_reach_the_client_in_order_before_the_answer(mesh, request_):
    processing = b"HTTP/1.1 102 Processing\r\n\r\n"
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(saying(HINT + b"\r\n", processing, HINT + b"\r\n" + OK))
        answer = await exchange(mesh, request_)
        assert heads_of(answer) == [
            b"HTTP/1.1 103 Early Hints",
            b"HTTP/1.1 102 Processing",
            b"HTTP/1.1 103 Early Hints",
            b"HTTP/1.1 200 OK",
        ]
        assert answer.startswith(HINT + b"\r\n")
        assert answer.endswith(b"ok")


async def test_a_hint_is_passed_on_while_the_answer_is_awaited(mesh):
    go_on = trio.Event()

    async def serve(connection):
        while await connection.request() is not None:
            await connection.send(HINT + b"\r\n")
            await go_on.wait()
            await connection.send(OK)

    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(serve)
        async with await mesh.connect() as client:
            await client.send_all(chat())
            assert await client.receive_some() == HINT + b"\r\n"
            assert mesh.counted("request_ttft_seconds_count") == 0, "a hint is no first byte"
            go_on.set()
            assert (await read_to_end(client)).endswith(b"ok")
        assert mesh.counted("request_ttft_seconds_count") == 1


async def test_a_client_of_http_1_0_gets_no_hints(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(saying(HINT + b"\r\n" + OK))
        answer = await exchange(mesh, b"GET / HTTP/1.0\r\n\r\n")
        assert heads_of(answer) == [b"HTTP/1.1 200 OK"]


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/files"])
async def test_an_engines_100_is_swallowed_as_the_gateway_has_said_it(mesh, target):
    go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(saying(go_on, go_on + OK))
        sent = post(target, CHAT, b"expect: 100-continue")
        async with await mesh.connect() as client:
            await client.send_all(sent[: -len(CHAT)])
            assert await client.receive_some() == go_on
            await client.send_all(CHAT)
            assert heads_of(await read_to_end(client)) == [b"HTTP/1.1 200 OK"]
        answer = await exchange(mesh, post(target, CHAT))
        assert heads_of(answer) == [b"HTTP/1.1 200 OK"], "and where nobody asked for it"


async def test_what_is_of_the_connection_or_of_pages_does_not_pass_with_a_hint(mesh):
    fields = (
        b"x-own: 1\r\nconnection: x-hop\r\nx-hop: 1\r\ntransfer-encoding: chunked\r\n"
        b"access-control-allow-origin: *\r\nx-meshnode-peer: me\r\n"
    )
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(saying(HINT + fields + b"\r\n" + OK))
        answer = await exchange(mesh, get())
        assert answer.startswith(HINT + b"x-own: 1\r\n\r\nHTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\nok")


@pytest.mark.parametrize(
    "end",
    [
        b"",
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        HINT + b"content-length: 5\r\n\r\nhello" + OK,
    ],
    ids=["closed", "503", "garbage", "an upgrade nobody asked for", "a hint with a body"],
)
async def test_after_a_hint_another_peer_is_still_asked(mesh, end):
    async def serve(connection):
        if await connection.request() is not None:
            await connection.send(HINT + b"\r\n" + end)

    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(serve, "bad", vram=9)
        await mesh.served_by(answering(b"served"), "good", vram=1)
        answer = await exchange(mesh, chat())
        *hints, final = heads_of(answer)
        assert (set(hints), final) == ({b"HTTP/1.1 103 Early Hints"}, b"HTTP/1.1 200 OK")
        assert answer.endswith(b"served")


async def test_where_nobody_else_can_serve_an_error_follows_the_hints(mesh):
    async def serve(connection):
        if await connection.request() is not None:
            await connection.send(HINT + b"\r\n")

    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(serve)
        answer = await exchange(mesh, chat())
        assert heads_of(answer) == [b"HTTP/1.1 103 Early Hints", b"HTTP/1.1 502 Bad Gateway"]
        assert b"closed the connection without an answer" in answer or b"no_peer_served" in answer


async def test_hints_without_end_are_cut_off(mesh):
    async def serve(connection):
        if await connection.request() is not None:
            while True:
                await connection.send(HINT + b"\r\n")
                await trio.lowlevel.checkpoint()

    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(serve)
        answer = await exchange(mesh, chat())
        *hints, final = heads_of(answer)
        assert (len(hints), final) == (MAX_INTERIM, b"HTTP/1.1 502 Bad Gateway")
        await engine.gone.wait()
        assert mesh.counted("retries_total", reason="bad_answer") == 1


async def test_a_client_that_leaves_after_a_hint_frees_the_engine(mesh):
    async def serve(connection):
        if await connection.request() is not None:
            await connection.send(HINT + b"\r\n")
            await connection.until_gone()

    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(serve)
        async with await mesh.connect() as client:
            await client.send_all(chat())
            assert await client.receive_some() == HINT + b"\r\n"
        await engine.gone.wait()
        await until(lambda: mesh.front.router.own_total == 0)
