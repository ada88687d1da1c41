from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.rsa import create_new_key_pair as create_rsa_key_pair
from libp2p.peer.envelope import Envelope, make_unsigned, pub_key_to_protobuf
from libp2p.peer.pb import envelope_pb2

from meshnode.errors import WireError
from meshnode.net.libp2p.envelope import DOMAIN, PAYLOAD_TYPE, open_sealed, seal
from meshnode.net.libp2p.identity import ephemeral_identity

ALICE = ephemeral_identity(b"a" * 32)
MALLORY = ephemeral_identity(b"m" * 32)


def message(sealed: bytes) -> envelope_pb2.Envelope:
    return envelope_pb2.Envelope.FromString(sealed)


def refused(envelope: bytes) -> str:
    with pytest.raises(WireError) as caught:
        open_sealed(envelope)
    assert caught.value.code == "bad_envelope"
    return str(caught.value)


def test_a_sealed_payload_opens_to_its_signer_and_itself() -> None:
    assert open_sealed(seal(ALICE, b"payload")) == (ALICE.peer_id, b"payload")


def test_the_envelope_adds_less_than_150_bytes() -> None:
    assert len(seal(ALICE, b"x" * 300)) < 450


def test_a_changed_payload_is_refused() -> None:
    changed = message(seal(ALICE, b"payload"))
    changed.payload = b"payloae"
    assert "does not match" in refused(changed.SerializeToString())


def test_nobody_signs_for_another() -> None:
    forged = message(seal(MALLORY, b"payload"))
    forged.public_key.CopyFrom(pub_key_to_protobuf(ALICE.key_pair.public_key))
    assert "does not match" in refused(forged.SerializeToString())


def test_a_signature_made_for_another_domain_is_refused() -> None:
    key = ALICE.key_pair
    signature = key.private_key.sign(make_unsigned("libp2p-peer-record", PAYLOAD_TYPE, b"x"))
    refused(Envelope(key.public_key, PAYLOAD_TYPE, b"x", signature).marshal_envelope())


def test_an_envelope_of_another_payload_type_is_refused() -> None:
    key = ALICE.key_pair
    signature = key.private_key.sign(make_unsigned(DOMAIN, b"/other", b"x"))
    sealed = Envelope(key.public_key, b"/other", b"x", signature).marshal_envelope()
    assert "type" in refused(sealed)


@pytest.mark.parametrize("length", [0, 1, 63, 65])
def test_a_signature_of_odd_length_is_refused_and_not_raised(length: int) -> None:
    odd = message(seal(ALICE, b"payload"))
    odd.signature = b"s" * length
    refused(odd.SerializeToString())


@pytest.mark.stock
def test_the_library_raises_over_a_signature_of_odd_length() -> None:
    with pytest.raises(ValueError, match="signature"):
        ALICE.key_pair.public_key.verify(b"data", b"s" * 63)


def test_a_short_key_is_refused_and_not_raised() -> None:
    short = message(seal(ALICE, b"payload"))
    short.public_key.Data = b"short"
    refused(short.SerializeToString())


def test_a_key_that_is_not_ed25519_is_refused() -> None:
    key = create_rsa_key_pair()
    signature = key.private_key.sign(make_unsigned(DOMAIN, PAYLOAD_TYPE, b"x"))
    sealed = Envelope(key.public_key, PAYLOAD_TYPE, b"x", signature).marshal_envelope()
    assert "Ed25519" in refused(sealed)


def test_a_huge_envelope_is_refused_unread() -> None:
    assert "more than" in refused(seal(ALICE, b"x" * 30_000))


@given(st.binary(max_size=400))
def test_garbage_is_refused(garbage: bytes) -> None:
    refused(garbage)


@given(st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_a_damaged_envelope_is_refused_or_still_the_signers(place: int, noise: bytes) -> None:
    damaged = bytearray(seal(ALICE, b"payload"))
    damaged[place : place + len(noise)] = noise
    try:
        opened = open_sealed(bytes(damaged))
    except WireError:
        return
    assert opened == (ALICE.peer_id, b"payload")
