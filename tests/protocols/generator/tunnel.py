"""tunnel/1.0.0: the two headers, and bodies in chunks."""

from __future__ import annotations

from common import pack, schema, shown, vectors

from meshnode.core.tunnel import (
    END,
    TunnelReply,
    TunnelRequest,
    encode_chunk,
    encode_reply,
    encode_request,
)

FOLDER = "tunnel/1.0.0"

REQUEST = TunnelRequest(service_id="llm")
REPLIES = [
    ("ok", TunnelReply(status="ok", in_flight=3, available_vram=20 * 2**30)),
    ("busy", TunnelReply(status="busy", in_flight=8, message="8 of 8 requests are open")),
    ("draining", TunnelReply(status="draining")),
    ("no such service", TunnelReply(status="no_such_service", message="no service llm here")),
    ("backend unreachable", TunnelReply(status="backend_unreachable", available_vram=2**64 - 1)),
    ("unhealthy", TunnelReply(status="unhealthy", in_flight=2**64 - 1)),
]


def files() -> dict[str, object]:
    return {
        f"{FOLDER}/schema.json": schema("meshnode tunnel", [TunnelRequest, TunnelReply]),
        f"{FOLDER}/vectors/canonical.json": vectors(
            "Bodies of frames. Each decodes to json, and encoding that gives hex again.",
            [
                {
                    "name": "a request",
                    "message": "TunnelRequest",
                    "hex": encode_request(REQUEST).hex(),
                    "json": shown(REQUEST),
                },
                *(
                    {
                        "name": name,
                        "message": "TunnelReply",
                        "hex": encode_reply(reply).hex(),
                        "json": shown(reply),
                    }
                    for name, reply in REPLIES
                ),
            ],
        ),
        f"{FOLDER}/vectors/valid.json": vectors(
            "Bodies of frames that decode to json, though a canonical encoder would write others.",
            [
                {
                    "name": "a reply with the status alone",
                    "message": "TunnelReply",
                    "hex": pack({"Status": "ok"}).hex(),
                    "json": shown(TunnelReply(status="ok")),
                },
                {
                    "name": "unknown keys are ignored: a request can't name an address",
                    "message": "TunnelRequest",
                    "hex": pack({"Address": "10.0.0.1:22", "ServiceID": "llm"}).hex(),
                    "json": shown(REQUEST),
                },
            ],
        ),
        f"{FOLDER}/vectors/invalid.json": vectors(
            "Decoding hex as a frame's body of the message named fails with the error named.",
            _invalid(),
        ),
        f"{FOLDER}/vectors/frames.json": vectors(
            "Reading stream as frames gives bodies, then, at its end, the error named, if any.",
            [
                {
                    "name": "a request",
                    "stream": "0000000f" + encode_request(REQUEST).hex(),
                    "bodies": [encode_request(REQUEST).hex()],
                },
                {
                    "name": "cut inside a request",
                    "stream": "0000000f" + encode_request(REQUEST).hex()[:-2],
                    "bodies": [],
                    "error": "truncated",
                },
                {
                    "name": "2,049 bytes promised: refused at once",
                    "stream": "00000801",
                    "bodies": [],
                    "error": "too_large",
                },
            ],
        ),
        f"{FOLDER}/vectors/chunks.json": vectors(
            "Reading stream, one direction of a body after an ok reply, gives payload, then, at "
            "the stream's end, the error named, if any. Without one, it ended cleanly.",
            _chunks(),
        ),
    }


def _invalid() -> list[dict[str, object]]:
    request, reply = "TunnelRequest", "TunnelReply"
    rows: list[tuple[str, str, bytes, str]] = [
        ("no service", request, pack({}), "bad_field"),
        ("an empty service", request, pack({"ServiceID": ""}), "bad_field"),
        ("a service of 65 characters", request, pack({"ServiceID": "x" * 65}), "bad_field"),
        ("a service that is a number", request, pack({"ServiceID": 1}), "bad_field"),
        ("a request that is an array", request, b"\x91\xa3llm", "bad_msgpack"),
        (
            "a request with a byte behind it",
            request,
            encode_request(REQUEST) + b"\x00",
            "bad_msgpack",
        ),
        ("a request of 2,049 bytes", request, bytes(2049), "too_large"),
        ("no status", reply, pack({"InFlight": 1}), "bad_field"),
        ("an unknown status", reply, pack({"Status": "later"}), "bad_field"),
        ("negative in-flight", reply, pack({"Status": "ok", "InFlight": -1}), "bad_field"),
        (
            "VRAM above 64 bits",
            reply,
            pack({"Status": "ok", "AvailableVRAM": -(2**63)}),
            "bad_field",
        ),
        (
            "a message of 257 characters",
            reply,
            pack({"Status": "ok", "Message": "x" * 257}),
            "bad_field",
        ),
        ("a reply cut short", reply, encode_reply(REPLIES[0][1])[:-1], "bad_msgpack"),
    ]
    return [
        {"name": name, "message": message, "hex": data.hex(), "error": code}
        for name, message, data, code in rows
    ]


def _chunks() -> list[dict[str, object]]:
    hello, world = encode_chunk(b"hello "), encode_chunk(b"world")
    rows: list[tuple[str, bytes, bytes, str | None]] = [
        ("an empty body", END, b"", None),
        ("one chunk", hello + END, b"hello ", None),
        ("two chunks", hello + world + END, b"hello world", None),
        ("a payload that looks like an end", encode_chunk(END) + END, END, None),
        ("nothing: cut", b"", b"", "cut"),
        ("cut between chunks", hello, b"hello ", "cut"),
        ("cut inside a length", hello + b"\x00", b"hello ", "cut"),
        ("cut inside a chunk", hello + world[:-1], b"hello worl", "cut"),
        ("cut inside the largest chunk", b"\xff\xe1abc", b"abc", "cut"),
        ("a chunk of 65,506 bytes", hello + b"\xff\xe2", b"hello ", "bad_chunk"),
        ("a chunk of 65,535 bytes", b"\xff\xff", b"", "bad_chunk"),
        ("bytes behind the end", hello + END + b"\x00", b"hello ", "after_end"),
        ("two ends", END + END, b"", "after_end"),
    ]
    return [
        {"name": name, "stream": stream.hex(), "payload": payload.hex()}
        | ({"error": error} if error else {})
        for name, stream, payload, error in rows
    ]
