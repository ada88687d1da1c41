"""Leaving without losing a request: what runs ends well, what is new goes elsewhere."""

from __future__ import annotations

import pytest
import trio
from structlog.testing import capture_logs

from meshnode.net.drain import Drain
from meshnode.net.local_services import LocalService


class SomeRouter:
    """A router's count of this node's own requests."""

    self_id = "12D3me"
    own_total = 0


@pytest.fixture
def host(make_node):
    return make_node("host", services=[LocalService("llm", "127.0.0.1", 1)])


@pytest.fixture
def drain(host, nursery):
    """Start a drain of ``host`` that waits to be wished for; returns it."""

    def drain(grace=30.0, made_queue=()):
        made = Drain(
            host.services,
            host.router,
            host.announcer,
            made_queue,
            close_entry=lambda: made.closed_at.append(trio.current_time()),
            grace=grace,
        )
        made.closed_at = []
        made.left_at = None

        async def run():
            await made.run()
            made.left_at = trio.current_time()

        nursery.start_soon(run)
        return made

    return drain


async def test_an_idle_node_leaves_at_once(host, drain, autojump_clock):
    wished = drain()
    await trio.sleep(5)
    assert wished.left_at is None
    wished.wished.set()
    await trio.sleep(0.1)
    assert wished.left_at == 5
    assert host.services.admit("llm") == "draining"
    assert host.announcer.state == "draining"


async def test_what_runs_ends_well_and_then_the_node_leaves(host, drain, autojump_clock):
    wished = drain()
    with host.services.claim("llm", "client"):
        wished.wished.set()
        await trio.sleep(12)
        assert wished.left_at is None
        assert (wished.running.served_here, wished.running.sent_elsewhere) == (1, 0)
    await trio.sleep(1)
    assert 12 <= wished.left_at <= 12.1
    assert wished.closed_at == []  # its clients could begin anew until the end


async def test_what_outlasts_the_grace_is_cut_and_said_so(host, drain, autojump_clock):
    wished = drain(grace=10.0)
    with host.services.claim("llm", "client"), capture_logs() as lines:
        wished.wished.set()
        await trio.sleep(20)
        assert 10 <= wished.left_at <= 10.1
        assert 5 <= wished.closed_at[0] <= 5.1
    (cut,) = [line for line in lines if line["event"] == "drain_cut_short"]
    assert cut["served_here"] == 1


async def test_own_clients_count_once_wherever_they_are_served(
    host, drain, monkeypatch, autojump_clock
):
    wished = drain()
    wished._router = SomeRouter()
    wished._router.own_total = 3  # one of them by this host's own service
    with host.services.claim("llm", "12D3me"), host.services.claim("llm", "other"):
        assert (wished.running.served_here, wished.running.sent_elsewhere) == (2, 2)


async def test_requests_that_wait_for_room_are_waited_for(drain, autojump_clock):
    queue = ["a request"]
    wished = drain(made_queue=queue)
    wished.wished.set()
    await trio.sleep(3)
    assert wished.left_at is None and wished.running.sent_elsewhere == 1
    queue.clear()
    await trio.sleep(1)
    assert wished.left_at is not None


async def test_a_grace_of_nothing_waits_for_nobody(host, drain, autojump_clock):
    wished = drain(grace=0.0)
    with host.services.claim("llm", "client"):
        wished.wished.set()
        await trio.sleep(0.5)
        assert wished.left_at is not None
