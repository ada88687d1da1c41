from __future__ import annotations

from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core import tunnel
from meshnode.core.tunnel import (
    END,
    MAX_CHUNK_BYTES,
    ChunkDecoder,
    TunnelReply,
    TunnelRequest,
    decode_reply,
    decode_request,
    encode_chunk,
    encode_chunks,
    encode_reply,
    encode_request,
)
from meshnode.errors import WireError


def whole_body(data: bytes) -> bytes:
    decoder = ChunkDecoder()
    body = b"".join(decoder.feed(data))
    decoder.finish()
    return body


def outcome_of(read: Callable[[bytes], object], data: bytes) -> str:
    try:
        read(data)
    except WireError as exc:
        return exc.code
    return "ok"


def test_a_request_and_its_reply_come_back_as_sent() -> None:
    request = TunnelRequest(service_id="llm")
    assert decode_request(encode_request(request)) == request
    reply = TunnelReply(status="busy", in_flight=3, available_vram=2**40, message="4 of 4")
    assert decode_reply(encode_reply(reply)) == reply


def test_the_largest_message_for_people_fits() -> None:
    reply = TunnelReply(status="ok", message="\U0001f600" * 256)
    assert decode_reply(encode_reply(reply)) == reply


@pytest.mark.parametrize("status", ["OK", "", "later", None, 0])
def test_an_unknown_status_is_a_bad_field(status: object) -> None:
    with pytest.raises(WireError) as caught:
        decode_reply(msgpack.packb({"Status": status}))
    assert caught.value.code == "bad_field"


@given(st.binary(max_size=100))
def test_random_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    assert outcome_of(decode_request, data) in {"ok"} | tunnel.ERROR_CODES
    assert outcome_of(decode_reply, data) in {"ok"} | tunnel.ERROR_CODES
    assert outcome_of(whole_body, data) in {"ok"} | tunnel.ERROR_CODES


@given(st.lists(st.binary(max_size=300), max_size=5), st.lists(st.integers(0, 1500), max_size=8))
def test_a_body_survives_any_cutting_of_the_stream(parts: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(chunk for part in parts for chunk in encode_chunks(part)) + END
    decoder, got, start = ChunkDecoder(), b"", 0
    for cut in [*sorted(cuts), len(stream)]:
        got += b"".join(decoder.feed(stream[start:cut]))
        start = max(start, min(cut, len(stream)))
    assert got == b"".join(parts)
    assert decoder.ended
    decoder.finish()


def test_a_large_body_becomes_chunks_that_each_fit_one_noise_frame() -> None:
    data = bytes(range(256)) * 800
    chunks = list(encode_chunks(data))
    assert [len(chunk) for chunk in chunks] == [65507, 65507, 65507, 204_800 - 3 * 65_505 + 2]
    assert b"".join(ChunkDecoder().feed(b"".join(chunks))) == data


def test_part_of_a_chunk_is_passed_on_at_once() -> None:
    decoder = ChunkDecoder()
    assert decoder.feed(b"\x00") == []
    assert decoder.feed(b"\x05ab") == [b"ab"]
    assert decoder.feed(b"cde") == [b"cde"]
    assert not decoder.ended


def test_nothing_to_send_is_no_chunk_for_that_would_be_the_end() -> None:
    assert list(encode_chunks(b"")) == []
    with pytest.raises(ValueError, match="a chunk holds 1 to 65505 bytes, not 0"):
        encode_chunk(b"")
    with pytest.raises(ValueError, match="not 65506"):
        encode_chunk(bytes(MAX_CHUNK_BYTES + 1))


@pytest.mark.parametrize("received", [b"", b"\x00\x03ab", b"\x00\x03abc", b"\x00\x03abc\x00"])
def test_an_end_without_its_marker_is_a_cut(received: bytes) -> None:
    decoder = ChunkDecoder()
    decoder.feed(received)
    with pytest.raises(WireError) as caught:
        decoder.finish()
    assert caught.value.code == "cut"


def test_bytes_behind_the_end_are_an_error() -> None:
    with pytest.raises(WireError) as caught:
        ChunkDecoder().feed(END + b"\x00")
    assert caught.value.code == "after_end"


def test_a_chunk_above_the_limit_is_an_error() -> None:
    with pytest.raises(WireError) as caught:
        ChunkDecoder().feed((MAX_CHUNK_BYTES + 1).to_bytes(2, "big"))
    assert caught.value.code == "bad_chunk"
