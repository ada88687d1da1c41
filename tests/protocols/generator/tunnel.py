"""tunnel/2.0.0: the two headers, and the items of both directions."""

from __future__ import annotations

from common import pack, schema, shown, vectors

from meshnode.core.tunnel import (
    DONE,
    END,
    TunnelReply,
    TunnelRequest,
    encode_chunk,
    encode_header,
    encode_reply,
    encode_request,
)

FOLDER = "tunnel/2.0.0"

REQUEST = TunnelRequest(service_id="llm")
FRESH = TunnelRequest(service_id="llm", fresh=True)
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
                {
                    "name": "a request that must not be sent twice",
                    "message": "TunnelRequest",
                    "hex": encode_request(FRESH).hex(),
                    "json": shown(FRESH),
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
                    "name": "a request with the service alone",
                    "message": "TunnelRequest",
                    "hex": pack({"ServiceID": "llm"}).hex(),
                    "json": shown(REQUEST),
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
        f"{FOLDER}/vectors/requests.json": vectors(
            "Reading stream, what a dialler sends, gives items, then, at the stream's end, the "
            "error named, if any. Without one, it ended cleanly.",
            _requests(),
        ),
        f"{FOLDER}/vectors/replies.json": vectors(
            "What a dialler asks, and what a server sends, in the order of the script, gives "
            "items, then, at the stream's end, the error named, if any.",
            _replies(),
        ),
    }


def _invalid() -> list[dict[str, object]]:
    request, reply = "TunnelRequest", "TunnelReply"
    rows: list[tuple[str, str, bytes, str]] = [
        ("no service", request, pack({}), "bad_field"),
        ("a fresh that is a number", request, pack({"ServiceID": "x", "Fresh": 1}), "bad_field"),
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


def _requests() -> list[dict[str, object]]:
    ask, asked = encode_header(encode_request(REQUEST)), ["header", encode_request(REQUEST).hex()]
    hello, world = encode_chunk(b"hello "), encode_chunk(b"world")
    said = ["bytes", b"hello ".hex()]
    both = ["bytes", b"hello world".hex()]
    end, done = ["end"], ["done"]
    rows: list[tuple[str, bytes, list[list[str]], str | None]] = [
        ("nothing: a tunnel that was never used", b"", [], None),
        ("a request without a body", ask + DONE, [asked, done], None),
        ("a request in two chunks", ask + hello + world + DONE, [asked, both, done], None),
        ("a client's whole connection", ask + hello + END, [asked, said, end], None),
        ("a half-close, then done", ask + hello + END + DONE, [asked, said, end, done], None),
        (
            "two requests, one behind the other",
            ask + hello + DONE + ask + world + DONE,
            [asked, said, done, asked, ["bytes", b"world".hex()], done],
            None,
        ),
        (
            "a payload that looks like marks",
            ask + encode_chunk(END + DONE) + DONE,
            [asked, ["bytes", (END + DONE).hex()], done],
            None,
        ),
        ("cut behind the header", ask, [asked], "cut"),
        ("cut between chunks", ask + hello, [asked, said], "cut"),
        ("cut inside a mark", ask + hello + b"\x00", [asked, said], "cut"),
        ("cut inside a chunk", ask + hello[:-1], [asked, ["bytes", b"hello".hex()]], "cut"),
        ("cut inside the largest chunk", ask + b"\xff\xe1abc", [asked, ["bytes", "616263"]], "cut"),
        ("cut inside a header", ask[:-1], [], "truncated"),
        ("a header of 2,049 bytes: refused at once", b"\xff\xff\0\0\x08\x01", [], "too_large"),
        ("a chunk of 65,506 bytes", ask + b"\xff\xe2", [asked], "bad_mark"),
        ("a mark that means nothing", ask + b"\xff\xfd", [asked], "bad_mark"),
        ("bytes behind the end", ask + hello + END + world, [asked, said, end], "after_end"),
        ("two ends", ask + END + END, [asked, end], "after_end"),
        ("bytes before any request", hello, [], "out_of_turn"),
        ("an end before any request", END, [], "out_of_turn"),
        ("done before any request", DONE, [], "out_of_turn"),
        ("done twice", ask + DONE + DONE, [asked, done], "out_of_turn"),
        ("bytes between requests", ask + DONE + hello, [asked, done], "out_of_turn"),
        ("a request inside a request", ask + hello + ask, [asked, said], "out_of_turn"),
        ("a request behind an end without done", ask + END + ask, [asked, end], "out_of_turn"),
    ]
    return [
        {"name": name, "stream": stream.hex(), "items": items} | ({"error": error} if error else {})
        for name, stream, items, error in rows
    ]


def _replies() -> list[dict[str, object]]:
    ok, busy = (encode_reply(reply) for _, reply in REPLIES[:2])
    yes, no = encode_header(ok), encode_header(busy)
    accepted, refused = ["header", ok.hex()], ["header", busy.hex()]
    hello, said, end = encode_chunk(b"hello "), ["bytes", b"hello ".hex()], ["end"]
    ask, done = ["ask"], ["done"]

    def comes(data: bytes) -> list[str]:
        return ["hex", data.hex()]

    rows: list[tuple[str, list[list[str]], list[list[str]], str | None]] = [
        ("nothing asked, nothing said", [], [], None),
        ("an answer", [ask, comes(yes + hello), done], [accepted, said], None),
        ("an answer that ends", [ask, comes(yes + hello + END), done], [accepted, said, end], None),
        ("a refusal", [ask, comes(no), done], [refused], None),
        (
            "two answers",
            [ask, comes(yes + hello), done, ask, comes(yes + hello + END)],
            [accepted, said, accepted, said, end],
            None,
        ),
        (
            "an end that met the done of its request",
            [ask, comes(yes + hello), done, comes(END), ask, comes(yes)],
            [accepted, said, accepted],
            "cut",
        ),
        (
            "the same, behind the next request",
            [ask, comes(yes + hello), done, ask, comes(END + yes + END)],
            [accepted, said, accepted, end],
            None,
        ),
        ("a stream that ends without a reply", [ask], [], "cut"),
        ("cut behind the reply", [ask, comes(yes)], [accepted], "cut"),
        ("bytes before the reply", [ask, comes(hello)], [], "out_of_turn"),
        ("an end before the reply", [ask, comes(END)], [], "out_of_turn"),
        ("a reply that nobody asked for", [comes(yes)], [], "out_of_turn"),
        ("two replies", [ask, comes(yes + no)], [accepted], "out_of_turn"),
        (
            "bytes that were not wanted any more",
            [ask, comes(yes + hello), done, comes(hello)],
            [accepted, said],
            "out_of_turn",
        ),
        (
            "bytes of the answer before, before the reply",
            [ask, comes(yes + hello), done, ask, comes(hello)],
            [accepted, said],
            "out_of_turn",
        ),
        (
            "bytes behind the end",
            [ask, comes(yes + END), comes(hello)],
            [accepted, end],
            "after_end",
        ),
        ("a server that says done", [ask, comes(yes + b"\xff\xfe")], [accepted], "out_of_turn"),
    ]
    return [
        {"name": name, "script": script, "items": items} | ({"error": error} if error else {})
        for name, script, items, error in rows
    ]
