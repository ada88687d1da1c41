"""The ledger protocol on the wire: two members tell each other what the other has not heard.

The law here: a record is what its owner signed, byte for byte, and only its age is the relaying
peer's word. What is inside an envelope is verified by whoever reads it, as if it had been gossiped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from meshnode.core.node_data import MAX_ENVELOPE_BYTES
from meshnode.core.wire import (
    FRAME_ERROR_CODES,
    TypedMessage,
    encode_frame,
    encode_model,
    parse_model,
    unpack_map,
)
from meshnode.errors import WireError

PROTOCOL_ID = "/meshnode/ledger/2.0.0"
TIMEOUT = 10.0  # seconds for a whole exchange; 10,000 records are some 7 MB
KEY_BYTES = 12  # of SHA-256 of a peer ID: finding another with the same takes 2^96 tries
SEQ_BYTES = 8
ENTRY_BYTES = KEY_BYTES + SEQ_BYTES
DIGEST_ENTRIES = 1600  # in one frame
WANT_KEYS = 2600  # in one frame
MAX_MESSAGE_BYTES = 32_768  # body of any frame; a record's has at most 20,544
# In one exchange: as many who are online, and as many who are gone, as a ledger holds.
MAX_DIGEST_ENTRIES = 20_000
MAX_RECORDS = 10_000  # in one direction, and keys wanted: as many as a ledger holds
MAX_TOTAL_BYTES = 32 * 1024 * 1024  # of all records together; 10,000 usual ones are a quarter
MAX_AGE = 31_536_000.0  # seconds, a year; no ledger keeps anything longer

ERROR_CODES = FRAME_ERROR_CODES | {"unknown_type", "too_many", "after_end"}

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


def _whole_entries(packed: bytes) -> bytes:
    if len(packed) % ENTRY_BYTES:
        raise ValueError(f"not a multiple of {ENTRY_BYTES} bytes")
    return packed


def _whole_keys(packed: bytes) -> bytes:
    if len(packed) % KEY_BYTES:
        raise ValueError(f"not a multiple of {KEY_BYTES} bytes")
    return packed


Entries = Annotated[
    bytes,
    Field(max_length=DIGEST_ENTRIES * ENTRY_BYTES),
    AfterValidator(_whole_entries),
    WithJsonSchema(
        {
            "type": "string",
            "contentEncoding": "base16",
            "pattern": f"^([0-9a-f]{{{2 * ENTRY_BYTES}}})*$",
            "maxLength": 2 * DIGEST_ENTRIES * ENTRY_BYTES,
        }
    ),
]
Keys = Annotated[
    bytes,
    Field(min_length=KEY_BYTES, max_length=WANT_KEYS * KEY_BYTES),
    AfterValidator(_whole_keys),
    WithJsonSchema(
        {
            "type": "string",
            "contentEncoding": "base16",
            "pattern": f"^([0-9a-f]{{{2 * KEY_BYTES}}})+$",
            "maxLength": 2 * WANT_KEYS * KEY_BYTES,
        }
    ),
]


class Digest(TypedMessage):
    """Asker to member: the newest Seq that the asker knows of some nodes."""

    type: Literal["digest"] = Field(default="digest", alias="Type")
    gone: bool = Field(alias="Gone")  # whether these nodes left or are offline, at the asker
    entries: Entries = Field(alias="Entries")  # each a key, then the Seq, big endian


class Want(TypedMessage):
    """Member to asker: hand over your records of these nodes."""

    type: Literal["want"] = Field(default="want", alias="Type")
    keys: Keys = Field(alias="Keys")


class Record(TypedMessage):
    """Either way: one announcement, sealed as its owner gossiped it."""

    type: Literal["record"] = Field(default="record", alias="Type")
    envelope: Envelope = Field(alias="Envelope")
    age: float = Field(alias="Age", ge=0, le=MAX_AGE)  # seconds since proof of life, as sent


class End(TypedMessage):
    """Either way: this part is complete. A stream that ends without it was cut."""

    type: Literal["end"] = Field(default="end", alias="Type")


Message = Digest | Want | Record | End
_MESSAGES: dict[object, type[Message]] = {
    "digest": Digest,
    "want": Want,
    "record": Record,
    "end": End,
}


def encode(message: Message) -> bytes:
    """Return the body of a message's frame."""
    return encode_model(message, MAX_MESSAGE_BYTES)


def decode(body: bytes) -> Message:
    """Return what one frame says.

    Raises:
        WireError: ``too_large``, ``bad_msgpack``, ``bad_field``, or ``unknown_type``.
    """
    fields = unpack_map(body, MAX_MESSAGE_BYTES)
    type_ = fields.get("Type")
    model = _MESSAGES.get(type_) if isinstance(type_, str) else None
    if model is None:
        raise WireError("unknown_type", f"Type is none of {', '.join(map(str, _MESSAGES))}")
    return parse_model(model, fields)


def digest_frames(entries: Sequence[bytes], *, gone: bool) -> Iterator[bytes]:
    """Yield digests of packed entries as frames."""
    for first in range(0, len(entries), DIGEST_ENTRIES):
        packed = b"".join(entries[first : first + DIGEST_ENTRIES])
        yield encode_frame(encode(Digest(gone=gone, entries=packed)))


def want_frames(keys: Sequence[bytes]) -> Iterator[bytes]:
    """Yield what is wanted as frames."""
    for first in range(0, len(keys), WANT_KEYS):
        yield encode_frame(encode(Want(keys=b"".join(keys[first : first + WANT_KEYS]))))


def record_frames(records: Iterable[Record]) -> Iterator[bytes]:
    """Yield records as frames: at most ``MAX_RECORDS``, and within the byte budget.

    List the freshest first: what does not fit is left out.
    """
    total = 0
    for count, record in enumerate(records):
        body = encode(record)
        total += len(body)
        if count == MAX_RECORDS or total > MAX_TOTAL_BYTES:
            return
        yield encode_frame(body)


def end_frame() -> bytes:
    """Return the frame that ends one part of the exchange."""
    return encode_frame(encode(End()))


class PartReader:
    """Reads one part of an exchange frame by frame, and holds its sender to the bounds.

    Args:
        expected: the kinds of message that this part is made of, besides its end.
        max_records: how many records it may have.
    """

    def __init__(self, *expected: type[Message], max_records: int = MAX_RECORDS) -> None:
        self._expected = (*expected, End)
        self._max_records = max_records
        self._records = 0
        self._record_bytes = 0
        self._entries = 0
        self._keys = 0
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the end has been read."""
        return self._ended

    def receive(self, body: bytes) -> Digest | Want | Record | None:
        """Take one frame's body; return its message, or None at the end.

        Raises:
            WireError: as ``decode``; ``unknown_type``: a message of another part; ``too_many``:
                entries, keys or records, or together too large; ``after_end``.
        """
        if self._ended:
            raise WireError("after_end", "a frame came after the end")
        message = decode(body)
        if not isinstance(message, self._expected):
            raise WireError("unknown_type", f"{message.type} has no place here")
        match message:
            case End():
                self._ended = True
                return None
            case Digest():
                self._entries += len(message.entries) // ENTRY_BYTES
            case Want():
                self._keys += len(message.keys) // KEY_BYTES
            case Record():
                self._records += 1
                self._record_bytes += len(body)
        if (
            self._entries > MAX_DIGEST_ENTRIES
            or self._keys > MAX_RECORDS
            or self._records > self._max_records
            or self._record_bytes > MAX_TOTAL_BYTES
        ):
            raise WireError("too_many", "more entries, keys or records than the limits allow")
        return message

    def finish(self) -> None:
        """Say that the stream ended.

        Raises:
            WireError: ``truncated``: it ended before this part did.
        """
        if not self._ended:
            raise WireError("truncated", "the stream ended before this part did")
