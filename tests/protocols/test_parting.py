from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from meshnode.core.parting import (
    MAX_BYTES,
    PartingReply,
    PartingRequest,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from meshnode.core.wire import WireModel
from meshnode.errors import WireError
from meshnode.net.framed import FrameReader

PROTOCOL = "parting/1.0.0"


def decoder_of(message: str) -> Callable[[bytes], WireModel]:
    return decode_request if message == "PartingRequest" else decode_reply


@pytest.mark.vectors(PROTOCOL, "canonical")
@pytest.mark.vectors(PROTOCOL, "valid")
def test_a_valid_message_decodes_as_written(vector: dict[str, Any]) -> None:
    message = decoder_of(vector["message"])(bytes.fromhex(vector["hex"]))
    assert message.model_dump(mode="json", by_alias=True) == vector["json"]


@pytest.mark.vectors(PROTOCOL, "canonical")
def test_a_canonical_message_is_encoded_byte_for_byte(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    message = decoder_of(vector["message"])(data)
    if isinstance(message, PartingRequest):
        assert encode_request(message) == data
    else:
        assert isinstance(message, PartingReply)
        assert encode_reply(message) == data


@pytest.mark.vectors(PROTOCOL, "invalid")
def test_an_invalid_message_fails_with_the_code_named(vector: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        decoder_of(vector["message"])(bytes.fromhex(vector["hex"]))
    assert caught.value.code == vector["error"]


class Pieces:
    """A stream that brings what was written, in pieces, and then its end."""

    def __init__(self, data: bytes, step: int) -> None:
        self._left = [data[at : at + step] for at in range(0, len(data), step)]

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        return self._left.pop(0) if self._left else b""


@pytest.mark.vectors(PROTOCOL, "streams")
@pytest.mark.parametrize("step", [1, 3, 10_000])
async def test_a_stream_holds_its_frame_or_fails_with_the_code_named(
    vector: dict[str, Any], step: int
) -> None:
    frames = FrameReader(Pieces(bytes.fromhex(vector["stream"]), step), MAX_BYTES)  # type: ignore[arg-type]
    if error := vector.get("error"):
        with pytest.raises(WireError) as caught:
            await frames.expect_frame()
        assert caught.value.code == error
    else:
        assert (await frames.expect_frame()).hex() == vector["body"]
