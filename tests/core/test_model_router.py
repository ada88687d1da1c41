"""Routing by model, one rule per test: who is a candidate, who is picked, why, what is said."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.core.decision import Decision
from meshnode.core.lease import Lease
from meshnode.core.ledger import Ledger
from meshnode.core.model_index import model_key
from meshnode.core.model_router import Affinity, ModelRequest, ModelRouter, Observed
from meshnode.core.node_data import NodeData, ServiceData
from meshnode.core.prefix_select import load_limit, select
from meshnode.core.router import Policy, Router
from meshnode.errors import AllFull, NoCandidate, UnknownModel

GIB = 2**30
LONG = "a conversation of many words " * 100  # 12 blocks


def service(*models: str, name: str = "ollama", **fields: Any) -> ServiceData:
    return ServiceData(service_id=name, models=models, **fields)


def node(
    peer_id: str, *services: ServiceData, vram: int = 0, seq: int = 1, **more: Any
) -> NodeData:
    more.setdefault("name", f"host-{peer_id}")
    return NodeData(id=peer_id, seq=seq, available_vram=vram * GIB, services=services, **more)


class Bench:
    """A model router over a ledger that was told of some nodes at second 0."""

    def __init__(
        self, *nodes: NodeData, policy: Policy = "vram", affinity: Affinity = "prefix"
    ) -> None:
        self.ledger = Ledger("self")
        rng = random.Random(1)
        self.router = Router(self.ledger, self_id="self", policy=policy, rng=rng)
        self.told: list[Observed] = []
        self.models = ModelRouter(
            self.router, self.ledger, rng=rng, affinity=affinity, on_observed=self.told.append
        )
        self.hear(*nodes)

    def hear(self, *nodes: NodeData, now: float = 0.0) -> None:
        for each in nodes:
            self.ledger.observe(each, now=now)
            self.router.hear(each)

    def lease(self, model: str | None = "llama3", prompt: str = "", **more: Any) -> Lease:
        return self.models.lease(ModelRequest(more.pop("now", 1.0), model, prompt, **more))

    def pick(self, model: str | None = "llama3", prompt: str = "", **more: Any) -> str:
        """Return who serves a request that is over at once."""
        with self.lease(model, prompt, **more) as lease:
            return lease.peer_id

    def explain(self, model: str | None = "llama3", prompt: str = "", **more: Any) -> Decision:
        return self.models.explain(ModelRequest(more.pop("now", 1.0), model, prompt, **more))

    def refusal(self, kind: type[NoCandidate], model: str | None = "llama3", **more: Any) -> str:
        with pytest.raises(NoCandidate) as caught:
            self.lease(model, **more)
        assert type(caught.value) is kind
        return str(caught.value)


# Who has it


def test_only_a_member_that_has_the_model_serves_it_however_free_the_others_are() -> None:
    bench = Bench(node("a", service("phi3"), vram=80), node("b", service("llama3", in_flight=9)))
    assert bench.pick("llama3") == "b"
    assert bench.pick("phi3") == "a"


def test_names_that_mean_one_model_to_ollama_are_one_model() -> None:
    for name in ("llama3", "llama3:latest", "Llama3", "library/llama3", "LLAMA3:latest"):
        assert model_key(name) == "llama3"
    assert model_key("llama3:8b") == "llama3:8b" != model_key("llama3")
    assert model_key(":latest") == ":latest"
    bench = Bench(node("a", service("llama3:latest")), node("b", service("llama3:8b"), vram=80))
    assert bench.pick("llama3") == bench.pick("LLAMA3:latest") == "a"
    assert bench.pick("llama3:8b") == "b"


def test_any_service_of_a_member_will_do_unless_one_is_named() -> None:
    bench = Bench(
        node("a", service("phi3"), service("llama3", name="vllm", in_flight=3)),
        node("b", service("llama3", in_flight=5)),
    )
    lease = bench.lease("llama3")
    assert (lease.peer_id, lease.service_id) == ("a", "vllm")
    assert lease.decision.service_id == "vllm"
    assert bench.pick("llama3", service_id="ollama") == "b"
    assert "in the service 'tts'" in bench.refusal(UnknownModel, service_id="tts")


def test_a_service_that_does_not_tell_its_models_is_asked_only_for_what_nobody_names() -> None:
    bench = Bench(node("plain", service(), vram=80), node("a", service("llama3"), vram=8))
    assert bench.pick("llama3") == "a"
    assert bench.pick("secret-model") == "plain"
    bench.hear(node("a", service(), seq=2, vram=8), now=1.0)
    assert bench.pick("llama3") == "plain"


def test_a_request_without_a_model_goes_to_an_engine_rather_than_to_any_port() -> None:
    bench = Bench(node("ssh", service(name="ssh"), vram=80), node("a", service("llama3")))
    assert bench.pick(None) == "a"
    assert Bench(node("x", service())).pick(None) == "x"
    assert bench.pick(None, service_id="ssh") == "ssh"


def test_an_unknown_model_is_refused_naming_those_like_it() -> None:
    bench = Bench(node("a", service("llama3:8b", "phi3", "qwen3:4b")))
    text = bench.refusal(UnknownModel, "llama3:7b")
    assert "'llama3:7b'" in text and "llama3:8b" in text and "GET /v1/models" in text
    with pytest.raises(UnknownModel) as caught:
        bench.lease("lama3:8b")
    assert (caught.value.model, caught.value.near) == ("lama3:8b", ("llama3:8b",))
    assert "like it" not in bench.refusal(UnknownModel, "zzzzzz")


def test_the_search_for_like_names_is_bounded_and_finds_the_family_among_thousands() -> None:
    names = [f"model-{number:04d}" for number in range(3000)]
    nodes = [node(f"n{i}", service(*names[i * 250 : (i + 1) * 250])) for i in range(12)]
    bench = Bench(*nodes, node("z", service("qwen3:4b")))
    assert "qwen3:4b" in bench.refusal(UnknownModel, "qwen3:5b")
    bench.refusal(UnknownModel, "x" * 100_000)


def test_without_any_service_in_the_mesh_it_says_so_and_not_that_the_model_is_unknown() -> None:
    assert "--expose" in Bench(node("a")).refusal(NoCandidate)
    assert "--expose" in Bench().refusal(NoCandidate, None)


def test_a_model_comes_and_goes_with_the_announcements() -> None:
    bench = Bench(node("a", service("llama3")), node("b", service("phi3")))
    assert bench.pick() == "a"
    bench.hear(node("b", service("phi3", "llama3"), vram=8, seq=2), now=1.0)
    assert bench.pick() == "b"
    bench.hear(node("b", service("phi3"), vram=8, seq=3), now=1.0)
    assert bench.pick() == "a"
    bench.ledger.mark_down("a", "gone", 2.0)
    assert bench.refusal(UnknownModel)


def test_members_silent_since_the_ledger_last_looked_are_not_picked() -> None:
    bench = Bench(node("a", service("llama3"), vram=80), node("b", service("llama3")))
    bench.hear(node("b", service("llama3"), seq=2), now=30.0)
    assert bench.pick(now=39.0) == "a"
    assert bench.pick(now=41.0) == "b"  # nobody called expire
    assert "silent" in bench.refusal(NoCandidate, now=71.0)


# Who is picked


def test_loaded_beats_more_vram_at_equal_load_but_not_less_load() -> None:
    bench = Bench(
        node("cold", service("llama3"), vram=80),
        node("warm", service("llama3", loaded=("llama3:latest",)), vram=8),
    )
    first, second = bench.lease(), bench.lease()
    assert (first.peer_id, first.decision.tier) == ("warm", "loaded")
    assert (second.peer_id, second.decision.tier) == ("cold", "in_flight")
    row = next(r for r in first.decision.candidates if r.peer_id == "warm")
    assert (row.loaded, row.service_id) == (True, "ollama")


def test_among_equals_in_all_else_the_most_free_vram_wins() -> None:
    bench = Bench(*(node(p, service("llama3"), vram=v) for p, v in (("a", 8), ("b", 24))))
    decision = bench.explain()
    assert (decision.picked, decision.tier, decision.model) == ("b", "vram", "llama3")
    assert Bench(node("a", service("llama3"))).explain().tier == "only"


def test_a_burst_spreads_since_each_pick_counts_at_once() -> None:
    bench = Bench(*(node(p, service("llama3"), vram=v) for p, v in (("a", 8), ("b", 24))))
    leases = [bench.lease() for _ in range(6)]
    assert [lease.peer_id for lease in leases] == ["b", "a"] * 3
    for lease in leases:
        lease.release()
    assert bench.router.own_total == 0


def test_rotation_and_dice_work_among_those_that_have_the_model() -> None:
    nodes = [node(p, service("llama3")) for p in "abc"]
    rotating = Bench(*nodes, policy="rotate")
    assert [rotating.pick() for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]
    dice = Bench(*nodes, policy="random")
    assert {dice.pick() for _ in range(50)} == {"a", "b", "c"}
    assert (dice.explain().picked, dice.explain().tier) == (None, "random")


def test_a_retry_goes_to_somebody_who_was_not_tried_and_says_who_was() -> None:
    bench = Bench(*(node(p, service("llama3"), vram=v) for p, v in (("a", 8), ("b", 24))))
    decision = bench.explain(exclude={"b"}, attempt=2)
    assert (decision.picked, decision.attempt) == ("a", 2)
    assert [r.peer_id for r in decision.candidates if r.excluded == "already tried"] == ["b"]
    assert "2 already tried" in bench.refusal(NoCandidate, exclude={"a", "b"})


def test_a_target_is_held_to_by_id_or_by_name() -> None:
    bench = Bench(
        node("a", service("llama3")), node("b", service("llama3"), vram=80), node("c", service("x"))
    )
    decision = bench.explain(target="a")
    assert (decision.picked, decision.tier) == ("a", "target")
    assert bench.pick(target="host-a") == "a"
    assert "does not have the model" in bench.refusal(NoCandidate, target="c")


def test_when_all_who_have_it_are_full_it_says_so_and_waiting_helps() -> None:
    bench = Bench(
        node("a", service("llama3", max_in_flight=1)),
        node("b", service("llama3", healthy=False)),
        node("c", service("llama3"), state="draining"),
    )
    bench.lease()
    text = bench.refusal(AllFull)
    assert "none of the 3 that have the model 'llama3'" in text
    assert "1 at its limit of 1" in text and "1 unhealthy" in text and "1 draining" in text
    bench.hear(node("a", service("llama3", healthy=False), seq=2), now=1.0)
    bench.refusal(NoCandidate)


# Who is warm


def three(**fields: Any) -> list[NodeData]:
    return [
        node(p, service("llama3", **fields), vram=v) for p, v in (("a", 8), ("b", 24), ("c", 16))
    ]


def test_the_next_turn_of_a_conversation_goes_where_the_last_one_went() -> None:
    bench = Bench(*three())
    first = bench.lease(prompt=LONG)
    other = bench.lease(prompt="something else" * 100)
    assert (first.peer_id, other.peer_id) == ("b", "c")
    other.release()
    first.release()
    decision = bench.explain(prompt=LONG + "and a new question")
    assert (decision.picked, decision.tier) == ("b", "prefix")
    assert decision.match_ratio is not None and decision.match_ratio > 0.8
    assert bench.explain(prompt="something else" * 101).picked == "c"


def test_new_conversations_spread_to_who_has_the_least_cached() -> None:
    bench = Bench(*three())
    assert [bench.pick(prompt=f"{n} {LONG}") for n in range(6)] == ["b", "c", "a"] * 2
    assert bench.explain(prompt=f"7 {LONG}" * 2).tier in ("vram", "least_cached")


def test_a_warm_peer_with_too_much_load_is_left_and_the_pressure_counted() -> None:
    bench = Bench(*three())
    bench.pick(prompt=LONG)
    held = [bench.lease(prompt=LONG), bench.lease(prompt=LONG)]
    assert [lease.peer_id for lease in held] == ["b", "b"]
    third = bench.lease(prompt=LONG)
    assert third.peer_id != "b"
    assert third.decision.forced_off == "b"
    assert bench.models.pressure.of("llama3", 1.0) == 1
    assert bench.models.pressure.of("llama3", 62.0) == 0


def test_explaining_counts_no_pressure_and_remembers_nothing() -> None:
    bench = Bench(*three())
    bench.explain(prompt=LONG)
    assert bench.models.blocks_known == 0
    for _ in range(3):
        bench.lease(prompt=LONG)
    before = bench.models.pressure.of("llama3", 1.0)
    bench.explain(prompt=LONG)
    assert bench.models.pressure.of("llama3", 1.0) == before


def test_a_short_match_is_no_reason_to_leave_the_order_of_the_load() -> None:
    bench = Bench(*three())
    bench.pick(prompt=LONG[:256])  # one block of twelve
    assert bench.explain(prompt=LONG).tier != "prefix"


def test_a_cache_is_gone_with_the_model_that_left_the_memory() -> None:
    bench = Bench(*three(loaded=("llama3",)))
    assert bench.pick(prompt=LONG) == "b"
    bench.hear(node("b", service("llama3"), vram=24, seq=2), now=1.0)
    decision = bench.explain(prompt=LONG)
    assert decision.picked != "b" and decision.forced_off is None


def test_with_a_prompt_a_loaded_model_goes_before_less_load_within_the_guard() -> None:
    bench = Bench(
        node("cold", service("llama3"), vram=80),
        node("warm", service("llama3", loaded=("llama3",), in_flight=1), vram=8),
    )
    decision = bench.explain(prompt=LONG)
    assert (decision.picked, decision.tier) == ("warm", "loaded")


def test_what_a_peer_that_left_had_cached_is_forgotten() -> None:
    bench = Bench(*three())
    assert bench.pick(prompt=LONG) == "b"
    bench.ledger.mark_down("b", "gone", 2.0)
    assert bench.models.blocks_known == 0
    assert bench.pick(prompt=LONG, now=2.0) == "c"


def test_a_warm_peer_that_is_no_candidate_does_not_hide_a_less_warm_one() -> None:
    bench = Bench(*three())
    bench.pick(prompt=LONG[:1792], target="a")  # 7 of 12 blocks
    bench.pick(prompt=LONG, target="c")
    bench.pick(prompt=LONG[:1792], target="a")
    decision = bench.explain(prompt=LONG, exclude={"c"})
    assert (decision.picked, decision.tier) == ("a", "prefix")
    assert decision.match_ratio == 7 / 12


def test_by_session_the_prompt_is_no_matter() -> None:
    bench = Bench(*three(), affinity="session")
    assert bench.pick(prompt="x", session="s1") == "b"
    held = bench.lease(prompt="y", session="s2")
    assert held.peer_id == "c"
    decision = bench.explain(prompt="anything", session="s2")
    assert (decision.picked, decision.tier, decision.match_ratio) == ("c", "session", 1.0)
    assert bench.explain(prompt="x").match_ratio is None


def test_with_affinity_off_nothing_is_remembered() -> None:
    bench = Bench(*three(), affinity="off")
    bench.pick(prompt=LONG, session="s")
    assert bench.models.blocks_known == 0 and bench.told == []


def test_others_are_told_only_of_what_they_do_not_know_yet() -> None:
    bench = Bench(*three())
    bench.pick(prompt=LONG)
    bench.pick(prompt=LONG)
    bench.pick(prompt=LONG + "x" * 256)
    assert [len(observed.blocks) for observed in bench.told] == [12, 2]
    assert bench.told[0].place == ("b", "ollama") and bench.told[0].model == "llama3"
    assert all(block < 2**48 for block in bench.told[0].blocks)


def test_what_another_entry_node_routed_is_warm_here_too() -> None:
    there, here = Bench(*three()), Bench(*three())
    there.pick(prompt=LONG, target="c")
    for observed in there.told:
        here.models.take_observed(observed, 1.0)
    decision = here.explain(prompt=LONG + "next")
    assert (decision.picked, decision.tier) == ("c", "prefix")


LOADS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), min_size=1, max_size=6)


@settings(max_examples=60)
@given(loads=LOADS, history=st.lists(st.integers(0, 5), max_size=8), turn=st.integers(0, 5))
def test_the_quick_choice_is_the_one_that_the_rules_name(
    loads: list[tuple[int, int]], history: list[int], turn: int
) -> None:
    peers = {f"p{i}": load for i, load in enumerate(loads)}
    bench = Bench(*(node(p, service("m", in_flight=n), vram=v) for p, (n, v) in peers.items()))
    for number in history:
        if f"p{number}" in peers:
            bench.pick("m", f"{number} {LONG}", target=f"p{number}")
    decision = bench.explain("m", f"{turn} {LONG}")
    rows = {row.peer_id: row for row in decision.candidates}
    in_flight = {(peer, 0): row.in_flight for peer, row in rows.items()}
    hot = max(rows.values(), key=lambda row: row.match_ratio or 0.0)
    cached = {p: history.count(int(p[1:])) and 1 for p in peers}  # each prompt weighs the same
    cold = sorted(peers, key=lambda p: (cached[p], peers[p][0], -peers[p][1], p))
    expected = select(
        in_flight,
        (hot.peer_id, 0) if hot.match_ratio else None,
        hot.match_ratio or 0.0,
        [(peer, 0) for peer in cold],
        limit=load_limit(min(in_flight.values())),
    )
    assert expected is not None and decision.picked == expected[0]


def test_rankings_of_models_that_nobody_asks_for_any_more_make_room() -> None:
    names = [f"m{number}" for number in range(250)]
    bench = Bench(node("a", service(*names)), node("b", service(*(f"n{n}" for n in range(250)))))
    for name in names:
        assert bench.pick(name) == "a"
    for number in range(250):
        assert bench.pick(f"n{number}") == "b"
    assert len(bench.models._rankings) == 256
    assert bench.pick("m0") == "a"


def test_a_peer_that_failed_is_left_alone_until_its_time_is_over() -> None:
    bench = Bench(node("a", service("m"), vram=8), node("b", service("m"), vram=24))
    for _ in range(5):
        with bench.lease("m", target="b") as lease:
            lease.failed("unreachable", now=1.0)
    decision = bench.explain("m")
    assert decision.picked == "a"
    assert next(r for r in decision.candidates if r.peer_id == "b").excluded is not None
    assert bench.pick("m", now=30.0) == "b"  # within the online window of both


def test_a_newcomer_gets_no_second_request_at_a_time_while_somebody_proven_is_ready() -> None:
    bench = Bench(node("a", service("m"), vram=8), node("b", service("m"), vram=24))
    for _ in range(30):
        with bench.lease("m", target="a") as lease:
            lease.succeeded(0.01, now=1.0)
    picks = [bench.lease("m") for _ in range(3)]
    assert [lease.peer_id for lease in picks] == ["b", "a", "a"]
    assert [r.peer_id for r in picks[2].decision.candidates if r.excluded] == ["b"]
