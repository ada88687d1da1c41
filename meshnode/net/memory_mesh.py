"""The mesh interface in one process: links that can be cut, severed and slowed, on trio's clock.

Under trio's mock clock a swarm of these runs faster than time. A cut link is silent: what was
sent waits, nothing is raised, until it is healed. A severed one dies at both ends at once.
"""

from __future__ import annotations

import hashlib
import heapq
import hmac
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import structlog
import trio

from meshnode.errors import (
    ConfigError,
    PeerRefused,
    PeerUnreachable,
    StreamReset,
    TokenRefused,
    WireError,
)
from meshnode.net.memory_link import Action, LinkEnd, MemoryStream
from meshnode.net.mesh import (
    Link,
    LinkEvent,
    LinkState,
    LinkWatcher,
    MeshStream,
    MessageListener,
    StreamHandler,
    Verdict,
)
from meshnode.net.rng import Rng

# Messages remembered so as not to deliver or forward them twice; each lives for milliseconds.
SEEN_MESSAGES = 20_000
_PORT = 4201
_SIGNATURE_BYTES = 32
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

log = structlog.get_logger(__name__)


class MemoryNetwork:
    """All nodes of one process, and the weather between them."""

    def __init__(self, rng: Rng) -> None:
        self._rng = rng
        self._secret = rng.getrandbits(256).to_bytes(32, "big")
        self._nodes: dict[str, MemoryMesh] = {}
        self._at_addr: dict[str, MemoryMesh] = {}
        self._hosts: dict[str, int] = {}
        self._cut: set[frozenset[str]] = set()
        self._delays: dict[frozenset[str], float] = {}
        self.loss = 0.0  # of the announcements over each link, this share goes astray
        self._weather_changed = trio.Event()
        self._posted = 0

    def node(self, name: str, *, keys: Sequence[bytes] = (b"a key",)) -> MemoryMesh:
        """Return a node that isn't running yet; the same name again is the same identity."""
        peer_id = self.peer_id_of(name)
        host = self._hosts.setdefault(peer_id, len(self._hosts) + 1)
        host_ip = f"10.{host >> 16}.{(host >> 8) & 255}.{host & 255}"
        mesh = MemoryMesh(self, peer_id, f"/ip4/{host_ip}/tcp/{_PORT}", tuple(keys))
        self._nodes[peer_id] = self._at_addr[mesh.transport_addr] = mesh
        return mesh

    def peer_id_of(self, name: str) -> str:
        """Return the peer ID that ``node(name)`` has."""
        number = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
        digits = []
        for _ in range(44):
            number, digit = divmod(number, 58)
            digits.append(_BASE58[digit])
        return "12D3KooW" + "".join(digits)

    def cut(self, a: MemoryMesh, b: MemoryMesh) -> None:
        """Let nothing through between ``a`` and ``b``, silently, until healed."""
        self._cut.add(frozenset((a.peer_id, b.peer_id)))

    def heal(self, a: MemoryMesh, b: MemoryMesh) -> None:
        """Let everything through again, what was held back first."""
        self._cut.discard(frozenset((a.peer_id, b.peer_id)))
        self._release_held()

    def heal_all(self) -> None:
        self._cut.clear()
        self._release_held()

    def isolate(self, node: MemoryMesh) -> None:
        """Cut ``node`` off from everybody, as a stopped process or a pulled cable does."""
        for other in self._nodes.values():
            if other is not node:
                self.cut(node, other)

    def partition(self, groups: Sequence[Collection[MemoryMesh]]) -> None:
        """Cut every link between nodes of different groups."""
        for number, group in enumerate(groups):
            for others in groups[number + 1 :]:
                for a in group:
                    for b in others:
                        self.cut(a, b)

    def sever(self, a: MemoryMesh, b: MemoryMesh) -> None:
        """Kill the connection between ``a`` and ``b`` at both ends; they may dial again."""
        for end in (a.link_end(b.peer_id), b.link_end(a.peer_id)):
            if end is not None:
                end.die("connection lost")

    def delay(self, a: MemoryMesh, b: MemoryMesh, seconds: float) -> None:
        """Let everything between ``a`` and ``b`` take ``seconds`` each way."""
        self._delays[frozenset((a.peer_id, b.peer_id))] = seconds

    # What nodes ask of their network.

    def at_addr(self, transport_addr: str) -> MemoryMesh | None:
        mesh = self._at_addr.get(transport_addr)
        return mesh if mesh is not None and mesh.running else None

    def goes_astray(self) -> bool:
        return self.loss > 0.0 and self._rng.random() < self.loss

    def is_cut(self, a: str, b: str) -> bool:
        return frozenset((a, b)) in self._cut

    def delay_of(self, a: str, b: str) -> float:
        return self._delays.get(frozenset((a, b)), 0.0)

    def next_post(self) -> int:
        self._posted += 1
        return self._posted

    async def weather_change(self) -> None:
        await self._weather_changed.wait()

    def sign(self, peer_id: str, payload: bytes) -> bytes:
        return hmac.digest(self._secret + peer_id.encode(), payload, "sha256")

    def _release_held(self) -> None:
        for mesh in self._nodes.values():
            mesh.release_held()
        self._weather_changed.set()
        self._weather_changed = trio.Event()


class MemoryMesh:
    """One node of a MemoryNetwork: implements ``net.mesh.Mesh``."""

    def __init__(
        self, network: MemoryNetwork, peer_id: str, transport_addr: str, keys: tuple[bytes, ...]
    ) -> None:
        self.transport_addr = transport_addr
        self.running = False
        self.copies_received = 0  # announcements, each as often as it arrived
        self.bytes_received = 0  # of those
        self._network = network
        self._peer_id = peer_id
        self._keys = keys
        self._ends: dict[str, LinkEnd] = {}
        self._handlers: dict[str, StreamHandler] = {}
        self._listeners: dict[str, MessageListener] = {}
        self._watchers: list[LinkWatcher] = []
        self._inbox: list[tuple[float, int, LinkEnd, Action]] = []
        self._inbox_filled = trio.Event()
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._nursery: trio.Nursery

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def addrs(self) -> tuple[str, ...]:
        return (f"{self.transport_addr}/p2p/{self._peer_id}",) if self.running else ()

    async def run_forever(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self.running = True
                task_status.started()
                await self._receive_forever()
        finally:
            self.running = False
            for end in tuple(self._ends.values()):
                end.close("this node stopped")
            self._inbox.clear()

    def serve(self, protocol_id: str, handler: StreamHandler) -> None:
        self._handlers[protocol_id] = handler

    def subscribe(self, topic: str, listener: MessageListener) -> None:
        self._listeners[topic] = listener

    def watch_links(self, watcher: LinkWatcher) -> None:
        self._watchers.append(watcher)

    async def publish(self, topic: str, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        message = self._network.next_post()
        self._remember(message)
        self._flood(message, topic, self._peer_id, data, except_for=())

    async def dial(self, addr: str, *, timeout: float, patience: float = 0.0) -> str:
        # Here a connection is taken and answered in one, so that nothing is left for patience.
        await trio.lowlevel.checkpoint()
        transport_addr, _, wanted = addr.partition("/p2p/")
        if not transport_addr.startswith("/") or not wanted:
            raise ConfigError(f"{addr} is no multiaddr that ends in /p2p/<peer ID>")
        if wanted in self._ends:
            return wanted
        with self._limit(timeout, f"{addr} did not answer in {timeout:g} s"):
            await self._connect(transport_addr, wanted)
        return wanted

    async def open_stream(self, peer_id: str, protocol_id: str, *, timeout: float) -> MeshStream:
        await trio.lowlevel.checkpoint()
        end = self._live_end(peer_id)
        stream = end.open_stream(protocol_id)
        try:
            with self._limit(timeout, f"{peer_id} did not answer in {timeout:g} s"):
                await stream.wait_accepted()
        except StreamReset as exc:
            raise PeerUnreachable(str(exc)) from exc
        except PeerRefused:
            raise
        except BaseException:
            stream.reset()
            raise
        return stream

    async def begin_stream(self, peer_id: str, protocol_id: str) -> MeshStream:
        await trio.lowlevel.checkpoint()
        stream = self._live_end(peer_id).open_stream(protocol_id)
        stream.is_begun = True
        return stream

    async def ping(self, peer_id: str, *, timeout: float) -> float:
        await trio.lowlevel.checkpoint()
        end = self._live_end(peer_id)
        answered = trio.Event()
        sent_at = trio.current_time()
        end.send(lambda other: other.send(lambda _: answered.set()))
        with self._limit(timeout, f"no answer to a ping of {peer_id} in {timeout:g} s"):
            await answered.wait()
        end.rtt = trio.current_time() - sent_at
        return end.rtt

    async def disconnect(self, peer_id: str, reason: str) -> None:
        await trio.lowlevel.checkpoint()
        if (end := self._ends.get(peer_id)) is not None:
            end.close(reason)

    def links(self) -> tuple[Link, ...]:
        return tuple(_link(peer_id, end) for peer_id, end in self._ends.items())

    def link_to(self, peer_id: str) -> Link | None:
        end = self._ends.get(peer_id)
        return None if end is None else _link(peer_id, end)

    def seal(self, payload: bytes) -> bytes:
        signer = self._peer_id.encode()
        signature = self._network.sign(self._peer_id, payload)
        return bytes([len(signer)]) + signer + signature + payload

    def open_sealed(self, envelope: bytes) -> tuple[str, bytes]:
        signer_end = 1 + (envelope[0] if envelope else 0)
        payload = envelope[signer_end + _SIGNATURE_BYTES :]
        signature = envelope[signer_end : signer_end + _SIGNATURE_BYTES]
        signer = envelope[1:signer_end].decode("ascii", "replace")
        if not hmac.compare_digest(signature, self._network.sign(signer, payload)):
            raise WireError("bad_envelope", "the envelope is not one, or its signature is wrong")
        return signer, payload

    # What links and the network ask of a node.

    def link_end(self, peer_id: str) -> LinkEnd | None:
        return self._ends.get(peer_id)

    def post(self, end: LinkEnd, action: Action) -> None:
        if not self.running:
            return
        delay = self._network.delay_of(self._peer_id, end.peer_id)
        arrival = max(trio.current_time() + delay, end.last_arrival)
        end.last_arrival = arrival
        heapq.heappush(self._inbox, (arrival, self._network.next_post(), end, action))
        self._inbox_filled.set()

    def release_held(self) -> None:
        for end in tuple(self._ends.values()):
            if not self._network.is_cut(self._peer_id, end.peer_id):
                held, end.held = end.held, type(end.held)()
                for action in held:
                    self.post(end, action)

    def accept_stream(self, stream: MemoryStream) -> bool:
        handler = self._handlers.get(stream.protocol_id)
        if handler is None or not self.running:
            return False
        self._nursery.start_soon(_handle_stream, handler, stream)
        return True

    def forget_link(self, end: LinkEnd, reason: str) -> None:
        if self._ends.get(end.peer_id) is end:
            del self._ends[end.peer_id]
            self._tell(LinkEvent(LinkState.DOWN, end.peer_id, reason, end.addr, end.dialled))

    async def _receive_forever(self) -> None:
        while True:
            now = trio.current_time()
            while self._inbox and self._inbox[0][0] <= now:
                _, _, end, action = heapq.heappop(self._inbox)
                if self._network.is_cut(self._peer_id, end.peer_id):
                    end.held.append(action)
                else:
                    end.arrive(action)
            self._inbox_filled = trio.Event()
            with trio.move_on_at(self._inbox[0][0] if self._inbox else float("inf")):
                await self._inbox_filled.wait()

    async def _connect(self, transport_addr: str, wanted: str) -> None:
        other = self._network.at_addr(transport_addr)
        if other is None or other is self:
            raise PeerUnreachable(f"nobody answers at {transport_addr}")
        while self._network.is_cut(self._peer_id, other.peer_id):
            await self._network.weather_change()
        await trio.sleep(2 * self._network.delay_of(self._peer_id, other.peer_id))
        if not other.running or not self.running:
            raise PeerUnreachable(f"{transport_addr} closed the connection")
        if other.peer_id != wanted:
            raise PeerUnreachable(f"{transport_addr} is {other.peer_id}, not {wanted}")
        if wanted in self._ends:
            return  # it dialled us meanwhile, or another task of ours was faster
        if not set(self._keys) & set(other._keys):
            refusal = partial(LinkEvent, LinkState.REFUSED, reason="wrong token")
            other._tell(refusal(peer_id=self._peer_id, addr=self.transport_addr))
            self._tell(refusal(peer_id=wanted, addr=transport_addr, dialled=True))
            raise TokenRefused(f"{wanted} at {transport_addr} has another token")
        self._link_with(other)

    def _link_with(self, other: MemoryMesh) -> None:
        ours = LinkEnd(self, addr=other.transport_addr, dialled=True)
        theirs = LinkEnd(other, addr=self.transport_addr, dialled=False)
        ours.other, theirs.other = theirs, ours
        self._add_end(ours)
        other._add_end(theirs)

    def _add_end(self, end: LinkEnd) -> None:
        # An old end may stand here while its peer has given it up across a cut.
        stale = self._ends.get(end.peer_id)
        self._ends[end.peer_id] = end
        if stale is not None:
            stale.die("replaced by a newer connection")
        else:
            self._tell(LinkEvent(LinkState.UP, end.peer_id, "", end.addr, end.dialled))

    def _live_end(self, peer_id: str) -> LinkEnd:
        if (end := self._ends.get(peer_id)) is None:
            raise PeerUnreachable(f"no live link to {peer_id}")
        return end

    def _tell(self, event: LinkEvent) -> None:
        for watcher in self._watchers:
            watcher(event)

    def _remember(self, message: int) -> bool:
        """Return whether ``message`` is new here."""
        if message in self._seen:
            return False
        self._seen[message] = None
        if len(self._seen) > SEEN_MESSAGES:
            self._seen.popitem(last=False)
        return True

    def _flood(
        self, message: int, topic: str, origin: str, data: bytes, *, except_for: Collection[str]
    ) -> None:
        for peer_id, end in tuple(self._ends.items()):
            if peer_id == origin or peer_id in except_for or self._network.goes_astray():
                continue
            end.send(partial(_hear, message=message, topic=topic, origin=origin, data=data))

    def hear(self, message: int, topic: str, origin: str, data: bytes, forwarder: str) -> None:
        self.copies_received += 1
        self.bytes_received += len(data)
        listener = self._listeners.get(topic)
        if listener is None or origin == self._peer_id or not self._remember(message):
            return
        if listener(origin, data) is Verdict.ACCEPT:
            self._flood(message, topic, origin, data, except_for=(forwarder,))

    @contextmanager
    def _limit(self, seconds: float, message: str) -> Iterator[None]:
        try:
            with trio.fail_after(seconds):
                yield
        except trio.TooSlowError as exc:
            raise PeerUnreachable(message) from exc


def _link(peer_id: str, end: LinkEnd) -> Link:
    return Link(peer_id, end.addr, end.dialled, end.since, end.last_received, end.rtt)


def _hear(end: LinkEnd, *, message: int, topic: str, origin: str, data: bytes) -> None:
    assert isinstance(end.owner, MemoryMesh)
    end.owner.hear(message, topic, origin, data, end.peer_id)


async def _handle_stream(handler: StreamHandler, stream: MemoryStream) -> None:
    """Run one inbound stream's handler; its failure costs that stream alone."""
    try:
        await handler(stream)
    except Exception as exc:  # noqa: BLE001  # the guard of every handler: the node must live
        stream.reset()
        log.warning(
            "stream_handler_failed",
            peer_id=stream.peer_id,
            protocol_id=stream.protocol_id,
            error=repr(exc),
        )
    else:
        await stream.aclose()
    finally:
        # Cancelled with the node, its end must look like a cut, never like a clean one.
        stream.reset_unless_closed()
