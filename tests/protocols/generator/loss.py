"""loss/1.0.0: reports of peers that were just lost."""

from __future__ import annotations

from common import A, B, pack, schema, shown, vectors

from meshnode.core.loss_report import MAX_REPORT_BYTES, LossReport, LostPeer, encode

FOLDER = "loss/1.0.0"
ONE = LossReport(lost=(LostPeer(id=A, seq=1_700_000_000_123),), reason="link_lost")
TWO = LossReport(lost=(LostPeer(id=A, seq=7), LostPeer(id=B, seq=2**64 - 1)))
FULL = LossReport(
    lost=tuple(LostPeer(id=A[:-2] + f"{n:02}", seq=n) for n in range(16)), reason="ping_timeout"
)


def files() -> dict[str, object]:
    entry = {"ID": A, "Seq": 7}
    valid = {
        "no reason": {"Lost": [entry]},
        "keys of a later version": {"Lost": [entry | {"Since": 3}], "Reason": "", "More": [1]},
        "another order": {"Reason": "x", "Lost": [{"Seq": 7, "ID": A}]},
    }
    read = LossReport(lost=(LostPeer(id=A, seq=7),))
    return {
        f"{FOLDER}/schema.json": schema("meshnode loss", [LossReport]),
        f"{FOLDER}/vectors/canonical.json": vectors(
            "Each decodes to json, and encoding that gives hex again.",
            [
                {"name": name, "message": "LossReport", "hex": encode(m).hex(), "json": shown(m)}
                for name, m in (
                    ("one peer", ONE),
                    ("two peers, without a reason", TWO),
                    ("as many as fit", FULL),
                )
            ],
        ),
        f"{FOLDER}/vectors/valid.json": vectors(
            "Reports that decode to json, though a canonical encoder would write others.",
            [
                {
                    "name": name,
                    "message": "LossReport",
                    "hex": pack(fields).hex(),
                    "json": shown(read.model_copy(update={"reason": fields.get("Reason", "")})),
                }
                for name, fields in valid.items()
            ],
        ),
        f"{FOLDER}/vectors/invalid.json": vectors(
            "Decoding hex as a report fails with the error named.", _invalid()
        ),
    }


def _invalid() -> list[dict[str, object]]:
    entry = {"ID": A, "Seq": 7}
    rows = {
        "bad_field": {
            "nobody lost": pack({"Lost": []}),
            "no list": pack({"Reason": "x"}),
            "17 lost": pack({"Lost": [entry] * 17}),
            "a peer without an ID": pack({"Lost": [{"Seq": 7}]}),
            "a peer with an empty ID": pack({"Lost": [entry | {"ID": ""}]}),
            "a peer without a Seq": pack({"Lost": [{"ID": A}]}),
            "a negative Seq": pack({"Lost": [entry | {"Seq": -1}]}),
            "a Seq that is a float": pack({"Lost": [entry | {"Seq": 7.0}]}),
            "a reason of 65 characters": pack({"Lost": [entry], "Reason": "x" * 65}),
            "a reason with an escape sequence": pack({"Lost": [entry], "Reason": "\x1b[2J"}),
        },
        "bad_msgpack": {"nothing": b"", "a list": pack({"a": []})[2:], "two maps": b"\x80\x80"},
        "too_large": {"one byte too many": bytes(MAX_REPORT_BYTES + 1)},
    }
    return [
        {"name": name, "message": "LossReport", "hex": data.hex(), "error": code}
        for code, cases in rows.items()
        for name, data in cases.items()
    ]
