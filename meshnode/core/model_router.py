"""Which peer serves a request that names a model: who has it, who is free, and who is warm.

Builds on ``Router``, which counts the load and keeps the decisions. The order among those that
have the model:

1. the one whose cache is warm for the prompt or the session, if its load is within the guard
   (``prefix_select``);
2. with a prompt: among those within the guard, who has the model loaded, then who has the least
   cached so far, then the policy's order;
3. without one: fewest in flight, then who has the model loaded, then the rest of the policy.

A service whose engine does not tell its models may have any; it is asked only for models that
nobody names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import islice
from typing import Literal, NamedTuple

from meshnode.core.decision import MAX_ROWS, CandidateRow, Decision, Tier
from meshnode.core.lease import Lease
from meshnode.core.ledger import Ledger
from meshnode.core.model_index import ModelIndex, Offer, Place, model_key
from meshnode.core.model_ranking import Candidate, ModelRanking, candidate, deciding_tier
from meshnode.core.model_shortage import why_nobody, why_unknown
from meshnode.core.peer_view import Group, Standing
from meshnode.core.prefix_cache import PrefixIndex, Weight
from meshnode.core.prefix_chain import session_chain, short_chain
from meshnode.core.prefix_select import MIN_PREFIX_MATCH, Pressure, load_limit
from meshnode.core.router import Dice, Router
from meshnode.errors import NoCandidate

Affinity = Literal["off", "prefix", "session"]

# Models in use at a time; the longest unused ranking is built anew when it is asked for again.
_MAX_RANKINGS = 256

Chain = tuple[int, ...]


class ModelRequest(NamedTuple):
    """What is asked of one decision."""

    now: float  # seconds on this node's monotonic clock
    model: str | None  # as the client wrote it; None: any engine will do
    prompt: str = ""  # canonical
    session: str | None = None  # what the client calls its session
    service_id: str | None = None  # nobody's other services will do
    target: str | None = None  # a peer ID, or a name that only one peer has
    exclude: Collection[str] = ()  # peer IDs that this request tried already
    attempt: int = 1
    is_retry: bool = False  # a peer failed this request already; one that was only busy did not
    wall_time: float | None = None  # Unix seconds, for display


@dataclass(frozen=True, slots=True)
class Observed:
    """One request that this node routed, as other entry nodes are told of it."""

    model: str  # its key
    blocks: Chain  # those that are new or changed hands
    place: Place


@dataclass(frozen=True, slots=True)
class _Pick:
    chosen: Candidate | None  # None: dice would be cast
    tier: Tier
    forced_off: Candidate | None = None


class ModelRouter:
    """Picks a peer for each request by its model, its prompt and the load.

    Args:
        router: counts the requests and keeps the decisions.
        affinity: what makes a peer warm: the prompt's beginning, the client's session, or nothing.
        seed: uint64 of the network's own, for the hashes of prompts.
        on_observed: told of each request whose cache others don't know of yet.
        rng: dice for the "random" policy.
    """

    def __init__(
        self,
        router: Router,
        ledger: Ledger,
        *,
        rng: Dice,
        affinity: Affinity = "prefix",
        seed: int = 0,
        on_observed: Callable[[Observed], None] = lambda _: None,
    ) -> None:
        self.affinity: Affinity = affinity
        self.index = ModelIndex(ledger)
        self.on_observed = on_observed
        self.pressure = Pressure()
        self._router = router
        self._ledger = ledger
        self._rng = rng
        self._seed = seed
        self._prefixes: PrefixIndex[Place] = PrefixIndex()
        self._rankings: OrderedDict[tuple[str | None, str | None], ModelRanking] = OrderedDict()
        # Peers in the order of their last change, with its number; rankings take in what is newer.
        self._changed: OrderedDict[str, int] = OrderedDict()
        self._serial = 0
        self._due: list[tuple[float, str]] = []  # a heap: when time alone changes a peer
        self._in_due: set[tuple[float, str]] = set()  # so that each stands in it once
        self._looked_at = 0  # the serial up to which a ranking took changes in
        router.watch(self._note, on_load=self._note_load)

    # Requests

    def lease(self, request: ModelRequest) -> Lease:
        """Pick the peer that serves this request, and count the request on it.

        Raises:
            UnknownModel: nobody has the model.
            AllFull: those who have it have as many requests as they take just now.
            RetriesSpent: it is a retry, and too many requests are retried already.
            NoCandidate: nobody who has it can serve it.
        """
        key, chain = self._read(request)
        decision = self._decide(request, key, chain, self._rng)
        assert decision.picked is not None  # dice were at hand
        lease = self._router.claim(decision)
        if decision.forced_off is not None:
            self.pressure.count(key, request.now)
        if chain:
            place = (decision.picked, decision.service_id)
            fresh = self._prefixes.observe(key, chain, place, request.now)
            if fresh:
                self.on_observed(Observed(key, fresh, place))
        return lease

    def explain(self, request: ModelRequest) -> Decision:
        """Return what ``lease`` would decide now; nothing is counted and no dice are cast.

        Raises:
            NoCandidate: as ``lease``.
        """
        return self._decide(request, *self._read(request), None)

    # News

    def take_observed(self, observed: Observed, now: float) -> bool:
        """Take in what another entry node routed, if the service named may have the model."""
        place = observed.place
        having = self.index.having(observed.model) or self.index.silent
        # A word about a peer that has left meanwhile would outlive it.
        if place not in having or not self._is_online(place[0], now):
            return False
        self._prefixes.observe(observed.model, observed.blocks, place, now)
        return True

    @property
    def blocks_known(self) -> int:
        """How many blocks of prompts are remembered."""
        return len(self._prefixes)

    def _note(self, peer_id: str) -> None:
        self.index.note(peer_id)
        entry = self._ledger.get(peer_id)
        if entry is None or entry.state in ("left", "offline"):
            self._prefixes.invalidate_node(peer_id)
        self._note_load(peer_id)

    def _note_load(self, peer_id: str) -> None:
        if self._changed.get(peer_id, 0) > self._looked_at:
            return  # no ranking took it in since: it stands in line already
        self._serial += 1
        self._changed[peer_id] = self._serial
        self._changed.move_to_end(peer_id)
        # Twice as many as a ledger holds: mostly of peers that are long gone.
        if len(self._changed) > 2 * len(self._ledger) + 256:
            self._rankings.clear()
            self._changed.clear()

    def _be_due(self, standing: Standing) -> None:
        """Look at the peer again when time alone changes it, as when an ejection ends."""
        if standing.until is not None:
            due = (standing.until, standing.peer_id)
            if due not in self._in_due:
                self._in_due.add(due)
                heappush(self._due, due)

    def _note_due(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            due = heappop(self._due)
            self._in_due.discard(due)
            self._note_load(due[1])

    # Deciding

    def _read(self, request: ModelRequest) -> tuple[str, Chain]:
        """Return the model's key, and by which blocks a warm cache is known."""
        key = "" if request.model is None else model_key(request.model)
        if self.affinity == "prefix" and request.prompt:
            return key, short_chain(key, request.prompt, seed=self._seed)
        if self.affinity == "session" and request.session:
            return key, session_chain(key, request.session, seed=self._seed)
        return key, ()

    def _decide(self, request: ModelRequest, key: str, chain: Chain, dice: Dice | None) -> Decision:
        ranking = self._ranking(request, key)
        may = partial(self._may, request)
        able = ranking.able(may if request.exclude or request.target is not None else None)
        depths = self._prefixes.matches(key, chain, request.now)
        while True:
            if not able:
                raise self._why_nobody(request, ranking, may)
            pick = self._pick(able, ranking, key, chain, depths, request.now, dice)
            if pick.chosen is None or self._is_online(pick.chosen.peer_id, request.now):
                return self._decision(request, ranking, able, pick, chain, depths)
            # Silent past its window since the ledger last looked, a second ago at the most.
            able = [c for c in able if self._is_online(c.peer_id, request.now)]

    def _why_nobody(
        self, request: ModelRequest, ranking: ModelRanking, may: Callable[[Candidate], bool]
    ) -> NoCandidate:
        others = [r for r in ranking.excluded(may, (), request.now) if _aimed(r, request)]
        may_wait = any(
            each.standing.group is Group.FULL and may(each) for each in ranking.held_back.values()
        )
        return why_nobody(request.model, request.target, others, len(ranking), may_wait=may_wait)

    def _pick(
        self,
        able: Sequence[Candidate],
        ranking: ModelRanking,
        key: str,
        chain: Chain,
        depths: Mapping[Place, int],
        now: float,
        dice: Dice | None,
    ) -> _Pick:
        forced_off: Candidate | None = None
        if chain:
            limit = load_limit(able[0].in_flight)
            hot = _hot(able, ranking, depths, len(chain))
            if hot is not None and hot.in_flight <= limit:
                return _Pick(hot, "session" if self.affinity == "session" else "prefix")
            forced_off = hot
        if self._router.policy == "random" and len(able) > 1:
            chosen = None if dice is None else able[dice.randrange(len(able))]
            return _Pick(chosen, "random", forced_off)
        first = able[0]
        if chain:
            chosen = _coldest(able, limit, self._prefixes.weights(key, now))
            if chosen is not first:
                tier: Tier = "least_cached" if chosen.loaded == first.loaded else "loaded"
                return _Pick(chosen, tier, forced_off)
        return _Pick(first, deciding_tier(first, able[1] if len(able) > 1 else None), forced_off)

    def _decision(
        self,
        request: ModelRequest,
        ranking: ModelRanking,
        able: Sequence[Candidate],
        pick: _Pick,
        chain: Chain,
        depths: Mapping[Place, int],
    ) -> Decision:
        chosen = pick.chosen

        best = list(islice(able, MAX_ROWS))
        if chosen is not None and chosen not in best:
            best[-1] = chosen
        rows = [each.row for each in best]
        if depths:
            for at, each in enumerate(best):
                if each.place in depths:
                    rows[at] = each.row._replace(match_ratio=depths[each.place] / len(chain))
        if len(rows) < min(MAX_ROWS, len(ranking)):
            others = ranking.excluded(partial(self._may, request), able, request.now)
            rows += islice(others, MAX_ROWS - len(rows))
        ratio = depths.get(chosen.place, 0) / len(chain) if chain and chosen else None
        return Decision(
            at=request.now,
            wall_time=request.wall_time,
            service_id=chosen.service_id if chosen else request.service_id or "",
            policy=self._router.policy,
            target=request.target,
            attempt=request.attempt,
            candidates=tuple(rows),
            candidates_total=len(ranking),
            picked=chosen.peer_id if chosen else None,
            tier=pick.tier if request.target is None else "target",
            model=request.model,
            match_ratio=ratio,
            forced_off=pick.forced_off.peer_id if pick.forced_off else None,
            is_retry=request.is_retry,
        )

    def _may(self, request: ModelRequest, each: Candidate) -> bool:
        if each.peer_id in request.exclude:
            return False
        target = request.target
        # A peer ID goes before a name, so that no peer can pass for another by its name.
        return (
            target is None
            or each.peer_id == target
            or (each.row.name == target and self._ledger.get(target) is None)
        )

    def _is_online(self, peer_id: str, now: float) -> bool:
        entry = self._ledger.get(peer_id)
        return entry is not None and now < entry.online_until

    # Who has it

    def _ranking(self, request: ModelRequest, key: str) -> ModelRanking:
        """Return who may serve the request, in order.

        Raises:
            NoCandidate: nobody does.
        """
        kind = self._kind(request.model, key, request.service_id)
        at = (kind, request.service_id)
        ranking = self._rankings.get(at)
        if ranking is None:
            ranking = self._rankings[at] = ModelRanking()
            if len(self._rankings) > _MAX_RANKINGS:
                self._rankings.popitem(last=False)
            for peer_id in {offer.place[0] for offer in self._offers(kind, request.service_id)}:
                self._place(ranking, peer_id, kind, request.service_id, request.now)
        else:
            self._rankings.move_to_end(at)
            self._note_due(request.now)
            for peer_id, serial in reversed(self._changed.items()):
                if serial <= ranking.serial:
                    break
                self._place(ranking, peer_id, kind, request.service_id, request.now)
        ranking.serial = self._looked_at = self._serial
        # Those who have it may all be silent since the ledger last looked.
        if not ranking and not any(True for _ in self._offers(kind, request.service_id)):
            raise why_unknown(self.index, request.model, request.service_id)
        return ranking

    def _kind(self, model: str | None, key: str, service_id: str | None) -> str | None:
        """Return which offers count: a model's key, _SILENT, _TELLING, or _EVERY."""

        def some(places: Collection[Place]) -> bool:
            return service_id is None or any(place[1] == service_id for place in places)

        if model is not None:
            having = self.index.having(key)
            return key if having and some(having) else _SILENT
        if service_id is not None:
            return _EVERY
        return _TELLING if self.index.any_named else _EVERY

    def _offers(self, kind: str | None, service_id: str | None) -> Iterator[Offer]:
        offers: Collection[Offer] | Iterator[Offer]
        if kind == _SILENT:
            offers = self.index.silent.values()
        elif kind in (_EVERY, _TELLING):
            offers = self.index.all_offers()
        else:
            offers = self.index.having(kind or "").values()
        return (offer for offer in offers if _counts(offer, kind, service_id))

    def _place(
        self, ranking: ModelRanking, peer_id: str, kind: str | None, service: str | None, now: float
    ) -> None:
        candidates = []
        for offer in self.index.offers(peer_id):
            if not _counts(offer, kind, service):
                continue
            standing = self._router.standing(peer_id, offer.place[1], now)
            if standing is not None:
                self._be_due(standing)
                candidates.append(candidate(standing, offer.place[1], kind in offer.loaded))
        ranking.put(peer_id, candidates)


# Kinds of rankings besides the models' keys, which are never empty and hold no control characters.
_SILENT = "\x00silent"  # services that don't tell their models
_TELLING = "\x00telling"  # services that do
_EVERY = "\x00every"


def _counts(offer: Offer, kind: str | None, service_id: str | None) -> bool:
    if service_id is not None and offer.place[1] != service_id:
        return False
    if kind == _EVERY:
        return True
    if kind == _SILENT:
        return not offer.models
    return bool(offer.models) if kind == _TELLING else kind in offer.models


def _aimed(row: CandidateRow, request: ModelRequest) -> bool:
    return request.target is None or request.target in (row.peer_id, row.name)


def _hot(
    able: Sequence[Candidate], ranking: ModelRanking, depths: Mapping[Place, int], length: int
) -> Candidate | None:
    """Return the candidate with the deepest match, if that is deep enough to matter."""
    best: Candidate | None = None
    for place, depth in depths.items():  # the deepest first
        if depth / length < MIN_PREFIX_MATCH:
            return None
        best = ranking.find(place, able)
        if best is not None:
            break
    # Without the model in memory there is no cache any more.
    if best is not None and not best.loaded and any(each.loaded for each in able):
        return None
    return best


def _coldest(able: Sequence[Candidate], limit: int, cached: Mapping[Place, Weight]) -> Candidate:
    """Return, among those within the guard, who has the model loaded and the least cached."""
    best: Candidate | None = None
    least = 0.0
    for each in able:
        if each.in_flight > limit:
            break
        weight = cached.get(each.place)
        total = 0.0 if weight is None else weight.total
        if (
            best is None
            or each.loaded > best.loaded
            or (each.loaded == best.loaded and total < least)
        ):
            best, least = each, total
            # Nobody behind it is better: the order is the policy's.
            if each.loaded and total == 0.0:
                break
    assert best is not None  # the first is within the guard
    return best
