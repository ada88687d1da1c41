"""Why nobody can serve a request, in words that say what to do about it.

Only asked once a pick has failed, so that a search through the whole ledger is no matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from meshnode.core.decision import CandidateRow
from meshnode.core.ledger import Ledger, LedgerEntry


def why_nobody_offers(ledger: Ledger, service_id: str, now: float) -> str:
    """Say who offered the service until lately, or what else is on offer."""
    gone = sum(entry.node.service(service_id) is not None for entry in ledger.entries())
    if gone:
        return (
            f"none of the {gone} peers that offered the service {service_id!r} is online; "
            "see `meshnode peers` for when each was last heard"
        )
    offered = ledger.services_online(now)
    if offered:
        return (
            f"no peer offers the service {service_id!r}; online are: {_some(offered)}; choose "
            f"one of those, or start a node with `--expose {service_id}=HOST:PORT`"
        )
    online = len(ledger.online(now))
    return (
        f"no peer offers the service {service_id!r}, nor any other ({online} online); start a "
        f"node with `--expose {service_id}=HOST:PORT`, or wait until one has joined"
    )


def why_no_target(ledger: Ledger, service_id: str, target: str, now: float) -> str:
    """Say what the peer that the caller asked for is, if it is no candidate."""
    entry = ledger.get(target)
    known = [entry] if entry is not None else []
    known = known or [entry for entry in ledger.entries() if entry.node.name == target]
    if not known:
        return f"no peer has the peer ID or the name {target!r}; see `meshnode peers`"
    online = [entry for entry in known if entry.is_online_at(now)]
    if not online:
        newest = max(known, key=lambda entry: entry.last_seen)
        said = "has left" if newest.state == "left" else "is offline"
        return (
            f"the peer {target!r} {said}, last heard "
            f"{now - newest.last_seen:.0f} s ago; start it again or choose another target"
        )
    offered = sorted({s.service_id for entry in online for s in entry.node.services})
    return (
        f"the peer {target!r} does not offer the service {service_id!r}, but: "
        f"{_some(offered) or 'nothing'}; choose another target or service"
    )


def why_ambiguous(service_id: str, target: str, aimed: Collection[LedgerEntry]) -> str:
    """Say which peers share the name that the caller asked for."""
    some = ", ".join(sorted(entry.peer_id for entry in aimed)[:3])
    return (
        f"{len(aimed)} peers that offer the service {service_id!r} are called {target!r}; "
        f"name the one you mean by its peer ID ({some})"
    )


def why_none_is_ready(
    service_id: str, target: str | None, held_back: Sequence[CandidateRow]
) -> str:
    """Say why each peer that offers the service had to be left out."""
    if target is not None:
        reason = held_back[0].excluded
        return (
            f"the peer {target!r} can't take a request for the service {service_id!r} now: "
            f"{reason}; try again later, or choose another target"
        )
    reasons = Counter(row.excluded for row in held_back)
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(5))
    return (
        f"none of the {len(held_back)} online peers that offer the service {service_id!r} can "
        f"take a request now: {counted}; try again later, or add a node that exposes it"
    )


def _some(names: Collection[str]) -> str:
    listed = ", ".join(sorted(names)[:8])
    return listed if len(names) <= 8 else f"{listed} and {len(names) - 8} more"
