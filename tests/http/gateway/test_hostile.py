"""Requests that no proxy may pass on: each gets its status, nothing hangs, the next is served."""

from __future__ import annotations

import pytest
import trio

from meshnode.http.gateway.client import ClientLimits
from meshnode.http.gateway.settings import GatewaySettings
from meshnode.net.accept import AcceptLimits
from support.gateway_mesh import abort, answering, exchange, get, post, read_to_end

LIMIT = 20.0  # seconds, for one test
HOST = b"host: localhost\r\n"


def request(*lines: bytes, first: bytes = b"POST / HTTP/1.1", host: bytes = HOST) -> bytes:
    return first + b"\r\n" + host + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


CHUNKED = b"transfer-encoding: chunked"
TABLE = {
    # Two parsers in a row must see one body.
    "a length beside chunks": (request(b"content-length: 5", CHUNKED) + b"0\r\n\r\n", 400),
    "chunks beside a length": (request(CHUNKED, b"content-length: 5") + b"0\r\n\r\n", 400),
    "two different lengths": (request(b"content-length: 5", b"content-length: 6"), 400),
    "the same length twice": (request(b"content-length: 5", b"content-length: 5"), 400),
    "a list of lengths": (request(b"content-length: 5, 5"), 400),
    "a signed length": (request(b"content-length: +5"), 400),
    "a negative length": (request(b"content-length: -1"), 400),
    "a length in hexadecimal": (request(b"content-length: 0x10"), 400),
    "a length with a gap": (request(b"content-length: 1 0"), 400),
    "an empty length": (request(b"content-length:"), 400),
    "a length of twenty digits": (request(b"content-length: 99999999999999999999"), 400),
    "a length in other digits": (request("content-length: ٣".encode()), 400),
    "two codings": (request(b"transfer-encoding: gzip, chunked"), 501),
    "another coding": (request(b"transfer-encoding: identity"), 501),
    "a coding with a tail": (request(b"transfer-encoding: chunked, identity"), 501),
    "chunked twice": (request(CHUNKED, CHUNKED), 501),
    "a coding behind a vertical tab": (request(b"transfer-encoding: \x0bchunked"), 400),
    "a coding name with a blank": (request(b"transfer-encoding : chunked"), 400),
    "chunks in HTTP/1.0": (request(CHUNKED, first=b"POST / HTTP/1.0"), 400),
    # Lines.
    "a folded header": (request(b"x: a", b" b"), 400),
    "a header folded with a tab": (request(b"x: a", b"\tb"), 400),
    "a bare LF behind the first line": (b"GET / HTTP/1.1\nhost: localhost\r\n\r\n", 400),
    "bare LFs only": (b"GET / HTTP/1.1\nhost: localhost\n\n", 400),
    "a bare LF in a header": (request(b"x: a\nTransfer-Encoding: chunked"), 400),
    "a bare CR in a header": (request(b"x: a\rb"), 400),
    "a NUL in a header": (request(b"x: a\0b"), 400),
    "a NUL in a name": (request(b"x\0: a"), 400),
    "a header without a colon": (request(b"nonsense"), 400),
    "a header without a name": (request(b": x"), 400),
    "a blank before a colon": (request(b"x : a"), 400),
    "a header before the host that looks folded": (request(b"x: a", host=b" y: b\r\n"), 400),
    # The first line.
    "no HTTP": (b"hello\r\n\r\n", 400),
    "a TLS handshake": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/2.0": (request(first=b"GET / HTTP/2.0"), 505),
    "HTTP/1.2": (request(first=b"GET / HTTP/1.2"), 505),
    "HTTP/0.9": (request(first=b"GET / HTTP/0.9"), 505),
    "a version without digits": (request(first=b"GET / HTTP/x"), 400),
    "a version in lower case": (request(first=b"GET / http/1.1"), 400),
    "no version": (request(first=b"GET /"), 400),
    "two blanks": (request(first=b"GET  / HTTP/1.1"), 400),
    "a tab for a blank": (request(first=b"GET\t/ HTTP/1.1"), 400),
    "a blank in the path": (request(first=b"GET /a b HTTP/1.1"), 400),
    "a byte beyond ASCII in the path": (request(first=b"GET /\xff HTTP/1.1"), 400),
    "a fragment": (request(first=b"GET /#x HTTP/1.1"), 400),
    "a path without a slash": (request(first=b"GET v1 HTTP/1.1"), 400),
    "a method that is no token": (request(first=b"G@T / HTTP/1.1"), 400),
    "a method of 33 letters": (request(first=b"A" * 33 + b" / HTTP/1.1"), 400),
    "CONNECT": (request(first=b"CONNECT localhost:22 HTTP/1.1"), 405),
    "an asterisk for GET": (request(first=b"GET * HTTP/1.1"), 400),
    # Whom it is for.
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (request(b"host: localhost"), 400),
    "an empty host": (request(host=b"host:\r\n"), 400),
    "a host with a path": (request(host=b"host: localhost/x\r\n"), 400),
    "a host with a name before it": (request(host=b"host: a@localhost\r\n"), 400),
    "a URL of another host": (request(first=b"GET http://other/ HTTP/1.1"), 400),
    "a URL with a password": (request(first=b"GET http://a:b@localhost/ HTTP/1.1"), 400),
    "a host that is not this machine": (request(host=b"host: evil.example\r\n"), 403),
    "a page of another origin": (request(b"origin: https://evil.example"), 403),
    "a page without an origin": (request(b"origin: null"), 403),
    # Too much.
    "a path of 17,000 bytes": (request(first=b"GET /" + b"a" * 17_000 + b" HTTP/1.1"), 414),
    "a path without end": (b"GET /" + b"a" * 70_000, 414),
    "a header of 70,000 bytes": (request(b"x: " + b"a" * 70_000), 431),
    "200 headers": (request(*[b"x: a"] * 200), 431),
    "headers without end": (b"GET / HTTP/1.1\r\n" + b"x: a\r\n" * 15_000, 431),
    "40 MiB announced to a chat": (
        request(
            b"content-length: 41943040",
            b"content-type: application/json",
            first=b"POST /v1/chat/completions HTTP/1.1",
        ),
        413,
    ),
    # The body.
    "a chunk size that is no number": (request(CHUNKED) + b"zz\r\n\r\n", 400),
    "a chunk size with a sign": (request(CHUNKED) + b"+5\r\nhello\r\n0\r\n\r\n", 400),
    "a chunk size with a prefix": (request(CHUNKED) + b"0x5\r\nhello\r\n0\r\n\r\n", 400),
    "a chunk size of 17 digits": (request(CHUNKED) + b"00000000000000005\r\nhello\r\n", 400),
    "a chunk size behind a blank": (request(CHUNKED) + b" 5\r\nhello\r\n0\r\n\r\n", 400),
    "a chunk size without CR": (request(CHUNKED) + b"5\nhello\n0\n\n", 400),
    "a chunk longer than its size": (request(CHUNKED) + b"3\r\nhello\r\n0\r\n\r\n", 400),
    "a chunk shorter than its size": (request(CHUNKED) + b"7\r\nhello\r\n0\r\n\r\n", 400),
    "an extension without end": (request(CHUNKED) + b"5;" + b"a" * 300 + b"\r\nhello\r\n", 400),
    "a bare LF in an extension": (request(CHUNKED) + b"5;a\nb\r\nhello\r\n0\r\n\r\n", 400),
    "a trailer that is no header": (request(CHUNKED) + b"0\r\nnonsense\r\n\r\n", 400),
    "trailers without end": (request(CHUNKED) + b"0\r\n" + b"x: a\r\n" * 3000, 400),
    "another expectation": (request(b"expect: a-miracle", b"content-length: 5"), 417),
}


@pytest.fixture(params=["/", "/v1/chat/completions"], ids=["streamed", "buffered"])
def path(request):
    return request.param


@pytest.mark.parametrize("name", TABLE)
async def test_what_is_ambiguous_is_refused_and_the_next_client_served(mesh, name):
    sent, status = TABLE[name]
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"whole"))
        answer = await exchange(mesh, sent)
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
        assert answer.count(b"\r\ncontent-length: ") == 1
        assert b'{"error":{' in answer
        assert b"\r\nconnection: close\r\n" in answer
        assert (await exchange(mesh, get())).endswith(b"whole")
        # At most the head of a body that was broken later; never a request of its own.
        assert all(b"evil" not in head for head, _ in engine.requests)


async def test_a_pipelined_request_is_not_served(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"first"))
        answer = await exchange(mesh, get("/1", close=False) + get("/2", close=False))
        assert answer.count(b"HTTP/1.1 200 OK") == 1
        assert b"\r\nconnection: close\r\n" in answer
        assert len(engine.requests) == 1


async def test_a_body_that_hides_a_request_stays_a_body(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"first"))
        hidden = get("/hidden", close=False)
        assert (await exchange(mesh, post("/x", hidden))).endswith(b"first")
        assert [body for _, body in engine.requests] == [hidden]


async def test_a_connection_header_can_not_take_away_what_frames_the_message(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"whole"))
        await exchange(
            mesh,
            request(
                b"connection: close, x-secret, host, content-length, authorization",
                b"x-secret: 1",
                b"authorization: Bearer k",
                b"content-length: 5",
                b"te: trailers",
                b"proxy-authorization: Basic x",
            )
            + b"hello",
        )
        head, body = engine.requests[0]
        assert body == b"hello"
        assert b"x-secret" not in head
        assert b"te:" not in head
        assert b"proxy-authorization" not in head
        assert b"\r\nauthorization: Bearer k\r\n" in head
        assert head.count(b"host:") == 1


def quick(**limits: float) -> GatewaySettings:
    return GatewaySettings(limits=ClientLimits(**limits))  # type: ignore[arg-type]


async def test_headers_that_come_too_slowly_are_answered_with_408(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open(settings=quick(head_timeout=0.2))
        async with await mesh.connect() as client:
            await client.send_all(b"GET / HTTP/1.1\r\nx: ")
            assert (await read_to_end(client)).startswith(b"HTTP/1.1 408 ")


async def test_a_byte_now_and_then_does_not_keep_a_connection(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open(settings=quick(head_timeout=0.3))
        async with await mesh.connect() as client, trio.open_nursery() as nursery:

            async def drip():
                for byte in b"GET / HTTP/1.1\r\nhost: localhost":
                    await client.send_all(bytes([byte]))
                    await trio.sleep(0.05)

            nursery.start_soon(drip)
            assert (await read_to_end(client)).startswith(b"HTTP/1.1 408 ")
            nursery.cancel_scope.cancel()


async def test_a_connection_without_a_request_is_closed_in_time(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open(settings=quick(keep_alive=0.2))
        assert await exchange(mesh) == b""


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/x"])
async def test_a_body_that_stops_coming_is_answered_with_408(mesh, target):
    with trio.fail_after(LIMIT):
        await mesh.open(settings=quick(body_pause=0.2))
        engine = await mesh.served_by(answering(b"whole"))
        async with await mesh.connect() as client:
            await client.send_all(post(target, b"x" * 10)[:-5])
            assert (await read_to_end(client)).startswith(b"HTTP/1.1 408 ")
        assert engine.requests == []


async def test_a_body_that_takes_too_long_is_answered_with_408(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open(settings=quick(body_timeout=0.3))
        await mesh.served_by(answering(b"whole"))
        async with await mesh.connect() as client, trio.open_nursery() as nursery:
            await client.send_all(post("/v1/chat/completions", b"x" * 1000)[:-1000])

            async def drip():
                while True:
                    await client.send_all(b"x")
                    await trio.sleep(0.02)

            nursery.start_soon(drip)
            answer = await client.receive_some()
            nursery.cancel_scope.cancel()
            assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_chunked_body_beyond_the_limit_is_answered_with_413(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open(settings=quick(body_bytes=100_000))
        await mesh.served_by(answering(b"whole"))
        chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
        head = request(CHUNKED, first=b"POST /v1/chat/completions HTTP/1.1")
        answer = await exchange(mesh, head + chunk * 2 + b"0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")


async def test_too_many_clients_are_cut_off_and_the_others_served(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open(settings=GatewaySettings(accept=AcceptLimits(in_all=2)))
        await mesh.served_by(answering(b"whole"))
        clients = [await mesh.connect() for _ in range(2)]
        for client in clients:
            await client.send_all(get(close=False))
            assert b"whole" in await client.receive_some()
        async with await mesh.connect() as one_more:
            with pytest.raises(trio.BrokenResourceError):
                await read_to_end(one_more)
        for client in clients:
            abort(client)
