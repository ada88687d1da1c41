"""Links let go by agreement: surplus ones that nobody uses, and never anybody's last.

The law here: this node closes a link as surplus only after its other end has agreed, and agrees
itself only while it keeps enough links for a connected graph, all its agreements counted as kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog
import trio

from meshnode.core.parting import (
    AGREED_FOR,
    MAX_BYTES,
    PROTOCOL_ID,
    TIMEOUT,
    Answer,
    PartingReply,
    PartingRequest,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from meshnode.core.wire import encode_frame
from meshnode.errors import MeshError, PeerRefused, WireError
from meshnode.metrics import Metrics
from meshnode.net.framed import FrameReader
from meshnode.net.mesh import Link, Mesh, MeshStream
from meshnode.net.rng import Rng

# A peer this node sent requests to, or served, keeps its link for so long: the next request of the
# same conversation should not wait for a handshake.
WARM_FOR = 300.0  # seconds
# Peers whose last use is remembered; who spreads requests over more has no favourites.
MAX_WARM = 64
# One at a time, so that the news of it has passed before the next.
_INTERVAL = (1.0, 3.0)  # seconds, from and to
_ASK_AGAIN = 60.0  # seconds after a peer said no
_ASK_STRANGER_AGAIN = 3600.0  # after one that does not speak the protocol

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LinkTargets:
    """How many links are enough."""

    # A random graph of six links each stays whole though a third of its nodes die.
    min_links: int = 6
    all_links_up_to: int = 30  # other nodes; above, ``min_links`` of them are enough
    # Idle links beyond these are let go: others dial too, so the usual node has about twice six.
    surplus_above: int = 16
    # From so many others on; not at once above ``all_links_up_to``, or a mesh of just that size
    # would let go what it makes.
    part_from: int = 45

    def missing(self, others: int, links: int) -> int:
        """Return how many links to make, negative if there are more than enough."""
        return (others if others <= self.all_links_up_to else self.min_links) - links


DEFAULT_TARGETS = LinkTargets()


class Parting:
    """Knows which links are used, lets surplus ones go, and answers peers that want to.

    Args:
        others: how many other nodes are online now.
        is_in_use: whether requests are open now to a peer or from it.
    """

    def __init__(
        self,
        mesh: Mesh,
        targets: LinkTargets,
        *,
        others: Callable[[], int],
        is_in_use: Callable[[str], bool],
        rng: Rng,
        metrics: Metrics,
    ) -> None:
        self._mesh = mesh
        self._targets = targets
        self._others = others
        self._is_in_use = is_in_use
        self._rng = rng
        self._metrics = metrics
        self._used_at: dict[str, float] = {}  # the latest last
        self._agreed_until: dict[str, float] = {}
        self._asking: str | None = None
        self._not_before: dict[str, float] = {}  # when to ask a linked peer again
        mesh.serve(PROTOCOL_ID, self.answer)

    def note_use(self, peer_id: str) -> None:
        """Keep the link to a peer warm: a request to it, or from it, began or ended."""
        if peer_id == self._mesh.peer_id:
            return
        self._used_at.pop(peer_id, None)
        if len(self._used_at) >= MAX_WARM:
            del self._used_at[next(iter(self._used_at))]
        self._used_at[peer_id] = trio.current_time()

    def take_agreement(self, peer_id: str) -> bool:
        """Return, once, whether a link that has just ended was let go by agreement."""
        return self._agreed_until.pop(peer_id, float("-inf")) >= trio.current_time()

    async def part_forever(self) -> None:
        """Let surplus links go, one after another, until cancelled."""
        while True:
            await trio.sleep(self._rng.uniform(*_INTERVAL))
            links = self._mesh.links()
            self._forget_all_but(links)
            if self._others() < self._targets.part_from:
                continue
            if len(links) <= self._targets.surplus_above:
                continue
            now = trio.current_time()
            spare = [k.peer_id for k in links if self._is_spare(k, now) and self._may_ask(k, now)]
            if spare:
                await self._part_with(self._rng.choice(spare), len(links))

    async def answer(self, stream: MeshStream) -> None:
        """Say whether the link to one peer may be closed."""
        peer_id = stream.peer_id
        try:
            with trio.fail_after(TIMEOUT):
                decode_request(await FrameReader(stream, MAX_BYTES).expect_frame())
                reply = PartingReply(answer=self._consider(peer_id))
                await stream.send_all(encode_frame(encode_reply(reply)))
                await stream.aclose()
        except WireError as exc:
            self._count_fault(exc)
            stream.reset()
        except (MeshError, trio.TooSlowError) as exc:
            log.debug("parting_not_answered", peer_id=peer_id, error=str(exc))
            stream.reset()

    def _consider(self, peer_id: str) -> Answer:
        """Decide, and count the link as gone in the same step."""
        now = trio.current_time()
        if self._is_used(peer_id, now):
            return "in_use"
        going = {p for p, until in self._agreed_until.items() if until >= now} | {peer_id}
        if self._asking is not None:
            going.add(self._asking)
        left = [link for link in self._mesh.links() if link.peer_id not in going]
        if self._targets.missing(self._others(), len(left)) > 0:
            return "needed"
        self._agreed_until[peer_id] = now + AGREED_FOR
        return "ok"

    async def _part_with(self, peer_id: str, links: int) -> None:
        self._asking = peer_id
        again_after = _ASK_AGAIN
        try:
            with trio.fail_after(TIMEOUT):
                answer = await self._ask(peer_id, links)
            # A request may have begun meanwhile: then the link stays after all.
            if answer == "ok" and not self._is_used(peer_id, trio.current_time()):
                self._agreed_until[peer_id] = trio.current_time() + AGREED_FOR
                await self._mesh.disconnect(peer_id, "let go by agreement: surplus and idle")
        except WireError as exc:
            self._count_fault(exc)
            again_after = _ASK_STRANGER_AGAIN
        except PeerRefused:
            again_after = _ASK_STRANGER_AGAIN
        except (MeshError, trio.TooSlowError) as exc:
            log.debug("parting_not_answered", peer_id=peer_id, error=str(exc))
        finally:
            self._asking = None
            self._not_before[peer_id] = trio.current_time() + again_after

    async def _ask(self, peer_id: str, links: int) -> Answer:
        stream = await self._mesh.open_stream(peer_id, PROTOCOL_ID, timeout=TIMEOUT)
        try:
            await stream.send_all(encode_frame(encode_request(PartingRequest(links=links))))
            reply = decode_reply(await FrameReader(stream, MAX_BYTES).expect_frame())
            await stream.aclose()
        except BaseException:
            stream.reset()
            raise
        return reply.answer

    def _is_spare(self, link: Link, now: float) -> bool:
        # A young one may have been made for a request that has not begun yet.
        return now - link.since >= WARM_FOR and not self._is_used(link.peer_id, now)

    def _is_used(self, peer_id: str, now: float) -> bool:
        used_at = self._used_at.get(peer_id, float("-inf"))
        return now - used_at < WARM_FOR or self._is_in_use(peer_id)

    def _may_ask(self, link: Link, now: float) -> bool:
        return self._not_before.get(link.peer_id, now) <= now

    def _forget_all_but(self, links: tuple[Link, ...]) -> None:
        linked, now = {link.peer_id for link in links}, trio.current_time()
        self._not_before = {p: at for p, at in self._not_before.items() if p in linked}
        self._agreed_until = {p: at for p, at in self._agreed_until.items() if at >= now}

    def _count_fault(self, fault: WireError) -> None:
        self._metrics.protocol_faults.labels(protocol="parting", code=fault.code).inc()
