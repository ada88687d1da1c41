"""How loaded one peer is, as this node knows it, and where that puts it in the policy's order.

Three sources meet here: our own open requests (exact), the peer's announcements (which include
ours), and its tunnel replies (which leave ours out, and are fresher). How its requests went
(``core/circuit``) and what it last answered decide with them whether it can be picked at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from meshnode.core.circuit import PROVEN_AFTER, Circuit
from meshnode.core.clusterrouting import ReplicaCandidate, rank
from meshnode.core.decision import CandidateRow
from meshnode.core.node_data import NodeData, ServiceData

# A peer that said "busy" may say how it is a second later: no node announces more often.
BUSY_HOLD = 1.0  # seconds
# One that drains announced it in the same moment; this covers a lost announcement.
DRAINING_HOLD = 10.0  # seconds


class Group(Enum):
    """Whether a peer can be picked, as far as its own numbers say."""

    READY = "ready"
    CROWDED = "crowded"  # a newcomer with a request already: not while somebody proven is ready
    SUSPECT = "suspect"  # nobody knows just now whether it is there: where nobody else is left
    FULL = "full"  # as many requests as it takes: later
    EJECTED = "ejected"  # put aside for its failures
    OUT = "out"  # draining, unhealthy, does not offer the service


class Standing(NamedTuple):
    """One peer's place in the order of the policy; peer IDs make every order total."""

    rank: tuple[int, float, int]
    peer_id: str
    candidate: ReplicaCandidate
    row: CandidateRow
    group: Group = Group.READY
    is_proven: bool = True
    reason: str = ""  # why it is not simply ready, for people
    until: float | None = None  # when time alone changes that; seconds on this node's clock

    def row_at(self, now: float, *, passed_over: bool = False) -> CandidateRow:
        """Return the row to show; ``passed_over``: others went before it for its group alone."""
        may_be_picked = self.group in (Group.CROWDED, Group.SUSPECT) and not passed_over
        if self.group is Group.READY or may_be_picked:
            return self.row
        reason = self.reason
        if self.group is Group.EJECTED and self.until is not None:
            reason = f"ejected for {max(0.0, self.until - now):.0f} s: {reason}"
        return self.row._replace(excluded=reason)


@dataclass(slots=True)
class Slot:
    """The load of one service on one peer, and how our requests to it went."""

    own: int = 0
    others: int = 0
    circuit: Circuit | None = None  # None: nothing was ever sent there
    answered: str = ""  # "busy" or "draining", while that holds it back
    answered_until: float = 0.0


@dataclass(slots=True)
class PeerView:
    """What the router knows of one peer beyond the ledger."""

    node: NodeData  # the announcement that these numbers started from
    vram: int  # bytes
    is_self: bool = False  # this node: its claims are its own
    reported_at: float | None = None
    last_used: float = 0.0
    slots: dict[str, Slot] = field(default_factory=dict)
    suspicion: str = ""  # why the ledger doubts that it is there, if it does

    def slot(self, service_id: str) -> Slot:
        """Return the load of one service, at first as announced."""
        slot = self.slots.get(service_id)
        if slot is None:
            slot = self.slots[service_id] = Slot(others=_announced(self.node, service_id))
        return slot

    def circuit(self, service_id: str) -> Circuit:
        """Return how our requests to one service went; closed if there were none."""
        slot = self.slot(service_id)
        if slot.circuit is None:
            slot.circuit = Circuit()
        return slot.circuit

    def start_from(self, node: NodeData) -> None:
        """Take an announcement's numbers; what was reported before it is out of date."""
        self.node = node
        self.vram = node.usable_vram
        self.reported_at = None
        for service_id, slot in self.slots.items():
            slot.others = max(0, _announced(node, service_id) - slot.own)
            slot.answered = ""

    def start_over(self) -> None:
        """Drop what was known of a peer that is gone; when it comes back it is tried at once."""
        self.last_used = 0.0
        self.start_from(self.node)
        for slot in self.slots.values():
            if slot.circuit is not None:
                slot.circuit.let_back(float("-inf"))

    def report(self, service_id: str, others: int, vram: int | None, now: float) -> None:
        """Take a tunnel reply's numbers; they stand until the next announcement."""
        self.slot(service_id).others = others
        if vram is not None:
            self.vram = self.node.credible_vram(vram)
        self.reported_at = now

    def hold_back(self, service_id: str, answer: str, now: float) -> float:
        """Pick the peer no more, as it answered "busy" or "draining"; return until when."""
        slot = self.slot(service_id)
        slot.answered = answer
        slot.answered_until = now + (BUSY_HOLD if answer == "busy" else DRAINING_HOLD)
        return slot.answered_until

    def count(self, service_id: str, change: int) -> None:
        """Count one of our own requests in or out."""
        self.slots[service_id].own += change

    def standing(self, service_id: str, now: float, *, pinned: bool = False) -> Standing:
        """Return the peer's place in the order of the policy, by the numbers of this moment.

        Args:
            pinned: nobody else will do, so that there is nobody to put it aside for.
        """
        slot = self.slot(service_id)
        in_flight = slot.own + slot.others
        node, last_used, vram = self.node, self.last_used, self.vram
        peer_id = node.id
        candidate = ReplicaCandidate(
            peer_id, in_flight=in_flight, last_used=last_used, available_vram=vram
        )
        group, reason, until = self._group(service_id, slot, now, pinned)
        row = CandidateRow(
            peer_id,
            node.name,
            slot.own,
            slot.others,
            in_flight,
            last_used,
            vram,
            self.reported_at,
        )
        return Standing(
            rank(candidate),
            peer_id,
            candidate,
            row,
            group,
            slot.circuit is not None and slot.circuit.is_proven,
            reason,
            until,
        )

    @property
    def own(self) -> int:
        """This node's open requests on the peer, over all services."""
        return sum(slot.own for slot in self.slots.values())

    def _group(
        self, service_id: str, slot: Slot, now: float, pinned: bool
    ) -> tuple[Group, str, float | None]:
        """Return whether the peer can be picked, why not, and until when."""
        service = self.node.service(service_id)
        out = _why_out(self.node, service)
        if out is not None:
            return Group.OUT, out, None
        assert service is not None
        answered = slot.answered if now < slot.answered_until else ""
        if answered == "draining":
            return Group.OUT, "draining", slot.answered_until
        circuit = None if pinned else slot.circuit
        if circuit is not None and circuit.state_at(now) == "open":
            return Group.EJECTED, circuit.why, circuit.until
        if service.max_in_flight and slot.own + slot.others >= service.max_in_flight:
            return Group.FULL, f"at its limit of {service.max_in_flight}", None
        if answered:
            return Group.FULL, "busy", slot.answered_until
        if circuit is not None and circuit.in_trial:
            return Group.FULL, f"on trial with one request, as {circuit.why}", None
        if self.suspicion and not pinned:
            return Group.SUSPECT, f"suspect: {self.suspicion}", None
        done = circuit.successes if circuit is not None else 0
        if slot.own and done < PROVEN_AFTER and not self.is_self and not pinned:
            return (
                Group.CROWDED,
                f"a newcomer gets one request at a time until {PROVEN_AFTER} have succeeded, "
                f"and {done} have",
                None,
            )
        return Group.READY, "", None


def _announced(node: NodeData, service_id: str) -> int:
    service = node.service(service_id)
    return 0 if service is None else service.in_flight


def _why_out(node: NodeData, service: ServiceData | None) -> str | None:
    """Return why an online peer can't serve, whatever its load; None if it can."""
    if service is None:
        return "not offered"
    if node.state != "up":
        return node.state
    return None if service.healthy else "unhealthy"
