from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core import ledger_exchange
from meshnode.core.ledger_exchange import (
    DIGEST_ENTRIES,
    ENTRY_BYTES,
    KEY_BYTES,
    MAX_DIGEST_ENTRIES,
    MAX_MESSAGE_BYTES,
    MAX_RECORDS,
    MAX_TOTAL_BYTES,
    WANT_KEYS,
    Digest,
    End,
    PartReader,
    Record,
    Want,
    decode,
    digest_frames,
    encode,
    end_frame,
    record_frames,
    want_frames,
)
from meshnode.core.node_data import MAX_ENVELOPE_BYTES
from meshnode.core.wire import FrameDecoder
from meshnode.errors import WireError


def bodies_of(stream: bytes) -> list[bytes]:
    decoder, bodies = FrameDecoder(MAX_MESSAGE_BYTES), []
    decoder.feed(stream)
    while (body := decoder.next_frame()) is not None:
        bodies.append(body)
    decoder.finish()
    return bodies


def code_of(reader: PartReader, body: bytes) -> str:
    with pytest.raises(WireError) as caught:
        reader.receive(body)
    return caught.value.code


def test_a_part_comes_back_message_by_message() -> None:
    records = [Record(envelope=b"one", age=0.5), Record(envelope=b"two", age=3)]
    reader = PartReader(Record, Want)
    keys = [bytes([n]) * KEY_BYTES for n in range(3)]
    stream = b"".join([*record_frames(records), *want_frames(keys), end_frame()])
    got = [reader.receive(body) for body in bodies_of(stream)]
    assert got == [*records, Want(keys=b"".join(keys)), None]
    assert reader.ended
    reader.finish()


def test_a_large_digest_is_cut_into_frames_that_fit() -> None:
    entries = [n.to_bytes(ENTRY_BYTES, "big") for n in range(2 * DIGEST_ENTRIES + 1)]
    digests = [decode(body) for body in bodies_of(b"".join(digest_frames(entries, gone=True)))]
    assert [len(d.entries) // ENTRY_BYTES for d in digests if isinstance(d, Digest)] == [
        DIGEST_ENTRIES,
        DIGEST_ENTRIES,
        1,
    ]
    keys = [n.to_bytes(KEY_BYTES, "big") for n in range(WANT_KEYS + 1)]
    assert len(bodies_of(b"".join(want_frames(keys)))) == 2


def test_the_largest_envelope_fits_and_a_larger_one_does_not() -> None:
    largest = Record(envelope=bytes(MAX_ENVELOPE_BYTES), age=1.0)
    assert decode(encode(largest)) == largest
    larger = {"Type": "record", "Envelope": bytes(MAX_ENVELOPE_BYTES + 1), "Age": 1.0}
    with pytest.raises(WireError) as caught:
        decode(msgpack.packb(larger))
    assert caught.value.code == "bad_field"


@pytest.mark.parametrize("age", [-0.001, float("nan"), float("inf"), "1", None, True, 1e9])
def test_an_age_is_a_finite_number_of_seconds_within_a_year(age: object) -> None:
    with pytest.raises(WireError) as caught:
        decode(msgpack.packb({"Type": "record", "Envelope": b"e", "Age": age}))
    assert caught.value.code == "bad_field"


def test_an_age_in_whole_seconds_may_be_an_integer() -> None:
    record = decode(msgpack.packb({"Type": "record", "Envelope": b"e", "Age": 3}))
    assert record == Record(envelope=b"e", age=3.0)


@pytest.mark.parametrize("type_", ["later", None, 1, ["record"], {"record": 1}])
def test_a_frame_of_another_type_is_an_error(type_: object) -> None:
    with pytest.raises(WireError) as caught:
        decode(msgpack.packb({"Type": type_}))
    assert caught.value.code == "unknown_type"


def test_a_message_of_another_part_is_an_error() -> None:
    want, digest = Want(keys=bytes(KEY_BYTES)), Digest(gone=False, entries=b"")
    assert code_of(PartReader(Digest), encode(want)) == "unknown_type"
    assert code_of(PartReader(Record, Want), encode(digest)) == "unknown_type"
    assert code_of(PartReader(Record), encode(want)) == "unknown_type"


def test_a_peer_can_send_no_more_records_than_it_was_asked_for() -> None:
    reader, body = PartReader(Record, max_records=2), encode(Record(envelope=b"e", age=0.0))
    for _ in range(2):
        reader.receive(body)
    assert code_of(reader, body) == "too_many"


def test_a_peer_can_send_no_more_than_a_ledger_holds() -> None:
    reader, body = PartReader(Record), encode(Record(envelope=b"e", age=0.0))
    for _ in range(MAX_RECORDS):
        reader.receive(body)
    assert code_of(reader, body) == "too_many"

    reader = PartReader(Digest)
    body = encode(Digest(gone=False, entries=bytes(ENTRY_BYTES * 1000)))
    for _ in range(MAX_DIGEST_ENTRIES // 1000):
        reader.receive(body)
    assert code_of(reader, body) == "too_many"

    reader, body = PartReader(Want), encode(Want(keys=bytes(KEY_BYTES * 1000)))
    for _ in range(MAX_RECORDS // 1000):
        reader.receive(body)
    assert code_of(reader, body) == "too_many"


def test_a_peer_can_send_no_more_bytes_than_the_budget() -> None:
    reader, body = PartReader(Record), encode(Record(envelope=bytes(20_000), age=0.0))
    for _ in range(MAX_TOTAL_BYTES // len(body)):
        reader.receive(body)
    assert code_of(reader, body) == "too_many"


def test_what_would_be_too_much_is_left_out() -> None:
    small = (Record(envelope=b"e", age=0.0) for _ in range(MAX_RECORDS + 5))
    assert len(list(record_frames(small))) == MAX_RECORDS
    large = (Record(envelope=bytes(20_000), age=0.0) for _ in range(MAX_RECORDS))
    assert sum(len(frame) - 4 for frame in record_frames(large)) <= MAX_TOTAL_BYTES


def test_a_part_without_its_end_is_truncated() -> None:
    reader = PartReader(Record)
    reader.receive(encode(Record(envelope=b"e", age=0.0)))
    with pytest.raises(WireError) as caught:
        reader.finish()
    assert caught.value.code == "truncated"


def test_a_frame_behind_the_end_is_an_error() -> None:
    reader = PartReader(Record)
    reader.receive(encode(End()))
    assert code_of(reader, encode(End())) == "after_end"


@given(st.binary(max_size=100))
def test_random_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    try:
        outcome = type(decode(data)).__name__
    except WireError as exc:
        outcome = exc.code
    assert outcome in ledger_exchange.ERROR_CODES
