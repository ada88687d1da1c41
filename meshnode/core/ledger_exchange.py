"""The ledger protocol: a newcomer asks one member for everything that it knows.

The law here: a record is what its owner signed, byte for byte, and only its age is the relaying
peer's word. What is inside an envelope is verified by whoever reads it, as if it had been gossiped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from meshnode.core.node_data import MAX_ENVELOPE_BYTES
from meshnode.core.wire import (
    FRAME_ERROR_CODES,
    TypedMessage,
    WireModel,
    decode_model,
    encode_frame,
    encode_model,
    parse_model,
    unpack_map,
)
from meshnode.errors import WireError

PROTOCOL_ID = "/meshnode/ledger/1.0.0"
TIMEOUT = 10.0  # seconds for a whole exchange; 10,000 records are some 7 MB
MAX_REQUEST_BYTES = 4096  # empty today; room for a digest of what the asker has
MAX_RECORD_BYTES = MAX_ENVELOPE_BYTES + 64  # the envelope, its keys and the age
MAX_RECORDS = 10_000  # as many as a ledger holds
MAX_TOTAL_BYTES = 32 * 1024 * 1024  # of all records together; 10,000 usual ones are a quarter
MAX_AGE = 31_536_000.0  # seconds, a year; no ledger keeps anything longer

ERROR_CODES = FRAME_ERROR_CODES | {"unknown_type", "too_many_records", "after_end"}

Envelope = Annotated[
    bytes,
    Field(min_length=1, max_length=MAX_ENVELOPE_BYTES),
    WithJsonSchema(
        {
            "type": "string",
            "contentEncoding": "base16",
            "pattern": "^([0-9a-f]{2})+$",
            "maxLength": 2 * MAX_ENVELOPE_BYTES,
        }
    ),
]


class Request(WireModel):
    """Asker to member, once: send what you know."""


class Record(TypedMessage):
    """Member to asker: one announcement, sealed as its owner gossiped it."""

    type: Literal["record"] = Field(default="record", alias="Type")
    envelope: Envelope = Field(alias="Envelope")
    age: float = Field(alias="Age", ge=0, le=MAX_AGE)  # seconds since proof of life, as sent


class End(TypedMessage):
    """Member to asker, last: that was all. A stream that ends without it was cut."""

    type: Literal["end"] = Field(default="end", alias="Type")


def encode_request(request: Request) -> bytes:
    """Return the body of the request's frame."""
    return encode_model(request, MAX_REQUEST_BYTES)


def decode_request(body: bytes) -> Request:
    """Return the request; raises ``WireError`` ``too_large``, ``bad_msgpack``, ``bad_field``."""
    return decode_model(Request, body, MAX_REQUEST_BYTES)


def encode_answer(answer: Record | End) -> bytes:
    """Return the body of one frame of the answer."""
    return encode_model(answer, MAX_RECORD_BYTES)


def decode_answer(body: bytes) -> Record | End:
    """Return what one frame of the answer says.

    Raises:
        WireError: ``too_large``, ``bad_msgpack``, ``bad_field``, or ``unknown_type``.
    """
    fields = unpack_map(body, MAX_RECORD_BYTES)
    match fields.get("Type"):
        case "record":
            return parse_model(Record, fields)
        case "end":
            return parse_model(End, fields)
        case _:
            raise WireError("unknown_type", "Type is neither record nor end")


def encode_frames(records: Iterable[Record]) -> Iterator[bytes]:
    """Yield the whole answer as frames: at most ``MAX_RECORDS`` records within the byte budget,
    then the end. List the freshest first: what does not fit is left out.
    """
    total = 0
    for count, record in enumerate(records):
        frame = encode_frame(encode_answer(record))
        total += len(frame)
        if count == MAX_RECORDS or total > MAX_TOTAL_BYTES:
            break
        yield frame
    yield encode_frame(encode_answer(End()))


class AnswerReader:
    """Reads an answer frame by frame, and holds the answering peer to the bounds."""

    def __init__(self) -> None:
        self._records = 0
        self._bytes = 0
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the end has been read."""
        return self._ended

    def receive(self, body: bytes) -> Record | None:
        """Take one frame's body; return its record, or None at the end.

        Raises:
            WireError: as ``decode_answer``; ``too_many_records``: too many, or together too
                large; ``after_end``: a frame behind the end.
        """
        if self._ended:
            raise WireError("after_end", "a frame came after the end of the answer")
        answer = decode_answer(body)
        if isinstance(answer, End):
            self._ended = True
            return None
        self._records += 1
        self._bytes += len(body)
        if self._records > MAX_RECORDS or self._bytes > MAX_TOTAL_BYTES:
            raise WireError("too_many_records", f"more than {MAX_RECORDS} records or too large")
        return answer

    def finish(self) -> None:
        """Say that the stream ended.

        Raises:
            WireError: ``truncated``: it ended before the answer did.
        """
        if not self._ended:
            raise WireError("truncated", "the stream ended before the answer did")
