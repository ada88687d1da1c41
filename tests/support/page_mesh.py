"""A made-up mesh of any size behind a real control API, for looking at the page at scale.

    python -m support.page_mesh --nodes 200 --churn 20

prints ``{"event": "ready", "api": "127.0.0.1:PORT"}`` and serves until it is ended. ``--churn``
rows change four times a second. Some members bear names that try to break a page.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import trio
from prometheus_client import CollectorRegistry

from meshnode.http.control_api import build_app
from meshnode.http.events import Feed
from meshnode.http.guard import Access
from meshnode.http.server import bind, serve_forever
from meshnode.http.traffic import Second, columns

GIB = 2**30
HOSTILE = (
    "<img src=x onerror=window.pwned=1>",
    "<script>window.pwned=1</script>",
    "\u202ereversed\u202c name",
    "גרפיקה ראשית",
    "x" * 64,
    '"><b>bold</b>',
)
MODELS = ("llama3.3:70b", "qwen3:32b", "mistral-small:24b", "hf.co/bartowski/gemma-3-27b:Q4_K_M")
STATES = ("up",) * 12 + ("draining", "suspect", "offline", "left")


class MadeUpMesh:
    """A view of a mesh that never was."""

    def __init__(self, nodes: int, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.rows: dict[str, dict[str, Any]] = {}
        self.seconds = [self.second(i) for i in range(600)]
        for number in range(nodes):
            row = self.row(number)
            self.rows[row["peer_id"]] = row
        self.self_id = next(iter(self.rows))
        self.made = [self.decision(i) for i in range(12)]
        self.sampled = 600

    def row(self, number: int) -> dict[str, Any]:
        rng = self.rng
        hostile = HOSTILE[number - 3] if 3 <= number < 3 + len(HOSTILE) else None
        state = "up" if number < 3 else rng.choice(STATES)
        total = rng.choice((24, 48, 80, 192)) * GIB
        loaded = rng.sample(MODELS, rng.randrange(0, 2))
        online = state in ("up", "draining", "suspect")
        linked = online and 0 < number < 13
        return {
            "peer_id": f"12D3KooW{number:036d}{rng.randrange(16**8):08x}",
            "name": hostile or f"gpu{number}",
            "state": state,
            "online": online,
            "reason": None if state == "up" else "link_lost: connection reset by peer",
            "seen_at": trio_now() - rng.random() * 30,
            "available_vram": int(total * rng.random()) if number % 17 else None,
            "total_vram": total if number % 17 else None,
            "gpu_count": rng.choice((1, 2, 4, 8)),
            "in_flight": rng.randrange(6),
            "services": [
                {
                    "service_id": "llm",
                    "models": rng.sample(MODELS, rng.randrange(1, 4)),
                    "loaded": loaded,
                    "in_flight": 0,
                    "max_in_flight": None,
                    "healthy": number % 11 != 5,
                }
            ],
            "addrs": [f"/ip4/10.0.0.{number % 250}/tcp/4201"],
            "connected": linked or number == 0,
            "path": "relayed" if linked and number % 5 == 0 else "direct",
            "rtt_ms": round(rng.random() * 20, 2) if linked else None,
            "version": "0.1.0",
            "down_reason": None,
        }

    def second(self, i: int) -> Second:
        busy = max(0, self.rng.gauss(14 + 8 * ((i // 60) % 3), 3))
        failed = 1 if self.rng.random() < 0.02 else 0
        half = 0.05 + self.rng.random() * 0.03
        return Second(round(busy), failed, round(busy), half, half * (2 + self.rng.random()))

    def decision(self, number: int) -> dict[str, Any]:
        rows = [row for row in self.rows.values() if row["online"]][:8]
        picked = self.rng.choice(rows)
        return {
            "key": f"{number}/1",
            "at": trio_now() - 12 + number,
            "wall_time": 1.7e9,
            "service_id": "llm",
            "model": self.rng.choice(MODELS),
            "policy": "vram",
            "target": None,
            "attempt": 1,
            "picked": picked["peer_id"],
            "tier": self.rng.choice(("in_flight", "vram", "only")),
            "outcome": self.rng.choice(("complete", "complete", None, "upstream_cut")),
            "duration_s": 1.234,
            "retries": 0,
            "candidates_total": len(self.rows),
            "candidates": [
                {
                    "peer_id": row["peer_id"],
                    "name": row["name"],
                    "in_flight": row["in_flight"],
                    "own_in_flight": 0,
                    "others_in_flight": row["in_flight"],
                    "available_vram": row["available_vram"],
                    "excluded": None if row["state"] == "up" else row["state"],
                }
                for row in rows
            ],
        }

    async def change_forever(self, churn: int) -> None:
        count = 12
        while True:
            await trio.sleep(0.25)
            for row in self.rng.sample(list(self.rows.values()), min(churn, len(self.rows))):
                row["seen_at"] = trio.current_time()
                row["in_flight"] = self.rng.randrange(6)
                if row["total_vram"]:
                    row["available_vram"] = int(row["total_vram"] * self.rng.random())
            if churn:
                count += 1
                made = self.decision(count)
                made["at"] = trio.current_time()
                self.made = [made, *self.made[:11]]
                if count % 4 == 0:
                    self.sampled += 1
                    self.seconds = [*self.seconds[1:], self.second(self.sampled)]

    # NodeView and LiveState

    def status(self) -> dict[str, object]:
        online = sum(1 for row in self.rows.values() if row["online"])
        return {
            "peer_id": self.self_id,
            "name": "gpu0",
            "version": "0.1.0",
            "network": "lab",
            "open": False,
            "state": "up",
            "ready": True,
            "missing": [],
            "uptime_s": 1.0,
            "addrs": ["/ip4/10.0.0.7/tcp/4201/p2p/" + self.self_id],
            "proxy": "127.0.0.1:8080",
            "policy": "vram",
            "own_in_flight": 2,
            "peers_online": online,
            "peers_known": len(self.rows),
        }

    def live_peers(self) -> tuple[dict[str, Any], int]:
        rows = {peer_id: dict(row) for peer_id, row in self.rows.items()}
        rows[self.self_id]["seen_at"] = None
        return rows, len(rows)

    def live_decisions(self) -> list[dict[str, Any]]:
        return list(self.made)

    def traffic(self) -> dict[str, object]:
        return {"upto": self.sampled, **columns(self.seconds)}

    def last_second(self) -> dict[str, object]:
        return {"upto": self.sampled, **columns(self.seconds[-1:])}

    def peers(self) -> dict[str, object]:
        return {"self": self.self_id, "peers": list(self.rows.values())}

    def decisions(self) -> dict[str, object]:
        return {"decisions": self.made}

    def explain(self, service: str | None, target: str | None) -> dict[str, object]:
        return self.made[0]

    def readiness(self) -> tuple[bool, list[str]]:
        return True, []

    def metrics(self) -> CollectorRegistry:
        return CollectorRegistry()


def trio_now() -> float:
    return trio.current_time()


async def serve(nodes: int, churn: int, port: int, key: str | None) -> None:
    mesh = MadeUpMesh(nodes)
    feed = Feed(mesh)
    sock = bind("127.0.0.1", port, setting="api")
    app = build_app(mesh, access=Access(api_key=key), events=feed)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_forever, app, sock)
        nursery.start_soon(feed.run_forever)
        nursery.start_soon(mesh.change_forever, churn)
        api = f"127.0.0.1:{sock.getsockname()[1]}"
        print(json.dumps({"event": "ready", "api": api}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--churn", type=int, default=20)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key")
    args = parser.parse_args()
    trio.run(serve, args.nodes, args.churn, args.port, args.key)
