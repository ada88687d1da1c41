from __future__ import annotations

import h11
import pytest
import trio
import trio.testing

from meshnode.http.unavailable import answer_unavailable

PAGE = b"<html><body><h1>Sorry, waiting for nodes to connect</h1></body></html>"


@pytest.fixture
async def address(nursery):
    """Where every connection is answered with 503, on a real socket."""

    async def serve(stream: trio.SocketStream) -> None:
        await answer_unavailable(stream, "nobody offers llm")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, serve, listeners)
    return listeners[0].socket.getsockname()[:2]


async def read_to_end(stream: trio.SocketStream) -> bytes:
    received = b""
    async for data in stream:
        received += data
    return received


async def exchange(address, *pieces: bytes, end: bool = False) -> bytes:
    with trio.fail_after(10):
        async with await trio.open_tcp_stream(*address) as stream:
            for piece in pieces:
                await stream.send_all(piece)
            if end:
                await stream.send_eof()
            return await read_to_end(stream)


def assert_is_whole_503(answer: bytes) -> None:
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(answer)
    response = parser.next_event()
    assert isinstance(response, h11.Response)
    headers = dict(response.headers)
    assert response.status_code == 503
    assert headers[b"retry-after"] == b"5"
    assert headers[b"connection"] == b"close"
    assert headers[b"x-meshnode-reason"] == b"nobody offers llm"
    assert parser.next_event().data == PAGE
    assert isinstance(parser.next_event(), h11.EndOfMessage)


async def test_a_plain_get_is_answered_whole(address):
    assert_is_whole_503(await exchange(address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))


async def test_a_client_that_posts_five_megabytes_first_reads_the_whole_answer(address):
    body = bytes(5_000_000)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n"
    assert_is_whole_503(await exchange(address, head, body))


async def test_a_chunked_body_is_read_to_its_end(address):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    assert_is_whole_503(await exchange(address, head, chunk * 20, b"0\r\n\r\n"))


async def test_headers_that_come_byte_by_byte_are_waited_for(address):
    request = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    assert_is_whole_503(await exchange(address, *(bytes([byte]) for byte in request)))


async def test_a_client_that_waits_for_100_continue_is_answered_at_once(address):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
    assert_is_whole_503(await exchange(address, head))


async def test_http_1_0_without_a_host_is_answered(address):
    assert_is_whole_503(await exchange(address, b"GET / HTTP/1.0\r\n\r\n"))


async def test_what_follows_the_first_request_does_not_spoil_its_answer(address):
    answer = await exchange(address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"\x00garbage" * 20_000)
    assert_is_whole_503(answer)


async def test_a_client_that_half_closes_after_its_request_is_answered(address):
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    assert_is_whole_503(await exchange(address, request, end=True))


async def test_broken_headers_after_a_good_first_line_are_answered(address):
    assert_is_whole_503(await exchange(address, b"GET / HTTP/1.1\r\n:::\r\n\r\n"))


async def test_headers_without_end_are_answered(address):
    answer = await exchange(address, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000)
    assert_is_whole_503(answer)


async def test_the_answer_to_head_has_no_body(address):
    answer = await exchange(address, b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert b"Content-Length: 70\r\n" in answer


@pytest.mark.parametrize(
    "opening",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",  # a TLS handshake
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00\x00\x00\x01",
        b"a" * 33,
        b"GET " + b"a" * 20_000,
        b"{}\n",
    ],
)
async def test_a_client_that_speaks_something_else_is_only_closed(address, opening):
    assert await exchange(address, opening) == b""


async def test_a_client_that_closes_at_once_does_no_harm(address):
    assert await exchange(address, end=True) == b""


async def test_a_client_that_resets_does_no_harm(address):
    with trio.fail_after(5):
        stream = await trio.open_tcp_stream(*address)
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, bytes([1, *[0] * 7]))
        stream.socket.close()
    assert_is_whole_503(await exchange(address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))


async def test_a_client_that_never_sends_is_closed_after_ten_seconds(autojump_clock):
    client, server = trio.testing.memory_stream_pair()
    await answer_unavailable(server)
    assert trio.current_time() == 10.0
    assert await client.receive_some() == b""


async def test_a_request_that_never_ends_is_answered_after_ten_seconds(autojump_clock):
    client, server = trio.testing.memory_stream_pair()
    await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
    await answer_unavailable(server)
    assert trio.current_time() == 12.0
    assert (await client.receive_some()).startswith(b"HTTP/1.1 503 ")


async def test_a_body_beyond_the_bound_is_not_waited_for(autojump_clock):
    client, server = trio.testing.memory_stream_pair()
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
    await client.send_all(head + bytes(33 * 1024 * 1024))
    await answer_unavailable(server)
    assert trio.current_time() == 2.0
    assert (await client.receive_some()).startswith(b"HTTP/1.1 503 ")


async def test_a_reason_can_not_add_headers(autojump_clock):
    client, server = trio.testing.memory_stream_pair()
    await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await answer_unavailable(server, "a\r\nSet-Cookie: x=ü" + "y" * 500)
    answer = await client.receive_some(4096)
    assert b"X-Meshnode-Reason: a??Set-Cookie: x=?yyy" in answer
    assert len(answer) < 600
