"""ledger/2.0.0: digests, wants, records in their owners' envelopes, and whole parts."""

from __future__ import annotations

from announce import LEAVING, USUAL
from common import SEED_A, SEED_B, A, B, pack, schema, seal, shown, vectors

from meshnode.core.ledger_digest import key_of
from meshnode.core.ledger_exchange import (
    MAX_MESSAGE_BYTES,
    Digest,
    End,
    Message,
    Record,
    Want,
)
from meshnode.core.ledger_exchange import encode as encode_message
from meshnode.core.node_data import NodeData, encode
from meshnode.core.wire import encode_frame

FOLDER = "ledger/2.0.0"
LAPTOP = NodeData(id=B, name="laptop", seq=3)
USUAL_RECORD = Record(envelope=seal(SEED_A, encode(USUAL)), age=1.5)
LAPTOP_RECORD = Record(envelope=seal(SEED_B, encode(LAPTOP)), age=0.0)
LEAVING_RECORD = Record(envelope=seal(SEED_A, encode(LEAVING)), age=39.75)
ENTRY_A = key_of(A) + (1_700_000_000_123).to_bytes(8, "big")
ENTRY_B = key_of(B) + (2**64 - 1).to_bytes(8, "big")
DIGEST = Digest(gone=False, entries=ENTRY_A + ENTRY_B)
WANT = Want(keys=key_of(A) + key_of(B))


def files() -> dict[str, object]:
    messages: list[tuple[str, Message]] = [
        ("a digest of two nodes that are online", DIGEST),
        ("a digest of one that is gone", Digest(gone=True, entries=ENTRY_A)),
        ("a digest of nobody", Digest(gone=False, entries=b"")),
        ("two records wanted", WANT),
        ("a record of a usual GPU host, 1.5 s old", USUAL_RECORD),
        ("a record of a laptop, just heard", LAPTOP_RECORD),
        ("a record of a node that left", LEAVING_RECORD),
        ("the end", End()),
    ]
    return {
        f"{FOLDER}/schema.json": schema("meshnode ledger", [Digest, Want, Record, End]),
        f"{FOLDER}/vectors/canonical.json": vectors(
            "Bodies of frames. Each decodes to json, and encoding that gives hex again.",
            [
                {
                    "name": name,
                    "message": type(m).__name__,
                    "hex": encode_message(m).hex(),
                    "json": shown(m),
                }
                for name, m in messages
            ],
        ),
        f"{FOLDER}/vectors/valid.json": vectors(
            "Bodies of frames that decode to json, though a canonical encoder would write others.",
            [
                {
                    "name": "a digest with a later version's key, in another order",
                    "message": "Digest",
                    "hex": pack(
                        {"Entries": ENTRY_A, "Later": 1, "Gone": True, "Type": "digest"}
                    ).hex(),
                    "json": shown(Digest(gone=True, entries=ENTRY_A)),
                },
                {
                    "name": "an age in whole seconds, as an integer",
                    "message": "Record",
                    "hex": pack({"Age": 3, "Envelope": b"\x01", "Type": "record"}).hex(),
                    "json": {"Type": "record", "Envelope": "01", "Age": 3.0},
                },
            ],
        ),
        f"{FOLDER}/vectors/invalid.json": vectors(
            "Decoding hex as a frame's body fails with the error named.", _invalid()
        ),
        f"{FOLDER}/vectors/keys.json": vectors(
            "The node with the peer ID peer_id has the key key, in hexadecimal.",
            [
                {"name": f"of {name}", "peer_id": peer_id, "key": key_of(peer_id).hex()}
                for name, peer_id in (("the first node", A), ("the second node", B))
            ],
        ),
        f"{FOLDER}/vectors/parts.json": vectors(
            "Reading stream as a part made of the messages expected gives messages, then, at its "
            "end, the error, if any.",
            _parts(),
        ),
    }


def _invalid() -> list[dict[str, object]]:
    record = {"Type": "record", "Envelope": b"\x01", "Age": 1.0}
    digest = {"Type": "digest", "Gone": False, "Entries": ENTRY_A}
    want = {"Type": "want", "Keys": key_of(A)}
    rows = {
        "bad_field": {
            "no envelope": pack({"Type": "record", "Age": 1.0}),
            "an empty envelope": pack(record | {"Envelope": b""}),
            "an envelope that is text": pack(record | {"Envelope": "x"}),
            "an envelope of 20,481 bytes": pack(record | {"Envelope": bytes(20_481)}),
            "no age": pack({"Type": "record", "Envelope": b"\x01"}),
            "a negative age": pack(record | {"Age": -0.5}),
            "an age above a year": pack(record | {"Age": 31_536_001.0}),
            "an age that is no number": pack(record | {"Age": float("nan")}),
            "an infinite age": pack(record | {"Age": float("inf")}),
            "an age that is text": pack(record | {"Age": "1"}),
            "a digest without entries": pack({"Type": "digest", "Gone": False}),
            "a digest that does not say of whom": pack({"Type": "digest", "Entries": ENTRY_A}),
            "a digest of gone 1": pack(digest | {"Gone": 1}),
            "a digest with a byte too few": pack(digest | {"Entries": ENTRY_A[:-1]}),
            "a digest of 1,601 entries": pack(digest | {"Entries": ENTRY_A * 1601}),
            "a digest whose entries are text": pack(digest | {"Entries": "x" * 20}),
            "nothing wanted": pack(want | {"Keys": b""}),
            "a key with a byte too many": pack(want | {"Keys": key_of(A) + b"\x00"}),
            "2,601 keys": pack(want | {"Keys": key_of(A) * 2601}),
        },
        "unknown_type": {"another type": pack({"Type": "later"}), "no type": pack({"Age": 1.0})},
        "bad_msgpack": {"nothing": b"", "a number": b"\x01"},
        "too_large": {"one byte too many": b"\x00" * (MAX_MESSAGE_BYTES + 1)},
    }
    return [
        {"name": name, "message": "Message", "hex": data.hex(), "error": code}
        for code, cases in rows.items()
        for name, data in cases.items()
    ]


def _parts() -> list[dict[str, object]]:
    def stream(*messages: Message) -> bytes:
        return b"".join(encode_frame(encode_message(message)) for message in messages)

    def row(
        name: str, data: bytes, expected: list[str], read: list[Message], error: str | None = None
    ) -> dict[str, object]:
        fields = {"name": name, "stream": data.hex(), "expected": expected}
        return {
            **fields,
            "messages": [shown(message) for message in read],
            **({"error": error} if error else {}),
        }

    one, two, end = USUAL_RECORD, LAPTOP_RECORD, End()
    asked, answer, last = ["Digest"], ["Record", "Want"], ["Record"]
    return [
        row(
            "a newcomer's digest",
            stream(Digest(gone=False, entries=b""), end),
            asked,
            [Digest(gone=False, entries=b"")],
        ),
        row("no digest at all", stream(end), asked, []),
        row("two records, and two wanted", stream(one, two, WANT, end), answer, [one, two, WANT]),
        row("what was wanted", stream(two, end), last, [two]),
        row("no end", stream(one, two), answer, [one, two], "truncated"),
        row("cut inside a record", stream(one, two)[:-5], answer, [one], "truncated"),
        row("a frame behind the end", stream(one, end, two), last, [one], "after_end"),
        row("a want in the last part", stream(one, WANT, end), last, [one], "unknown_type"),
        row("a record in place of a digest", stream(one, end), asked, [], "unknown_type"),
        row(
            "a frame that promises too much",
            stream(one) + (MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"),
            last,
            [one],
            "too_large",
        ),
    ]
