from __future__ import annotations

from typing import Any

import pytest

from meshnode.core import tunnel
from meshnode.core.tunnel import MAX_HEADER_BYTES, ChunkDecoder
from meshnode.core.wire import FrameDecoder
from meshnode.errors import WireError

PROTOCOL = "tunnel/1.0.0"

DECODERS = {"TunnelRequest": tunnel.decode_request, "TunnelReply": tunnel.decode_reply}


@pytest.mark.vectors(PROTOCOL, "canonical")
@pytest.mark.vectors(PROTOCOL, "valid")
def test_a_valid_header_decodes_as_written(vector: dict[str, Any]) -> None:
    message = DECODERS[vector["message"]](bytes.fromhex(vector["hex"]))
    assert message.model_dump(mode="json", by_alias=True) == vector["json"]


@pytest.mark.vectors(PROTOCOL, "canonical")
def test_a_canonical_header_is_encoded_byte_for_byte(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    if vector["message"] == "TunnelRequest":
        assert tunnel.encode_request(tunnel.decode_request(data)) == data
    else:
        assert tunnel.encode_reply(tunnel.decode_reply(data)) == data


@pytest.mark.vectors(PROTOCOL, "invalid")
def test_an_invalid_header_fails_with_the_code_named(vector: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        DECODERS[vector["message"]](bytes.fromhex(vector["hex"]))
    assert caught.value.code == vector["error"]


@pytest.mark.vectors(PROTOCOL, "frames")
def test_a_stream_is_cut_into_the_frames_written(vector: dict[str, Any]) -> None:
    decoder, bodies, error = FrameDecoder(MAX_HEADER_BYTES), [], None
    decoder.feed(bytes.fromhex(vector["stream"]))
    try:
        while (body := decoder.next_frame()) is not None:
            bodies.append(body.hex())
        decoder.finish()
    except WireError as exc:
        error = exc.code
    assert (bodies, error) == (vector["bodies"], vector.get("error"))


@pytest.mark.vectors(PROTOCOL, "chunks")
@pytest.mark.parametrize("step", [1, 2, 3, 10_000])
def test_a_body_gives_the_payload_and_the_end_written(vector: dict[str, Any], step: int) -> None:
    stream = bytes.fromhex(vector["stream"])
    decoder, payload, error = ChunkDecoder(), b"", None
    try:
        for at in range(0, len(stream), step):
            payload += b"".join(decoder.feed(stream[at : at + step]))
        decoder.finish()
    except WireError as exc:
        error = exc.code
    assert error == vector.get("error")
    # What came in the very piece that broke the rules may be lost with it.
    if error in (None, "cut") or step == 1:
        assert payload.hex() == vector["payload"]
