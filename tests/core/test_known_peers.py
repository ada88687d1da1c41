from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.known_peers import (
    MAX_ADDRS_PER_PEER,
    MAX_FILE_BYTES,
    MAX_KNOWN_PEERS,
    KnownPeer,
    KnownPeers,
    decode,
    encode,
)
from meshnode.errors import StateDamaged


def peer_id(number: int) -> str:
    return f"12D3KooW{number:05d}".replace("0", "z")


def addr(number: int, port: int = 4201) -> str:
    return f"/ip4/192.0.2.7/tcp/{port}/p2p/{peer_id(number)}"


def peer(number: int, *ports: int) -> KnownPeer:
    return KnownPeer(peer_id(number), tuple(addr(number, port) for port in ports or (4201,)))


def known(*peers: KnownPeer) -> KnownPeers:
    book = KnownPeers()
    for one in peers:
        book.note(one.peer_id, one.addrs)
    return book


def content(**changed: Any) -> bytes:
    row = {"peer_id": peer_id(1), "addrs": [addr(1)]}
    return json.dumps({"schema_version": 1, "network": "home", "peers": [row]} | changed).encode()


def row(**changed: Any) -> dict[str, Any]:
    return {"peer_id": peer_id(1), "addrs": [addr(1)]} | changed


def test_the_peer_linked_last_comes_first() -> None:
    assert known(peer(1), peer(2), peer(1)).latest_first() == (peer(1), peer(2))


def test_only_what_is_worth_writing_is_told() -> None:
    told: list[None] = []
    book = KnownPeers(on_change=lambda: told.append(None))
    book.note(peer_id(1), (addr(1),))
    book.note(peer_id(1), (addr(1),))
    assert len(told) == 1
    book.note(peer_id(1), (addr(1, 9),))
    book.forget(peer_id(1))
    book.forget(peer_id(1))
    assert len(told) == 3


def test_the_oldest_makes_room() -> None:
    book = known(*(peer(number) for number in range(MAX_KNOWN_PEERS + 10)))
    assert len(book) == MAX_KNOWN_PEERS
    assert book.addrs_of(peer_id(9)) == ()
    assert book.addrs_of(peer_id(10)) == (addr(10),)


def test_a_peer_keeps_its_first_addresses_and_none_that_leads_to_another() -> None:
    book = known(KnownPeer(peer_id(1), (addr(2), *(addr(1, port) for port in range(1, 9)))))
    assert book.addrs_of(peer_id(1)) == tuple(addr(1, p) for p in range(1, 1 + MAX_ADDRS_PER_PEER))


def test_nothing_that_holds_changes_nothing() -> None:
    book = known(peer(1))
    book.note(peer_id(1), (addr(2), "nonsense"))
    assert book.latest_first() == (peer(1),)


def test_what_was_kept_stands_behind_what_is_known_already() -> None:
    book = known(peer(1, 9))
    book.restore((peer(3), peer(1), peer(2)))
    assert book.latest_first() == (peer(1, 9), peer(3), peer(2))


def test_as_many_as_are_kept_come_back_in_their_order() -> None:
    peers = tuple(peer(number, 1, 2, 3, 4) for number in range(MAX_KNOWN_PEERS))
    data = encode("home", peers)
    decoded = decode(data)
    assert decoded.peers == peers
    assert (decoded.network, decoded.faults) == ("home", ())
    assert len(data) < MAX_FILE_BYTES


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        (b"\0" * 4096, "no JSON"),
        (content()[:-5], "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "schema_version is None"),
        (content(schema_version=2), "schema_version is 2"),
        (content(schema_version=True), "schema_version is True"),
        (content(schema_version="9" * 500), "schema_version is 99999999999999999999,"),
        (content(network=7), "network"),
        (content(peers={}), "peers"),
    ],
)
def test_what_is_no_such_file_says_why(data: bytes, said: str) -> None:
    with pytest.raises(StateDamaged, match=said):
        decode(data)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (7, "no object"),
        ({}, "no peer_id"),
        (row(peer_id="../../etc/passwd"), "no peer_id"),
        (row(peer_id=""), "no peer_id"),
        (row(addrs=addr(1)), "no addrs"),
        (row(addrs=[]), "no addrs"),
        (row(addrs=[addr(1)] * 5), "more than 4"),
        (row(addrs=[addr(2)]), "no multiaddr"),
        (row(addrs=[7]), "no multiaddr"),
        (row(addrs=[f"127.0.0.1/p2p/{peer_id(1)}"]), "no multiaddr"),
        (row(addrs=[f"/ip4/\x1b[2J/p2p/{peer_id(1)}"]), "no multiaddr"),
        (row(addrs=[f"/dns/{'a' * 300}/tcp/1/p2p/{peer_id(1)}"]), "no multiaddr"),
    ],
)
def test_a_bad_entry_costs_itself_alone_and_is_named(bad: object, said: str) -> None:
    decoded = decode(content(peers=[row(), bad, row(peer_id=peer_id(2), addrs=[addr(2)])]))
    assert decoded.peers == (peer(1), peer(2))
    (fault,) = decoded.faults
    assert fault.startswith("peers[1] ") and said in fault


def test_more_peers_than_are_kept_are_cut_off_and_said() -> None:
    decoded = decode(encode("home", [peer(number) for number in range(MAX_KNOWN_PEERS + 1)]))
    assert len(decoded.peers) == MAX_KNOWN_PEERS
    assert decoded.faults == ("it has 257 peers, and only 256 are kept",)


def test_a_thousand_faults_are_not_a_thousand_lines() -> None:
    assert len(decode(content(peers=[7] * 1000)).faults) <= 9


@given(st.binary(max_size=400) | st.text(max_size=400).map(str.encode))
def test_no_bytes_do_worse_than_to_be_called_damaged(data: bytes) -> None:
    with suppress(StateDamaged):
        assert decode(data).peers == ()


@given(st.data())
def test_a_changed_byte_is_damage_or_leaves_peers_that_hold(data: st.DataObject) -> None:
    whole = bytearray(encode("home", [peer(1, 1, 2), peer(2)]))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(bytes(whole))
    except StateDamaged:
        return
    for one in decoded.peers:
        assert one.addrs
        assert all(a.endswith(f"/p2p/{one.peer_id}") and a.isprintable() for a in one.addrs)
