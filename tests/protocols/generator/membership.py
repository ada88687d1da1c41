"""membership/1.0.0: messages, key IDs, proofs, and whole exchanges from either side."""

from __future__ import annotations

from collections.abc import Sequence

from common import A, B, pack, schema, shown, vectors

from meshnode.core.membership import (
    MESSAGES,
    Challenge,
    DiallerSide,
    Exchange,
    Hello,
    ListenerSide,
    Message,
    Proof,
    Refusal,
    Welcome,
    encode,
    key_id,
)
from meshnode.core.wire import encode_frame
from meshnode.errors import MeshnodeError

FOLDER = "membership/1.0.0"
KEY = bytes(range(64, 96))
OLD_KEY = bytes(range(96, 128))
OTHER_KEY = bytes(range(128, 160))
D_NONCE = bytes(range(160, 192))
L_NONCE = bytes(range(192, 224))
EXCHANGE = Exchange(A, B, D_NONCE, L_NONCE)

HELLO = Hello(nonce=D_NONCE, key_ids=(key_id(KEY),))
CHALLENGE = Challenge(nonce=L_NONCE, key_id=key_id(KEY), proof=EXCHANGE.listener_proof(KEY))
PROOF = Proof(proof=EXCHANGE.dialler_proof(KEY))
REFUSAL = Refusal(code="wrong_token", message="this mesh has another token")


def files() -> dict[str, object]:
    return {
        f"{FOLDER}/schema.json": schema("meshnode membership", list(MESSAGES.values())),
        f"{FOLDER}/vectors/canonical.json": vectors(
            "Bodies of frames. Each decodes to json, and encoding that gives hex again.",
            [
                {
                    "name": name,
                    "message": type(m).__name__,
                    "hex": encode(m).hex(),
                    "json": shown(m),
                }
                for name, m in [
                    ("hello with one key", HELLO),
                    ("hello during a rotation", Hello(nonce=D_NONCE, key_ids=(b"a" * 8, b"b" * 8))),
                    ("challenge", CHALLENGE),
                    ("proof", PROOF),
                    ("welcome", Welcome()),
                    ("refusal", REFUSAL),
                    ("refusal of a later version, still a refusal", Refusal(code="later")),
                ]
            ],
        ),
        f"{FOLDER}/vectors/valid.json": vectors(
            "Bodies of frames that decode to json, though a canonical encoder would write others.",
            [
                {
                    "name": "unknown keys are ignored, and order means nothing",
                    "message": "Welcome",
                    "hex": pack({"Later": [1], "Type": "welcome"}).hex(),
                    "json": shown(Welcome()),
                },
                {
                    "name": "a refusal without text",
                    "message": "Refusal",
                    "hex": pack({"Type": "refusal", "Code": "too_many"}).hex(),
                    "json": shown(Refusal(code="too_many")),
                },
            ],
        ),
        f"{FOLDER}/vectors/invalid.json": vectors(
            "Decoding hex as a frame's body fails with the error named.", _invalid()
        ),
        f"{FOLDER}/vectors/frames.json": vectors(
            "Reading stream as frames gives bodies, then, at its end, the error named, if any.",
            _frames(),
        ),
        f"{FOLDER}/vectors/proofs.json": vectors(
            "What each side works out; transcript is what follows the label under the HMAC.",
            _proofs(),
        ),
        f"{FOLDER}/vectors/exchanges.json": vectors(
            "One side under test: it sends first where steps say so, takes each receive, answers "
            "with send or nothing, and ends with outcome: member, or a refusal's or error's code.",
            _exchanges(),
        ),
    }


def _invalid() -> list[dict[str, object]]:
    hello = {"Type": "hello", "Nonce": D_NONCE, "KeyIDs": [b"a" * 8]}
    rows = {
        "bad_field": {
            "a nonce of 31 bytes": pack(hello | {"Nonce": bytes(31)}),
            "a nonce that is text": pack(hello | {"Nonce": "x" * 32}),
            "no key": pack(hello | {"KeyIDs": []}),
            "nine keys": pack(hello | {"KeyIDs": [b"a" * 8] * 9}),
            "a key ID of 7 bytes": pack(hello | {"KeyIDs": [b"a" * 7]}),
            "a challenge without its proof": pack(
                {"Type": "challenge", "Nonce": L_NONCE, "KeyID": b"a" * 8}
            ),
            "a proof of 33 bytes": pack({"Type": "proof", "Proof": bytes(33)}),
            "a refusal without a code": pack({"Type": "refusal"}),
            "a refusal's text with an escape sequence": pack(
                {"Type": "refusal", "Code": "x", "Message": "a\x1b[31mb"}
            ),
        },
        "unknown_type": {
            "no type": pack({"Nonce": D_NONCE}),
            "another type": pack({"Type": "goodbye"}),
            "a type that is a number": pack({"Type": 1}),
            "a type in another case": pack({"Type": "Welcome"}),
        },
        "bad_msgpack": {
            "nothing": b"",
            "an array": b"\x90",
            "a byte behind the map": encode(Welcome()) + b"\x00",
        },
        "too_large": {"2,049 bytes": b"\x00" * 2049},
    }
    return [
        {"name": name, "hex": data.hex(), "error": code}
        for code, cases in rows.items()
        for name, data in cases.items()
    ]


def _frames() -> list[dict[str, object]]:
    one, two = encode(Welcome()), encode(PROOF)
    whole = encode_frame(one) + encode_frame(two)
    return [
        {"name": "two frames", "stream": whole.hex(), "bodies": [one.hex(), two.hex()]},
        {"name": "no frame", "stream": "", "bodies": []},
        {
            "name": "cut inside the second",
            "stream": whole[:-1].hex(),
            "bodies": [one.hex()],
            "error": "truncated",
        },
        {"name": "cut inside a length", "stream": "0000", "bodies": [], "error": "truncated"},
        {
            "name": "2,049 bytes promised: refused at once",
            "stream": "00000801",
            "bodies": [],
            "error": "too_large",
        },
    ]


def _proofs() -> list[dict[str, object]]:
    rows = []
    for name, key, exchange in [
        ("a key and two peers", KEY, EXCHANGE),
        ("the same peers, the other way round", KEY, Exchange(B, A, D_NONCE, L_NONCE)),
        ("the same peers, nonces exchanged", KEY, Exchange(A, B, L_NONCE, D_NONCE)),
        ("another key", OTHER_KEY, EXCHANGE),
    ]:
        parts = (exchange.dialler.encode(), exchange.listener.encode())
        parts += (exchange.dialler_nonce, exchange.listener_nonce)
        rows.append(
            {
                "name": name,
                "key": key.hex(),
                "dialler": exchange.dialler,
                "listener": exchange.listener,
                "dialler_nonce": exchange.dialler_nonce.hex(),
                "listener_nonce": exchange.listener_nonce.hex(),
                "key_id": key_id(key).hex(),
                "transcript": b"".join(len(p).to_bytes(2, "big") + p for p in parts).hex(),
                "listener_proof": exchange.listener_proof(key).hex(),
                "dialler_proof": exchange.dialler_proof(key).hex(),
            }
        )
    return rows


def _exchanges() -> list[dict[str, object]]:
    lied = CHALLENGE.model_copy(update={"proof": EXCHANGE.dialler_proof(KEY)})
    unknown = CHALLENGE.model_copy(update={"key_id": key_id(OTHER_KEY)})
    old_first = Hello(nonce=D_NONCE, key_ids=(key_id(OLD_KEY), key_id(KEY)))
    wrong = Hello(nonce=D_NONCE, key_ids=(key_id(OTHER_KEY),))
    reflected = Proof(proof=CHALLENGE.proof)
    refused = "wrong_token"
    return [
        _dialler("a dialler is taken in", [CHALLENGE, Welcome()], "member"),
        _dialler("a dialler with another token", [REFUSAL], refused),
        _dialler("the listener's proof is the dialler's", [lied], refused),
        _dialler("the listener chose a key that was not offered", [unknown], refused),
        _dialler("the listener is full", [Refusal(code="too_many")], "too_many"),
        _dialler("welcomed without a challenge", [Welcome()], "unexpected_message"),
        _dialler("challenged twice", [CHALLENGE, CHALLENGE], "unexpected_message"),
        _dialler("a hello from the listener", [HELLO], "unexpected_message"),
        _listener("a listener takes a dialler in", [HELLO, PROOF], "member"),
        _listener("a dialler with a wrong token", [wrong], refused),
        _listener("its own proof comes back", [HELLO, reflected], refused),
        _listener("the dialler refuses", [HELLO, Refusal(code="wrong_token")], refused),
        _listener("a proof before the hello", [PROOF], "unexpected_message"),
        _listener("two hellos", [HELLO, HELLO], "unexpected_message"),
        _listener("during a rotation, its own first key", [old_first, PROOF], "member", OLD_KEY),
    ]


def _dialler(name: str, received: Sequence[Message], outcome: str) -> dict[str, object]:
    side = DiallerSide((KEY,), A, B, D_NONCE)
    steps: list[dict[str, object]] = [{"send": encode(side.hello()).hex()}]
    return _play(name, "dialler", [KEY], side, steps, received, outcome)


def _listener(
    name: str, received: Sequence[Message], outcome: str, *further_keys: bytes
) -> dict[str, object]:
    keys = [KEY, *further_keys]
    return _play(name, "listener", keys, ListenerSide(keys, B, A, L_NONCE), [], received, outcome)


def _play(
    name: str,
    role: str,
    keys: Sequence[bytes],
    side: DiallerSide | ListenerSide,
    steps: list[dict[str, object]],
    received: Sequence[Message],
    outcome: str,
) -> dict[str, object]:
    own, peer, nonce = (A, B, D_NONCE) if role == "dialler" else (B, A, L_NONCE)
    for message in received:
        step: dict[str, object] = {"receive": encode(message).hex()}
        try:
            reply = side.receive(message)
        except MeshnodeError:  # which one is for the test to say
            reply = None
        if reply is not None:
            step["send"] = encode(reply).hex()
        steps.append(step)
    return {
        "name": name,
        "role": role,
        "keys": [key.hex() for key in keys],
        "own_id": own,
        "peer_id": peer,
        "nonce": nonce.hex(),
        "steps": steps,
        "outcome": outcome,
    }
