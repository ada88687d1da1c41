"""Entry nodes share what they know of warm caches: in time, within a budget, and against liars."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import trio

from meshnode.core.affinity_batch import (
    AffinityBatch,
    AffinityPlace,
    AffinityRun,
    encode,
    pack_blocks,
)
from meshnode.core.affinity_outbox import TOTAL_BYTES
from meshnode.core.decision import Decision
from meshnode.core.ledger import Ledger
from meshnode.core.model_router import Affinity, ModelRequest, ModelRouter, Observed
from meshnode.core.node_data import NodeData, ServiceData, State
from meshnode.core.prefix_cache import MAX_ENTRIES
from meshnode.core.prefix_chain import short_chain
from meshnode.core.router import Router
from meshnode.metrics import Metrics
from meshnode.net.affinity import AffinityGossip, affinity_topic
from meshnode.net.member import Member, MemberSettings
from meshnode.net.memory_mesh import MemoryMesh, MemoryNetwork
from meshnode.net.mesh import Verdict

from .conftest import KEY, Node

TOPIC = affinity_topic("test")
LONG = "a conversation of many words " * 100  # 12 blocks


class Host(Node):
    """A node before an engine that is pretended to have the model."""

    def compose(self, seq: int, state: State) -> NodeData:
        service = ServiceData(service_id="llm", models=("m",), loaded=("m",))
        return super().compose(seq, state).model_copy(update={"services": (service,)})


class Entry:
    """A member with a gateway, as far as routing goes."""

    def __init__(self, mesh: MemoryMesh, **settings: object) -> None:
        given = {"network": "test", "name": mesh.peer_id[-4:], "is_gateway": True} | settings
        self.mesh = mesh
        self.metrics = Metrics()
        self.member = Member(
            mesh,
            MemberSettings(**given),  # type: ignore[arg-type]
            gpu=lambda: None,
            rng=random.Random(mesh.peer_id),
            metrics=self.metrics,
            wall_time=lambda: 1_800_000_000.0,
        )

    def serve(self, prompt: str = LONG, target: str | None = None) -> str:
        """Route one request that is over at once; return who served it."""
        with self.member.models.lease(request(prompt, target)) as lease:
            return lease.peer_id

    def explain(self, prompt: str = LONG) -> Decision:
        return self.member.models.explain(request(prompt))

    def is_warm(self, prompt: str = LONG) -> bool:
        return self.explain(prompt).tier == "prefix"

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"meshnode_affinity_{name}", labels) or 0.0


def request(prompt: str, target: str | None = None) -> ModelRequest:
    return ModelRequest(trio.current_time(), "m", prompt, target=target)


@pytest.fixture
def run(network: MemoryNetwork, nursery, start, wait_until):
    """Start hosts and entries in a row, each linked with the next; wait until all are known."""

    async def run(hosts: Sequence[Host], entries: Sequence[Entry]) -> None:
        await start(*hosts)
        for entry in entries:
            await nursery.start(entry.mesh.run_forever)
            nursery.start_soon(entry.member.run_forever)
        meshes = [*(host.memory_mesh for host in hosts), *(entry.mesh for entry in entries)]
        for one, other in pairwise(meshes):
            await one.dial(other.addrs[0], timeout=5)
        wanted = {host.peer_id for host in hosts}

        def knows(entry: Entry) -> bool:
            return wanted <= {e.peer_id for e in entry.member.ledger.online(trio.current_time())}

        await wait_until(lambda: all(map(knows, entries)), within=10)

    return run


@pytest.fixture
def hosts(network: MemoryNetwork) -> list[Host]:
    return [Host(network.node(name, keys=(KEY,)), name) for name in ("h1", "h2", "h3")]


@pytest.fixture
def entry(network: MemoryNetwork) -> Callable[..., Entry]:
    return lambda name, **settings: Entry(network.node(name, keys=(KEY,)), **settings)


async def test_a_conversation_begun_at_one_entry_goes_on_warm_at_another(
    run, hosts, entry, wait_until, autojump_clock
):
    a, b = entry("a"), entry("b")
    await run(hosts, [a, b])
    assert not b.is_warm()
    for host in hosts:  # whichever it was: not by the order of load
        prompt = f"{host.name}: {LONG}"
        assert a.serve(prompt, target=host.peer_id) == host.peer_id
        assert await wait_until(lambda p=prompt: b.is_warm(p), within=1.5) <= 1.5
        decision = b.explain(prompt + " and then?")
        assert (decision.picked, decision.tier) == (host.peer_id, "prefix")
        assert decision.match_ratio > 0.8
    assert a.counted("batches_total", direction="sent") == 3
    assert b.counted("batches_total", direction="received") == 3
    assert b.counted("batches_total", direction="sent") == 0  # what was heard is not told again
    assert b.counted("blocks_total", outcome="taken") == b.member.models.blocks_known == 36


async def test_requests_that_tell_nothing_new_send_nothing(run, hosts, entry, autojump_clock):
    a, b = entry("a"), entry("b")
    await run(hosts, [a, b])
    for _ in range(20):
        a.serve(target=hosts[0].peer_id)
        await trio.sleep(0.5)
    assert a.counted("batches_total", direction="sent") == 1


async def test_what_stays_in_use_at_one_entry_is_not_forgotten_at_the_other(
    run, hosts, entry, autojump_clock
):
    a, b = entry("a"), entry("b")
    await run(hosts, [a, b])
    for _ in range(20):
        a.serve(target=hosts[0].peer_id)
        await trio.sleep(30)
        assert b.member.models.blocks_known > 0
    # Not with every request, though: ten minutes are four times what is told again after.
    assert 3 <= a.counted("batches_total", direction="sent") <= 5


@pytest.mark.parametrize("affinity", ["off", "session"])
async def test_without_affinity_to_prompts_an_entry_neither_tells_nor_takes(
    run, hosts, entry, affinity: Affinity, autojump_clock
):
    a, other = entry("a"), entry("o", affinity=affinity)
    await run(hosts, [a, other])
    with other.member.models.lease(ModelRequest(trio.current_time(), "m", LONG, session="s")):
        a.serve()
    await trio.sleep(3)
    assert other.counted("batches_total", direction="sent") == 0
    assert other.counted("batches_total", direction="received") == 1
    assert other.counted("blocks_total", outcome="taken") == 0


async def test_a_node_without_a_gateway_passes_batches_on_and_keeps_nothing(
    run, hosts, entry, wait_until, autojump_clock
):
    a, plain, b = entry("a"), entry("plain", is_gateway=False), entry("b")
    await run(hosts, [a, plain, b])
    # Only the plain node stands between the two.
    await a.mesh.disconnect(b.mesh.peer_id, "test")
    a.serve()
    await wait_until(b.is_warm, within=1.5)
    assert plain.member.models.blocks_known == 0
    assert plain.counted("batches_total", direction="received") == 1


async def test_what_others_told_of_a_peer_is_forgotten_when_it_leaves_and_not_taken_after(
    run, hosts, entry, wait_until, autojump_clock
):
    a, b = entry("a"), entry("b")
    await run(hosts, [a, b])
    gone = hosts[0]
    a.serve(target=gone.peer_id)
    await wait_until(b.is_warm, within=1.5)
    await gone.announcer.say_leaving()
    await wait_until(lambda: b.member.models.blocks_known == 0, within=2)
    assert not b.is_warm()
    late = batch_of(gone.peer_id, short_chain("m", LONG))
    assert b.member.affinity.hear(a.mesh.peer_id, late) is Verdict.ACCEPT
    assert b.member.models.blocks_known == 0
    assert b.counted("blocks_total", outcome="not_offered") == 12


def batch_of(peer_id: str, blocks: Sequence[int], model: str = "m", service: str = "llm") -> bytes:
    run = AffinityRun(model=0, place=0, blocks=pack_blocks(blocks))
    places = (AffinityPlace(id=peer_id, service_id=service),)
    return encode(AffinityBatch(models=(model,), places=places, runs=(run,)))


@pytest.mark.parametrize(
    ("peer", "model", "service"),
    [("nobody", "m", "llm"), (None, "other", "llm"), (None, "m", "ssh")],
)
async def test_a_place_that_does_not_offer_the_model_is_passed_over(
    run, hosts, entry, peer, model, service, autojump_clock
):
    a = entry("a")
    await run(hosts, [a])
    data = batch_of(peer or hosts[0].peer_id, range(12), model, service)
    assert a.member.affinity.hear("liar", data) is Verdict.ACCEPT
    assert a.member.models.blocks_known == 0


async def test_a_lie_sends_nobody_more_than_the_load_guard_allows(
    run, hosts, entry, autojump_clock
):
    a = entry("a")
    await run(hosts, [a])
    a.member.affinity.hear("liar", batch_of(hosts[0].peer_id, short_chain("m", LONG)))
    leases = [a.member.models.lease(request(LONG)) for _ in range(30)]
    served = sorted(sum(lease.peer_id == host.peer_id for lease in leases) for host in hosts)
    assert served[0] >= 8 and served[-1] <= 13
    for lease in leases:
        lease.release()


async def test_a_flooding_member_is_not_heard_and_its_bytes_are_not_passed_on(
    run, hosts, entry, autojump_clock
):
    a = entry("a")
    await run(hosts, [a])
    rng = random.Random(1)
    verdicts = []
    for _ in range(3000):  # a hundred a second
        blocks = [rng.getrandbits(48) for _ in range(1300)]
        data = batch_of(hosts[0].peer_id, blocks)
        verdicts.append(a.member.affinity.hear("flood", data))
        await trio.sleep(0.01)
    assert 60 <= verdicts.count(Verdict.ACCEPT) <= 64
    assert verdicts.count(Verdict.IGNORE) == 3000 - verdicts.count(Verdict.ACCEPT)
    assert a.counted("batches_rejected_total", reason="rate") == verdicts.count(Verdict.IGNORE)
    assert a.member.models.blocks_known <= MAX_ENTRIES * 3 // 4 + 1300 + 16_384


async def test_made_up_blocks_do_not_push_out_what_this_node_routed_itself(
    run, hosts, entry, autojump_clock
):
    a = entry("a")
    await run(hosts, [a])
    a.serve(target=hosts[1].peer_id)
    rng = random.Random(1)
    for _ in range(400):
        blocks = [rng.getrandbits(48) for _ in range(1300)]
        a.member.affinity.hear("flood", batch_of(hosts[0].peer_id, blocks))
        await trio.sleep(0.5)
    assert a.counted("blocks_total", outcome="crowded") > 100_000
    decision = a.explain()
    assert (decision.picked, decision.tier) == (hosts[1].peer_id, "prefix")


async def test_many_origins_together_are_bounded(run, hosts, entry, autojump_clock):
    a = entry("a")
    await run(hosts, [a])
    data = batch_of(hosts[0].peer_id, range(1300))
    verdicts = [a.member.affinity.hear(f"p{n}", data) for n in range(100)]
    assert verdicts.count(Verdict.ACCEPT) == 2 * TOTAL_BYTES // len(data)
    assert a.counted("batches_rejected_total", reason="budget") > 0


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc1", bytes(8193)])
async def test_what_is_no_batch_is_rejected(run, hosts, entry, data, autojump_clock):
    a = entry("a")
    await run(hosts, [a])
    assert a.member.affinity.hear("x", data) is Verdict.REJECT
    assert (
        sum(
            a.counted("batches_rejected_total", reason=reason)
            for reason in ("bad_msgpack", "bad_field", "too_large")
        )
        == 1
    )


async def test_fifty_busy_entries_stay_within_the_budget_of_all(
    network: MemoryNetwork, nursery, autojump_clock
):
    heard: list[tuple[float, str, int]] = []

    def note(origin: str, data: bytes) -> Verdict:
        heard.append((trio.current_time(), origin, len(data)))
        return Verdict.ACCEPT

    hub = network.node("hub")
    hub.subscribe(TOPIC, note)
    await nursery.start(hub.run_forever)
    routers = []
    for number in range(50):
        mesh = network.node(f"e{number}")
        ledger, rng = Ledger(mesh.peer_id), random.Random(number)
        router = Router(ledger, self_id=mesh.peer_id, policy="vram", rng=rng)
        models = ModelRouter(router, ledger, rng=rng)
        gossip = AffinityGossip(
            mesh, models, topic=TOPIC, takes_part=True, rng=rng, metrics=Metrics()
        )
        await nursery.start(mesh.run_forever)
        nursery.start_soon(gossip.share_forever)
        await mesh.dial(hub.addrs[0], timeout=5)
        routers.append(models)
    rng, began = random.Random(1), trio.current_time()
    for _ in range(100):  # ten seconds of 100 requests a second at each
        for models in routers:
            for _ in range(10):
                blocks = tuple(rng.getrandbits(48) for _ in range(4))
                models.on_observed(Observed("m", blocks, ("host", "llm")))
        await trio.sleep(0.1)
    for start, _, _ in heard:
        within = sum(size for at, _, size in heard if start <= at < start + 1.0)
        assert within <= TOTAL_BYTES
    spoke = {origin for _, origin, _ in heard}
    assert len(spoke) == 50
    # The budget is used, too.
    in_all = sum(size for at, _, size in heard)
    assert in_all > 0.7 * TOTAL_BYTES * (trio.current_time() - began - 1.0)
    nursery.cancel_scope.cancel()
