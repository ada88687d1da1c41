"""LocalAI's own endpoints, in the shapes that its page and other tools read."""

from __future__ import annotations

import httpx
import pytest
import trio

from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData, ServiceData
from meshnode.http import localai
from meshnode.http.control_api import build_app
from meshnode.http.guard import Access
from meshnode.http.server import bind, serve_forever

NOW = 1000.0


def peer(peer_id, *services, **more):
    offered = tuple(ServiceData(ServiceID=name, Healthy=name != "broken") for name in services)
    return NodeData(ID=peer_id, Name=f"name of {peer_id}", Services=offered, Seq=1, **more)


@pytest.fixture
def ledger():
    ledger = Ledger("me")
    ledger.observe(peer("me", "llm"), now=NOW)
    ledger.observe(peer("a", "worker", "llm"), now=NOW - 10)
    ledger.observe(peer("b", "worker"), now=NOW - 100)  # past its window of 40 s
    ledger.observe(peer("c", "mlx_worker", "broken"), now=NOW)
    return ledger


class View:
    def __init__(self, ledger, token="mesh1secret"):
        self.ledger, self.text = ledger, token

    def p2p_nodes(self):
        tunnels = {("worker", "a"): "127.0.0.1:5000"}
        return localai.nodes(self.ledger.entries(), tunnels, now=NOW, wall_time=1.7e9)

    def token(self):
        return self.text


@pytest.fixture
async def get(nursery, ledger):
    async def get(path, *, key=None, token="mesh1secret"):
        sock = bind("127.0.0.1", 0, setting="api")
        routes = localai.routes(View(ledger, token))
        app = build_app(None, access=Access(local_key="right"), more=routes)
        await nursery.start(serve_forever, app, sock)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with trio.fail_after(10):
            async with httpx.AsyncClient() as client:
                return await client.get(
                    f"http://127.0.0.1:{sock.getsockname()[1]}{path}", headers=headers
                )

    return get


async def test_workers_are_listed_by_kind_with_the_tunnels_that_are_open(get):
    body = (await get("/api/p2p/workers")).json()
    assert set(body) == {"llama_cpp", "mlx", "nodes"}
    assert body["nodes"] == body["llama_cpp"]["nodes"]
    assert body["nodes"] == [
        {
            "name": "name of a",
            "id": "a",
            "tunnelAddress": "127.0.0.1:5000",
            "serviceID": "worker",
            "lastSeen": "2023-11-14T22:13:10.000Z",
            "isOnline": True,
        },
        {
            "name": "name of b",
            "id": "b",
            "tunnelAddress": "",
            "serviceID": "worker",
            "lastSeen": "2023-11-14T22:11:40.000Z",
            "isOnline": False,
        },
    ]
    assert [node["id"] for node in body["mlx"]["nodes"]] == ["c"]


async def test_everything_else_is_federated_and_what_is_unwell_is_not_online(get):
    body = (await get("/api/p2p/federation")).json()
    assert [(n["id"], n["serviceID"], n["isOnline"]) for n in body["nodes"]] == [
        ("a", "llm", True),
        ("c", "broken", False),
        ("me", "llm", True),
    ]


async def test_the_stats_count_each_kind(get):
    assert (await get("/api/p2p/stats")).json() == {
        "llama_cpp_workers": {"online": 1, "total": 2},
        "federated": {"online": 2, "total": 3},
        "mlx_workers": {"online": 1, "total": 1},
    }


async def test_the_overview_has_gos_own_names(get):
    body = (await get("/api/p2p")).json()
    assert set(body) == {"llama_cpp_nodes", "federated_nodes", "mlx_nodes"}
    assert set(body["mlx_nodes"][0]) == {"Name", "ID", "TunnelAddress", "ServiceID", "LastSeen"}


async def test_the_token_is_told_as_text_to_whoever_has_the_key_and_nobody_else(get):
    for key in (None, "wrong"):
        answer = await get("/api/p2p/token", key=key)
        assert answer.status_code == 401
        assert "mesh1secret" not in answer.text
    answer = await get("/api/p2p/token", key="right")
    assert (answer.status_code, answer.text) == (200, "mesh1secret")
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["cache-control"] == "no-store"
    assert (await get("/api/p2p/token", key="right", token=None)).status_code == 404
