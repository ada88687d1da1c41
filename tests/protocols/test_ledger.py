from __future__ import annotations

from typing import Any

import pytest

from meshnode.core import ledger_exchange
from meshnode.core.ledger_digest import key_of
from meshnode.core.ledger_exchange import (
    MAX_MESSAGE_BYTES,
    PartReader,
    Record,
)
from meshnode.core.node_data import decode_signed
from meshnode.core.wire import FrameDecoder
from meshnode.errors import WireError
from meshnode.net.libp2p.envelope import open_sealed

PROTOCOL = "ledger/2.0.0"


@pytest.mark.vectors(PROTOCOL, "keys")
def test_a_node_has_the_key_named(vector: dict[str, Any]) -> None:
    assert key_of(vector["peer_id"]).hex() == vector["key"]


@pytest.mark.vectors(PROTOCOL, "parts")
def test_a_part_gives_the_messages_and_the_end_written(vector: dict[str, Any]) -> None:
    frames = FrameDecoder(MAX_MESSAGE_BYTES)
    reader = PartReader(*(getattr(ledger_exchange, name) for name in vector["expected"]))
    frames.feed(bytes.fromhex(vector["stream"]))
    messages, error = [], None
    try:
        while (body := frames.next_frame()) is not None:
            message = reader.receive(body)
            if message is not None:
                messages.append(message.model_dump(mode="json", by_alias=True))
            if isinstance(message, Record):
                decode_signed(*open_sealed(message.envelope))
        frames.finish()
        reader.finish()
    except WireError as exc:
        error = exc.code
    assert (messages, error) == (vector["messages"], vector.get("error"))
