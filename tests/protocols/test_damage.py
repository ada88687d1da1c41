"""Golden vectors, damaged in thousands of ways: every reader gives a value or a WireError."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnode.core import (
    affinity_batch,
    ledger_exchange,
    loss_report,
    membership,
    node_data,
    token,
    tunnel,
)
from meshnode.core.wire import FrameDecoder
from meshnode.errors import TokenInvalid, WireError
from meshnode.net.libp2p.envelope import open_sealed


def read_part(stream: bytes) -> None:
    frames = FrameDecoder(ledger_exchange.MAX_MESSAGE_BYTES)
    reader = ledger_exchange.PartReader(ledger_exchange.Record, ledger_exchange.Want)
    frames.feed(stream)
    while (body := frames.next_frame()) is not None:
        message = reader.receive(body)
        if isinstance(message, ledger_exchange.Record):
            node_data.decode_signed(*open_sealed(message.envelope))
    reader.finish()


def read_requests(stream: bytes) -> None:
    decoder = tunnel.RequestDecoder()
    for item in decoder.feed(stream):
        if isinstance(item, tunnel.Header):
            tunnel.decode_request(item.body)
    decoder.finish()


READERS: list[tuple[str, str, str, Callable[[bytes], object]]] = [
    ("announce", "canonical", "hex", node_data.decode),
    ("announce", "envelopes", "envelope", open_sealed),
    ("membership", "canonical", "hex", membership.decode),
    ("ledger", "canonical", "hex", ledger_exchange.decode),
    ("ledger", "parts", "stream", read_part),
    ("loss", "canonical", "hex", loss_report.decode),
    ("affinity", "canonical", "hex", affinity_batch.decode),
    ("tunnel", "canonical", "hex", tunnel.decode_reply),
    ("tunnel", "canonical", "hex", tunnel.decode_request),
    ("tunnel", "requests", "stream", read_requests),
]


def damaged(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                del changed[at : at + rng.randint(1, 6)]
            case 2:
                changed[at:at] = rng.randbytes(rng.randint(1, 6))
            case _:
                changed[at : at + 1] = rng.choice((b"\xc0", b"\xc1", b"\xdf", b"\xdd", b"\xff"))
    return bytes(changed)


def outcome_of(read: Callable[[bytes], object], data: bytes) -> str:
    try:
        read(data)
    except WireError as exc:
        return exc.code
    return "ok"


@pytest.mark.parametrize(("protocol", "file", "column", "read"), READERS)
def test_damaged_bytes_raise_nothing_but_wire_errors(
    protocols: Path, protocol: str, file: str, column: str, read: Callable[[bytes], object]
) -> None:
    rng = random.Random(20_000)
    (path,) = (protocols / protocol).glob(f"*/vectors/{file}.json")
    text = path.read_text()
    rows = json.loads(text)["vectors"]
    originals = [bytes.fromhex(row[column]) for row in rows if len(row[column]) < 4000]
    outcomes = {outcome_of(read, damaged(rng.choice(originals), rng)) for _ in range(4000)}
    assert len(outcomes) > 1
    assert outcomes <= {"ok", "wrong_signer", "bad_envelope"} | set().union(
        *(m.ERROR_CODES for m in (node_data, membership, ledger_exchange, affinity_batch, tunnel))
    )


def test_no_damaged_envelope_is_taken_for_a_true_one(protocols: Path) -> None:
    rng = random.Random(7)
    text = (protocols / "announce/1.0.0/vectors/envelopes.json").read_text()
    for row in json.loads(text)["vectors"]:
        for _ in range(500):
            try:
                opened = open_sealed(damaged(bytes.fromhex(row["envelope"]), rng))
            except WireError:
                continue
            # Protobuf lets unknown fields be added outside the signature; what it covers stands.
            assert opened == (row["signer"], bytes.fromhex(row["payload"]))


def test_a_damaged_token_is_never_taken_for_another(protocols: Path) -> None:
    rng = random.Random(3)
    text = (protocols / "membership/1.0.0/vectors/tokens.json").read_text()
    for row in json.loads(text)["vectors"]:
        for _ in range(1000):
            changed = damaged(row["text"].encode(), rng).decode("latin-1")
            if "".join(changed.split()) == row["text"]:
                continue
            with pytest.raises(TokenInvalid):
                token.decode(changed)
