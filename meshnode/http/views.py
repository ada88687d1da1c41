"""The JSON of the control API, made from the node's own values; pure.

Unknown values are null. Ages are seconds on this node's clock, so that no peer's clock is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meshnode.core.circuit import Circuit
from meshnode.core.decision import CandidateRow, Decision
from meshnode.core.ledger import LedgerEntry
from meshnode.core.node_data import NodeData, ServiceData
from meshnode.net.mesh import Link


class LoadCount(Protocol):
    """Who knows the requests in flight on a peer; the router does."""

    def in_flight(self, peer_id: str, service_id: str) -> int: ...

    def circuit(self, peer_id: str, service_id: str) -> Circuit | None: ...


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What ``/api/status`` says of this node."""

    peer_id: str
    name: str
    version: str
    network: str
    fingerprint: str  # by which people compare networks; not secret
    is_open: bool
    state: str  # up, draining, leaving
    uptime: float  # seconds
    addrs: Sequence[str]
    proxy: str | None  # HOST:PORT
    api: str  # HOST:PORT
    policy: str
    service: str | None  # what the proxy serves, if it was told or found
    target: str | None
    available_vram: int | None  # bytes; None = unknown
    total_vram: int | None  # bytes
    gpu_count: int | None
    own_in_flight: int  # requests that came in here
    peers_online: int  # this node included
    peers_known: int
    links: int
    missing: Sequence[str]  # what keeps it from being ready; empty if it is
    services: Sequence[ServiceData] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)  # of each service that is not well


def status_view(status: NodeStatus) -> dict[str, object]:
    """Return the body of ``/api/status``."""
    return {
        "peer_id": status.peer_id,
        "name": status.name,
        "version": status.version,
        "network": status.network,
        "fingerprint": status.fingerprint,
        "open": status.is_open,
        "state": status.state,
        "ready": not status.missing,
        "missing": list(status.missing),
        "uptime_s": round(status.uptime, 3),
        "addrs": list(status.addrs),
        "proxy": status.proxy,
        "api": status.api,
        "policy": status.policy,
        "service": status.service,
        "target": status.target,
        "available_vram": status.available_vram,
        "total_vram": status.total_vram,
        "gpu_count": status.gpu_count,
        "services": [
            _service_view(s, s.in_flight) | {"reason": status.reasons.get(s.service_id)}
            for s in status.services
        ],
        "own_in_flight": status.own_in_flight,
        "peers_online": status.peers_online,
        "peers_known": status.peers_known,
        "links": status.links,
    }


def peers_view(
    entries: Iterable[LedgerEntry],
    load: LoadCount,
    links: Iterable[Link],
    *,
    self_id: str,
    now: float,
) -> dict[str, object]:
    """Return the body of ``/api/peers``: this node first, then the others by name."""
    by_peer = {link.peer_id: link for link in links}
    order = sorted(entries, key=lambda e: (e.peer_id != self_id, e.node.name, e.peer_id))
    return {
        "self": self_id,
        "peers": [
            _peer_view(entry, load, by_peer.get(entry.peer_id), entry.peer_id == self_id, now)
            for entry in order
        ],
    }


def live_rows(
    body: Mapping[str, object], *, now: float, limit: int
) -> tuple[dict[str, Mapping[str, object]], int]:
    """Return the first ``limit`` peers of ``peers_view`` by peer ID, and how many there are.

    This node comes first, then those online, then the rest. An age changes all the time; the
    moment of a sighting does not. So ``last_seen_s`` becomes ``seen_at``, seconds on this node's
    clock, and null for this node itself.
    """
    listed = body["peers"]
    assert isinstance(listed, list)
    # Whoever is cut off is at least nobody who could serve.
    peers = sorted(listed, key=lambda peer: (peer["peer_id"] != body["self"], not peer["online"]))
    rows: dict[str, Mapping[str, object]] = {}
    for peer in peers[:limit]:
        row = dict(peer)
        age = row.pop("last_seen_s")
        row["seen_at"] = None if row["peer_id"] == body["self"] else round(now - age, 2)
        rows[row["peer_id"]] = row
    return rows, len(peers)


def live_decision(decision: Decision, *, now: float, rows: int) -> dict[str, object]:
    """Return one decision for the page: with a key, its moment, and at most ``rows`` candidates."""
    view = decision_view(decision._replace(candidates=decision.candidates[:rows]), now=now)
    del view["age_s"]
    return {**view, "key": f"{decision.at:.6f}/{decision.attempt}", "at": round(decision.at, 3)}


def decisions_view(decisions: Iterable[Decision], *, now: float) -> dict[str, object]:
    """Return the body of ``/api/decisions``, the newest first as they come."""
    return {"decisions": [decision_view(decision, now=now) for decision in decisions]}


def decision_view(decision: Decision, *, now: float) -> dict[str, object]:
    """Return one decision; ``outcome`` is null while its request is open."""
    return {
        "age_s": round(max(0.0, now - decision.at), 3),
        "wall_time": decision.wall_time,
        "service_id": decision.service_id,
        "policy": decision.policy,
        "target": decision.target,
        "attempt": decision.attempt,
        "picked": decision.picked,
        "tier": decision.tier,
        "outcome": decision.outcome,
        "duration_s": None if decision.duration is None else round(decision.duration, 6),
        "retries": decision.retries,
        "model": decision.model,
        "match_ratio": _rounded(decision.match_ratio),
        "forced_off": decision.forced_off,
        "candidates_total": decision.candidates_total,
        "candidates": [_row_view(row, now) for row in decision.candidates],
    }


def _row_view(row: CandidateRow, now: float) -> dict[str, object]:
    return {
        "peer_id": row.peer_id,
        "name": row.name,
        "in_flight": row.in_flight,
        "own_in_flight": row.own_in_flight,
        "others_in_flight": row.others_in_flight,
        "last_used_s": round(now - row.last_used, 3) if row.last_used else None,
        "available_vram": row.available_vram or None,
        "excluded": row.excluded,
        "service_id": row.service_id,
        "loaded": row.loaded,
        "match_ratio": _rounded(row.match_ratio),
    }


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 4)


def _peer_view(
    entry: LedgerEntry, load: LoadCount, link: Link | None, is_self: bool, now: float
) -> dict[str, object]:
    node = entry.node
    loads = {s.service_id: load.in_flight(node.id, s.service_id) for s in node.services}
    return {
        "peer_id": node.id,
        "name": node.name,
        "state": entry.state_at(now),
        "online": entry.is_online_at(now),
        "last_seen_s": 0.0 if is_self else round(max(0.0, now - entry.last_seen), 3),
        "available_vram": _available_vram(node),
        "total_vram": node.total_vram or None,
        "gpu_count": node.gpu_count or None,
        "in_flight": sum(loads.values()),
        "services": [
            _service_view(s, loads[s.service_id])
            | _circuit_view(load.circuit(node.id, s.service_id), now)
            for s in node.services
        ],
        "addrs": list(node.addrs),
        "connected": is_self or link is not None,
        # None where there is no link, as to this node itself.
        "path": None if link is None else "direct" if link.via is None else "relayed",
        "via": None if link is None else link.via,
        "rtt_ms": None if link is None or link.rtt is None else round(link.rtt * 1000, 3),
        "version": node.version or None,
        "reason": "this node" if is_self else entry.reason_at(now),
        "down_reason": entry.down_reason,
    }


def _available_vram(node: NodeData) -> int | None:
    """Return free bytes; 0 beside a known total is a full GPU, and without one it is unknown."""
    if node.usable_vram or (node.total_vram and node.available_vram == 0):
        return node.usable_vram
    return None


def _circuit_view(circuit: Circuit | None, now: float) -> dict[str, object]:
    """Return how this node's own requests to the service went."""
    if circuit is None:
        return {"circuit": "closed", "circuit_reason": None, "ejected_for_s": None, "proven": False}
    state = circuit.state_at(now)
    ends_in = circuit.until - now if circuit.until is not None and state == "open" else None
    return {
        "circuit": state,
        "circuit_reason": None if state == "closed" else circuit.why,
        "ejected_for_s": None if ends_in is None else round(ends_in, 1),
        "proven": circuit.is_proven,
    }


def _service_view(service: ServiceData, in_flight: int) -> dict[str, object]:
    return {
        "service_id": service.service_id,
        "models": list(service.models),
        "loaded": list(service.loaded),
        "in_flight": in_flight,
        "max_in_flight": service.max_in_flight or None,
        "healthy": service.healthy,
    }
