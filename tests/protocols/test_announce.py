from __future__ import annotations

from typing import Any

import pytest

from meshnode.core.node_data import decode, decode_signed, encode
from meshnode.errors import WireError
from meshnode.net.libp2p.envelope import open_sealed, seal
from meshnode.net.libp2p.identity import ephemeral_identity

PROTOCOL = "announce/1.0.0"


@pytest.mark.vectors(PROTOCOL, "valid")
def test_what_is_not_canonical_is_encoded_otherwise(vector: dict[str, Any]) -> None:
    assert encode(decode(bytes.fromhex(vector["hex"]))).hex() != vector["hex"]


@pytest.mark.vectors(PROTOCOL, "envelopes")
def test_an_envelope_gives_its_signer_and_payload(vector: dict[str, Any]) -> None:
    signer, payload = open_sealed(bytes.fromhex(vector["envelope"]))
    assert (signer, payload.hex()) == (vector["signer"], vector["payload"])
    node = decode_signed(signer, payload)
    assert node.model_dump(mode="json", by_alias=True) == vector["json"]


@pytest.mark.vectors(PROTOCOL, "envelopes")
def test_our_own_seal_is_the_vectors_byte_for_byte(vector: dict[str, Any]) -> None:
    identity = ephemeral_identity(bytes.fromhex(vector["seed"]))
    assert identity.peer_id == vector["signer"]
    assert seal(identity, bytes.fromhex(vector["payload"])).hex() == vector["envelope"]


@pytest.mark.vectors(PROTOCOL, "invalid_envelopes")
def test_an_invalid_envelope_fails_with_the_code_named(vector: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        decode_signed(*open_sealed(bytes.fromhex(vector["envelope"])))
    assert caught.value.code == vector["error"]
