"""The record of one routing decision: who could have served, who was picked, and why.

Values only. The router makes them; the control API and the command line show them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from meshnode.core.clusterrouting import PolicyTier

Policy = Literal["vram", "rotate", "random"]
# What decided: a tier of the policy, the dice, the caller's own choice of peer, or with a model
# what is warm there: the model itself, the prompt's prefix, the session, or least cached so far.
Tier = PolicyTier | Literal["random", "target", "loaded", "prefix", "session", "least_cached"]

# What a person reads and a page shows; it also keeps a record of ten thousand peers small.
MAX_ROWS = 50


class CandidateRow(NamedTuple):
    """One peer that offers the service, as the decision saw it."""

    peer_id: str
    name: str
    own_in_flight: int  # this node's open requests there
    others_in_flight: int  # what the peer last said others have open there
    in_flight: int  # both: what the policy compares
    last_used: float  # seconds on this node's clock; 0 unless the policy rotates
    available_vram: int  # bytes; 0 = unknown
    reported_at: float | None = None  # when a tunnel reply gave newer numbers than announced
    excluded: str | None = None  # why it could not be picked, if it could not
    service_id: str | None = None  # where the request names a model and any service will do
    loaded: bool | None = None  # whether the model is in memory there; None: no model was asked
    match_ratio: float | None = None  # of the prompt's blocks, how many were last served there


class Decision(NamedTuple):
    """One pick, or what a pick would be."""

    at: float  # seconds on this node's monotonic clock
    wall_time: float | None  # Unix seconds, for display
    service_id: str
    policy: Policy
    target: str | None  # the peer ID or name that the caller asked for
    attempt: int  # 1 = the first peer asked for this request
    candidates: tuple[CandidateRow, ...]  # the best first, then the excluded; at most MAX_ROWS
    candidates_total: int  # how many there were, listed or not, excluded ones included
    picked: str | None  # peer ID; None only where dice would be cast, in an explanation
    tier: Tier
    outcome: str | None = None  # None while the lease is open
    duration: float | None = None  # seconds from the pick to the end
    retries: int | None = None  # peers given up before this one
    model: str | None = None  # as the request named it
    match_ratio: float | None = None  # of the picked peer; None: no prompt was looked at
    # The peer whose cache is warm, where its load made somebody else serve.
    forced_off: str | None = None
    is_retry: bool = False  # a peer failed this request before; one that was only busy did not

    def attributes(self) -> dict[str, str | int | float | bool]:
        """Return what a trace says of it; unknown values are left out."""
        names = {row.peer_id: row.name for row in self.candidates}
        told = {
            "service": self.service_id,
            "model": self.model,
            "policy": self.policy,
            "target": self.target,
            "attempt": self.attempt,
            "tier": self.tier,
            "peer_id": self.picked,
            "peer": names.get(self.picked or ""),
            "candidates": self.candidates_total,
            "match_ratio": self.match_ratio,
        }
        return {f"meshnode.{key}": value for key, value in told.items() if value is not None}
