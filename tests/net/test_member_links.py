"""A whole member tells its peering which links are used, so that those are kept."""

from __future__ import annotations

import random

import trio

from meshnode.metrics import Metrics
from meshnode.net.local_services import LocalService
from meshnode.net.member import Member, MemberSettings
from meshnode.net.memory_mesh import MemoryMesh, MemoryNetwork


def member_on(mesh: MemoryMesh, **settings) -> Member:
    return Member(
        mesh,
        MemberSettings(network="test", name=mesh.peer_id[-4:], **settings),
        gpu=lambda: None,
        rng=random.Random(1),
        metrics=Metrics(),
        wall_time=lambda: 1_800_000_000.0,
    )


async def test_a_request_is_a_use_of_the_link_for_who_sends_it_and_for_who_serves_it(
    network: MemoryNetwork, nursery: trio.Nursery, wait_until
) -> None:
    with trio.fail_after(10):
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, lambda stream: stream.aclose(), [listener])
        port = listener.socket.getsockname()[1]
        there, here = network.node("there"), network.node("here")
        service = LocalService("llm", "127.0.0.1", port)
        host = member_on(there, services=(service,))
        await nursery.start(there.run_forever)
        entry = member_on(here, bootstraps=(there.addrs[0],))
        await nursery.start(here.run_forever)
        nursery.start_soon(host.run_forever)
        nursery.start_soon(entry.run_forever)
        await wait_until(lambda: entry.ledger.offering("llm", trio.current_time()), within=5)
        sends, serves = entry.peering._parting, host.peering._parting

        with entry.router.lease(now=trio.current_time(), service_id="llm"):
            assert sends._is_used(there.peer_id, trio.current_time() + 3600)  # while it is open
        assert sends._is_used(there.peer_id, trio.current_time())
        assert not sends._is_used(there.peer_id, trio.current_time() + 3600)
        assert not serves._is_used(here.peer_id, trio.current_time())
        with host.services.claim("llm", here.peer_id):
            assert serves._is_used(here.peer_id, trio.current_time() + 3600)
        assert serves._is_used(here.peer_id, trio.current_time())
        assert not serves._is_used(here.peer_id, trio.current_time() + 3600)
        nursery.cancel_scope.cancel()
