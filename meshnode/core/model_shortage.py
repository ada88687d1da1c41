"""Why nobody can serve a request for a model, in words that say what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from meshnode.core.decision import CandidateRow
from meshnode.core.model_index import ModelIndex
from meshnode.errors import AllFull, NoCandidate, UnknownModel


def why_unknown(index: ModelIndex, model: str | None, service_id: str | None) -> NoCandidate:
    """Say that nobody online has the model, and which names are like it."""
    where = f" in the service {service_id!r}" if service_id else ""
    if model is None or not index.any_offers:
        return NoCandidate(
            f"no member of the mesh offers an engine{where} now; start a node with "
            "`--expose NAME=HOST:PORT`, or wait until one has joined"
        )
    near = index.near(model)
    like = f"; like it are: {', '.join(near)}" if near else ""
    return UnknownModel(
        f"no member of the mesh has the model {model!r}{where}{like}; "
        "GET /v1/models lists them all",
        model=model,
        near=near,
    )


def why_nobody(
    model: str | None,
    target: str | None,
    others: Sequence[CandidateRow],
    total: int,
    *,
    may_wait: bool,
) -> NoCandidate:
    """Say why each of those that have the model had to be left out.

    Args:
        others: their rows with the reasons; with a target, those of the target alone.
        total: how many have it.
        may_wait: some are only full just now.
    """
    what = "an engine" if model is None else f"the model {model!r}"
    if target is not None and not others:
        return NoCandidate(
            f"the peer {target!r} is not online or does not have {what}; "
            "see `meshnode peers`, or choose another target"
        )
    reasons = Counter(row.excluded for row in others)
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(5))
    who = f"none of the {total} that have {what}" if target is None else f"the peer {target!r}"
    verb = "can" if target is None else "can't"
    text = (
        f"{who} {verb} take a request now: {counted or 'silent for too long'}; "
        "try again later, or add a node that has it"
    )
    return AllFull(text) if may_wait else NoCandidate(text)
