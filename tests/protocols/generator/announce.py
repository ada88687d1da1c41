"""announce/1.0.0: NodeData maps and the envelopes that carry them."""

from __future__ import annotations

from common import PAYLOAD_TYPE, SEED_A, SEED_B, A, B, pack, schema, seal, shown, vectors
from libp2p.crypto.secp256k1 import create_new_key_pair as secp256k1_key_pair
from libp2p.peer.envelope import Envelope, make_unsigned

from meshnode.core import node_data
from meshnode.core.node_data import NodeData, ServiceData, decode, encode

FOLDER = "announce/1.0.0"
GIB = 2**30

MINIMAL = NodeData(id=A, seq=0)
USUAL = NodeData(
    id=A,
    name="gpu-1",
    service_id="llm",
    last_seen=1_767_225_600_000,
    available_vram=20 * GIB,
    total_vram=24 * GIB,
    gpu_count=1,
    services=(
        ServiceData(
            service_id="llm",
            models=("llama3.1:8b", "qwen2.5:32b"),
            in_flight=2,
            max_in_flight=8,
            loaded=("qwen2.5:32b",),
        ),
        ServiceData(service_id="whisper", healthy=False),
    ),
    addrs=(f"/ip4/192.168.1.20/tcp/4201/p2p/{A}", f"/ip6/fd00::20/tcp/4201/p2p/{A}"),
    seq=1_767_225_600_007,
    version="0.1.0",
)
BEHIND_NAT = USUAL.model_copy(
    update={
        "addrs": (
            f"/ip4/192.168.1.20/tcp/4201/p2p/{A}",
            f"/ip4/198.51.100.7/tcp/4201/p2p/{B}/p2p-circuit/p2p/{A}",
        )
    }
)
RELAY = NodeData(id=B, seq=1, addrs=(f"/ip4/198.51.100.7/tcp/4201/p2p/{B}",), relay=True)
LEAVING = USUAL.model_copy(update={"seq": USUAL.seq + 1, "state": "leaving"})
EXTREME = NodeData(
    id="x" * 128,
    name="\u00fc\U0001f600" * 32,
    last_seen=2**64 - 1,
    available_vram=2**64 - 1,
    total_vram=2**63,
    gpu_count=2**32,
    services=tuple(ServiceData(service_id=f"s{n}") for n in range(32)),
    addrs=("/dns4/" + "a" * 250,) * 16,
    seq=2**64 - 1,
    state="draining",
    online_window=2**64 - 1,
    version="v" * 64,
)


def files() -> dict[str, object]:
    return {
        f"{FOLDER}/schema.json": schema("meshnode announcement", [NodeData]),
        f"{FOLDER}/vectors/canonical.json": vectors(
            "Each decodes to json, and encoding that gives hex again, byte for byte.",
            [
                {"name": name, "hex": encode(node).hex(), "json": shown(node)}
                for name, node in [
                    ("only what is required, defaults written out", MINIMAL),
                    ("a usual GPU host", USUAL),
                    ("a node that leaves", LEAVING),
                    ("a node that is reached through a relay", BEHIND_NAT),
                    ("a relay", RELAY),
                    ("every value at its limit", EXTREME),
                ]
            ],
        ),
        f"{FOLDER}/vectors/valid.json": vectors(
            "Each decodes to json; a canonical encoder would write other bytes.", list(_valid())
        ),
        f"{FOLDER}/vectors/invalid.json": vectors(
            "Decoding hex as a payload fails with the error named.", list(_invalid())
        ),
        f"{FOLDER}/vectors/envelopes.json": vectors(
            "Sealing payload with the Ed25519 key made from seed gives envelope; opening that "
            "gives signer and payload.",
            list(_envelopes()),
        ),
        f"{FOLDER}/vectors/invalid_envelopes.json": vectors(
            "Opening envelope, then decoding its payload as an announcement of the signer, fails "
            "with the error named.",
            list(_invalid_envelopes()),
        ),
    }


def _valid() -> list[dict[str, object]]:
    required = {"ID": A, "Seq": 7}
    rows = {
        "missing keys take their defaults": pack(required),
        "the order of keys means nothing": pack({"Seq": 7, "ID": A}),
        "unknown keys are ignored, whatever they hold": pack(
            required | {"Later": {"a": [1.5, None, b"\xff", {"b": -1}]}}
        ),
        "an unknown key inside a service is ignored": pack(
            required | {"Services": [{"ServiceID": "llm", "Later": True}]}
        ),
        "integers may be longer than needed": bytes.fromhex("82a24944a141")
        + bytes.fromhex("a3536571cf0000000000000007"),
        "strings and maps may be longer than needed": bytes.fromhex("df00000002")
        + bytes.fromhex("db000000024944d90141d903536571d007"),
        "a tunnel address is read, though never sent": pack(
            required | {"TunnelAddress": "127.0.0.1:9000"}
        ),
        "incredible VRAM is kept, and counts as unknown in routing": pack(
            required | {"AvailableVRAM": 32 * GIB, "TotalVRAM": 24 * GIB}
        ),
        "an online window out of bounds is kept, and bounded in use": pack(
            required | {"OnlineWindow": 1}
        ),
        "two services of one name are kept, and the first counts": pack(
            required | {"Services": [{"ServiceID": "a", "InFlight": 1}, {"ServiceID": "a"}]}
        ),
        "a model said to be loaded that is not served is kept, and says nothing": pack(
            required | {"Services": [{"ServiceID": "a", "Models": ["m"], "Loaded": ["n"]}]}
        ),
        "a key in another case is another key": pack(required | {"state": "leaving"}),
    }
    return [
        {"name": name, "hex": data.hex(), "json": shown(decode(data))}
        for name, data in rows.items()
    ]


def _invalid() -> list[dict[str, object]]:
    required = {"ID": "A", "Seq": 7}

    def bad(**changes: object) -> bytes:
        return pack(required | changes)

    bad_field = {
        "ID is missing": pack({"Seq": 7}),
        "Seq is missing": pack({"ID": "A"}),
        "ID is empty": bad(ID=""),
        "ID is binary": bad(ID=b"A"),
        "ID is too long": bad(ID="x" * 129),
        "Seq is negative": bad(Seq=-1),
        "Seq is a string": bad(Seq="7"),
        "Seq is a boolean": bad(Seq=True),
        "Name is null": bad(Name=None),
        "Name is too long": bad(Name="x" * 65),
        "Name holds an escape sequence": bad(Name="a\x1b[31mb"),
        "Name turns the direction of text": bad(Name="a\u202eb"),
        "AvailableVRAM is negative": bad(AvailableVRAM=-1),
        "State is unknown": bad(State="asleep"),
        "Services is a map": bad(Services={"ServiceID": "a"}),
        "a service without ServiceID": bad(Services=[{"Healthy": True}]),
        "a service with an empty ServiceID": bad(Services=[{"ServiceID": ""}]),
        "Healthy is a number": bad(Services=[{"ServiceID": "a", "Healthy": 1}]),
        "33 services": bad(Services=[{"ServiceID": "a"}] * 33),
        "257 models": bad(Services=[{"ServiceID": "a", "Models": ["m"] * 257}]),
        "a model's name is too long": bad(Services=[{"ServiceID": "a", "Models": ["m" * 129]}]),
        "257 loaded models": bad(Services=[{"ServiceID": "a", "Loaded": ["m"] * 257}]),
        "a loaded model's name is empty": bad(Services=[{"ServiceID": "a", "Loaded": [""]}]),
        "Loaded is a number": bad(Services=[{"ServiceID": "a", "Loaded": 1}]),
        "17 addresses": bad(Addrs=["/ip4/10.0.0.1/tcp/1"] * 17),
        "an address is too long": bad(Addrs=["/" + "a" * 256]),
    }
    bad_msgpack = {
        "nothing": b"",
        "cut short": pack(required)[:-1],
        "a byte behind the map": pack(required) + b"\x00",
        "an array": pack(required)[:0] + b"\x92\xa1A\x07",
        "a string": b"\xa1A",
        "a reserved byte": b"\xc1",
        "a key twice": bytes.fromhex("83a24944a141a353657107a353657108"),
        "a key twice in an inner map": bytes.fromhex("83a24944a141a353657107a15882a16101a16102"),
        "a key that is a number": bytes.fromhex("83a24944a141a3536571070101"),
        "a key that is binary": bytes.fromhex("83a24944a141a353657107c4015801"),
        "a string that is not UTF-8": bytes.fromhex("82a24944a1ffa353657107"),
        "an extension": bytes.fromhex("83a24944a141a353657107a158d40500"),
        "a timestamp": bytes.fromhex("83a24944a141a353657107a158d6ff00000001"),
        "an array that promises 2^32 - 1 items": bytes.fromhex("81a158ddffffffff"),
        "nested 1,200 deep": bytes.fromhex("81a158") + b"\x91" * 1200 + b"\xc0",
        "a string of 4,097 bytes under an unknown key": pack({"X": "x" * 4097} | required),
        "an array of 1,025 items under an unknown key": pack({"X": [0] * 1025} | required),
        "a map of 65 keys": pack({f"k{n}": 0 for n in range(63)} | required),
    }
    # JSON can't tell 7.0 from 7, so the schema passes these.
    beyond_json = {
        "Seq is a float": bad(Seq=7.0),
        "OnlineWindow is a float": bad(OnlineWindow=40.0),
    }
    size = node_data.MAX_ANNOUNCEMENT_BYTES
    padding = {f"X{n}": "x" * 4000 for n in range(4)} | {"Y": ""}
    at_limit = size + 1 - len(pack(padding | required)) - 2
    too_large = {"one byte above 16 KiB": pack(padding | {"Y": "x" * at_limit} | required)}
    return [
        {"name": name, "hex": data.hex(), "error": code}
        for code, rows in [
            ("bad_field", bad_field),
            ("bad_field", beyond_json),
            ("bad_msgpack", bad_msgpack),
            ("too_large", too_large),
        ]
        for name, data in rows.items()
    ]


def _envelopes() -> list[dict[str, object]]:
    return [
        {
            "name": name,
            "seed": seed.hex(),
            "signer": signer,
            "payload": encode(node).hex(),
            "envelope": seal(seed, encode(node)).hex(),
            "json": shown(node),
        }
        for name, seed, signer, node in [
            ("the least that can be said", SEED_A, A, MINIMAL),
            ("a usual GPU host", SEED_A, A, USUAL),
            ("a node that leaves", SEED_A, A, LEAVING),
            ("another signer", SEED_B, B, NodeData(id=B, name="laptop", seq=1)),
        ]
    ]


def _invalid_envelopes() -> list[dict[str, object]]:
    payload = encode(USUAL)
    good = seal(SEED_A, payload)
    keys = secp256k1_key_pair(SEED_A)
    other_kind = Envelope(
        keys.public_key,
        PAYLOAD_TYPE,
        payload,
        keys.private_key.sign(make_unsigned("meshnode-announce", PAYLOAD_TYPE, payload)),
    ).marshal_envelope()
    bad = {
        "nothing": b"",
        "no protobuf": b"\xff\xff\xff\xff",
        "cut short": good[:-1],
        "one bit of the signature flipped": good[:-1] + bytes([good[-1] ^ 1]),
        "the payload was changed": seal(SEED_A, payload, signed=encode(MINIMAL)),
        "signed for another domain": seal(SEED_A, payload, domain="libp2p-peer-record"),
        "another payload type": seal(SEED_A, payload, payload_type=b"\x03\x01"),
        "the key is not an Ed25519 key": other_kind,
        "a signature of 63 bytes": good.replace(b"\x2a\x40" + good[-64:], b"\x2a\x3f" + good[-63:]),
        "without a key": good[good.index(b"\x12" + bytes([len(PAYLOAD_TYPE)])) :],
        "a key of 31 bytes": b"\x0a\x23\x08\x01\x12\x1f" + good[6:37] + good[38:],
        "another's key on it": seal(SEED_B, payload)[:38] + good[38:],
    }
    return [
        *(
            {"name": name, "envelope": data.hex(), "error": "bad_envelope"}
            for name, data in bad.items()
        ),
        {
            "name": "speaks for another",
            "envelope": seal(SEED_B, payload).hex(),
            "error": "wrong_signer",
        },
        {
            "name": "well sealed, but no map",
            "envelope": seal(SEED_A, b"\x01").hex(),
            "error": "bad_msgpack",
        },
        {
            "name": "well sealed, but without Seq",
            "envelope": seal(SEED_A, pack({"ID": A})).hex(),
            "error": "bad_field",
        },
    ]
