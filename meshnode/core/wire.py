"""What all protocols share on the wire: bounded msgpack maps, strict models, framing.

The law here: whatever bytes a peer sends, decoding returns a value or raises ``WireError``, and
no length that a peer names is believed before it is compared with a bound.

Pure and synchronous: bytes in, values out, so that each protocol can be tested as a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Never, TypeVar

import msgpack  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema

from meshnode.errors import WireError

UINT64_MAX = 2**64 - 1

# The words of WireError.code. Each protocol's SPEC.md lists its own; a test compares them.
MAP_ERROR_CODES = frozenset({"too_large", "bad_msgpack", "bad_field"})
FRAME_ERROR_CODES = MAP_ERROR_CODES | {"truncated"}

# Bounds inside one map. They are wider than any field of today, because unknown keys of later
# versions must pass; narrow enough that one message can't hold tens of thousands of objects.
MAX_STR_BYTES = 4096
MAX_BIN_BYTES = 32 * 1024  # the largest value is a ledger record's envelope
MAX_ARRAY_ITEMS = 1024
MAX_MAP_ITEMS = 64

# No control or direction-changing characters: these strings end up in terminals and logs, where an
# escape sequence from a stranger could rewrite what the reader sees.
_PRINTABLE = r"^[^\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069]*$"
# The same without half characters, which JSON can carry and UTF-8 can not.
_SENDABLE = re.compile(_PRINTABLE.removesuffix("]*$") + r"\ud800-\udfff]*")

Uint64 = Annotated[int, Field(ge=0, le=UINT64_MAX)]
Text64 = Annotated[str, Field(max_length=64, pattern=_PRINTABLE)]
Text128 = Annotated[str, Field(max_length=128, pattern=_PRINTABLE)]
Text256 = Annotated[str, Field(max_length=256, pattern=_PRINTABLE)]


def is_sendable(text: str, max_length: int) -> bool:
    """Say whether ``text`` is printable, 1 to ``max_length`` characters, and UTF-8 can hold it."""
    return 1 <= len(text) <= max_length and _SENDABLE.fullmatch(text) is not None


class WireModel(BaseModel):
    """A frozen message: Python names for us, the wire's keys (aliases) for peers.

    Building one from values out of range raises pydantic's ``ValidationError``, a ``ValueError``:
    then the caller is at fault, not a peer.
    """

    model_config = ConfigDict(
        strict=True,  # True is no 1, "1" is no 1, 1.0 is no 1: other languages would differ
        frozen=True,
        extra="ignore",  # so that old nodes understand new ones
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
        ser_json_bytes="hex",  # as in the schemas and the vectors
        hide_input_in_errors=True,  # a key or a stranger's bytes must not end up in a log
    )


class TypedMessage(WireModel):
    """One of several messages of a protocol, told apart by the value of Type."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, object]:
        # Readers choose the message by Type, so it is required on the wire though Python code
        # need not write it.
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema["required"] = ["Type", *schema.get("required", [])]
        return schema


ModelT = TypeVar("ModelT", bound=WireModel)


def unpack_map(data: bytes, max_bytes: int) -> dict[str, object]:
    """Return the one msgpack map that ``data`` is.

    Raises:
        WireError: ``too_large``: more than ``max_bytes``. ``bad_msgpack``: not exactly one map
            with unique string keys, within the bounds above, and without extension types.
    """
    if len(data) > max_bytes:
        raise WireError("too_large", f"{len(data)} bytes are more than the {max_bytes} allowed")
    try:
        value: object = msgpack.unpackb(
            data,
            raw=False,
            use_list=False,
            strict_map_key=True,
            object_pairs_hook=_unique_keys,
            ext_hook=_refuse_extension,
            max_str_len=MAX_STR_BYTES,
            max_bin_len=MAX_BIN_BYTES,
            max_array_len=MAX_ARRAY_ITEMS,
            max_map_len=MAX_MAP_ITEMS,
            max_ext_len=0,
        )
    # ValueError covers msgpack's own errors, trailing bytes, nesting and ill-formed UTF-8.
    # RecursionError and MemoryError can't come from 32 KiB: msgpack keeps its own bounded stack.
    except (ValueError, TypeError, msgpack.UnpackException) as exc:
        raise WireError("bad_msgpack", f"not one msgpack map: {_brief(exc)}") from exc
    if not isinstance(value, dict):
        raise WireError("bad_msgpack", f"expected a map, got {type(value).__name__}")
    return value


def pack_map(fields: Mapping[str, object], max_bytes: int) -> bytes:
    """Return ``fields`` as msgpack, in their order, each value in its shortest form.

    Raises:
        WireError: ``too_large``: more than ``max_bytes``.
    """
    data: bytes = msgpack.packb(fields, use_bin_type=True)
    if len(data) > max_bytes:
        raise WireError("too_large", f"{len(data)} bytes are more than the {max_bytes} allowed")
    return data


def parse_model(model: type[ModelT], fields: Mapping[str, object]) -> ModelT:
    """Return ``fields``, as they came from the wire, as a checked ``model``.

    Raises:
        WireError: ``bad_field``: a required key is missing, or a value is of the wrong type or
            out of range.
    """
    try:
        return model.model_validate(fields, by_alias=True, by_name=False)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WireError("bad_field", f"{where}: {first['msg'][:200]}") from exc


def decode_model(model: type[ModelT], data: bytes, max_bytes: int) -> ModelT:
    """Return ``data`` as a checked ``model``; raises as ``unpack_map`` and ``parse_model``."""
    return parse_model(model, unpack_map(data, max_bytes))


def encode_model(message: WireModel, max_bytes: int) -> bytes:
    """Return ``message`` canonically: every key, in the model's order, defaults included.

    Raises:
        WireError: ``too_large``: more than ``max_bytes``.
    """
    return pack_map(message.model_dump(by_alias=True), max_bytes)


def _unique_keys(pairs: list[tuple[object, object]]) -> dict[object, object]:
    fields = dict(pairs)
    # Readers differ on which of two equal keys wins, so that one message would mean two things.
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice in one map")
    if not all(type(key) is str for key in fields):
        raise ValueError("a key is not a string")
    return fields


def _refuse_extension(_code: int, _data: bytes) -> Never:
    raise ValueError("extension types are not allowed")


def _brief(exc: BaseException) -> str:
    return (str(exc) or type(exc).__name__)[:200]


FRAME_HEADER_BYTES = 4  # uint32, big endian: the body's length


def encode_frame(body: bytes) -> bytes:
    """Return ``body`` with its length before it."""
    return len(body).to_bytes(FRAME_HEADER_BYTES, "big") + body


class FrameDecoder:
    """Cuts a byte stream into frames: uint32 length, then that many bytes.

    Feed it what arrives, then take frames until None; it never holds more than one frame and
    what came behind it in the same feed.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes  # of one body
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take in the next bytes of the stream."""
        self._buffer += data

    def next_frame(self) -> bytes | None:
        """Return the next whole body, or None if more bytes are needed.

        Raises:
            WireError: ``too_large``, as soon as the length is known.
        """
        if len(self._buffer) < FRAME_HEADER_BYTES:
            return None
        length = int.from_bytes(self._buffer[:FRAME_HEADER_BYTES], "big")
        if length > self._max_bytes:
            raise WireError(
                "too_large", f"a frame of {length} bytes is more than the {self._max_bytes} allowed"
            )
        end = FRAME_HEADER_BYTES + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[FRAME_HEADER_BYTES:end])
        del self._buffer[:end]
        return body

    def take_rest(self) -> bytes:
        """Return, once, the bytes behind the last frame: the start of whatever follows frames."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def finish(self) -> None:
        """Say that the stream ended.

        Raises:
            WireError: ``truncated``: it ended inside a frame.
        """
        if self._buffer:
            raise WireError("truncated", "the stream ended inside a frame")
