from __future__ import annotations

from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core import tunnel
from meshnode.core.tunnel import (
    DONE,
    END,
    MAX_CHUNK_BYTES,
    ReplyDecoder,
    RequestDecoder,
    TunnelReply,
    TunnelRequest,
    decode_reply,
    decode_request,
    encode_chunk,
    encode_chunks,
    encode_header,
    encode_reply,
    encode_request,
)
from meshnode.errors import WireError

ASK = encode_header(encode_request(TunnelRequest(service_id="llm")))
OK = encode_header(encode_reply(TunnelReply(status="ok")))


def opened() -> RequestDecoder:
    decoder = RequestDecoder()
    decoder.feed(ASK)
    return decoder


def whole_body(data: bytes) -> bytes:
    decoder = opened()
    body = b"".join(item for item in decoder.feed(data) if type(item) is bytes)
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
    decoder, got, start = opened(), b"", 0
    for cut in [*sorted(cuts), len(stream)]:
        got += b"".join(i for i in decoder.feed(stream[start:cut]) if type(i) is bytes)
        start = max(start, min(cut, len(stream)))
    assert got == b"".join(parts)
    decoder.finish()


def test_a_large_body_becomes_chunks_that_each_fit_one_noise_frame() -> None:
    data = bytes(range(256)) * 800
    chunks = list(encode_chunks(data))
    assert [len(chunk) for chunk in chunks] == [65507, 65507, 65507, 204_800 - 3 * 65_505 + 2]
    assert whole_body(b"".join(chunks) + END) == data


def test_part_of_a_chunk_is_passed_on_at_once() -> None:
    decoder = opened()
    assert decoder.feed(b"\x00") == []
    assert decoder.feed(b"\x05ab") == [b"ab"]
    assert decoder.feed(b"cde") == [b"cde"]


def test_nothing_to_send_is_no_chunk_for_that_would_be_the_end() -> None:
    assert list(encode_chunks(b"")) == []
    with pytest.raises(ValueError, match="a chunk holds 1 to 65505 bytes, not 0"):
        encode_chunk(b"")
    with pytest.raises(ValueError, match="not 65506"):
        encode_chunk(bytes(MAX_CHUNK_BYTES + 1))


@pytest.mark.parametrize("received", [b"", b"\x00\x03ab", b"\x00\x03abc", b"\x00\x03abc\x00"])
def test_an_end_without_its_marker_is_a_cut(received: bytes) -> None:
    decoder = opened()
    decoder.feed(received)
    with pytest.raises(WireError) as caught:
        decoder.finish()
    assert caught.value.code == "cut"


def test_a_dialler_that_is_done_in_the_middle_of_a_chunk_is_not_quiet() -> None:
    decoder = ReplyDecoder()
    decoder.ask()
    decoder.feed(OK + b"\x00\x05ab")
    decoder.done()
    assert not decoder.is_quiet


def test_a_tunnel_is_quiet_before_its_first_request_and_between_two() -> None:
    decoder = ReplyDecoder()
    assert decoder.is_quiet
    decoder.ask()
    assert not decoder.is_quiet
    decoder.feed(OK + encode_chunk(b"answer"))
    decoder.done()
    assert decoder.is_quiet
    decoder.finish()


def test_an_end_that_comes_late_is_overlooked_once() -> None:
    decoder = ReplyDecoder()
    decoder.ask()
    decoder.feed(OK)
    decoder.done()
    assert decoder.feed(END) == []
    with pytest.raises(WireError) as caught:
        decoder.feed(END)
    assert caught.value.code == "out_of_turn"


def test_done_takes_two_bytes() -> None:
    assert opened().feed(DONE) == [tunnel.Mark.DONE]
