"""Fitting the names of a host's models into one announcement, whatever its engines list.

The law here: a catalogue may cost a node some of its names, never its announcement. What is in
memory is named first, because that is what routing gains most from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from meshnode.core.node_data import MAX_ANNOUNCEMENT_BYTES, NodeData, ServiceData, encode
from meshnode.errors import WireError

# msgpack's headers: of a string of up to 255 bytes, and of an array beyond its empty one's byte.
_STR_HEADER = 2
_ARRAY_HEADER = 2


@dataclass(frozen=True, slots=True)
class _Name:
    service: int  # its place among the services
    name: str
    cost: int  # bytes on the wire; twice the name where it is loaded, too


def fit_models(node: NodeData, max_bytes: int = MAX_ANNOUNCEMENT_BYTES) -> tuple[NodeData, int]:
    """Return ``node`` as it can be announced, and how many of its models that leaves unnamed.

    Loaded models come first, then the others in their order, one of each service in turn, so that
    an engine with thousands of models does not crowd out its neighbours.

    Raises:
        WireError: ``too_large``: even without any model it is too large.
    """
    if _fits(node, max_bytes):
        return node, 0
    bare = [s.model_copy(update={"models": (), "loaded": ()}) for s in node.services]
    size = len(encode(node.model_copy(update={"services": tuple(bare)})))
    left = max_bytes - size - 2 * _ARRAY_HEADER * len(bare)
    kept: list[set[str]] = [set() for _ in bare]
    for name in _by_worth(node.services):
        if name.cost <= left:
            kept[name.service].add(name.name)
            left -= name.cost
    services = tuple(
        service.model_copy(
            update={
                "models": tuple(m for m in dict.fromkeys(service.models) if m in names),
                "loaded": tuple(m for m in dict.fromkeys(service.loaded) if m in names),
            }
        )
        for service, names in zip(node.services, kept, strict=True)
    )
    unnamed = sum(len(set(s.models)) for s in node.services) - sum(map(len, kept))
    return node.model_copy(update={"services": services}), unnamed


def _fits(node: NodeData, max_bytes: int) -> bool:
    try:
        return len(encode(node)) <= max_bytes
    except WireError:
        return False


def _by_worth(services: Sequence[ServiceData]) -> Iterator[_Name]:
    warm, cold = [], []
    for place, service in enumerate(services):
        loaded = set(service.loaded)
        names = dict.fromkeys(service.models)
        warm.append([_Name(place, m, 2 * _cost(m)) for m in names if m in loaded])
        cold.append([_Name(place, m, _cost(m)) for m in names if m not in loaded])
    yield from _in_turn(warm)
    yield from _in_turn(cold)


def _in_turn(rows: Iterable[Sequence[_Name]]) -> Iterator[_Name]:
    for column in zip_longest(*rows):
        yield from (name for name in column if name is not None)


def _cost(name: str) -> int:
    return len(name.encode()) + _STR_HEADER
