"""Members that announce garbage, too much, in others' names, or again and again."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
import trio

from meshnode.core.belonging import by_keys
from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData, ServiceData, encode
from meshnode.core.token import decode as decode_token
from meshnode.metrics import Metrics
from meshnode.net.gossip import Hearer, announce_topic
from meshnode.net.libp2p import envelope
from meshnode.net.libp2p.host import Libp2pMesh
from meshnode.net.libp2p.identity import Identity, ephemeral_identity
from meshnode.net.mesh import Verdict
from support.cluster import Cluster, eventually
from support.faults import Figures

HONEST = 10  # members that announce once a second
FLOOD_RATE = 1_000  # messages per second
FLOODED_FOR = 10.0  # seconds
FUZZED = 1_000_000


class Unrouted:
    def hear(self, node: NodeData) -> None: ...
    def forget(self, peer_id: str) -> None: ...


def announcement(identity: Identity, seq: int) -> bytes:
    services = (ServiceData(service_id="llm", models=("a", "b"), in_flight=3),)
    node = NodeData(id=identity.peer_id, name="fuzzed", seq=seq, services=services)
    return envelope.seal(identity, encode(node))


def damaged(rng: random.Random, good: bytes) -> bytes:
    """Bytes like ``good`` but for one kind of damage."""
    kind, at = rng.randrange(5), rng.randrange(len(good))
    if kind == 0:
        return good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]
    if kind == 1:
        return good[:at]
    if kind == 2:
        return good[:at] + rng.randbytes(rng.randrange(1, 8)) + good[at:]
    if kind == 3:
        return good[:at] + good[at + rng.randrange(1, 16) :]
    return rng.randbytes(rng.randrange(200))


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_a_million_fuzzed_announcements_end_nothing(figures: Figures) -> None:
    rng = random.Random(20)
    honest, liar = ephemeral_identity(b"h" * 32), ephemeral_identity(b"l" * 32)
    ledger = Ledger("me")
    metrics = Metrics()
    hearer = Hearer(ledger, Unrouted(), open_sealed=envelope.open_sealed, metrics=metrics)
    good = [announcement(honest, seq) for seq in range(1, 50)]
    began = time.process_time()
    verdicts: Counter[Verdict] = Counter()
    for _ in range(FUZZED):
        sender = rng.choice((honest, liar)).peer_id
        verdicts[hearer.hear(sender, damaged(rng, rng.choice(good)))] += 1
    spent = time.process_time() - began
    assert verdicts[Verdict.ACCEPT] == 0 or ledger.get(liar.peer_id) is None
    assert ledger.get(liar.peer_id) is None, "nobody speaks for another"
    assert hearer.hear(honest.peer_id, announcement(honest, 10**6)) is Verdict.ACCEPT
    figures.at_least("fuzzed inputs survived", FUZZED, 1_000_000, "")
    figures.note("CPU for each", spent / FUZZED * 1e6, "µs")


@pytest.mark.parametrize("kind", ["garbage", "oversized", "spoofed", "replayed"])
@pytest.mark.long
def test_honest_announcements_arrive_while_a_member_floods(
    cluster: Cluster, figures: Figures, kind: str
) -> None:
    victim = cluster.node("victim")
    token = decode_token(cluster.token)
    topic = announce_topic(token.network)
    heard = lambda: _metric(victim, 'meshnode_announcements_total{direction="received"}')  # noqa: E731

    def mesh() -> Libp2pMesh:
        return Libp2pMesh(
            identity=ephemeral_identity(),
            listen=("/ip4/127.0.0.1/tcp/0",),
            membership=by_keys((token.key,)),
            metrics=Metrics(),
        )

    async def run() -> tuple[float, float, int]:
        honest, liar = [mesh() for _ in range(HONEST)], mesh()
        sent = flooded = 0
        async with trio.open_nursery() as nursery:
            for each in (*honest, liar):
                each.subscribe(topic, lambda _, data: Verdict.ACCEPT)
                await nursery.start(each.run_forever)
                await each.dial(victim.addr, timeout=10)
            await trio.sleep(2)
            before, seq, began = heard(), 0, trio.current_time()
            async with trio.open_nursery() as talking:

                async def flood() -> None:
                    nonlocal flooded
                    rng = random.Random(1)
                    stolen = honest[0].seal(encode(NodeData(id=honest[0].peer_id, seq=1)))
                    while True:
                        due = int((trio.current_time() - began) * FLOOD_RATE) - flooded
                        for _ in range(min(due, 100)):
                            await liar.publish(topic, _bad(kind, rng, liar, stolen, flooded))
                            flooded += 1
                        await trio.sleep(0.01)

                talking.start_soon(flood)
                while trio.current_time() < began + FLOODED_FOR:
                    seq += 1
                    for each in honest:
                        node = NodeData(id=each.peer_id, name="honest", seq=10**6 + seq)
                        await each.publish(topic, each.seal(encode(node)))
                        sent += 1
                    await trio.sleep(1)
                await trio.sleep(2)
                talking.cancel_scope.cancel()
            arrived = heard() - before
            nursery.cancel_scope.cancel()
        return sent, arrived, flooded

    sent, arrived, flooded = trio.run(run)
    assert victim.child.poll() is None
    rate = flooded / (FLOODED_FOR + 2)
    figures.note("bad announcements sent per second", rate, "")
    assert rate > FLOOD_RATE * 0.9 or not figures.is_strict, "no flood, so no proof"
    if kind == "replayed":
        arrived -= 1  # the liar's own, when it is said for the first time
    figures.at_least("of the honest ones arrived", arrived / sent * 100, 99, "%")
    eventually(lambda: victim.get("/healthz"), within=5)


def _bad(kind: str, rng: random.Random, liar: Libp2pMesh, stolen: bytes, number: int) -> bytes:
    match kind:
        case "garbage":
            return rng.randbytes(rng.randrange(1, 300))
        case "oversized":
            return rng.randbytes(40_000)
        case "spoofed":
            return stolen
        case _:
            return liar.seal(encode(NodeData(id=liar.peer_id, name="liar", seq=1)))


def _metric(node, name: str) -> float:
    for line in node.get("/metrics").splitlines():
        if line.startswith(name + " "):
            return float(line.rpartition(" ")[2])
    return 0.0
