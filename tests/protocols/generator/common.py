"""What the generators share: fixed identities, sealing, and the shape of the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgpack
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.envelope import Envelope, make_unsigned
from libp2p.peer.id import ID
from pydantic.json_schema import models_json_schema

from meshnode.core.wire import WireModel

DOMAIN = "meshnode-announce"
PAYLOAD_TYPE = b"/meshnode/announce/1.0.0"

SEED_A = bytes(range(32))
SEED_B = bytes(range(32, 64))


def peer_id(seed: bytes) -> str:
    return str(ID.from_pubkey(create_new_key_pair(seed).public_key))


A = peer_id(SEED_A)
B = peer_id(SEED_B)


def seal(
    seed: bytes,
    payload: bytes,
    *,
    domain: str = DOMAIN,
    payload_type: bytes = PAYLOAD_TYPE,
    signed: bytes | None = None,
) -> bytes:
    """Return an envelope; ``signed`` differs from ``payload`` in a forged one."""
    keys = create_new_key_pair(seed)
    unsigned = make_unsigned(domain, payload_type, payload if signed is None else signed)
    signature = keys.private_key.sign(unsigned)
    return Envelope(keys.public_key, payload_type, payload, signature).marshal_envelope()


def pack(fields: Mapping[str, object]) -> bytes:
    packed: bytes = msgpack.packb(dict(fields))
    return packed


def shown(message: WireModel) -> dict[str, object]:
    """Return a decoded message as the vectors write it: wire keys, bytes as hexadecimal."""
    return message.model_dump(mode="json", by_alias=True)


def vectors(about: str, rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names), "two vectors have one name"
    return {"about": about, "vectors": list(rows)}


def schema(title: str, models: Sequence[type[WireModel]]) -> dict[str, object]:
    """Return one JSON Schema of several messages, as pydantic makes it."""
    _, definitions = models_json_schema([(model, "serialization") for model in models])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "anyOf": [{"$ref": f"#/$defs/{model.__name__}"} for model in models],
        **definitions,
    }
