"""Two ledgers compared by a digest: what has to go which way."""

from __future__ import annotations

import pytest

from meshnode.core.ledger import Ledger
from meshnode.core.ledger_digest import chosen, compare, digest_entries, key_of, records, split_keys
from meshnode.core.ledger_exchange import (
    Digest,
    digest_frames,
    end_frame,
    record_frames,
    want_frames,
)
from meshnode.core.node_data import NodeData, ServiceData, encode


def heard(ledger: Ledger, peer_id: str, seq: int, *, now: float = 0.0, state: str = "up") -> None:
    node = NodeData.model_validate({"ID": peer_id, "Seq": seq, "State": state})
    ledger.observe(node, envelope=f"{peer_id} {seq}".encode(), now=now)


def digests_of(ledger: Ledger, now: float = 0.0) -> list[Digest]:
    online, gone = digest_entries(ledger, now)
    return [
        Digest(gone=False, entries=b"".join(online)),
        Digest(gone=True, entries=b"".join(gone)),
    ]


def difference(asker: Ledger, member: Ledger, now: float = 0.0) -> tuple[list[str], list[str]]:
    """Return (what the member sends, what it wants), as "peer Seq"."""
    found = compare(member, digests_of(asker, now), now)
    sent = sorted(f"{entry.peer_id} {entry.node.seq}" for entry in found.to_send)
    wanted = sorted(f"{e.peer_id} {e.node.seq}" for e in chosen(asker, found.wanted))
    assert len(wanted) == len(found.wanted)
    return sent, wanted


@pytest.fixture
def pair() -> tuple[Ledger, Ledger]:
    return Ledger("x"), Ledger("y")


def test_equal_ledgers_exchange_nothing(pair: tuple[Ledger, Ledger]) -> None:
    for ledger in pair:
        heard(ledger, "a", 1)
        heard(ledger, "b", 2, state="leaving")
    assert difference(*pair) == ([], [])


def test_a_newcomer_is_sent_whoever_is_online_and_nobody_else(pair: tuple[Ledger, Ledger]) -> None:
    newcomer, member = pair
    heard(newcomer, "x", 5)
    heard(member, "a", 1)
    heard(member, "gone", 1, state="leaving")
    heard(member, "silent", 1, now=-100.0)
    assert difference(newcomer, member) == (["a 1"], ["x 5"])


def test_only_what_differs_goes_and_both_ways(pair: tuple[Ledger, Ledger]) -> None:
    asker, member = pair
    for peer_id, one, other in (("a", 1, 1), ("b", 2, 9), ("c", 9, 2)):
        heard(asker, peer_id, one)
        heard(member, peer_id, other)
    heard(asker, "d", 1)
    heard(member, "e", 1)
    assert difference(asker, member) == (["b 9", "e 1"], ["c 9", "d 1"])


def test_a_goodbye_that_one_side_missed_reaches_it(pair: tuple[Ledger, Ledger]) -> None:
    asker, member = pair
    heard(asker, "a", 1)
    heard(member, "a", 2, state="leaving")
    heard(asker, "b", 2, state="leaving")
    heard(member, "b", 1)
    assert difference(asker, member) == (["a 2"], ["b 2"])


def test_records_of_the_long_dead_are_not_asked_for(pair: tuple[Ledger, Ledger]) -> None:
    asker, member = pair
    heard(asker, "a", 1, now=-100.0)
    heard(asker, "ages ago", 1, now=-3600.0)
    assert difference(asker, member) == ([], [])
    assert sum(len(digest.entries) for digest in digests_of(asker)) == 20


def test_a_forgotten_peer_is_wanted_only_with_news(pair: tuple[Ledger, Ledger]) -> None:
    asker, member = pair
    for peer_id in "ab":
        heard(member, peer_id, 5)
        member.forget(peer_id, 0.0)
    heard(asker, "a", 5)
    heard(asker, "b", 6)
    assert difference(asker, member) == ([], ["b 6"])


def test_our_own_record_of_an_earlier_life_is_wanted(pair: tuple[Ledger, Ledger]) -> None:
    asker, member = pair
    heard(asker, "y", 1000)
    heard(member, "y", 10)
    assert difference(asker, member) == ([], ["y 1000"])


def test_a_hostile_digest_costs_no_more_than_it_names() -> None:
    member = Ledger("y")
    heard(member, "a", 1)
    entry = key_of("a") + b"\xff" * 8
    twice = Digest(gone=False, entries=entry * 1600)
    nonsense = Digest(gone=True, entries=bytes(range(20)) * 1600)
    found = compare(member, [twice, nonsense], 0.0)
    assert found.to_send == []
    assert found.wanted == [key_of("a")]
    assert chosen(member, [key_of("a")] * 1000 + [key_of("nobody")]) == [member.get("a")]


def test_records_come_freshest_first_and_as_old_as_they_are(pair: tuple[Ledger, Ledger]) -> None:
    ledger, _ = pair
    for number, peer_id in enumerate("abc"):
        heard(ledger, peer_id, 1, now=float(number))
    sent = list(records(ledger.entries(), 10.0))
    assert [record.age for record in sent] == [8.0, 9.0, 10.0]
    assert split_keys(key_of("a") + key_of("b")) == [key_of("a"), key_of("b")]


@pytest.mark.parametrize("nodes", [100, 1_000])
def test_comparing_equal_ledgers_takes_a_small_part_of_handing_one_over(nodes: int) -> None:
    ledger = Ledger("x")
    for number in range(nodes):
        node = usual_host(number)
        # 140 bytes are what an Ed25519 envelope adds.
        ledger.observe(node, envelope=bytes(140) + encode(node), now=0.0)
    online, _ = digest_entries(ledger, 0.0)
    compared = total(digest_frames(online, gone=False)) + 3 * len(end_frame())
    handed_over = total(record_frames(records(ledger.entries(), 0.0))) + len(end_frame())
    assert compared * 20 < handed_over
    one_differs = compared + total(want_frames([key_of("a")])) + handed_over // nodes
    assert one_differs * 20 < handed_over


def total(frames: object) -> int:
    return sum(len(frame) for frame in frames)  # type: ignore[attr-defined]


def usual_host(number: int) -> NodeData:
    peer_id = f"12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1N{number:08}"
    return NodeData(
        id=peer_id,
        name=f"gpu-host-{number}",
        service_id="ollama",
        available_vram=20 * 2**30,
        total_vram=24 * 2**30,
        gpu_count=1,
        services=(ServiceData(service_id="ollama", models=("llama3.1:8b", "qwen2.5:32b")),),
        addrs=tuple(f"/ip4/{ip}/tcp/4201/p2p/{peer_id}" for ip in ("192.0.2.7", "10.0.0.7")),
        seq=1_700_000_000_000 + number,
        version="0.1.0",
    )
