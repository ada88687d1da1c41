"""Requests through a gateway and an in-process mesh to engines on loopback."""

from __future__ import annotations

import contextlib
import json
from uuid import UUID

import pytest
import trio

from meshnode.http.gateway.access import Access
from meshnode.http.gateway.bodies import ChunkedBody
from meshnode.http.gateway.settings import GatewaySettings
from support.gateway_mesh import (
    CHAT,
    answering,
    chat,
    exchange,
    get,
    post,
    read_to_end,
    until,
)

LIMIT = 20.0  # seconds, for one test


def lines_of(answer: bytes) -> list[bytes]:
    return answer.partition(b"\r\n\r\n")[0].split(b"\r\n")


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


async def test_a_request_reaches_the_engine_and_its_answer_the_client(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"hello", b"200 OK", b"x-engine: e"))
        answer = await exchange(mesh, get("/v1/things?x=1", b"accept: */*"))
        assert lines_of(answer)[:2] == [b"HTTP/1.1 200 OK", b"x-engine: e"]
        assert body_of(answer) == b"hello"
        sent = engine.requests[0][0].split(b"\r\n")
        assert sent[:3] == [b"GET /v1/things?x=1 HTTP/1.1", b"host: localhost", b"accept: */*"]
        assert b"via: 1.1 meshnode" in sent


async def test_a_hundred_requests_of_one_client_need_one_connection_to_the_engine(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"hello"))
        async with await mesh.connect() as client:
            for _ in range(100):
                await client.send_all(get(close=False))
                answer = b""
                while not answer.endswith(b"hello"):
                    answer += await client.receive_some()
        assert engine.connections == 1
        assert len(engine.requests) == 100
        await until(lambda: mesh.counted("requests_total", outcome="complete") == 100)
        await until(lambda: mesh.front.router.own_total == 0)
        await until(lambda: mesh.peers["peer"].services.total_in_flight == 0)


async def test_each_request_of_one_connection_is_routed_by_itself(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(answering(b"small"), "small", vram=1)
        async with await mesh.connect() as client:
            await client.send_all(get(close=False))
            assert (await client.receive_some()).endswith(b"small")
            await mesh.served_by(answering(b"big"), "big", vram=9)
            await until(lambda: mesh.front.router.own_total == 0)
            await client.send_all(get(close=False))
            assert (await client.receive_some()).endswith(b"big")


async def test_the_answer_tells_who_served_it_and_why_unless_told_not_to(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(answering(b"hello", b"200 OK", b"x-meshnode-peer: forged"))
        lines = lines_of(await exchange(mesh, get("/", b"x-request-id: my-id.1")))
        peer = mesh.front.router.decisions()[0].picked.encode()
        assert b"x-request-id: my-id.1" in lines
        assert b"x-meshnode-peer: " + peer in lines
        assert b"x-meshnode-reason: only" in lines
        assert b"x-meshnode-peer: forged" not in lines
        await mesh.gateway(GatewaySettings(response_headers=False), None)
        assert b"x-meshnode" not in await exchange(mesh, get())


async def test_every_request_has_an_id_which_the_engine_gets_too(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"hello"))
        ids = set()
        for given in (b"x-request-id: bad id\xff", b"x-other: 1"):
            lines = lines_of(await exchange(mesh, get("/", given)))
            (line,) = [line for line in lines if line.startswith(b"x-request-id: ")]
            assert line in engine.requests[-1][0]
            ids.add(line.removeprefix(b"x-request-id: ").decode())
        assert len(ids) == 2
        # There are engines that refuse any other kind.
        assert all(UUID(value).version == 4 and str(UUID(value)) == value for value in ids)


async def test_chunks_are_passed_on_as_they_come_and_trailers_dropped(mesh):
    go_on = trio.Event()

    async def serve(connection):
        await connection.request()
        await connection.send(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n"
            b"5;ext=1\r\nfirst\r\n"
        )
        await go_on.wait()
        await connection.send(b"6\r\nsecond\r\n0\r\nx-sum: 1\r\n\r\n")
        await connection.until_gone()

    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(serve)
        async with await mesh.connect() as client:
            await client.send_all(get())
            first = b""
            while not first.endswith(b"5\r\nfirst\r\n"):
                first += await client.receive_some()
            go_on.set()
            rest = await read_to_end(client)
        assert rest == b"6\r\nsecond\r\n0\r\n\r\n"
        assert b"trailer:" not in first


async def test_an_answer_that_ends_with_its_connection_is_put_in_chunks(mesh):
    async def serve(connection):
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\n\r\nall of it")

    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(serve)
        for _ in range(3):
            answer = await exchange(mesh, get())
            assert b"\r\ntransfer-encoding: chunked\r\n" in answer
            assert body_of(answer) == b"9\r\nall of it\r\n0\r\n\r\n"
        assert engine.connections == 3


async def test_a_client_of_http_1_0_gets_a_plain_body_and_the_connections_end(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(
            answering(b"5\r\nhello\r\n0\r\n\r\n", framing=b"transfer-encoding: chunked")
        )
        answer = await exchange(mesh, b"GET / HTTP/1.0\r\n\r\n")
        assert body_of(answer) == b"hello"
        assert b"transfer-encoding" not in answer
        assert b"\r\nconnection: close" in answer


@pytest.mark.parametrize(
    ("request_", "status", "framing"),
    [
        (b"HEAD / HTTP/1.1\r\nhost: localhost\r\n\r\n", b"200 OK", b"content-length: 5000"),
        (get(close=False), b"304 Not Modified", b"content-length: 5000"),
        (get(close=False), b"204 No Content", b"x-a: b"),
    ],
)
async def test_answers_without_a_body_end_with_their_head(mesh, request_, status, framing):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"", status, framing=framing))
        async with await mesh.connect() as client:
            for _ in range(3):
                await client.send_all(request_)
                answer = await client.receive_some()
                assert answer.endswith(b"\r\n\r\n")
                assert framing in answer.split(b"\r\n")
        assert engine.connections == 1


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/files"])
async def test_a_body_in_chunks_reaches_the_engine_whole(mesh, target):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"ok"))
        head = (
            f"POST {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        ).encode()
        pieces = [CHAT[:10], CHAT[10:]]
        chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
        answer = await exchange(mesh, head, *chunks, b"0\r\nx-trailer: 1\r\n\r\n")
        assert answer.endswith(b"ok")
        got = engine.requests[0][1]
        if target == "/v1/files":
            framing = ChunkedBody()
            assert (framing.feed(got), framing.done) == (CHAT, True)
            assert b"x-trailer" not in got
        else:
            assert got == CHAT


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/files"])
async def test_ten_megabytes_are_uploaded_whole(mesh, target):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"ok"))
        body = b'{"model":"m","x":"' + b"a" * 10_000_000 + b'"}'
        assert (await exchange(mesh, post(target, body))).endswith(b"ok")
        assert engine.requests[0][1] == body


async def test_an_upload_streams_through_before_it_is_whole(mesh):
    first = trio.Event()

    async def serve(connection):
        connection.data = b""
        while b"begun" not in connection.data:
            connection.data += await connection.more()
        first.set()
        await connection.request()
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(serve)
        async with await mesh.connect() as client:
            await client.send_all(post("/v1/files", b"begun, and done")[:-10])
            await first.wait()
            await client.send_all(b", and done")
            assert (await read_to_end(client)).endswith(b"ok")


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/files"])
async def test_a_client_that_waits_to_be_asked_for_its_body_is_asked_once(mesh, target):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"ok"))
        sent = post(target, CHAT, b"expect: 100-continue")
        async with await mesh.connect() as client:
            await client.send_all(sent[: -len(CHAT)])
            assert await client.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send_all(CHAT)
            answer = await read_to_end(client)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert engine.requests[0][1] == CHAT
        assert b"expect" not in engine.requests[0][0]


async def test_an_engine_that_answers_before_the_upload_ends_is_heard(mesh):
    async def serve(connection):
        await connection.more()
        await connection.send(
            b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 7\r\n"
            b"connection: close\r\n\r\ntoo big"
        )
        await trio.sleep(0.1)

    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(serve)
        async with await mesh.connect() as client, trio.open_nursery() as nursery:

            async def upload():
                with contextlib.suppress(trio.BrokenResourceError):  # nobody reads the rest
                    await client.send_all(post("/v1/files", bytes(50_000_000)))

            nursery.start_soon(upload)
            answer = await client.receive_some(65536)
            nursery.cancel_scope.cancel()
        assert answer.startswith(b"HTTP/1.1 413 Content Too Large")
        assert answer.endswith(b"too big")


async def test_an_upgraded_connection_is_spliced_both_ways(mesh):
    async def serve(connection):
        if (request := await connection.request()) is None:
            return
        head, _ = request
        assert b"\r\nconnection: upgrade\r\nupgrade: websocket" in head
        await connection.send(
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n"
            b"connection: Upgrade\r\nsec-websocket-accept: x\r\n\r\nhello"
        )
        while data := await connection.stream.receive_some():
            await connection.send(data.upper())

    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(serve)
        async with await mesh.connect() as client:
            await client.send_all(
                get(
                    "/v1/realtime",
                    b"connection: Upgrade",
                    b"upgrade: websocket",
                    b"sec-websocket-key: k",
                    close=False,
                )
            )
            answer = b""
            while not answer.endswith(b"hello"):
                answer += await client.receive_some()
            assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
            assert b"\r\nsec-websocket-accept: x\r\n" in answer
            await client.send_all(b"ping")
            assert await client.receive_some() == b"PING"
            assert mesh.front.router.own_total == 1
            await client.send_eof()
            assert await read_to_end(client) == b""
        await engine.gone.wait()
        await until(lambda: mesh.front.router.own_total == 0)


async def test_nobody_to_serve_is_said_in_the_shape_of_each_api(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        answer = await exchange(mesh, chat())
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nretry-after: 5\r\n" in answer
        error = json.loads(body_of(answer))["error"]
        assert "Sorry, waiting for nodes to connect" in error["message"]
        assert (error["type"], error["code"]) == ("server_error", "no_candidate")
        ollama = json.loads(body_of(await exchange(mesh, post("/api/chat", CHAT))))
        assert "waiting for nodes" in ollama["error"]
        anthropic = json.loads(body_of(await exchange(mesh, post("/v1/messages", CHAT))))
        assert anthropic["type"] == "error"
        assert anthropic["error"]["type"] == "overloaded_error"


async def test_a_client_may_go_on_after_an_error_that_its_body_was_read_for(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(answering(b"ok"))
        async with await mesh.connect() as client:
            await client.send_all(post("/v1/chat/completions", b"no json", close=False))
            answer = await client.receive_some()
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert b"connection: close" not in answer
            await client.send_all(get())
            assert (await read_to_end(client)).endswith(b"ok")


async def test_pages_get_nothing_unless_their_origin_is_allowed(mesh):
    page = b"origin: https://chat.example"
    engine = answering(b"ok", b"200 OK", b"access-control-allow-origin: *")
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(engine)
        assert b"access-control" not in await exchange(mesh, get())
        assert (await exchange(mesh, get("/", page))).startswith(b"HTTP/1.1 403 ")
        own = b"origin: http://localhost"
        assert (await exchange(mesh, get("/", own))).startswith(b"HTTP/1.1 200 ")

        access = Access(loopback_only=True, cors_origins=("https://chat.example",))
        await mesh.gateway(None, access)
        lines = lines_of(await exchange(mesh, get("/", page)))
        assert lines[0] == b"HTTP/1.1 200 OK"
        assert b"access-control-allow-origin: https://chat.example" in lines
        assert b"access-control-allow-origin: *" not in lines
        other = await exchange(mesh, get("/", b"origin: https://other.example"))
        assert other.startswith(b"HTTP/1.1 403 ")
        preflight = get(
            "/v1/models",
            page,
            b"access-control-request-method: POST",
            b"access-control-request-headers: authorization",
        ).replace(b"GET", b"OPTIONS")
        lines = lines_of(await exchange(mesh, preflight))
        assert lines[0] == b"HTTP/1.1 204 No Content"
        assert b"access-control-allow-headers: authorization" in lines


async def test_a_nodes_own_engine_is_asked_over_a_connection_that_is_kept(mesh):
    """The node with the gateway exposes the service itself."""
    with trio.fail_after(LIMIT):
        engine = await mesh.engine(answering(b"mine"))
        mesh.expose(engine)
        await mesh.open()
        await until(lambda: mesh.front.ledger.services_online(trio.current_time()) == ("llm",))
        for _ in range(5):
            assert (await exchange(mesh, get())).endswith(b"mine")
        assert engine.connections == 1
        assert mesh.front.services.total_in_flight == 0
