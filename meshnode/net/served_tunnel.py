"""The server's side of one tunnel: one request after another, over one connection to a backend.

The law here: a request that is refused has not sent a byte to the backend, and one whose dialler
goes away takes its backend connection with it, so that the engine stops working for nobody.
Between requests a tunnel counts as no load; its connection is kept for the next one unless the
backend ended it, or said something that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache

import trio

from meshnode.core.tunnel import (
    END,
    Header,
    Mark,
    RequestDecoder,
    Status,
    TunnelReply,
    TunnelRequest,
    decode_request,
    encode_chunks,
    encode_header,
    encode_reply,
)
from meshnode.errors import MeshError, PeerUnreachable, StreamClosed, StreamReset, WireError
from meshnode.metrics import Metrics
from meshnode.net.local_services import LocalServices
from meshnode.net.mesh import MeshStream
from meshnode.net.tcp_stream import TcpStream

# For the first request's header, once the stream stands; it comes with the first bytes.
_HEADER_TIMEOUT = 3.0  # seconds
# The idle deadline moves at most this often: moving it for every chunk costs more than it tells.
_DEADLINE_STEP = 1.0  # seconds
_READ_BYTES = 64 * 1024


@dataclass(eq=False, slots=True)
class _Backend:
    """A connection to a service of this host."""

    service_id: str
    stream: TcpStream
    ended: bool = False  # its END was passed on
    half_closed: bool = False  # it was told that nothing more comes
    passing_on: bool = False  # bytes of it are on their way into the tunnel

    @property
    def is_reusable(self) -> bool:
        return not (self.ended or self.half_closed or self.passing_on)


class ServedTunnel:
    """One inbound tunnel; ``serve`` it once.

    Args:
        free_vram: this host's free GPU memory in bytes; None while unknown.
        idle_timeout: seconds without a byte either way, and without a request. Longer than
            diallers keep a quiet tunnel, so that it is theirs to close.
    """

    def __init__(
        self,
        stream: MeshStream,
        services: LocalServices,
        *,
        free_vram: Callable[[], int | None],
        metrics: Metrics,
        idle_timeout: float,
    ) -> None:
        self.requests = 0  # that were begun
        self._stream = stream
        self._services = services
        self._free_vram = free_vram
        self._idle_timeout = idle_timeout
        self._count_to_service = metrics.tunnel_bytes.labels(direction="to_service").inc
        self._count_to_client = metrics.tunnel_bytes.labels(direction="to_client").inc
        self._decoder = RequestDecoder()
        self._backend: _Backend | None = None
        self._claim = ExitStack()
        self._status: Status | None = None  # of the open request; None: there is none
        self._asker_ended = False
        self._answer_ended = trio.Event()
        self._cut: str | None = None  # why this side reset the stream
        self._tasks: trio.Nursery | None = None
        self._scope = trio.CancelScope()

    async def serve(self) -> str:
        """Serve until the dialler ends the tunnel; return the outcome, a word for a metric.

        Raises:
            WireError: the dialler broke the protocol.
            StreamReset: it reset the stream, or its connection died.
        """
        failure: MeshError | WireError | None = None
        self._scope.deadline = trio.current_time() + _HEADER_TIMEOUT
        try:
            with self._scope:
                async with trio.open_nursery() as self._tasks:
                    try:
                        await self._serve_requests()
                        await self._stream.aclose()
                    except (MeshError, WireError) as exc:
                        failure = exc
                    self._tasks.cancel_scope.cancel()
        finally:
            self._claim.close()
            if self._backend is not None:
                self._backend.stream.reset()
        if self._cut is not None:
            return self._cut
        if failure is not None:
            raise failure
        if self._scope.cancelled_caught:
            self._stream.reset()
            return "idle"
        return "complete"

    async def _serve_requests(self) -> None:
        decoder = self._decoder
        while data := await self._stream.receive_some(_READ_BYTES):
            for item in decoder.feed(data):
                if type(item) is bytes:
                    await self._pass_on(item)
                elif type(item) is Header:
                    await self._begin(decode_request(item.body))
                elif item is Mark.END:
                    await self._end_asking()
                else:
                    self._end_request()
        try:
            decoder.finish()
        except WireError as exc:
            raise StreamReset(str(exc)) from exc
        if self._status == "ok":
            await self._answer_ended.wait()

    async def _begin(self, request: TunnelRequest) -> None:
        self.requests += 1
        self._asker_ended = False
        self._answer_ended = trio.Event()
        self._touch()
        service_id = request.service_id
        status, message = self._services.admit(service_id), ""
        if status == "ok":
            self._claim.enter_context(self._services.claim(service_id, self._stream.peer_id))
            # Only a connected service is promised: until then the asker can go elsewhere.
            try:
                await self._connect(service_id, fresh=request.fresh)
            except PeerUnreachable as exc:
                self._claim.close()
                status, message = "backend_unreachable", str(exc)
        self._status = status
        reply = _encoded_reply(
            status,
            self._services.in_flight_of_others(service_id, self._stream.peer_id),
            self._free_vram() or 0,
            message[:256],
        )
        # A backend that answers at once has its first bytes leave with the promise of them. Whoever
        # was refused goes elsewhere, and should not wait.
        await (self._stream.send_soon if status == "ok" else self._stream.send_all)(reply)

    async def _connect(self, service_id: str, *, fresh: bool) -> None:
        backend = self._backend
        if backend is not None:
            if not fresh and backend.service_id == service_id and backend.stream.is_quiet():
                return
            self._drop_backend()
        backend = _Backend(service_id, await self._services.connect(service_id))
        self._backend = backend
        assert self._tasks is not None
        self._tasks.start_soon(self._carry_back, backend)

    async def _pass_on(self, data: bytes) -> None:
        """Give the backend what the asker sent; what follows a refusal is thrown away."""
        backend = self._backend
        if self._status != "ok" or backend is None:
            return
        self._count_to_service(len(data))
        self._touch()
        try:
            await backend.stream.send_all(data)
        except (StreamReset, StreamClosed):
            # It may have answered before it went: _carry_back reads that, and then the cut.
            backend.half_closed = True

    async def _end_asking(self) -> None:
        self._asker_ended = True
        backend = self._backend
        if self._status == "ok" and backend is not None:
            backend.half_closed = True
            with suppress(StreamReset, StreamClosed):
                await backend.stream.send_eof()
        self._release_when_ended()

    def _end_request(self) -> None:
        """Take the asker's word that the request is over."""
        self._status = None
        self._claim.close()
        if self._backend is not None and not self._backend.is_reusable:
            self._drop_backend()
        self._touch()

    def _drop_backend(self) -> None:
        backend, self._backend = self._backend, None
        assert backend is not None
        if backend.passing_on:
            # What the asker does not want would come in the middle of the next answer.
            backend.stream.reset()
            self._reset("answer_not_wanted")
        else:
            backend.stream.close()

    async def _carry_back(self, backend: _Backend) -> None:
        """Carry what the backend says into the tunnel, until it ends or is not wanted."""
        try:
            while data := await backend.stream.receive_some(_READ_BYTES):
                if backend is not self._backend or self._status is None:
                    break
                self._count_to_client(len(data))
                self._touch()
                backend.passing_on = True
                for chunk in encode_chunks(data):
                    await self._stream.send_all(chunk)
                backend.passing_on = False
            if backend is not self._backend:
                return
            if self._status is None:
                self._drop_backend()
                return
            backend.ended = True
            await self._stream.send_all(END)
            self._answer_ended.set()
            self._release_when_ended()
        except (StreamReset, StreamClosed):
            if backend is not self._backend:
                return
            if self._status is None:
                self._drop_backend()
            elif not backend.passing_on and not backend.ended:
                self._reset("upstream_cut")

    def _reset(self, why: str) -> None:
        self._cut = why
        self._stream.reset()
        self._answer_ended.set()

    def _release_when_ended(self) -> None:
        if self._asker_ended and (self._answer_ended.is_set() or self._status != "ok"):
            self._claim.close()

    def _touch(self) -> None:
        deadline = trio.current_time() + self._idle_timeout
        if deadline - self._scope.deadline >= min(_DEADLINE_STEP, self._idle_timeout / 4):
            self._scope.deadline = deadline


@lru_cache(maxsize=256)  # load and free memory change seldom between two requests
def _encoded_reply(status: Status, in_flight: int, available_vram: int, message: str) -> bytes:
    reply = TunnelReply(
        status=status, in_flight=in_flight, available_vram=available_vram, message=message
    )
    return encode_header(encode_reply(reply))
