"""The policy against its worked examples and its own definition."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.clusterrouting import (
    ReplicaCandidate,
    deciding_tier,
    pick_best_replica,
    rank,
)

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "routing.json").read_text()
)
UINT64_MAX = 2**64 - 1


@pytest.mark.parametrize("vector", VECTORS["pick_best_replica"], ids=lambda v: v["name"])
def test_the_worked_example_picks_as_written(vector: dict[str, Any]) -> None:
    candidates = [ReplicaCandidate(**fields) for fields in vector["candidates"]]
    picked = pick_best_replica(candidates)
    assert (picked.node_id if picked else None) == vector["picked"]


def test_the_worked_rotation_goes_round_when_each_pick_refreshes_last_used() -> None:
    vector = VECTORS["rotation_when_each_pick_refreshes_last_used"]
    pool = {
        name: ReplicaCandidate(name, available_vram=vram) for name, vram in vector["vram"].items()
    }
    sequence = []
    for turn in range(1, len(vector["sequence"]) + 1):
        picked = pick_best_replica(pool.values())
        assert picked is not None
        sequence.append(picked.node_id)
        pool[picked.node_id] = picked._replace(last_used=float(turn))
    assert sequence == vector["sequence"]


def test_free_vram_near_two_to_the_64_is_compared_exactly_and_not_as_a_float() -> None:
    # As floats the two are equal, and the first listed would win.
    less = ReplicaCandidate("less", available_vram=UINT64_MAX - 1)
    more = ReplicaCandidate("more", available_vram=UINT64_MAX)
    assert float(less.available_vram) == float(more.available_vram)
    assert pick_best_replica([less, more]) is more


def test_any_iterable_will_do_even_one_that_is_read_once() -> None:
    assert pick_best_replica(ReplicaCandidate(name) for name in "ab") == ReplicaCandidate("a")


def test_importing_the_policy_loads_no_library() -> None:
    code = (
        "import sys, meshnode.core.clusterrouting\n"
        "heavy = {'trio', 'libp2p', 'pydantic', 'msgpack'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# Few distinct values, so that ties on every tier come up all the time.
candidates = st.builds(
    ReplicaCandidate,
    node_id=st.text("abcdef", min_size=1, max_size=3),
    address=st.sampled_from(["", "10.0.0.1:80"]),
    replica_index=st.integers(0, 3),
    in_flight=st.integers(0, 3),
    last_used=st.sampled_from([0.0, 0.5, 1.0, 3600.0]),
    available_vram=st.sampled_from([0, 1, 8 * 10**9, UINT64_MAX - 1, UINT64_MAX]),
)


@given(st.lists(candidates, min_size=1))
def test_the_pick_is_the_first_listed_of_the_lowest_by_the_three_tiers(
    listed: list[ReplicaCandidate],
) -> None:
    def tiers(c: ReplicaCandidate) -> tuple[int, float, int]:
        return (c.in_flight, c.last_used, UINT64_MAX - c.available_vram)

    lowest = min(tiers(c) for c in listed)
    first = next(c for c in listed if tiers(c) == lowest)
    assert pick_best_replica(listed) is first


@given(
    st.lists(candidates, min_size=1, unique_by=rank).flatmap(
        lambda listed: st.tuples(st.just(listed), st.permutations(listed))
    )
)
def test_where_nothing_ties_the_order_of_listing_does_not_matter(
    orders: tuple[list[ReplicaCandidate], list[ReplicaCandidate]],
) -> None:
    assert pick_best_replica(orders[0]) == pick_best_replica(orders[1])


@given(st.lists(candidates, min_size=1), candidates)
def test_a_worse_newcomer_changes_nothing(
    listed: list[ReplicaCandidate], newcomer: ReplicaCandidate
) -> None:
    picked = pick_best_replica(listed)
    assert picked is not None
    after = pick_best_replica([*listed, newcomer])
    assert after is (newcomer if rank(newcomer) < rank(picked) else picked)


@given(
    vram=st.lists(st.integers(0, UINT64_MAX), min_size=1, max_size=8),
    rounds=st.integers(1, 5),
)
def test_rotation_gives_every_peer_one_turn_in_each_round(vram: list[int], rounds: int) -> None:
    pool = [ReplicaCandidate(str(i), available_vram=v) for i, v in enumerate(vram)]
    turns: Counter[str] = Counter()
    for turn in range(1, rounds * len(pool) + 1):
        picked = pick_best_replica(pool)
        assert picked is not None
        turns[picked.node_id] += 1
        pool[int(picked.node_id)] = picked._replace(last_used=float(turn))
    assert set(turns.values()) == {rounds}


@given(
    vram=st.lists(st.integers(0, UINT64_MAX), min_size=1, max_size=8),
    burst=st.integers(1, 40),
)
def test_a_burst_that_counts_its_own_picks_spreads_within_one_request(
    vram: list[int], burst: int
) -> None:
    pool = [ReplicaCandidate(str(i), available_vram=v) for i, v in enumerate(vram)]
    for _ in range(burst):
        picked = pick_best_replica(pool)
        assert picked is not None
        pool[int(picked.node_id)] = picked._replace(in_flight=picked.in_flight + 1)
    loads = [c.in_flight for c in pool]
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize(
    ("runner_up", "tier"),
    [
        (None, "only"),
        (ReplicaCandidate("b", in_flight=1, last_used=9.0, available_vram=7), "in_flight"),
        (ReplicaCandidate("b", last_used=9.0, available_vram=7), "last_used"),
        (ReplicaCandidate("b", available_vram=7), "vram"),
        (ReplicaCandidate("b", available_vram=8), "first_listed"),
    ],
)
def test_the_tier_named_is_the_first_that_sets_best_and_second_apart(
    runner_up: ReplicaCandidate | None, tier: str
) -> None:
    assert deciding_tier(ReplicaCandidate("a", available_vram=8), runner_up) == tier
