"""Which services have which models, kept up to date from the ledger, peer by peer.

Models go by key here: what Ollama's users take for one name is one key ("llama3",
"llama3:latest", "Llama3"). A request's own spelling is what the engine gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from meshnode.core.ledger import Ledger, LedgerEntry
from meshnode.core.node_data import ServiceData

Place = tuple[str, str]  # peer ID, service ID

# What one search for near names looks at: it costs some 20 µs a name.
_MAX_COMPARED = 200
_MAX_NEAR = 3
_DEFAULT_PREFIXES = ("registry.ollama.ai/", "library/")
_DEFAULT_TAG = ":latest"


@lru_cache(maxsize=1024)  # what clients name has 256 characters at most, what peers do 128
def model_key(model: str) -> str:
    """Return what all spellings of one model share, as Ollama reads its names."""
    key = model.strip().lower()
    for prefix in _DEFAULT_PREFIXES:
        key = key.removeprefix(prefix)
    return key.removesuffix(_DEFAULT_TAG) or key


@dataclass(frozen=True, slots=True)
class Offer:
    """One service of one online peer, and the keys of its models."""

    place: Place
    models: frozenset[str]  # empty: its engine does not tell
    loaded: frozenset[str]


class ModelIndex:
    """The offers of all online peers, by peer and by model.

    Tell it by ``note`` of each peer that changed; it looks at them at the next question.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._dirty: set[str] = {entry.peer_id for entry in ledger.entries()}
        self._services: dict[str, tuple[ServiceData, ...]] = {}
        self._offers: dict[str, tuple[Offer, ...]] = {}
        self._by_model: dict[str, dict[Place, Offer]] = {}
        self._silent: dict[Place, Offer] = {}  # those whose engines don't tell their models
        self._names: dict[str, str] = {}  # a spelling of each model

    def note(self, peer_id: str) -> None:
        """Look at the peer again at the next question."""
        self._dirty.add(peer_id)
        # A node that routes nothing never asks: then its ledger's size is the bound.
        if len(self._dirty) > 2 * len(self._ledger) + 256:
            self._refresh()

    def offers(self, peer_id: str) -> tuple[Offer, ...]:
        """Return what the peer offers; nothing if it is offline."""
        self._refresh()
        return self._offers.get(peer_id, ())

    def having(self, key: str) -> Mapping[Place, Offer]:
        """Return the offers that name the model."""
        self._refresh()
        return self._by_model.get(key, {})

    @property
    def silent(self) -> Mapping[Place, Offer]:
        """The offers that name no models at all, so that any may be there."""
        self._refresh()
        return self._silent

    @property
    def any_offers(self) -> bool:
        """Whether anybody online offers anything."""
        self._refresh()
        return bool(self._offers)

    @property
    def any_named(self) -> bool:
        """Whether anybody online tells its models."""
        self._refresh()
        return bool(self._by_model)

    def all_offers(self) -> Iterator[Offer]:
        """Yield every offer."""
        self._refresh()
        for offers in self._offers.values():
            yield from offers

    def near(self, model: str) -> tuple[str, ...]:
        """Return names like ``model``, the likest first; at most three."""
        self._refresh()
        key = model_key(model)[:128]
        # Those of the same family first, as a mesh may name thousands.
        family = key[:3]
        ranked = sorted(self._names, key=lambda other: (family not in other, other))
        close = get_close_matches(key, ranked[:_MAX_COMPARED], n=_MAX_NEAR, cutoff=0.5)
        return tuple(self._names[other] for other in close)

    def _refresh(self) -> None:
        while self._dirty:
            peer_id = self._dirty.pop()
            entry = self._ledger.get(peer_id)
            online = entry is not None and entry.state in ("up", "draining")
            self._follow(peer_id, entry if online else None)

    def _follow(self, peer_id: str, entry: LedgerEntry | None) -> None:
        services = () if entry is None else entry.node.services
        # Nearly every announcement says the same of its models; only the load differs.
        if _same_models(services, self._services.get(peer_id, ())):
            return
        for offer in self._offers.pop(peer_id, ()):
            self._unlist(offer)
        self._services.pop(peer_id, None)
        if services:
            self._services[peer_id] = services
            self._offers[peer_id] = tuple(self._list(peer_id, services))

    def _list(self, peer_id: str, services: Iterable[ServiceData]) -> Iterator[Offer]:
        seen: set[str] = set()
        for service in services:
            if service.service_id in seen:
                continue  # of two equal names the first counts
            seen.add(service.service_id)
            models = {model_key(name): name for name in service.models}
            offer = Offer(
                place=(peer_id, service.service_id),
                models=frozenset(models),
                loaded=frozenset(map(model_key, service.loaded)),
            )
            for key, name in models.items():
                self._by_model.setdefault(key, {})[offer.place] = offer
                self._names.setdefault(key, name)
            if not models:
                self._silent[offer.place] = offer
            yield offer

    def _unlist(self, offer: Offer) -> None:
        self._silent.pop(offer.place, None)
        for key in offer.models:
            having = self._by_model[key]
            del having[offer.place]
            if not having:
                del self._by_model[key]
                del self._names[key]


def _same_models(one: tuple[ServiceData, ...], other: tuple[ServiceData, ...]) -> bool:
    return len(one) == len(other) and all(
        a.service_id == b.service_id and a.models == b.models and a.loaded == b.loaded
        for a, b in zip(one, other, strict=True)
    )
