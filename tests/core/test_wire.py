from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.wire import FrameDecoder, encode_frame, pack_map, unpack_map
from meshnode.errors import WireError


def code_of(data: bytes, max_bytes: int = 1024) -> str:
    with pytest.raises(WireError) as caught:
        unpack_map(data, max_bytes)
    return caught.value.code


def test_a_map_comes_back_with_its_keys_in_order() -> None:
    packed = pack_map({"b": 1, "a": (True, None, b"\x00", "é")}, 100)
    assert list(unpack_map(packed, 100).items()) == [("b", 1), ("a", (True, None, b"\x00", "é"))]


def test_the_size_is_checked_before_anything_is_parsed() -> None:
    assert code_of(b"\xc1" * 11, max_bytes=10) == "too_large"
    with pytest.raises(WireError) as caught:
        pack_map({"a": "x" * 100}, 50)
    assert caught.value.code == "too_large"


@pytest.mark.parametrize(
    ("why", "data"),
    [
        ("empty", b""),
        ("cut short", b"\x81\xa1a"),
        ("bytes behind the map", b"\x80\x00"),
        ("a reserved byte", b"\xc1"),
        ("an array", b"\x90"),
        ("a number", b"\x01"),
        ("text that is not UTF-8", b"\x81\xa1a\xa1\xff"),
        ("a lone surrogate", b"\x81\xa1a\xa3\xed\xa0\x80"),
        ("a key twice", b"\x82\xa1a\x01\xa1a\x02"),
        ("a key twice in an inner map", b"\x81\xa1a\x82\xa1a\x01\xa1a\x02"),
        ("a number as key", b"\x81\x01\x01"),
        ("bytes as key", b"\x81\xc4\x01a\x01"),
        ("an extension", b"\x81\xa1a\xd4\x05\x00"),
        ("an empty extension", b"\x81\xa1a\xc7\x00\x05"),
        ("a timestamp", b"\x81\xa1a\xd6\xff\x00\x00\x00\x01"),
        ("a promise of four thousand million items", b"\x81\xa1a\xdd\xff\xff\xff\xff"),
        ("a promise of four thousand million keys", b"\xdf\xff\xff\xff\xff"),
        ("a promise of four gigabytes", b"\x81\xa1a\xdb\xff\xff\xff\xff"),
        ("deep nesting", b"\x81\xa1a" + b"\x91" * 1000),
        ("too long a string", b"\x81\xa1a\xda\x10\x01" + b"x" * 4097),
    ],
)
def test_what_is_not_one_clean_map_is_bad_msgpack(why: str, data: bytes) -> None:
    assert code_of(data, max_bytes=8192) == "bad_msgpack", why


def test_a_float_key_or_nan_value_raises_no_foreign_error() -> None:
    assert code_of(b"\x81\xca\x7f\xc0\x00\x00\x01") == "bad_msgpack"
    assert list(unpack_map(b"\x81\xa1a\xca\x7f\xc0\x00\x00", 100)) == ["a"]


@given(st.binary(max_size=200))
def test_any_bytes_give_a_map_or_a_wire_error(data: bytes) -> None:
    try:
        outcome = type(unpack_map(data, 150)).__name__
    except WireError as exc:
        outcome = exc.code
    assert outcome in {"dict", "too_large", "bad_msgpack"}


msgpack_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=3), msgpack_values, max_size=5))
def test_what_another_encoder_writes_is_read(fields: dict[str, object]) -> None:
    assert list(unpack_map(msgpack.packb(fields), 100_000)) == list(fields)


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 200), max_size=6))
def test_frames_survive_any_cutting_of_the_stream(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(body) for body in bodies)
    decoder, got, start = FrameDecoder(40), [], 0
    for cut in [*sorted(cuts), len(stream)]:
        decoder.feed(stream[start:cut])
        start = max(start, min(cut, len(stream)))
        while (body := decoder.next_frame()) is not None:
            got.append(body)
    assert got == bodies
    decoder.finish()


def test_a_frame_that_promises_too_much_is_refused_before_its_body_comes() -> None:
    decoder = FrameDecoder(100)
    decoder.feed(b"\x00\x00\x00\x65")
    with pytest.raises(WireError) as caught:
        decoder.next_frame()
    assert caught.value.code == "too_large"


def test_a_stream_that_ends_inside_a_frame_is_truncated() -> None:
    decoder = FrameDecoder(100)
    decoder.feed(b"\x00\x00\x00\x02a")
    assert decoder.next_frame() is None
    with pytest.raises(WireError) as caught:
        decoder.finish()
    assert caught.value.code == "truncated"


def test_bytes_behind_the_last_frame_are_handed_on_once() -> None:
    decoder = FrameDecoder(100)
    decoder.feed(encode_frame(b"head") + b"body")
    assert decoder.next_frame() == b"head"
    assert decoder.take_rest() == b"body"
    assert decoder.take_rest() == b""
