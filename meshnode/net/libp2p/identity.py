"""Who this node is: an Ed25519 key in a file that only its owner can read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from libp2p.crypto.ed25519 import Ed25519PrivateKey, create_new_key_pair
from libp2p.crypto.keys import KeyPair, KeyType
from libp2p.identity_utils import load_identity
from libp2p.peer.id import ID

from meshnode.errors import IdentityDamaged
from meshnode.state_files import create_atomically


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's key pair and the peer ID that follows from it."""

    peer_id: str
    key_pair: KeyPair = field(repr=False, compare=False)


def ephemeral_identity(seed: bytes | None = None) -> Identity:
    """Return a fresh identity that is nowhere stored; ``seed`` (32 bytes) makes it repeatable."""
    return _identity(create_new_key_pair(seed))


def load_or_create_identity(path: Path) -> Identity:
    """Return the identity kept in ``path``, making the file (mode 0600) if there is none.

    Raises:
        IdentityDamaged: the file is there but holds no Ed25519 key; it is left untouched,
            because a new key would silently make this another node.
        OSError: the file can't be read or made.
    """
    try:
        return load_identity_file(path)
    except FileNotFoundError:
        _create(path)
    return load_identity_file(path)


def load_identity_file(path: Path) -> Identity:
    """Return the identity kept in ``path``. Raises as ``load_or_create_identity``."""
    try:
        key_pair = load_identity(path)
    except ValueError as exc:
        raise IdentityDamaged(
            f"{path} is not an identity key, so this node can't prove who it is; restore the file "
            "from a backup, or move it away to start as a new node"
        ) from exc
    if key_pair.private_key.get_type() is not KeyType.Ed25519:
        raise IdentityDamaged(
            f"{path} holds a {key_pair.private_key.get_type().name} key where Ed25519 is needed; "
            "move it away to start as a new node"
        )
    return _identity(key_pair)


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    create_atomically(path, create_new_key_pair().private_key.serialize())


def _identity(key_pair: KeyPair) -> Identity:
    assert isinstance(key_pair.private_key, Ed25519PrivateKey)
    return Identity(peer_id=str(ID.from_pubkey(key_pair.public_key)), key_pair=key_pair)
