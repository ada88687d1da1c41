"""Local ports for each peer of a service: how many, and who is told that some have none."""

from __future__ import annotations

import pytest
import structlog.testing
import trio

from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData, ServiceData
from meshnode.net import forwards

SERVICES = (ServiceData(service_id="worker"),)


async def test_more_workers_than_ports_are_told_of_once_and_again_after_there_was_room(
    autojump_clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwards, "MAX_PORTS", 2)
    ledger = Ledger("self")
    told: list[list[str]] = []

    async def tell(opened) -> None:
        told.append([each.peer_id for each in opened])

    def say(peer_id: str, seq: int, state: str = "up") -> None:
        node = NodeData(id=peer_id, seq=seq, services=SERVICES, state=state, name=peer_id)
        ledger.observe(node, now=trio.current_time())

    followed = forwards.Forwards(ledger, carrier=lambda service_id, peer_id: None)
    with structlog.testing.capture_logs() as logs, trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: followed.follow("worker", tell, repeat=1000))
            for peer_id in "abc":
                say(peer_id, 1)
            await trio.sleep(2)
            assert told == [["a", "b"]]
            full = [line for line in logs if line["event"] == "forwards_full"]
            assert full == [
                {
                    "event": "forwards_full",
                    "log_level": "warning",
                    "service": "worker",
                    "peers": 3,
                    "limit": 2,
                }
            ]
            say("a", 2, "leaving")
            await trio.sleep(2)
            assert told[-1] == ["b", "c"]
            say("a", 3)
            await trio.sleep(2)
            full = [line for line in logs if line["event"] == "forwards_full"]
            assert len(full) == 2
            nursery.cancel_scope.cancel()
