"""Links that are used stay, links that nobody needs go, and nobody loses its last ones."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import trio

from meshnode.core.parting import PROTOCOL_ID
from meshnode.metrics import Metrics
from meshnode.net import parting
from meshnode.net.local_services import LocalService
from meshnode.net.parting import MAX_WARM, LinkTargets

# A large mesh in small: two links are enough, and from six others on idle ones are let go.
SMALL = LinkTargets(min_links=2, all_links_up_to=3, surplus_above=3, part_from=6)
SERVICE = LocalService("llm", "127.0.0.1", 9)
WARM_FOR = 10.0


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds for minutes: most of what passes on the virtual clock is pings."""
    monkeypatch.setattr(parting, "WARM_FOR", WARM_FOR)
    monkeypatch.setattr(parting, "_INTERVAL", (0.2, 0.6))
    monkeypatch.setattr(parting, "_ASK_AGAIN", 5.0)


def star(make_node, leaves: int, **options):
    hub = make_node("hub", targets=SMALL, **options)
    return hub, [
        make_node(f"leaf{n}", bootstraps=[hub.addr], targets=SMALL, **options)
        for n in range(leaves)
    ]


def is_pruned(hub, leaves) -> bool:
    """Whether the hub has no more links than it may, or none that its leaves can spare."""
    linked = [leaf for leaf in leaves if leaf.peer_id in hub.linked()]
    return len(linked) <= 3 or all(len(leaf.linked()) <= 2 for leaf in linked)


async def test_a_hub_lets_idle_leaves_go_that_have_others_and_no_one_is_taken_for_dead(
    make_node, start, wait_until, autojump_clock
):
    hub, leaves = star(make_node, 9)
    await start(hub, *leaves)
    nodes = [hub, *leaves]
    await wait_until(lambda: all(len(n.online()) == 10 for n in nodes), within=5)
    for one, other in zip(leaves, leaves[1:] + leaves[:1], strict=True):
        await one.peering.connect(other.peer_id, timeout=3)
    assert len(hub.linked()) == 9  # nobody has been idle for long yet

    await wait_until(lambda: is_pruned(hub, leaves), within=60)
    left = len(hub.linked())
    assert left < 9
    # Neither redialled as a loss nor as a bootstrap.
    for _ in range(30):
        await trio.sleep(2)
        assert len(hub.linked()) <= left
        assert all(len(node.linked()) >= 2 for node in nodes)
        assert all(len(node.online()) == 10 for node in nodes)
    assert sum(node.counted("ejections_total", reason="link_lost") for node in nodes) == 0


async def test_leaves_that_have_nobody_else_are_never_let_go(
    make_node, start, wait_until, network, autojump_clock
):
    hub, leaves = star(make_node, 8)
    network.partition([[leaf.mesh] for leaf in leaves])
    await start(hub, *leaves)
    await wait_until(lambda: len(hub.linked()) == 8, within=10)
    for _ in range(40):
        await trio.sleep(2)
        assert len(hub.linked()) == 8


async def busy_hub(make_node, start, wait_until):
    """A hub whose leaves are all in use but the first, which could spare its link."""
    hub, leaves = star(make_node, 7, services=[SERVICE])
    await start(hub, *leaves)
    await wait_until(lambda: all(len(n.online()) == 8 for n in (hub, *leaves)), within=10)
    for other in leaves[1:4]:
        await leaves[0].peering.connect(other.peer_id, timeout=3)

    def use_others() -> bool:
        for one in leaves[1:]:
            hub.peering.note_use(one.peer_id)
            leaves[0].peering.note_use(one.peer_id)
        return leaves[0].peer_id in hub.linked()

    return hub, leaves[0], use_others


@pytest.mark.parametrize("user", ["leaf", "hub"])
async def test_a_link_that_requests_go_over_stays_and_goes_some_idle_time_later(
    make_node, start, wait_until, autojump_clock, user
):
    hub, leaf, is_linked_while_others_are_used = await busy_hub(make_node, start, wait_until)
    router, target = (leaf.router, hub) if user == "leaf" else (hub.router, leaf)
    for _ in range(10):
        with router.lease(now=trio.current_time(), service_id="llm", target=target.peer_id):
            pass
        await trio.sleep(0.7 * WARM_FOR)
        assert is_linked_while_others_are_used()

    await wait_until(lambda: not is_linked_while_others_are_used(), within=2 * WARM_FOR)


@pytest.mark.parametrize("side", ["entry", "exit"])
async def test_an_endless_request_keeps_its_link_on_either_side(
    make_node, start, wait_until, autojump_clock, side
):
    hub, leaf, is_linked_while_others_are_used = await busy_hub(make_node, start, wait_until)
    if side == "entry":
        request = leaf.router.lease(now=trio.current_time(), service_id="llm", target=hub.peer_id)
    else:
        request = leaf.services.claim("llm", hub.peer_id)
    with request:
        for _ in range(50):
            await trio.sleep(1)
            assert is_linked_while_others_are_used()
    # Its end is a use as well.
    await trio.sleep(0.9 * WARM_FOR)
    assert is_linked_while_others_are_used()
    await wait_until(lambda: not is_linked_while_others_are_used(), within=2 * WARM_FOR)


async def test_a_peer_that_does_not_speak_of_parting_keeps_its_link(
    make_node, start, wait_until, autojump_clock
):
    hub, leaves = star(make_node, 7)
    asked = []

    async def refuse(stream) -> None:
        asked.append(stream.peer_id)
        stream.reset()

    for node in (hub, *leaves):
        node.mesh.serve(PROTOCOL_ID, refuse)
    await start(hub, *leaves)
    await wait_until(lambda: len(hub.linked()) == 7, within=10)
    await trio.sleep(WARM_FOR + 20)
    assert len(hub.linked()) == 7
    # Each leaf once in a while, not again and again.
    assert 7 <= asked.count(hub.peer_id) <= 7 * 5


async def test_of_two_that_ask_at_once_only_one_is_let_go_where_one_can_be_spared(
    memory_meshes, autojump_clock
):
    async with memory_meshes(4, linked=False) as (leaf, *others):
        for other in others:
            await leaf.dial(other.addrs[0], timeout=1)
        answers = []
        parties = [party(mesh) for mesh in (leaf, *others)]

        async def ask(one) -> None:
            answers.append(await one._ask(leaf.peer_id, 99))

        async with trio.open_nursery() as nursery:
            for one in parties[1:]:
                nursery.start_soon(ask, one)
        assert sorted(answers) == ["needed", "needed", "ok"]
        # What was agreed and not done is void after a moment.
        await trio.sleep(4)
        answers.clear()
        await ask(parties[1])
        assert answers == ["ok"]
        assert parties[0].take_agreement(others[0].peer_id) is True
        assert parties[0].take_agreement(others[0].peer_id) is False


def party(mesh) -> parting.Parting:
    return parting.Parting(
        mesh,
        SMALL,
        others=lambda: 9,
        is_in_use=lambda _: False,
        rng=random.Random(1),
        metrics=Metrics(),
    )


async def test_the_peers_that_are_kept_warm_are_bounded(memory_meshes, autojump_clock):
    async with memory_meshes(1) as (mesh,):
        one = party(mesh)
        for number in range(MAX_WARM + 5):
            one.note_use(f"peer{number}")
        one.note_use(mesh.peer_id)  # this node's own service needs no link
        now = trio.current_time()
        assert len(one._used_at) == MAX_WARM
        assert not one._is_used("peer4", now) and one._is_used("peer5", now)
        assert not one._is_used("peer5", now + WARM_FOR)


async def test_on_real_sockets_a_hub_lets_leaves_go_and_nobody_misses_anybody(
    make_libp2p_node, start, wait_until, monkeypatch
):
    monkeypatch.setattr(parting, "WARM_FOR", 0.5)
    targets = LinkTargets(min_links=2, all_links_up_to=2, surplus_above=2, part_from=4)
    with trio.fail_after(40):
        hub = make_libp2p_node("hub", targets=targets)
        await start(hub)
        boot = [hub.mesh.addrs[0]]
        content = replace(targets, surplus_above=99)  # the leaves ask nobody
        leaves = [make_libp2p_node(f"leaf{n}", bootstraps=boot, targets=content) for n in range(5)]
        await start(*leaves)
        nodes = [hub, *leaves]
        await wait_until(lambda: all(len(n.online()) == 6 for n in nodes), within=15)
        for one, other in zip(leaves, leaves[1:] + leaves[:1], strict=True):
            await one.peering.connect(other.peer_id, timeout=3)
        await wait_until(lambda: len(hub.linked()) == 2, within=10)
        assert all(len(n.linked()) >= 2 for n in nodes)
        await trio.sleep(1.5)
        assert all(len(n.online()) == 6 for n in nodes)
        assert sum(n.counted("ejections_total", reason="link_lost") for n in nodes) == 0
