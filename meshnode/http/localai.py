"""LocalAI's own endpoints, in its shapes, for tools that read them already.

Source of the shapes: LocalAI core/http/routes/ui_api.go and core/schema/localai.go. LocalAI tells
its kinds of nodes apart by the name of the service that they expose, and so does this: ``worker``
is a llama.cpp worker, ``mlx_worker`` one of MLX, and every other service takes whole requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from meshnode.core.ledger import LedgerEntry
from meshnode.http.answers import HEADERS, error_response

LLAMA_CPP = "worker"
MLX = "mlx_worker"


@dataclass(frozen=True, slots=True)
class P2PNode:
    """One peer with one service, as LocalAI lists them."""

    name: str
    peer_id: str
    service_id: str
    tunnel_address: str  # HOST:PORT here that leads to it; "" while none is open
    last_seen: str  # RFC 3339, by this node's clock
    is_online: bool

    def as_struct(self) -> dict[str, object]:
        """Return LocalAI's NodeData, which has Go's own names."""
        return {
            "Name": self.name,
            "ID": self.peer_id,
            "TunnelAddress": self.tunnel_address,
            "ServiceID": self.service_id,
            "LastSeen": self.last_seen,
        }

    def as_row(self) -> dict[str, object]:
        return {
            "name": self.name,
            "id": self.peer_id,
            "tunnelAddress": self.tunnel_address,
            "serviceID": self.service_id,
            "lastSeen": self.last_seen,
            "isOnline": self.is_online,
        }


class P2PView(Protocol):
    """What LocalAI's endpoints need of a node."""

    def p2p_nodes(self) -> list[P2PNode]: ...

    def token(self) -> str | None:
        """Return the token that joins the mesh; None where it is open."""
        ...


def nodes(
    entries: Iterable[LedgerEntry],
    tunnels: Mapping[tuple[str, str], str],
    *,
    now: float,
    wall_time: float,
) -> list[P2PNode]:
    """Return each service of each peer, by name.

    Args:
        entries: the ledger's.
        tunnels: local addresses by service and peer ID.
        now: seconds on this node's monotonic clock.
        wall_time: Unix seconds at ``now``; a peer's own clock is never shown.
    """
    found: list[P2PNode] = []
    for entry in sorted(entries, key=lambda entry: (entry.node.name, entry.peer_id)):
        seen = datetime.fromtimestamp(wall_time - max(0.0, now - entry.last_seen), UTC)
        for service in entry.node.services:
            found.append(
                P2PNode(
                    name=entry.node.name,
                    peer_id=entry.peer_id,
                    service_id=service.service_id,
                    tunnel_address=tunnels.get((service.service_id, entry.peer_id), ""),
                    last_seen=seen.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                    is_online=entry.is_online_at(now) and service.healthy,
                )
            )
    return found


def routes(view: P2PView) -> list[Route]:
    """Return LocalAI's endpoints over ``view``."""

    def route(path: str, body: Callable[[list[P2PNode]], dict[str, object]]) -> Route:
        async def answer(request: Request) -> Response:
            return JSONResponse(body(view.p2p_nodes()), headers=HEADERS)

        return Route(path, answer, methods=["GET"])

    async def token(request: Request) -> Response:
        text = view.token()
        if text is None:
            return error_response(404, "no_token", "this mesh is open: it has no token")
        return PlainTextResponse(text, headers=HEADERS)

    return [
        route("/api/p2p", _overview),
        route("/api/p2p/workers", _workers),
        route("/api/p2p/federation", lambda all_: {"nodes": _rows(_federated(all_))}),
        route("/api/p2p/stats", _stats),
        Route("/api/p2p/token", token, methods=["GET"]),
    ]


def _overview(all_: list[P2PNode]) -> dict[str, object]:
    return {
        "llama_cpp_nodes": [node.as_struct() for node in _of(all_, LLAMA_CPP)],
        "federated_nodes": [node.as_struct() for node in _federated(all_)],
        "mlx_nodes": [node.as_struct() for node in _of(all_, MLX)],
    }


def _workers(all_: list[P2PNode]) -> dict[str, object]:
    llama_cpp = _rows(_of(all_, LLAMA_CPP))
    return {
        "llama_cpp": {"nodes": llama_cpp},
        "mlx": {"nodes": _rows(_of(all_, MLX))},
        "nodes": llama_cpp,  # as LocalAI had it before there were MLX workers
    }


def _stats(all_: list[P2PNode]) -> dict[str, object]:
    kinds = {
        "llama_cpp_workers": _of(all_, LLAMA_CPP),
        "federated": _federated(all_),
        "mlx_workers": _of(all_, MLX),
    }
    return {
        kind: {"online": sum(node.is_online for node in found), "total": len(found)}
        for kind, found in kinds.items()
    }


def _of(all_: list[P2PNode], service_id: str) -> list[P2PNode]:
    return [node for node in all_ if node.service_id == service_id]


def _federated(all_: list[P2PNode]) -> list[P2PNode]:
    return [node for node in all_ if node.service_id not in (LLAMA_CPP, MLX)]


def _rows(found: list[P2PNode]) -> list[dict[str, object]]:
    return [node.as_row() for node in found]
