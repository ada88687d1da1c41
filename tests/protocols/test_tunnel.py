from __future__ import annotations

from typing import Any

import pytest

from meshnode.core import tunnel
from meshnode.core.tunnel import Header, Item, Mark, ReplyDecoder, RequestDecoder
from meshnode.errors import WireError

PROTOCOL = "tunnel/2.0.0"

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


def shown(items: list[Item]) -> list[list[str]]:
    """The items as the vectors show them: bytes that follow one another are one."""
    out: list[list[str]] = []
    for item in items:
        if isinstance(item, Header):
            out.append(["header", item.body.hex()])
        elif isinstance(item, Mark):
            out.append([item.name.lower()])
        elif out and out[-1][0] == "bytes":
            out[-1][1] += item.hex()
        else:
            out.append(["bytes", item.hex()])
    return out


@pytest.mark.vectors(PROTOCOL, "requests")
@pytest.mark.parametrize("step", [1, 2, 3, 10_000])
def test_a_diallers_direction_gives_the_items_and_the_end_written(
    vector: dict[str, Any], step: int
) -> None:
    stream = bytes.fromhex(vector["stream"])
    decoder, items, error = RequestDecoder(), list[Item](), None
    try:
        for at in range(0, len(stream), step):
            items += decoder.feed(stream[at : at + step])
        decoder.finish()
    except WireError as exc:
        error = exc.code
    assert error == vector.get("error")
    # What came in the very piece that broke the rules may be lost with it.
    if error in (None, "cut", "truncated") or step == 1:
        assert shown(items) == vector["items"]


@pytest.mark.vectors(PROTOCOL, "replies")
@pytest.mark.parametrize("step", [1, 2, 3, 10_000])
def test_a_servers_direction_gives_the_items_and_the_end_written(
    vector: dict[str, Any], step: int
) -> None:
    decoder, items, error = ReplyDecoder(), list[Item](), None
    try:
        for action in vector["script"]:
            match action:
                case ["ask"]:
                    decoder.ask()
                case ["done"]:
                    decoder.done()
                case ["hex", text]:
                    data = bytes.fromhex(text)
                    for at in range(0, len(data), step):
                        items += decoder.feed(data[at : at + step])
        decoder.finish()
    except WireError as exc:
        error = exc.code
    assert error == vector.get("error")
    if error in (None, "cut") or step == 1:
        assert shown(items) == vector["items"]
