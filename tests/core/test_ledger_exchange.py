from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core import ledger_exchange
from meshnode.core.ledger_exchange import (
    MAX_RECORD_BYTES,
    MAX_RECORDS,
    MAX_TOTAL_BYTES,
    AnswerReader,
    End,
    Record,
    Request,
    decode_answer,
    decode_request,
    encode_answer,
    encode_frames,
    encode_request,
)
from meshnode.core.node_data import MAX_ENVELOPE_BYTES
from meshnode.core.wire import FrameDecoder
from meshnode.errors import WireError


def bodies_of(stream: bytes) -> list[bytes]:
    decoder, bodies = FrameDecoder(MAX_RECORD_BYTES), []
    decoder.feed(stream)
    while (body := decoder.next_frame()) is not None:
        bodies.append(body)
    decoder.finish()
    return bodies


def test_an_answer_comes_back_record_by_record() -> None:
    records = [Record(envelope=b"one", age=0.5), Record(envelope=b"two", age=3)]
    reader = AnswerReader()
    got = [reader.receive(body) for body in bodies_of(b"".join(encode_frames(records)))]
    assert got == [*records, None]
    assert reader.ended
    reader.finish()


def test_a_request_has_room_for_later_keys() -> None:
    assert decode_request(encode_request(Request())) == Request()
    assert decode_request(msgpack.packb({"Have": b"digest"})) == Request()


def test_the_largest_envelope_fits_and_a_larger_one_does_not() -> None:
    largest = Record(envelope=bytes(MAX_ENVELOPE_BYTES), age=1.0)
    assert decode_answer(encode_answer(largest)) == largest
    larger = {"Type": "record", "Envelope": bytes(MAX_ENVELOPE_BYTES + 1), "Age": 1.0}
    with pytest.raises(WireError) as caught:
        decode_answer(msgpack.packb(larger))
    assert caught.value.code == "bad_field"


@pytest.mark.parametrize("age", [-0.001, float("nan"), float("inf"), "1", None, True, 1e9])
def test_an_age_is_a_finite_number_of_seconds_within_a_year(age: object) -> None:
    with pytest.raises(WireError) as caught:
        decode_answer(msgpack.packb({"Type": "record", "Envelope": b"e", "Age": age}))
    assert caught.value.code == "bad_field"


def test_an_age_in_whole_seconds_may_be_an_integer() -> None:
    record = decode_answer(msgpack.packb({"Type": "record", "Envelope": b"e", "Age": 3}))
    assert record == Record(envelope=b"e", age=3.0)


@pytest.mark.parametrize("type_", ["later", None, 1, ["record"]])
def test_a_frame_of_another_type_is_an_error(type_: object) -> None:
    with pytest.raises(WireError) as caught:
        decode_answer(msgpack.packb({"Type": type_}))
    assert caught.value.code == "unknown_type"


def test_a_peer_can_send_no_more_records_than_a_ledger_holds() -> None:
    reader, body = AnswerReader(), encode_answer(Record(envelope=b"e", age=0.0))
    for _ in range(MAX_RECORDS):
        reader.receive(body)
    with pytest.raises(WireError) as caught:
        reader.receive(body)
    assert caught.value.code == "too_many_records"


def test_a_peer_can_send_no_more_bytes_than_the_budget() -> None:
    reader, body = AnswerReader(), encode_answer(Record(envelope=bytes(20_000), age=0.0))
    for _ in range(MAX_TOTAL_BYTES // len(body)):
        reader.receive(body)
    with pytest.raises(WireError) as caught:
        reader.receive(body)
    assert caught.value.code == "too_many_records"


def test_an_answer_that_would_be_too_long_is_ended_early_but_cleanly() -> None:
    reader = AnswerReader()
    frames = list(encode_frames(Record(envelope=b"e", age=0.0) for _ in range(MAX_RECORDS + 5)))
    for frame in frames:
        reader.receive(frame[4:])
    assert (len(frames), reader.ended) == (MAX_RECORDS + 1, True)
    large = (Record(envelope=bytes(20_000), age=0.0) for _ in range(MAX_RECORDS))
    assert sum(map(len, encode_frames(large))) <= MAX_TOTAL_BYTES + 100


def test_an_answer_without_its_end_is_truncated() -> None:
    reader = AnswerReader()
    reader.receive(encode_answer(Record(envelope=b"e", age=0.0)))
    with pytest.raises(WireError) as caught:
        reader.finish()
    assert caught.value.code == "truncated"


def test_a_frame_behind_the_end_is_an_error() -> None:
    reader = AnswerReader()
    reader.receive(encode_answer(End()))
    with pytest.raises(WireError) as caught:
        reader.receive(encode_answer(End()))
    assert caught.value.code == "after_end"


@given(st.binary(max_size=100))
def test_random_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    for decode in (decode_answer, decode_request):
        try:
            outcome = type(decode(data)).__name__
        except WireError as exc:
            outcome = exc.code
        assert outcome in {"Request"} | ledger_exchange.ERROR_CODES
