from __future__ import annotations

import stat
from pathlib import Path

import pytest
from libp2p.crypto.rsa import create_new_key_pair as create_rsa_key_pair

from meshnode.errors import IdentityDamaged
from meshnode.net.libp2p.identity import ephemeral_identity, load_or_create_identity


def test_a_node_is_the_same_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state" / "identity.key"
    first = load_or_create_identity(path)
    assert load_or_create_identity(path).peer_id == first.peer_id
    assert first.peer_id.startswith("12D3KooW")


def test_the_identity_file_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    load_or_create_identity(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["identity.key"]


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"\x08\x01\x12\x03abc", b"\x08\x63\x12\x20" + b"k" * 32]
)
def test_a_damaged_identity_file_is_refused_and_left_untouched(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    with pytest.raises(IdentityDamaged) as caught:
        load_or_create_identity(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_an_identity_of_another_key_type_is_refused_and_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    content = create_rsa_key_pair().private_key.serialize()
    path.write_bytes(content)
    with pytest.raises(IdentityDamaged, match="Ed25519"):
        load_or_create_identity(path)
    assert path.read_bytes() == content


def test_an_identity_never_shows_its_key() -> None:
    identity = ephemeral_identity(b"s" * 32)
    assert "key_pair" not in repr(identity)
    assert identity.peer_id == ephemeral_identity(b"s" * 32).peer_id
