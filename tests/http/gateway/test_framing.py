"""Heads and bodies beside h11 and httptools: what is taken here means the same to them."""

from __future__ import annotations

import contextlib

import h11
import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.http.gateway.bodies import (
    LAST_CHUNK,
    BodyError,
    ChunkedBody,
    EofBody,
    LengthBody,
    encode_chunk,
)
from meshnode.http.gateway.headers import request_for_engine
from meshnode.http.gateway.heads import (
    BadRequest,
    BadResponse,
    parse_request,
    parse_response,
)

# Pieces of requests, good and bad, that hypothesis puts together.
LINES = st.sampled_from(
    [
        b"host: localhost",
        b"Host: localhost:8080",
        b"host: a b",
        b"content-length: 5",
        b"Content-Length: 7",
        b"content-length: 0",
        b"content-length: +5",
        b"content-length: 5, 5",
        b"content-length : 5",
        b"transfer-encoding: chunked",
        b"Transfer-Encoding: CHUNKED",
        b"transfer-encoding: chunked, gzip",
        b"transfer-encoding: identity",
        b"connection: close",
        b"connection: keep-alive, x",
        b"connection: upgrade",
        b"upgrade: websocket",
        b"expect: 100-continue",
        b"accept: */*",
        b" folded",
        b"x: a\tb",
        b"x:",
        b"x: \xe4",
        b": y",
        b"x: a\rb",
        b"x: a\nb",
        b"x\x00: a",
    ]
)
FIRST = st.sampled_from(
    [
        b"GET / HTTP/1.1",
        b"POST /v1/chat/completions?x=1 HTTP/1.1",
        b"POST / HTTP/1.0",
        b"HEAD /%20 HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"GET http://localhost/x HTTP/1.1",
        b"get / HTTP/1.1",
        b"GET /a b HTTP/1.1",
        b"GET / HTTP/1.2",
        b"GET  / HTTP/1.1",
    ]
)


def by_h11(head: bytes) -> tuple[bytes, int | None, bool]:
    """(method, length, chunked) as h11 reads a request; raises RemoteProtocolError."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head + b"\r\n\r\n")
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    headers = dict(event.headers)
    length = headers.get(b"content-length")
    chunked = headers.get(b"transfer-encoding") == b"chunked"
    return event.method, None if length is None else int(length), chunked


@given(FIRST, st.lists(LINES, max_size=5))
def test_what_is_taken_for_a_request_is_the_same_request_to_h11(
    first: bytes, lines: list[bytes]
) -> None:
    head = b"\r\n".join([first, *lines])
    try:
        ours = parse_request(head)
    except BadRequest:
        return
    assert (ours.method, ours.length, ours.chunked) == by_h11(head)


class Seen:
    """What httptools makes of a message."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.whole = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self.whole = True


@given(FIRST, st.lists(LINES, max_size=5))
def test_what_is_taken_for_a_request_has_the_same_headers_to_httptools(
    first: bytes, lines: list[bytes]
) -> None:
    head = b"\r\n".join([first, *lines])
    try:
        ours = parse_request(head)
    except BadRequest:
        return
    if ours.method == b"get":
        return  # a method like any other here; llhttp knows a list of them
    seen = Seen()
    parser = httptools.HttpRequestParser(seen)
    try:
        parser.feed_data(head + b"\r\n\r\n")
    except httptools.HttpParserUpgrade:
        assert ours.upgrade is not None
    assert seen.whole
    assert seen.headers == [(name, value) for name, value, _ in ours.fields]


@given(st.lists(LINES, max_size=4), st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.0 404"]))
def test_what_is_taken_for_an_answer_is_one_to_h11(lines: list[bytes], first: bytes) -> None:
    head = b"\r\n".join([first, *lines])
    try:
        ours = parse_response(head)
    except BadResponse:
        return
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(head + b"\r\n\r\n")
    event = connection.next_event()
    assert isinstance(event, h11.Response | h11.InformationalResponse)
    assert event.status_code == ours.status


@given(st.binary(max_size=60))
def test_any_bytes_for_a_head_give_a_value_or_its_error(data: bytes) -> None:
    for parse, error in ((parse_request, BadRequest), (parse_response, BadResponse)):
        with contextlib.suppress(error):
            parse(data)


def fed(body, data: bytes, cuts: list[int]) -> bytes:
    payload, at = b"", 0
    for cut in [*sorted(cuts), len(data)]:
        payload += body.feed(data[at:cut]) if cut > at else b""
        at = max(at, cut)
    return payload


CUTS = st.lists(st.integers(0, 400), max_size=8)


@given(st.lists(st.binary(min_size=1, max_size=80), max_size=5), CUTS, st.booleans())
def test_a_chunked_body_survives_any_cutting(
    pieces: list[bytes], cuts: list[int], trailed: bool
) -> None:
    data = b"".join(map(encode_chunk, pieces))
    data += b"0\r\nx-sum: 1\r\n\r\n" if trailed else LAST_CHUNK
    body = ChunkedBody()
    cuts = [min(cut, len(data)) for cut in cuts]
    assert fed(body, data, cuts) == b"".join(pieces)
    assert body.done
    body.finish()


@given(st.binary(max_size=120), CUTS)
def test_what_is_taken_for_a_chunked_body_is_the_same_to_h11(data: bytes, cuts: list[int]) -> None:
    data = b"5\r\nhello\r\n" + data
    body = ChunkedBody()
    try:
        payload = fed(body, data, [min(cut, len(data)) for cut in cuts])
    except BodyError:
        return
    if not body.done:
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + data
    )
    theirs = b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Data):
            theirs += bytes(event.data)
        assert event is not h11.NEED_DATA
    assert theirs == payload


@pytest.mark.parametrize("cut", range(1, 26))
def test_a_chunked_body_that_is_not_whole_says_so(cut: int) -> None:
    data = b"5\r\nhello\r\n5;x=1\r\nworld\r\n0\r\n\r\n"
    body = ChunkedBody()
    body.feed(data[: -cut or None])
    assert not body.done
    with pytest.raises(BodyError, match="before its last chunk"):
        body.finish()


def test_what_follows_a_body_is_kept_apart() -> None:
    for body, data in (
        (ChunkedBody(), b"5\r\nhello\r\n0\r\n\r\nGET /"),
        (LengthBody(5), b"helloGET /"),
    ):
        assert body.feed(data) == b"hello"
        assert (body.done, body.rest) == (True, b"GET /")


def test_a_body_of_known_length_that_ends_early_says_so() -> None:
    body = LengthBody(10)
    assert body.feed(b"hello") == b"hello"
    with pytest.raises(BodyError, match="5 bytes before its length"):
        body.finish()


def test_a_body_that_ends_with_its_connection_is_whole_then() -> None:
    body = EofBody()
    assert body.feed(b"hello") == b"hello"
    assert not body.done
    body.finish()
    assert body.done


def test_nothing_is_no_chunk_for_that_would_be_the_end() -> None:
    assert encode_chunk(b"") == b""
    assert encode_chunk(b"x" * 255) == b"ff\r\n" + b"x" * 255 + b"\r\n"


def test_heads_that_differ_in_their_length_alone_keep_each_its_own() -> None:
    for length in (5, 0, 17, 5):
        line = b"Content-Length: %d" % length
        asked = parse_request(b"POST /v1/x HTTP/1.1\r\nhost: a\r\n" + line + b"\r\naccept: */*")
        assert asked.length == length
        assert asked.fields[1] == (b"content-length", b"%d" % length, line)
        assert asked.value(b"content-length") == b"%d" % length
        answer = parse_response(b"HTTP/1.1 200 OK\r\nserver: x\r\n" + line)
        assert (answer.length, answer.value(b"content-length")) == (length, b"%d" % length)


def test_a_head_read_before_does_not_hide_a_second_length_or_chunks() -> None:
    good = b"POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: 5"
    assert parse_request(good).length == 5
    for more in (b"\r\ncontent-length: 5", b"\r\ncontent-length: 6", b"\r\nContent-Length: 5"):
        with pytest.raises(BadRequest, match="more than one Content-Length"):
            parse_request(good + more)
    with pytest.raises(BadRequest, match="both Content-Length and Transfer-Encoding"):
        parse_request(good + b"\r\ntransfer-encoding: chunked")
    for wrong in (b"5, 5", b"+5", b"0x5", b"5 5", b"1" * 16):
        with pytest.raises(BadRequest, match="is no length"):
            parse_request(b"POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: " + wrong)


def test_what_is_passed_on_of_alike_heads_is_each_ones_own() -> None:
    def sent(key: bytes, length: int) -> bytes:
        head = parse_request(
            b"POST /v1/x HTTP/1.1\r\nhost: a\r\nauthorization: %b\r\ncontent-length: %d"
            % (key, length)
        )
        return request_for_engine(head, b"id%d" % length, length=length, without=frozenset())

    for key, length in ((b"one", 1), (b"two", 2), (b"one", 3), (b"two", 1)):
        lines = sent(key, length).split(b"\r\n")
        assert b"authorization: " + key in lines
        assert b"x-request-id: id%d" % length in lines
        assert [line for line in lines if line.startswith(b"content-length")] == [
            b"content-length: %d" % length
        ]
    head = parse_request(b"GET / HTTP/1.1\r\nhost: a\r\nauthorization: secret")
    for without, told in ((frozenset({b"authorization"}), False), (frozenset(), True)):
        passed = request_for_engine(head, b"id", length=None, without=without)
        assert (b"secret" in passed) is told
