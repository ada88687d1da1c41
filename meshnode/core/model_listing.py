"""The union of all models of the mesh, as OpenAI's and Ollama's clients list them; pure.

Who has each stands in an extension field ``meshnode``, which those clients pass over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from meshnode.core.ledger import LedgerEntry
from meshnode.core.model_index import model_key

# Beyond this many only the count is told: ten thousand peers would make megabytes of each answer.
MAX_HOLDERS = 50
# When a model was made is not known; clients want a number, and a time.
_CREATED = 0
_MODIFIED = "1970-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class Holder:
    """One service that has a model."""

    peer_id: str
    name: str
    service_id: str
    loaded: bool
    ready: bool  # healthy, and taking new work


@dataclass(slots=True)
class ListedModel:
    """One model under one spelling, and who has it."""

    name: str
    holders: list[Holder] = field(default_factory=list)


def list_models(
    entries: Iterable[LedgerEntry], now: float, *, service_id: str | None = None
) -> list[ListedModel]:
    """Return every model that somebody online has, by name.

    Args:
        entries: the ledger's.
        service_id: only those of this service; None: of any.
    """
    models: dict[str, ListedModel] = {}
    for entry in entries:
        if not entry.is_online_at(now):
            continue
        for service in entry.node.services:
            if service_id is not None and service.service_id != service_id:
                continue
            loaded = frozenset(map(model_key, service.loaded))
            for name in dict.fromkeys(service.models):
                holder = Holder(
                    peer_id=entry.peer_id,
                    name=entry.node.name,
                    service_id=service.service_id,
                    loaded=model_key(name) in loaded,
                    ready=service.healthy and entry.node.state == "up",
                )
                models.setdefault(name, ListedModel(name)).holders.append(holder)
    return sorted(models.values(), key=lambda model: model.name)


def find_model(models: Iterable[ListedModel], name: str) -> ListedModel | None:
    """Return the model that ``name`` means, the very spelling first."""
    key, alike = model_key(name), None
    for model in models:
        if model.name == name:
            return model
        if alike is None and model_key(model.name) == key:
            alike = model
    return alike


def openai_models(models: Iterable[ListedModel]) -> dict[str, object]:
    """Return the body of ``GET /v1/models``."""
    return {"object": "list", "data": [openai_model(model) for model in models]}


def openai_model(model: ListedModel) -> dict[str, object]:
    """Return the body of ``GET /v1/models/{model}``."""
    return {
        "id": model.name,
        "object": "model",
        "created": _CREATED,
        "owned_by": "meshnode",
        "meshnode": _who(model),
    }


def anthropic_models(models: Iterable[ListedModel]) -> dict[str, object]:
    """Return the body of ``GET /v1/models`` for a client that sends ``anthropic-version``."""
    rows = [
        {
            "type": "model",
            "id": model.name,
            "display_name": model.name,
            "created_at": _MODIFIED,
            "meshnode": _who(model),
        }
        for model in models
    ]
    first, last = (rows[0]["id"], rows[-1]["id"]) if rows else (None, None)
    return {"data": rows, "has_more": False, "first_id": first, "last_id": last}


def ollama_tags(models: Iterable[ListedModel]) -> dict[str, object]:
    """Return the body of ``GET /api/tags``."""
    return {
        "models": [
            {
                "name": model.name,
                "model": model.name,
                "modified_at": _MODIFIED,
                "size": 0,
                "digest": "",
                "details": {},
                "meshnode": _who(model),
            }
            for model in models
        ]
    }


def ollama_running(models: Iterable[ListedModel]) -> dict[str, object]:
    """Return the body of ``GET /api/ps``: those in memory somewhere."""
    running = [model for model in models if any(holder.loaded for holder in model.holders)]
    return ollama_tags(running)


def _who(model: ListedModel) -> dict[str, object]:
    return {
        "peers_total": len(model.holders),
        "peers": [
            {
                "peer_id": holder.peer_id,
                "name": holder.name,
                "service_id": holder.service_id,
                "loaded": holder.loaded,
                "ready": holder.ready,
            }
            for holder in model.holders[:MAX_HOLDERS]
        ],
    }
