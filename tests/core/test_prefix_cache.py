"""The prefix index against its worked examples, its traps, and a simple model of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshnode.core.prefix_cache import PrefixIndex
from meshnode.core.prefix_chain import extract_chain, session_chain, short_chain
from meshnode.core.prefix_select import Pressure, load_limit, select

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "routing.json").read_text()
)
A, B, C = ("A", 0), ("B", 0), ("C", 0)


def key(raw: list[Any] | None) -> tuple[str, int] | None:
    return None if raw is None else (raw[0], raw[1])


# Chains


@pytest.mark.parametrize("vector", VECTORS["extract_chain"], ids=lambda v: v["name"])
def test_the_worked_prompt_has_the_chain_as_written(vector: dict[str, Any]) -> None:
    repeat = vector["repeat"]
    prompt = vector["prompt"] if repeat is None else repeat["unit"] * repeat["n"]
    chain = extract_chain(
        vector["model"], prompt, window=vector["window"], max_depth=vector["max_depth"]
    )
    assert [f"{value:016x}" for value in chain] == vector["chain"]


@given(prompt=st.text(max_size=100), more=st.text(max_size=100))
def test_an_extended_prompt_shares_all_full_leading_blocks(prompt: str, more: str) -> None:
    window = 8
    short = extract_chain("m", prompt, window=window)
    long = extract_chain("m", prompt + more, window=window)
    full = min(len(prompt.encode()) // window, 64)
    assert long[:full] == short[:full]


def test_a_chain_costs_no_more_for_a_prompt_of_megabytes_and_none_for_an_empty_one() -> None:
    assert extract_chain("m", "") == []
    assert extract_chain("m", "ü" * 5_000_000) == extract_chain("m", "ü" * 8192)
    assert len(extract_chain("m", "x" * 5_000_000)) == 64


def test_a_prompt_has_other_hashes_in_another_network() -> None:
    assert set(short_chain("m", "hello" * 200, seed=1)).isdisjoint(
        short_chain("m", "hello" * 200, seed=2)
    )
    assert all(value < 2**48 for value in short_chain("m", "hello" * 200, seed=1))


def test_a_session_is_one_block_and_no_prompt_passes_for_it() -> None:
    assert len(session_chain("m", "s" * 300)) == 1
    assert session_chain("m", "abc") != session_chain("m", "abd")
    assert session_chain("m", "abc") != session_chain("n", "abc")
    assert session_chain("m", "abc") != short_chain("m", "abc")


# Select


@pytest.mark.parametrize("vector", VECTORS["select"], ids=lambda v: v["name"])
def test_the_worked_selection_picks_as_written(vector: dict[str, Any]) -> None:
    in_flight = {(c["key"][0], c["key"][1]): c["in_flight"] for c in vector["candidates"]}
    limit = load_limit(
        min(in_flight.values(), default=0), vector["balance_abs"], vector["balance_rel"]
    )
    picked = select(
        in_flight,
        key(vector["hot"]),
        vector["match_ratio"],
        [(raw[0], raw[1]) for raw in vector["cold_order"]],
        limit=limit,
        min_prefix_match=vector["min_prefix_match"],
    )
    assert picked == key(vector["picked"])


def test_the_load_guard_lets_in_as_many_as_written() -> None:
    for least, most in VECTORS["load_guard_max_eligible_in_flight_by_minimum"].items():
        assert load_limit(int(least)) == most


def test_pressure_counts_the_last_minute_of_one_model() -> None:
    pressure = Pressure()
    for now in (0.0, 30.0, 60.0):
        pressure.count("m", now)
    assert (pressure.of("m", 60.0), pressure.of("m", 60.1), pressure.of("m", 121.0)) == (3, 2, 0)
    assert pressure.of("other", 60.0) == 0


def test_the_models_under_most_pressure_come_first_and_those_without_any_not_at_all() -> None:
    pressure = Pressure()
    for model, count in (("calm", 1), ("busy", 3), ("past", 2)):
        for _ in range(count):
            pressure.count(model, 0.0 if model == "past" else 50.0)
    assert pressure.highest(70.0, 10) == [("busy", 3), ("calm", 1)]
    assert pressure.highest(70.0, 1) == [("busy", 3)]


def test_pressure_is_kept_of_so_many_models_only() -> None:
    pressure = Pressure()
    for number in range(2000):
        pressure.count(f"m{number}", 0.0)
    assert pressure.of("m0", 0.0) == 0
    assert pressure.of("m1999", 0.0) == 1


# The index


def test_the_worked_script_goes_as_written() -> None:
    script = VECTORS["index_script"]
    index: PrefixIndex[tuple[str, int]] = PrefixIndex(
        ttl=script["ttl_s"], half_life=script["half_life_s"]
    )
    for step in script["steps"]:
        chain, now = step["chain"], step["now"]
        if step["op"] == "observe":
            fresh = index.observe("m", chain, key(step["key"]) or A, now)
            assert bool(fresh) == step["changed"], step
            continue
        candidates = [(raw[0], raw[1]) for raw in step["candidates"]]
        verdict = index.decide("m", chain, candidates, now)
        assert verdict.hot == key(step["hot"]), step
        assert verdict.match_ratio == step["match_ratio"]
        assert [list(replica) for replica in verdict.cold_order] == step["cold_order"]
        for name, weight in step["weights"].items():
            node, replica = name.split("/")
            assert index.weight("m", (node, int(replica)), now) == pytest.approx(weight, abs=1e-6)


def test_a_deeper_match_of_no_candidate_does_not_hide_a_shallower_one_of_a_candidate() -> None:
    index: PrefixIndex[tuple[str, int]] = PrefixIndex()
    index.observe("m", [1, 2], B, 0.0)
    index.observe("m", [1, 2, 3, 4], A, 1.0)
    index.observe("m", [1, 2], B, 2.0)
    verdict = index.decide("m", [1, 2, 3, 4], [B, C], 3.0)
    assert (verdict.hot, verdict.match_ratio) == (B, 0.5)


def test_observing_says_which_blocks_are_new_or_changed_hands() -> None:
    index: PrefixIndex[tuple[str, int]] = PrefixIndex()
    assert index.observe("m", [1, 2], A, 0.0) == (1, 2)
    assert index.observe("m", [1, 2, 3], A, 1.0) == (3,)
    assert index.observe("m", [1, 2, 3], A, 2.0) == ()
    assert index.observe("m", [1, 9], B, 3.0) == (1, 9)
    assert index.observe("m", [1, 2, 3], A, 4.0) == ()  # the deepest is its already
    assert index.observe("m", [], A, 5.0) == ()


def test_models_do_not_share_what_is_cached() -> None:
    index: PrefixIndex[tuple[str, int]] = PrefixIndex()
    index.observe("m", [1], A, 0.0)
    assert index.decide("other", [1], [A], 0.0).hot is None
    assert (index.weight("m", A, 0.0), index.weight("other", A, 0.0)) == (1.0, 0.0)


def test_what_a_replica_or_a_node_served_is_forgotten_when_it_goes() -> None:
    index: PrefixIndex[tuple[str, int]] = PrefixIndex()
    index.observe("m", [1], ("A", 0), 0.0)
    index.observe("m", [2], ("A", 1), 0.0)
    index.observe("m", [3], ("A", 2), 0.0)
    index.observe("m", [4], B, 0.0)
    index.invalidate(("A", 0))
    assert len(index) == 3 and index.decide("m", [1], [A], 0.0).hot is None
    index.invalidate_node("A")
    assert len(index) == 1 and index.decide("m", [4], [B], 0.0).hot == B
    assert index.weight("m", ("A", 1), 0.0) == 0.0


def test_a_full_index_drops_the_longest_unseen_and_the_deepest_of_a_path_first() -> None:
    index: PrefixIndex[tuple[str, int]] = PrefixIndex(max_entries=4)
    index.observe("m", [1, 2, 3], A, 0.0)
    index.observe("m", [7, 8], B, 1.0)
    assert len(index) == 4
    assert index.decide("m", [1, 2, 3], [A], 1.0).match_ratio == 2 / 3
    assert index.decide("m", [7, 8], [B], 1.0).match_ratio == 1.0


def test_weights_stay_right_over_a_year_of_requests() -> None:
    index: PrefixIndex[tuple[str, int]] = PrefixIndex()
    for hour in range(24 * 365):
        index.observe("m", [hour], A, hour * 3600.0)
    now = 24 * 365 * 3600.0 - 3600.0
    assert index.weight("m", A, now) == pytest.approx(1.0)
    assert len(index) == 1


REPLICAS = (A, B, C)
BRANCHES = st.lists(st.integers(0, 2), max_size=4)


def chain_of(branches: list[int]) -> list[int]:
    """Return hashes that cover what comes before them, like those of real prompts."""
    chain, path = [], 1
    for branch in branches:
        path = path * 4 + branch
        chain.append(path)
    return chain


class IndexMachine(RuleBasedStateMachine):
    """The index beside a plain table of (model, block) -> (owner, seen, told), searched naively."""

    def __init__(self) -> None:
        super().__init__()
        self.index: PrefixIndex[tuple[str, int]] = PrefixIndex(ttl=300, half_life=120)
        self.table: dict[tuple[str, int], tuple[tuple[str, int], float, float]] = {}
        self.now = 0.0

    def live(self) -> dict[tuple[str, int], tuple[tuple[str, int], float, float]]:
        return {k: v for k, v in self.table.items() if self.now - v[1] <= 300}

    @rule(seconds=st.sampled_from([0.0, 1.0, 60.0, 150.0, 300.0, 300.5, 40_000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(model=st.sampled_from("mn"), branches=BRANCHES, owner=st.sampled_from(REPLICAS))
    def observe(self, model: str, branches: list[int], owner: tuple[str, int]) -> None:
        chain, live = chain_of(branches), self.live()
        nobody = (None, 0.0, 0.0)

        def is_news(block: int) -> bool:
            known_owner, _, told = live.get((model, block), nobody)
            return known_owner != owner or self.now - told > 150

        expected = [b for b in chain if is_news(b)] if chain and is_news(chain[-1]) else []
        assert list(self.index.observe(model, chain, owner, self.now)) == expected
        self.table = live
        for block in chain:
            told = self.now if block in expected else live.get((model, block), nobody)[2]
            self.table[model, block] = (owner, self.now, told)

    @rule(owner=st.sampled_from(REPLICAS))
    def leave(self, owner: tuple[str, int]) -> None:
        self.index.invalidate_node(owner[0])
        self.table = {k: v for k, v in self.table.items() if v[0] != owner}

    @precondition(lambda self: self.table)
    @rule(
        model=st.sampled_from("mn"),
        branches=BRANCHES,
        among=st.lists(st.sampled_from(REPLICAS), unique=True),
    )
    def decide(self, model: str, branches: list[int], among: list[tuple[str, int]]) -> None:
        chain, live = chain_of(branches), self.live()
        owners = [live.get((model, block), (None, 0))[0] for block in chain]
        matches = [(d, o) for d, o in enumerate(owners, 1) if o in among]
        verdict = self.index.decide(model, chain, among, self.now)
        depth, hot = max(matches, default=(0, None), key=lambda match: match[0])
        assert verdict.hot == hot
        assert verdict.match_ratio == (depth / len(chain) if chain else 0.0)
        assert set(verdict.cold_order) == set(among)

    @invariant()
    def weights_are_the_sums_of_their_parts(self) -> None:
        live = self.live()
        for model in "mn":
            for replica in REPLICAS:
                expected = sum(
                    0.5 ** ((self.now - seen) / 120)
                    for (of, _), (owner, seen, _told) in live.items()
                    if of == model and owner == replica
                )
                assert self.index.weight(model, replica, self.now) == pytest.approx(expected)


TestIndexMachine = IndexMachine.TestCase
