"""Payloads signed by a node's key, in the envelopes of libp2p's RFC 0002.

The domain keeps a signature made here from being read as one made for another purpose.
"""

from __future__ import annotations

from functools import lru_cache

from google.protobuf.message import DecodeError
from libp2p.crypto.ed25519 import Ed25519PublicKey
from libp2p.peer.envelope import Envelope, make_unsigned
from libp2p.peer.id import ID
from libp2p.peer.pb import crypto_pb2, envelope_pb2

from meshnode.core.node_data import MAX_ENVELOPE_BYTES
from meshnode.errors import WireError
from meshnode.net.libp2p.identity import Identity

DOMAIN = "meshnode-announce"
PAYLOAD_TYPE = b"/meshnode/announce/1.0.0"
_SIGNATURE_BYTES = 64


def seal(identity: Identity, payload: bytes) -> bytes:
    """Return ``payload`` in an envelope signed by ``identity``."""
    signature = identity.key_pair.private_key.sign(make_unsigned(DOMAIN, PAYLOAD_TYPE, payload))
    public_key = identity.key_pair.public_key
    return Envelope(public_key, PAYLOAD_TYPE, payload, signature).marshal_envelope()


def open_sealed(envelope: bytes) -> tuple[str, bytes]:
    """Return (signer's peer ID, payload).

    Raises:
        WireError: code ``bad_envelope``: not an envelope, too large, of another payload type,
            not from an Ed25519 key, or the signature is not this key's over this payload.
    """
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise _bad(f"{len(envelope)} bytes are more than {MAX_ENVELOPE_BYTES}")
    message = envelope_pb2.Envelope()
    try:
        message.ParseFromString(envelope)
    except DecodeError as exc:
        raise _bad("not a protobuf message") from exc
    if message.payload_type != PAYLOAD_TYPE:
        raise _bad("the payload is of another type")
    # Only Ed25519, which every libp2p offers: an RSA key of a stranger's size costs us its
    # size to check, and a short key or signature makes the library raise instead of say no.
    if message.public_key.Type != crypto_pb2.KeyType.Ed25519:
        raise _bad("the key is not an Ed25519 key")
    if len(message.signature) != _SIGNATURE_BYTES:
        raise _bad("the signature has the wrong length")
    try:
        signer, key = _signer(message.public_key.Data)
        genuine = key.verify(
            make_unsigned(DOMAIN, PAYLOAD_TYPE, message.payload), message.signature
        )
    except ValueError as exc:  # nacl's own errors are ValueErrors too
        raise _bad("the key is not a valid one") from exc
    if not genuine:
        raise _bad("the signature does not match")
    return signer, message.payload


# To write a key as a peer ID costs half as much as to verify a signature, and the same nodes sign
# again and again; as many are remembered as a large mesh has.
@lru_cache(maxsize=4096)
def _signer(public_key: bytes) -> tuple[str, Ed25519PublicKey]:
    """Return (peer ID, key). Raises: ValueError for bytes that are no key."""
    key = Ed25519PublicKey.from_bytes(public_key)
    return str(ID.from_pubkey(key)), key


def _bad(why: str) -> WireError:
    return WireError("bad_envelope", f"the sealed record can't be trusted: {why}")
