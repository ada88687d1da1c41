"""parting/1.0.0: the question, the answers, and the frame around them."""

from __future__ import annotations

from typing import get_args

from common import pack, schema, shown, vectors

from meshnode.core.parting import (
    Answer,
    PartingReply,
    PartingRequest,
    encode_reply,
    encode_request,
)
from meshnode.core.wire import encode_frame

FOLDER = "parting/1.0.0"

REQUEST = PartingRequest(links=117)
REPLIES = [PartingReply(answer=answer) for answer in get_args(Answer)]
EXPLAINED = PartingReply(answer="needed", message="5 links would be left")


def files() -> dict[str, object]:
    return {
        f"{FOLDER}/schema.json": schema("meshnode parting", [PartingRequest, PartingReply]),
        f"{FOLDER}/vectors/canonical.json": vectors(
            "Bodies of frames. Each decodes to json, and encoding that gives hex again.",
            [
                {
                    "name": "a question",
                    "message": "PartingRequest",
                    "hex": encode_request(REQUEST).hex(),
                    "json": shown(REQUEST),
                },
                {
                    "name": "a question of the largest number",
                    "message": "PartingRequest",
                    "hex": encode_request(PartingRequest(links=2**64 - 1)).hex(),
                    "json": shown(PartingRequest(links=2**64 - 1)),
                },
                *(
                    {
                        "name": reply.message or reply.answer,
                        "message": "PartingReply",
                        "hex": encode_reply(reply).hex(),
                        "json": shown(reply),
                    }
                    for reply in [*REPLIES, EXPLAINED]
                ),
            ],
        ),
        f"{FOLDER}/vectors/valid.json": vectors(
            "Bodies of frames that decode to json, though a canonical encoder would write others.",
            [
                {
                    "name": "a question without numbers",
                    "message": "PartingRequest",
                    "hex": pack({}).hex(),
                    "json": shown(PartingRequest()),
                },
                {
                    "name": "an answer without a message, and with a key of a later version",
                    "message": "PartingReply",
                    "hex": pack({"Answer": "ok", "Wait": 7}).hex(),
                    "json": shown(REPLIES[0]),
                },
            ],
        ),
        f"{FOLDER}/vectors/invalid.json": vectors(
            "Decoding hex as a frame's body of the message named fails with the error named.",
            _invalid(),
        ),
        f"{FOLDER}/vectors/streams.json": vectors(
            "What one side sends, then its end: holds body, or fails with the error named.",
            _streams(),
        ),
    }


def _invalid() -> list[dict[str, object]]:
    request, reply = "PartingRequest", "PartingReply"
    rows: list[tuple[str, str, bytes, str]] = [
        ("negative links", request, pack({"Links": -1}), "bad_field"),
        ("links that are a word", request, pack({"Links": "many"}), "bad_field"),
        ("a request that is an array", request, b"\x91\x01", "bad_msgpack"),
        ("a request of 2,049 bytes", request, bytes(2049), "too_large"),
        ("no answer", reply, pack({"Message": "hm"}), "bad_field"),
        ("an unknown answer", reply, pack({"Answer": "later"}), "bad_field"),
        ("an answer in capitals", reply, pack({"Answer": "OK"}), "bad_field"),
        (
            "a message of 257 characters",
            reply,
            pack({"Answer": "ok", "Message": "x" * 257}),
            "bad_field",
        ),
        ("a reply cut short", reply, encode_reply(REPLIES[0])[:-1], "bad_msgpack"),
    ]
    return [
        {"name": name, "message": message, "hex": data.hex(), "error": code}
        for name, message, data, code in rows
    ]


def _streams() -> list[dict[str, object]]:
    body = encode_reply(REPLIES[0])
    frame = encode_frame(body)
    rows: list[tuple[str, bytes, str]] = [
        ("nothing", b"", "truncated"),
        ("a frame cut short", frame[:-1], "truncated"),
        ("a length cut short", frame[:3], "truncated"),
        ("a frame of 2,049 bytes: refused at once", b"\0\0\x08\x01", "too_large"),
    ]
    return [{"name": "a whole frame", "stream": frame.hex(), "body": body.hex()}] + [
        {"name": name, "stream": data.hex(), "error": code} for name, data, code in rows
    ]
