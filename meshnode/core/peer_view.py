"""How loaded one peer is, as this node knows it, and where that puts it in the policy's order.

Three sources meet here: our own open requests (exact), the peer's announcements (which include
ours), and its tunnel replies (which leave ours out, and are fresher).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from meshnode.core.clusterrouting import ReplicaCandidate, rank
from meshnode.core.decision import CandidateRow
from meshnode.core.node_data import NodeData


class Standing(NamedTuple):
    """One peer's place in the order of the policy; peer IDs make every order total."""

    rank: tuple[int, float, int]
    peer_id: str
    candidate: ReplicaCandidate
    row: CandidateRow


@dataclass(slots=True)
class Slot:
    """The load of one service on one peer."""

    own: int = 0
    others: int = 0


@dataclass(slots=True)
class PeerView:
    """What the router knows of one peer beyond the ledger."""

    node: NodeData  # the announcement that these numbers started from
    vram: int  # bytes
    reported_at: float | None = None
    last_used: float = 0.0
    slots: dict[str, Slot] = field(default_factory=dict)

    def slot(self, service_id: str) -> Slot:
        """Return the load of one service, at first as announced."""
        slot = self.slots.get(service_id)
        if slot is None:
            slot = self.slots[service_id] = Slot(others=_announced(self.node, service_id))
        return slot

    def start_from(self, node: NodeData) -> None:
        """Take an announcement's numbers; what was reported before it is out of date."""
        self.node = node
        self.vram = node.usable_vram
        self.reported_at = None
        for service_id, slot in self.slots.items():
            slot.others = max(0, _announced(node, service_id) - slot.own)

    def report(self, service_id: str, others: int, vram: int | None, now: float) -> None:
        """Take a tunnel reply's numbers; they stand until the next announcement."""
        self.slot(service_id).others = others
        if vram is not None:
            # The same bounds hold as for an announced figure.
            self.vram = self.node.model_copy(update={"available_vram": vram}).usable_vram
        self.reported_at = now

    def count(self, service_id: str, change: int) -> None:
        """Count one of our own requests in or out."""
        self.slots[service_id].own += change

    def standing(self, service_id: str) -> Standing:
        """Return the peer's place in the order of the policy, by the numbers of this moment."""
        slot = self.slot(service_id)
        in_flight = slot.own + slot.others
        candidate = ReplicaCandidate(
            node_id=self.node.id,
            in_flight=in_flight,
            last_used=self.last_used,
            available_vram=self.vram,
        )
        row = CandidateRow(
            peer_id=self.node.id,
            name=self.node.name,
            own_in_flight=slot.own,
            others_in_flight=slot.others,
            in_flight=in_flight,
            last_used=self.last_used,
            available_vram=self.vram,
            reported_at=self.reported_at,
            excluded=_why_not(self.node, service_id, in_flight),
        )
        return Standing(rank(candidate), self.node.id, candidate, row)

    @property
    def own(self) -> int:
        """This node's open requests on the peer, over all services."""
        return sum(slot.own for slot in self.slots.values())


def _announced(node: NodeData, service_id: str) -> int:
    service = node.service(service_id)
    return 0 if service is None else service.in_flight


def _why_not(node: NodeData, service_id: str, in_flight: int) -> str | None:
    """Return why an online peer can't be picked, in words for a person; None if it can."""
    service = node.service(service_id)
    if service is None:
        return "not offered"
    if node.state != "up":
        return node.state
    if not service.healthy:
        return "unhealthy"
    if service.max_in_flight and in_flight >= service.max_in_flight:
        return f"at its limit of {service.max_in_flight}"
    return None
