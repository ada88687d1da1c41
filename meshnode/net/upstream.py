"""One attempt: from a lease to a stream that reaches the service, at a peer or at this host."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol

import trio

from meshnode.core.lease import Lease
from meshnode.core.router import Router
from meshnode.core.tunnel import (
    MAX_HEADER_BYTES,
    PROTOCOL_ID,
    TunnelReply,
    TunnelRequest,
    decode_reply,
    encode_request,
)
from meshnode.core.wire import encode_frame
from meshnode.errors import MeshnodeError, PeerRefused, PeerUnreachable, StreamReset, WireError
from meshnode.metrics import Metrics
from meshnode.net.framed import FrameReader
from meshnode.net.local_services import LocalServices
from meshnode.net.mesh import ByteStream, Mesh, MeshStream
from meshnode.net.tunnel_stream import TunnelStream

# For one peer, from the dial (if there is no link) to its reply.
OPEN_TIMEOUT = 3.0  # seconds


class AttemptError(MeshnodeError):
    """This peer does not serve this client; ``reason`` is fit for a metric label."""

    def __init__(self, reason: str, error: str) -> None:
        super().__init__(error)
        self.reason = reason


class Neighbours(Protocol):
    """What is asked of peering."""

    async def connect(self, peer_id: str, *, timeout: float) -> None:
        """Make a link to a peer unless there is one; raises MeshError."""

    def report_unreachable(self, peer_id: str, error: str) -> None:
        """Take a peer out of the candidates: a stream to it could not be opened."""


class Upstreams:
    """Opens tunnels to peers, and connections to this host's own services."""

    def __init__(
        self,
        mesh: Mesh,
        router: Router,
        neighbours: Neighbours,
        services: LocalServices,
        *,
        metrics: Metrics,
    ) -> None:
        self._mesh = mesh
        self._router = router
        self._neighbours = neighbours
        self._services = services
        self._metrics = metrics

    async def open(self, lease: Lease, holding: ExitStack) -> ByteStream:
        """Return a stream to the leased service; what it holds is let go with ``holding``.

        Raises:
            AttemptError: the peer is gone, silent, or does not serve now.
        """
        if lease.is_local:
            return await self._open_here(lease, holding)
        try:
            with trio.fail_after(OPEN_TIMEOUT):
                return await self._open_there(lease)
        except trio.TooSlowError as exc:
            error = f"no reply within {OPEN_TIMEOUT:g} s"
            self._neighbours.report_unreachable(lease.peer_id, error)
            raise AttemptError("timeout", error) from exc
        except PeerUnreachable as exc:
            self._neighbours.report_unreachable(lease.peer_id, str(exc))
            raise AttemptError("unreachable", str(exc)) from exc
        except PeerRefused as exc:
            raise AttemptError("refused", str(exc)) from exc
        except StreamReset as exc:
            raise AttemptError("reset", str(exc)) from exc
        except WireError as exc:
            self._metrics.protocol_faults.labels(protocol="tunnel", code=exc.code).inc()
            raise AttemptError("protocol_error", str(exc)) from exc

    async def _open_here(self, lease: Lease, holding: ExitStack) -> ByteStream:
        status = self._services.admit(lease.service_id)
        if status != "ok":
            raise AttemptError(status, f"this node's own service is {status}")
        holding.enter_context(self._services.claim(lease.service_id, lease.peer_id))
        try:
            return await self._services.connect(lease.service_id)
        except PeerUnreachable as exc:
            raise AttemptError("backend_unreachable", str(exc)) from exc

    async def _open_there(self, lease: Lease) -> ByteStream:
        peer_id = lease.peer_id
        await self._neighbours.connect(peer_id, timeout=OPEN_TIMEOUT)
        stream = await self._mesh.open_stream(peer_id, PROTOCOL_ID, timeout=OPEN_TIMEOUT)
        try:
            frames = FrameReader(stream, MAX_HEADER_BYTES)
            reply = await self._ask(stream, frames, lease)
            if reply.status != "ok":
                raise AttemptError(reply.status, reply.message or f"the peer is {reply.status}")
        except AttemptError:
            await stream.aclose()
            raise
        except BaseException:
            stream.reset()
            raise
        return TunnelStream(stream, frames.take_rest())

    async def _ask(self, stream: MeshStream, frames: FrameReader, lease: Lease) -> TunnelReply:
        request = TunnelRequest(service_id=lease.service_id)
        await stream.send_all(encode_frame(encode_request(request)))
        reply = decode_reply(await frames.expect_frame())
        self._router.report(
            lease.peer_id,
            lease.service_id,
            others_in_flight=reply.in_flight,
            available_vram=reply.available_vram,
            now=trio.current_time(),
        )
        return reply
