from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from meshnode.core.ledger_exchange import (
    MAX_RECORD_BYTES,
    AnswerReader,
    Record,
    Request,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from meshnode.core.node_data import decode_signed
from meshnode.core.wire import FrameDecoder, WireModel
from meshnode.errors import WireError
from meshnode.net.libp2p.envelope import open_sealed

PROTOCOL = "ledger/1.0.0"


def decoder_of(message: str) -> Callable[[bytes], WireModel]:
    return decode_request if message == "Request" else decode_answer


@pytest.mark.vectors(PROTOCOL, "canonical")
@pytest.mark.vectors(PROTOCOL, "valid")
def test_a_valid_message_decodes_as_written(vector: dict[str, Any]) -> None:
    message = decoder_of(vector["message"])(bytes.fromhex(vector["hex"]))
    assert type(message).__name__ == vector["message"]
    assert message.model_dump(mode="json", by_alias=True) == vector["json"]


@pytest.mark.vectors(PROTOCOL, "canonical")
def test_a_canonical_message_is_encoded_byte_for_byte(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    if vector["message"] == "Request":
        assert encode_request(Request()) == data
    else:
        assert encode_answer(decode_answer(data)) == data


@pytest.mark.vectors(PROTOCOL, "invalid")
def test_an_invalid_message_fails_with_the_code_named(vector: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        decoder_of(vector["message"])(bytes.fromhex(vector["hex"]))
    assert caught.value.code == vector["error"]


@pytest.mark.vectors(PROTOCOL, "answers")
def test_an_answer_gives_the_records_and_the_end_written(vector: dict[str, Any]) -> None:
    frames, reader = FrameDecoder(MAX_RECORD_BYTES), AnswerReader()
    frames.feed(bytes.fromhex(vector["stream"]))
    records, error = [], None
    try:
        while (body := frames.next_frame()) is not None:
            record = reader.receive(body)
            if record is not None:
                records.append(shown(record))
        frames.finish()
        reader.finish()
    except WireError as exc:
        error = exc.code
    assert (records, error) == (vector["records"], vector.get("error"))


def shown(record: Record) -> dict[str, object]:
    signer, payload = open_sealed(record.envelope)
    node = decode_signed(signer, payload)
    json = node.model_dump(mode="json", by_alias=True)
    return {"signer": signer, "age": record.age, "json": json}
