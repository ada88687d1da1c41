"""ledger/1.0.0: a request, records in their owners' envelopes, and whole answers."""

from __future__ import annotations

from announce import LEAVING, USUAL
from common import SEED_A, SEED_B, B, pack, schema, seal, shown, vectors

from meshnode.core.ledger_exchange import (
    MAX_RECORD_BYTES,
    End,
    Record,
    Request,
    encode_answer,
    encode_request,
)
from meshnode.core.node_data import NodeData, encode
from meshnode.core.wire import encode_frame

FOLDER = "ledger/1.0.0"
LAPTOP = NodeData(id=B, name="laptop", seq=3)
USUAL_RECORD = Record(envelope=seal(SEED_A, encode(USUAL)), age=1.5)
LAPTOP_RECORD = Record(envelope=seal(SEED_B, encode(LAPTOP)), age=0.0)
LEAVING_RECORD = Record(envelope=seal(SEED_A, encode(LEAVING)), age=39.75)


def files() -> dict[str, object]:
    answers: list[tuple[str, Record | End]] = [
        ("a record of a usual GPU host, 1.5 s old", USUAL_RECORD),
        ("a record of a laptop, just heard", LAPTOP_RECORD),
        ("a record of a node that left", LEAVING_RECORD),
        ("the end", End()),
    ]
    return {
        f"{FOLDER}/schema.json": schema("meshnode ledger", [Request, Record, End]),
        f"{FOLDER}/vectors/canonical.json": vectors(
            "Bodies of frames. Each decodes to json, and encoding that gives hex again.",
            [
                {
                    "name": "a request",
                    "message": "Request",
                    "hex": encode_request(Request()).hex(),
                    "json": {},
                },
                *(
                    {
                        "name": name,
                        "message": type(m).__name__,
                        "hex": encode_answer(m).hex(),
                        "json": shown(m),
                    }
                    for name, m in answers
                ),
            ],
        ),
        f"{FOLDER}/vectors/valid.json": vectors(
            "Bodies of frames that decode to json, though a canonical encoder would write others.",
            [
                {
                    "name": "a request with a later version's key",
                    "message": "Request",
                    "hex": pack({"Have": b"\x01\x02"}).hex(),
                    "json": {},
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
            "Decoding hex as a frame's body of the message named (Request, or else Answer) fails "
            "with the error named.",
            _invalid(),
        ),
        f"{FOLDER}/vectors/answers.json": vectors(
            "Reading stream as an answer gives the records, then, at its end, the error, if any. "
            "json is what the envelope's payload decodes to.",
            _answers(),
        ),
    }


def _invalid() -> list[dict[str, object]]:
    record = {"Type": "record", "Envelope": b"\x01", "Age": 1.0}
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
        },
        "unknown_type": {"another type": pack({"Type": "later"}), "no type": pack({"Age": 1.0})},
        "bad_msgpack": {"nothing": b"", "a number": b"\x01"},
        "too_large": {"one byte too many": b"\x00" * (MAX_RECORD_BYTES + 1)},
    }
    answers = [
        {"name": name, "message": "Answer", "hex": data.hex(), "error": code}
        for code, cases in rows.items()
        for name, data in cases.items()
    ]
    return [
        *answers,
        {
            "name": "a request of 4,097 bytes",
            "message": "Request",
            "hex": "00" * 4097,
            "error": "too_large",
        },
        {
            "name": "a request that is no map",
            "message": "Request",
            "hex": "c0",
            "error": "bad_msgpack",
        },
    ]


def _answers() -> list[dict[str, object]]:
    def row(record: Record, signer: NodeData) -> dict[str, object]:
        return {"signer": signer.id, "age": record.age, "json": shown(signer)}

    one, two = encode_frame(encode_answer(USUAL_RECORD)), encode_frame(encode_answer(LAPTOP_RECORD))
    end = encode_frame(encode_answer(End()))
    both = [row(USUAL_RECORD, USUAL), row(LAPTOP_RECORD, LAPTOP)]
    return [
        {"name": "two records", "stream": (one + two + end).hex(), "records": both},
        {"name": "an empty ledger", "stream": end.hex(), "records": []},
        {"name": "no end", "stream": (one + two).hex(), "records": both, "error": "truncated"},
        {
            "name": "cut inside a record",
            "stream": (one + two[:-5]).hex(),
            "records": both[:1],
            "error": "truncated",
        },
        {
            "name": "a frame behind the end",
            "stream": (one + end + two).hex(),
            "records": both[:1],
            "error": "after_end",
        },
        {
            "name": "a frame that promises too much",
            "stream": (one + (MAX_RECORD_BYTES + 1).to_bytes(4, "big")).hex(),
            "records": both[:1],
            "error": "too_large",
        },
    ]
