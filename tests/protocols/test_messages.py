"""What holds for the messages of every protocol: read, written and refused as its vectors say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core import (
    affinity_batch,
    ledger_exchange,
    loss_report,
    membership,
    node_data,
    parting,
    tunnel,
)
from meshnode.core.wire import WireModel
from meshnode.errors import WireError

Decode = Callable[[bytes], WireModel]


@dataclass(frozen=True)
class Codec:
    """How one protocol's messages are read and written.

    ``decode`` and ``encode`` are by the name of the message. Under ``""`` stands what reads any
    message, where the bytes themselves tell which it is.
    """

    decode: dict[str, Decode]
    encode: dict[str, Callable[[Any], bytes]]
    error_codes: frozenset[str]

    def read(self, vector: dict[str, Any]) -> WireModel:
        decode = self.decode.get("") or self.decode[vector["message"]]
        return decode(bytes.fromhex(vector["hex"]))

    def write(self, message: WireModel) -> bytes:
        encode = self.encode.get("") or self.encode[type(message).__name__]
        return encode(message)


def codec_of(module: Any) -> Codec:
    return Codec({"": module.decode}, {"": module.encode}, module.ERROR_CODES)


CODECS = {
    "announce/1.0.0": codec_of(node_data),
    "affinity/1.0.0": codec_of(affinity_batch),
    "ledger/2.0.0": codec_of(ledger_exchange),
    "loss/1.0.0": codec_of(loss_report),
    "membership/1.0.0": codec_of(membership),
    "parting/1.0.0": Codec(
        {"PartingRequest": parting.decode_request, "PartingReply": parting.decode_reply},
        {"PartingRequest": parting.encode_request, "PartingReply": parting.encode_reply},
        parting.ERROR_CODES,
    ),
    "tunnel/2.0.0": Codec(
        {"TunnelRequest": tunnel.decode_request, "TunnelReply": tunnel.decode_reply},
        {"TunnelRequest": tunnel.encode_request, "TunnelReply": tunnel.encode_reply},
        tunnel.ERROR_CODES,
    ),
}


def test_every_protocol_is_here(protocols: Any) -> None:
    folders = {str(path.parent.relative_to(protocols)) for path in protocols.glob("*/*/vectors")}
    assert folders == set(CODECS)


@pytest.mark.messages("canonical")
@pytest.mark.messages("valid")
def test_a_valid_message_decodes_as_written(protocol: str, vector: dict[str, Any]) -> None:
    message = CODECS[protocol].read(vector)
    assert vector.get("message", type(message).__name__) == type(message).__name__
    assert message.model_dump(mode="json", by_alias=True) == vector["json"]


@pytest.mark.messages("canonical")
def test_a_canonical_message_is_encoded_byte_for_byte(
    protocol: str, vector: dict[str, Any]
) -> None:
    codec = CODECS[protocol]
    assert codec.write(codec.read(vector)).hex() == vector["hex"]


@pytest.mark.messages("invalid")
def test_an_invalid_message_fails_with_the_code_named(
    protocol: str, vector: dict[str, Any]
) -> None:
    with pytest.raises(WireError) as caught:
        CODECS[protocol].read(vector)
    assert caught.value.code == vector["error"]
    assert vector["error"] in CODECS[protocol].error_codes


@pytest.mark.parametrize("protocol", CODECS)
@given(data=st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_wire_errors(protocol: str, data: bytes) -> None:
    codec = CODECS[protocol]
    for decode in codec.decode.values():
        try:
            outcome = isinstance(decode(data), WireModel)
        except WireError as exc:
            outcome = exc.code in codec.error_codes
        assert outcome
