from __future__ import annotations

import random

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from meshnode.core import node_data
from meshnode.core.node_data import NodeData, ServiceData, decode, decode_signed, encode
from meshnode.errors import WireError

GIB = 2**30
FULL = NodeData(
    id="12D3KooWA",
    name="gpu-1",
    service_id="llm",
    last_seen=1_700_000_000_000,
    available_vram=20 * GIB,
    total_vram=24 * GIB,
    gpu_count=1,
    services=(
        ServiceData(
            service_id="llm", models=("m:8b",), in_flight=2, max_in_flight=4, loaded=("m:8b",)
        ),
        ServiceData(service_id="whisper", healthy=False),
    ),
    addrs=("/ip4/10.0.0.1/tcp/4201/p2p/12D3KooWA",),
    seq=7,
    state="draining",
    online_window=60,
    version="1.2.3",
    relay=True,
)

text = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\u2028\u2029").filter(
        lambda c: not "\u202a" <= c <= "\u202e" and not "\u2066" <= c <= "\u2069"
    ),
    max_size=20,
)
uint = st.integers(0, 2**64 - 1)
services = st.fixed_dictionaries(
    {
        "service_id": text.filter(bool),
        "models": st.lists(text.filter(bool), max_size=3).map(tuple),
        "in_flight": uint,
        "max_in_flight": uint,
        "healthy": st.booleans(),
        "loaded": st.lists(text.filter(bool), max_size=3).map(tuple),
    }
).map(lambda fields: ServiceData(**fields))
nodes = st.fixed_dictionaries(
    {
        "id": text.filter(bool),
        "name": text,
        "service_id": text,
        "last_seen": uint,
        "available_vram": uint,
        "total_vram": uint,
        "gpu_count": uint,
        "services": st.lists(services, max_size=3).map(tuple),
        "addrs": st.lists(text, max_size=3).map(tuple),
        "seq": uint,
        "state": st.sampled_from(["up", "draining", "leaving"]),
        "online_window": uint,
        "version": text,
    }
).map(lambda fields: NodeData(**fields))


def packed(**changes: object) -> bytes:
    return msgpack.packb({"ID": "12D3KooWA", "Seq": 1} | changes)


def code_of(data: bytes) -> str:
    with pytest.raises(WireError) as caught:
        decode(data)
    return caught.value.code


def outcome_of(data: bytes) -> str:
    try:
        decode(data)
    except WireError as exc:
        return exc.code
    return "node"


@given(nodes)
def test_what_is_encoded_decodes_to_the_same(node: NodeData) -> None:
    assert decode(encode(node)) == node
    assert encode(decode(encode(node))) == encode(node)


@given(st.binary(max_size=300))
def test_random_bytes_give_a_node_or_a_wire_error(data: bytes) -> None:
    assert outcome_of(data) in {"node"} | node_data.ERROR_CODES


def test_a_damaged_announcement_gives_a_node_or_a_wire_error() -> None:
    rng = random.Random(1)
    whole = encode(FULL)
    outcomes = set()
    for _ in range(20_000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            match rng.randrange(3):
                case 0:
                    damaged[at] = rng.randrange(256)
                case 1:
                    del damaged[at : at + rng.randint(1, 8)]
                    damaged = damaged or bytearray(b"\x00")
                case _:
                    damaged[at:at] = rng.randbytes(rng.randint(1, 8))
        outcomes.add(outcome_of(bytes(damaged)))
    assert outcomes == {"node", "bad_msgpack", "bad_field"}


def test_missing_keys_take_their_defaults() -> None:
    node = decode(packed())
    assert node == NodeData(id="12D3KooWA", seq=1)
    assert (node.state, node.online_window, node.window_s) == ("up", 40, 40.0)


def test_unknown_keys_are_ignored_also_inside_a_service() -> None:
    node = decode(packed(Later={"a": [1.5, None]}, Services=[{"ServiceID": "x", "Later": 1}]))
    assert node.services == (ServiceData(service_id="x"),)


def test_our_own_attribute_names_mean_nothing_on_the_wire() -> None:
    assert decode(packed(name="x", in_flight=3)).name == ""
    assert code_of(msgpack.packb({"id": "a", "seq": 1})) == "bad_field"


def test_the_tunnel_address_is_read_but_never_sent() -> None:
    node = decode(packed(TunnelAddress="127.0.0.1:9000"))
    assert node.tunnel_address == "127.0.0.1:9000"
    assert b"TunnelAddress" not in encode(node)


@pytest.mark.parametrize(
    "changes",
    [
        {"ID": ""},
        {"ID": None},
        {"ID": b"12D3KooWA"},
        {"ID": "x" * 129},
        {"Seq": -1},
        {"Seq": 1.0},
        {"Seq": True},
        {"Seq": "1"},
        {"Name": "x" * 65},
        {"Name": "red\x1b[31m"},
        {"Name": "left\u202eright"},
        {"AvailableVRAM": -1},
        {"State": "asleep"},
        {"State": 1},
        {"OnlineWindow": 40.0},
        {"Services": {"ServiceID": "x"}},
        {"Services": [{}]},
        {"Services": [{"ServiceID": ""}]},
        {"Services": [{"ServiceID": "x", "Healthy": 1}]},
        {"Services": [{"ServiceID": "x", "Models": ["m"] * 257}]},
        {"Services": [{"ServiceID": "x", "Loaded": ["m"] * 257}]},
        {"Services": [{"ServiceID": "x", "Loaded": ["m" * 129]}]},
        {"Services": [{"ServiceID": "x"}] * 33},
        {"Addrs": ["/ip4/10.0.0.1"] * 17},
        {"Addrs": ["x" * 257]},
        {"Addrs": "/ip4/10.0.0.1"},
    ],
)
def test_a_value_out_of_its_bounds_is_a_bad_field(changes: dict[str, object]) -> None:
    assert code_of(packed(**changes)) == "bad_field"


def test_every_maximum_by_itself_is_accepted() -> None:
    assert decode(packed(Seq=2**64 - 1, AvailableVRAM=2**64 - 1)).seq == 2**64 - 1
    assert decode(packed(Name="ü" * 64)).name == "ü" * 64
    services = [{"ServiceID": f"s{n}", "Models": ["m"] * 256} for n in range(2)]
    assert len(decode(packed(Services=services)).services[1].models) == 256


def test_an_announcement_above_16_kib_is_neither_read_nor_sent() -> None:
    assert code_of(packed(Later="x" * 4000, More=["y" * 4000] * 4)) == "too_large"
    models = tuple(f"{n:0128}" for n in range(256))
    with pytest.raises(WireError) as caught:
        encode(NodeData(id="a", seq=1, services=(ServiceData(service_id="s", models=models),)))
    assert caught.value.code == "too_large"


def test_our_own_wrong_values_are_a_value_error_not_a_peers_fault() -> None:
    with pytest.raises(ValidationError):
        NodeData(id="a", seq=-1)


@pytest.mark.parametrize(
    ("announced", "window"), [(0, 10.0), (9, 10.0), (10, 10.0), (60, 60.0), (2**64 - 1, 3600.0)]
)
def test_the_window_is_bounded_whatever_a_peer_asks_for(announced: int, window: float) -> None:
    assert decode(packed(OnlineWindow=announced)).window_s == window


@pytest.mark.parametrize(
    ("available", "total", "usable"),
    [
        (8 * GIB, 24 * GIB, 8 * GIB),
        (24 * GIB, 24 * GIB, 24 * GIB),
        (25 * GIB, 24 * GIB, 0),
        (8 * GIB, 0, 8 * GIB),
        (16 * 2**40, 0, 16 * 2**40),
        (16 * 2**40 + 1, 0, 0),
        (2**64 - 1, 2**64 - 1, 0),
    ],
)
def test_incredible_vram_routes_as_unknown_but_is_shown_as_announced(
    available: int, total: int, usable: int
) -> None:
    node = decode(packed(AvailableVRAM=available, TotalVRAM=total))
    assert (node.usable_vram, node.available_vram) == (usable, available)


def test_of_two_services_of_one_name_the_first_counts() -> None:
    node = decode(
        packed(Services=[{"ServiceID": "x", "InFlight": 1}, {"ServiceID": "x", "InFlight": 2}])
    )
    found = node.service("x")
    assert found is not None and found.in_flight == 1
    assert node.service("y") is None


def test_nobody_speaks_for_another() -> None:
    assert decode_signed("12D3KooWA", packed()).id == "12D3KooWA"
    with pytest.raises(WireError) as caught:
        decode_signed("12D3KooWB", packed())
    assert caught.value.code == "wrong_signer"


def test_an_error_says_which_field_but_not_what_the_peer_wrote() -> None:
    with pytest.raises(WireError) as caught:
        decode(packed(Services=[{"ServiceID": "secret\x07"}]))
    assert "Services.0.ServiceID" in str(caught.value)
    assert "secret" not in str(caught.value) + str(caught.value.__cause__)
