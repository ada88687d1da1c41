from __future__ import annotations

from typing import Any

import pytest

from meshnode.core import tunnel
from meshnode.core.tunnel import Header, Item, Mark, ReplyDecoder, RequestDecoder
from meshnode.errors import WireError

PROTOCOL = "tunnel/2.0.0"

DECODERS = {"TunnelRequest": tunnel.decode_request, "TunnelReply": tunnel.decode_reply}


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
