"""What this node says of itself to all, and what it believes of what it hears.

The law here: an announcement counts only if its signer, its sender and the node that it speaks of
are one and the same, and its Seq is new. Everything else is dropped and counted by reason; only
what a record told before is passed on, though it tells nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import structlog
import trio

from meshnode.core.budget import ChangePacer
from meshnode.core.catalogue import fit_models
from meshnode.core.ledger import Ledger, Observation
from meshnode.core.node_data import MAX_ENVELOPE_BYTES, NodeData, State, decode_signed, encode
from meshnode.core.rate import RateLimit
from meshnode.errors import WireError
from meshnode.metrics import Metrics
from meshnode.net.mesh import LinkEvent, LinkState, Mesh, Verdict
from meshnode.net.rng import Rng

ANNOUNCE_INTERVAL = 10.0  # seconds
# Without jitter, hosts booted together announce in lockstep.
_JITTER = 0.1
# A node says at most one thing a second: GossipSub mutes a faster one after its restart.
MIN_SPACING = 1.0  # seconds
# A new link's topic streams open a moment after the link itself.
_LINK_SETTLES = 0.15  # seconds
LEAVING_TIMEOUT = 1.0  # seconds
_EXPIRE_INTERVAL = 1.0  # seconds
# A timer this late means that this node stood still, as when it was stopped by a signal.
_STALL = 1.0  # seconds

# Per origin: twice the rate of an honest node, and room for what a healed link held back.
_ORIGIN_RATE = 2.0  # announcements per second
_ORIGIN_BURST = 15.0
_MAX_ORIGINS = 20_000  # twice as many as a ledger holds
_MAX_RELAYED = 10_000  # as many as a ledger holds

log = structlog.get_logger(__name__)


def announce_topic(network: str) -> str:
    """Return the topic on which the nodes of ``network`` announce themselves."""
    return f"/meshnode/{network}/announce/1.0.0"


class RemoteLoad(Protocol):
    """The router's ear for announcements."""

    def hear(self, node: NodeData) -> None: ...

    def forget(self, peer_id: str) -> None: ...


class Hearer:
    """Checks announcements, gossiped or relayed, and lets the ledger and the router observe them.

    Args:
        open_sealed: as ``Mesh.open_sealed``.
        on_own_seq: told the Seq of this node's own announcements that others still relay, so that
            a node whose clock was set back can speak above it.
    """

    def __init__(
        self,
        ledger: Ledger,
        router: RemoteLoad,
        *,
        open_sealed: Callable[[bytes], tuple[str, bytes]],
        metrics: Metrics,
        on_own_seq: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.on_own_seq = on_own_seq
        # Told the time of each announcement that is news, to reckon how many there are.
        self.on_heard: Callable[[float], None] = lambda _: None
        # peer ID -> why nothing that this peer says is heard; None if it is
        self.objection: Callable[[str], str | None] = lambda _: None
        self._ledger = ledger
        self._router = router
        self._open_sealed = open_sealed
        self._metrics = metrics
        # peer ID -> the Seq that a record brought, and gossip has not yet
        self._relayed: dict[str, int] = {}
        self._rates = RateLimit(per_s=_ORIGIN_RATE, burst=_ORIGIN_BURST, max_keys=_MAX_ORIGINS)

    def hear(self, sender: str, envelope: bytes) -> Verdict:
        """Judge one gossiped message; ``sender`` is its proven origin, not who forwarded it."""
        now = trio.current_time()
        try:
            node = self._open(envelope, sender)
        except WireError as exc:
            self._reject(exc.code, sender)
            return Verdict.REJECT
        if not self._rates.allows(sender, now):
            self._reject("rate_limited", sender)
            return Verdict.IGNORE
        observation = self._observe(node, envelope, now, age=0.0)
        if observation is Observation.STALE:
            if self._relayed.get(sender) == node.seq:
                del self._relayed[sender]
                # While many join at once, records outrun gossip at half of the nodes. Peers behind
                # them, which have no record, would miss it.
                return Verdict.ACCEPT
            self._reject("stale", sender)
            return Verdict.IGNORE
        if observation is Observation.FULL:
            self._reject("ledger_full", sender)
            return Verdict.IGNORE
        self._metrics.announcements.labels(direction="received").inc()
        self.on_heard(now)
        return Verdict.ACCEPT

    def take_record(self, envelope: bytes, age: float) -> Observation:
        """Take in a record that a peer relays, ``age`` seconds after it had proof of life.

        Raises:
            WireError: it is no announcement signed by the node that it speaks of.
        """
        node = self._open(envelope, sender=None)
        if node.id == self._ledger.self_id:
            self.on_own_seq(node.seq)
            return Observation.STALE
        observation = self._observe(node, envelope, trio.current_time(), age)
        if observation not in (Observation.STALE, Observation.FULL):
            self._relayed.pop(node.id, None)
            if len(self._relayed) >= _MAX_RELAYED:
                self._relayed.pop(next(iter(self._relayed)))
            self._relayed[node.id] = node.seq
        return observation

    def record_own(self, node: NodeData, envelope: bytes) -> None:
        """Observe this node itself, so that it is a candidate and its record can be relayed."""
        self._ledger.observe(node, envelope=envelope, now=trio.current_time())
        self._router.hear(node)

    async def expire_forever(self) -> None:
        """Notice silence: once a second, take those out whose window has passed.

        What this node slept through itself is nobody's silence.
        """
        while True:
            due = trio.current_time() + _EXPIRE_INTERVAL
            await trio.sleep_until(due)
            late = trio.current_time() - due
            if late > _STALL:
                self._ledger.forgive(late, trio.current_time())
            for peer_id in self._ledger.expire(trio.current_time()):
                self._router.forget(peer_id)
                self._metrics.ejections.labels(reason="silent").inc()
                log.info("peer_offline", peer_id=peer_id, reason="silent")

    def _open(self, envelope: bytes, sender: str | None) -> NodeData:
        if len(envelope) > MAX_ENVELOPE_BYTES:
            raise WireError(
                "too_large", f"{len(envelope)} bytes are more than {MAX_ENVELOPE_BYTES} allowed"
            )
        signer, payload = self._open_sealed(envelope)
        if sender is not None and signer != sender:
            raise WireError("wrong_signer", f"sent by {sender}, but signed by {signer}")
        kept_out = self.objection(signer)
        if kept_out is not None:
            raise WireError("blocked", kept_out)
        return decode_signed(signer, payload)

    def _observe(self, node: NodeData, envelope: bytes, now: float, age: float) -> Observation:
        observation = self._ledger.observe(node, envelope=envelope, now=now, age=age)
        match observation:
            case Observation.NEW:
                log.info("peer_joined", peer_id=node.id, name=node.name)
            case Observation.RETURNED:
                log.info("peer_returned", peer_id=node.id, name=node.name)
            case Observation.LEFT:
                self._router.forget(node.id)
                self._metrics.ejections.labels(reason="leaving").inc()
                log.info("peer_left", peer_id=node.id, name=node.name)
        if observation in (Observation.NEW, Observation.NEWER, Observation.RETURNED):
            self._router.hear(node)
        return observation

    def _reject(self, reason: str, sender: str) -> None:
        self._metrics.announcements_rejected.labels(reason=reason).inc()
        log.debug("announcement_rejected", peer_id=sender, error=reason)


class Announcer:
    """Says what this node is: on a beat, soon after a change or a new link, and when it leaves.

    Args:
        compose: (Seq, State) -> what to say of this node now.
        record_own: told each announcement with its envelope, before it is sent.
        interval: seconds between announcements when nothing changes, asked before each.
        start_seq: the first Seq; Unix milliseconds at boot, so that it rises across restarts.
        pacer: when changes of load may be told, and how many nodes there are; None: at once.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        topic: str,
        compose: Callable[[int, State], NodeData],
        record_own: Callable[[NodeData, bytes], None],
        rng: Rng,
        metrics: Metrics,
        start_seq: int,
        interval: Callable[[], float] = lambda: ANNOUNCE_INTERVAL,
        pacer: tuple[ChangePacer, Callable[[], int]] | None = None,
    ) -> None:
        self._pacer, self._nodes = pacer or (ChangePacer(rng), lambda: 1)
        self._mesh = mesh
        self._topic = topic
        self._compose = compose
        self._record_own = record_own
        self._rng = rng
        self._metrics = metrics
        self._next_seq = start_seq
        self._interval = interval
        self._state: State = "up"
        self._due = float("-inf")
        self._load_due = float("inf")  # when a change of load may be told
        self._said: NodeData | None = None
        self._due_moved = trio.Event()
        self._last_sent = float("-inf")
        self._unnamed = 0  # models that the last announcement had no room for
        mesh.watch_links(self._on_link)

    @property
    def state(self) -> State:
        return self._state

    def changed(self) -> None:
        """Announce what changed: load and memory when it is this node's turn, the rest at once.

        In a mesh of up to 25 nodes it is always this node's turn.
        """
        now, nodes = trio.current_time(), self._nodes()
        if self._is_always_its_turn() or self._can_be_used_otherwise():
            self.say_now()
        elif self._load_due > now:
            self._load_due = min(self._load_due, self._pacer.first_try(nodes, now))
            self._due_moved.set()

    def say_now(self) -> None:
        """Announce now, or as soon as the last announcement is ``MIN_SPACING`` old."""
        self._be_due_at(trio.current_time())

    def drain(self) -> None:
        """Tell all that this node takes no new work, from now on."""
        self._state = "draining"
        # This can't wait for the spacing: until they know, others send what is then refused.
        self._last_sent = float("-inf")
        self._due = trio.current_time()
        self._due_moved.set()

    def rise_above(self, seq: int) -> None:
        """Speak above ``seq``: others already heard it from this identity."""
        if seq >= self._next_seq:
            self._next_seq = seq + 1
            self.say_now()

    async def announce_forever(self) -> None:
        """Announce until cancelled, or until ``say_leaving``."""
        while self._state != "leaving":
            jitter = self._rng.uniform(1 - _JITTER, 1 + _JITTER)
            self._due = trio.current_time() + self._interval() * jitter
            await self._announce()  # what changes while this waits moves the due time again
            await self._wait_until_due()

    async def say_leaving(self) -> None:
        """Say goodbye, so that the others send nothing more here; takes a second at most."""
        self._state = "leaving"
        self._be_due_at(trio.current_time())
        with trio.move_on_after(LEAVING_TIMEOUT, shield=True):
            await self._announce()

    async def _wait_until_due(self) -> None:
        while self._state != "leaving":
            now = trio.current_time()
            if self._load_due <= now < self._due:
                self._load_due = self._pacer.try_again(self._nodes(), now)
            due = max(min(self._due, self._load_due), self._last_sent + MIN_SPACING)
            if due <= now:
                return
            self._due_moved = trio.Event()
            with trio.move_on_at(due):
                await self._due_moved.wait()

    async def _announce(self) -> None:
        node, unnamed = fit_models(self._compose(self._next_seq, self._state))
        self._said, self._load_due = node, float("inf")
        self._pacer.said(self._nodes(), trio.current_time())
        self._next_seq += 1
        self._tell_unnamed(unnamed)
        envelope = self._mesh.seal(encode(node))
        self._record_own(node, envelope)
        if self._mesh.links():
            # With nobody there, the first link's news must not wait for the spacing.
            self._last_sent = trio.current_time()
        await self._mesh.publish(self._topic, envelope)
        self._metrics.announcements.labels(direction="sent").inc()

    def _tell_unnamed(self, unnamed: int) -> None:
        if unnamed > self._unnamed:
            log.warning(
                "models_not_announced",
                models=unnamed,
                error="an announcement has no room for them, so nobody is routed here for them; "
                "expose fewer models, or split them over several hosts",
            )
        self._unnamed = unnamed

    def _is_always_its_turn(self) -> bool:
        return self._pacer.share(self._nodes()) <= MIN_SPACING

    def _can_be_used_otherwise(self) -> bool:
        """Whether more than the load and free memory differs from what was said last."""
        if self._said is None:
            return True
        now = fit_models(self._compose(self._said.seq, self._state))[0]
        return _but_for_load(now) != _but_for_load(self._said)

    def _on_link(self, event: LinkEvent) -> None:
        # The first is this node's way into the mesh. Each further one is worth telling only where
        # there are few to hear it: of a hundred that join at once, each would hear thousands.
        is_first = len(self._mesh.links()) <= 1
        if event.state is LinkState.UP and (is_first or self._is_always_its_turn()):
            self._be_due_at(trio.current_time() + _LINK_SETTLES)

    def _be_due_at(self, due: float) -> None:
        if due < self._due:
            self._due = due
            self._due_moved.set()


def _but_for_load(node: NodeData) -> NodeData:
    """Return what an announcement says besides how busy its node is just now."""
    services = tuple(service.model_copy(update={"in_flight": 0}) for service in node.services)
    beside = {"available_vram": 0, "last_seen": 0, "online_window": 0, "services": services}
    return node.model_copy(update=beside)
