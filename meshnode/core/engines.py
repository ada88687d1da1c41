"""What inference engines say of themselves over HTTP: their models, and how busy they are.

The law here: whatever a backend answers, reading it gives a value within the announcement's
bounds or raises ``ProbeFailed``. A backend may be anything that happens to listen on that port.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from meshnode.core.node_data import MAX_MODEL_NAME, MAX_MODELS
from meshnode.core.wire import is_sendable
from meshnode.errors import ProbeFailed

# More requests than any engine holds: a gauge above it is no count.
_MAX_LOAD = 1_000_000


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The models of one engine, as far as they can be announced."""

    models: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()  # of ``models``, those in memory now
    owners: frozenset[str] = frozenset()  # who the engine says made them: often the engine
    unnameable: int = 0  # left out: too many, or names that an announcement can't hold


def parse_openai_models(body: bytes) -> Catalogue:
    """Return what ``GET /v1/models`` lists.

    Loaded are those whose status says so, as llama.cpp's router tells it.

    Raises:
        ProbeFailed: it is no such list.
    """
    rows = _rows(body, "data", "/v1/models")
    named = [(row.get("id"), row) for row in rows]
    warm = [name for name, row in named if _status_of(row) == "loaded"]
    owners = frozenset(str(row.get("owned_by"))[:64] for row in rows[:MAX_MODELS])
    catalogue = _catalogue(name for name, _ in named)
    return Catalogue(
        models=catalogue.models,
        loaded=tuple(name for name in catalogue.models if name in warm),
        owners=owners,
        unnameable=catalogue.unnameable,
    )


def has_status(body: bytes) -> bool:
    """Say whether ``GET /v1/models`` tells of each model whether it is loaded."""
    return any(_status_of(row) is not None for row in _rows(body, "data", "/v1/models"))


def parse_ollama_models(body: bytes, path: str) -> Catalogue:
    """Return what Ollama's ``/api/tags`` (all) or ``/api/ps`` (loaded) lists.

    Raises:
        ProbeFailed: it is no such list.
    """
    rows = _rows(body, "models", path)
    return _catalogue(row.get("name", row.get("model")) for row in rows)


def parse_slots(body: bytes) -> int:
    """Return how many of llama.cpp's ``/slots`` are at work.

    Raises:
        ProbeFailed: it is no list of slots.
    """
    slots = _json(body, "/slots")
    if not isinstance(slots, list):
        raise ProbeFailed("/slots is no list", is_certain=False)
    return sum(isinstance(slot, dict) and slot.get("is_processing") is True for slot in slots)


def parse_gauges(body: bytes, names: Iterable[str]) -> int | None:
    """Return the sum of these gauges in Prometheus' text, of all labels; None if there is none."""
    wanted = frozenset(names)
    total: float | None = None
    for line in body.decode("utf-8", "replace").splitlines():
        name, value = _sample(line)
        if name in wanted and value is not None:
            total = (total or 0.0) + value
    return None if total is None else min(round(total), _MAX_LOAD)


def _sample(line: str) -> tuple[str, float | None]:
    head, brace, rest = line.partition("{")
    name, _, after = head.partition(" ")
    words = (rest.rpartition("}")[2] if brace else after).split()
    try:
        value = float(words[0]) if words else math.nan
    except ValueError:
        return name, None
    return name, value if math.isfinite(value) and value >= 0 else None


def _rows(body: bytes, key: str, path: str) -> list[dict[str, object]]:
    answer = _json(body, path)
    rows = answer.get(key) if isinstance(answer, dict) else None
    # Ollama without a model, and Go's encoders in general, write null for an empty list.
    if rows is None and isinstance(answer, dict) and key in answer:
        return []
    if not isinstance(rows, list):
        raise ProbeFailed(f"{path} names no list of models", is_certain=False)
    return [row for row in rows if isinstance(row, dict)]


def _json(body: bytes, path: str) -> object:
    try:
        value: object = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise ProbeFailed(f"{path} is no JSON", is_certain=False) from exc
    return value


def _status_of(row: dict[str, object]) -> object:
    status = row.get("status")
    return status.get("value") if isinstance(status, dict) else None


def _catalogue(names: Iterable[object]) -> Catalogue:
    seen = dict.fromkeys(name for name in names if isinstance(name, str))
    good = [name for name in seen if is_sendable(name, MAX_MODEL_NAME)]
    return Catalogue(models=tuple(good[:MAX_MODELS]), unnameable=len(seen) - len(good[:MAX_MODELS]))
