"""Inbound tunnels: a member's stream, carried to a service that this host exposes."""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from meshnode.core.tunnel import (
    MAX_HEADER_BYTES,
    PROTOCOL_ID,
    Status,
    TunnelReply,
    decode_request,
    encode_reply,
)
from meshnode.core.wire import encode_frame
from meshnode.errors import MeshError, PeerUnreachable, WireError
from meshnode.metrics import Metrics
from meshnode.net.framed import FrameReader
from meshnode.net.local_services import LocalServices
from meshnode.net.mesh import Mesh, MeshStream
from meshnode.net.splice import IDLE_TIMEOUT, splice
from meshnode.net.tunnel_stream import TunnelStream

# For the request's header, once the stream stands; it comes with the first bytes.
_HEADER_TIMEOUT = 3.0  # seconds
# For a refusal to leave: a peer that does not read it has given up.
_REFUSAL_TIMEOUT = 3.0  # seconds

log = structlog.get_logger(__name__)


class ExitPoint:
    """Serves the tunnel protocol for the services of this host.

    Args:
        free_vram: this host's free GPU memory in bytes; None while unknown.
    """

    def __init__(
        self,
        mesh: Mesh,
        services: LocalServices,
        *,
        free_vram: Callable[[], int | None],
        metrics: Metrics,
        idle_timeout: float = IDLE_TIMEOUT,
    ) -> None:
        self._services = services
        self._free_vram = free_vram
        self._metrics = metrics
        self._idle_timeout = idle_timeout
        mesh.serve(PROTOCOL_ID, self.serve_stream)

    async def serve_stream(self, stream: MeshStream) -> None:
        """Answer one tunnel, from its request to its end."""
        started = trio.current_time()
        try:
            outcome = await self._serve(stream)
        except WireError as exc:
            self._metrics.protocol_faults.labels(protocol="tunnel", code=exc.code).inc()
            stream.reset()
            outcome = "protocol_error"
        except (MeshError, trio.TooSlowError):
            stream.reset()
            outcome = "client_gone"
        except BaseException:
            stream.reset()
            self._metrics.tunnels.labels(role="exit", outcome="stopped").inc()
            raise
        self._metrics.tunnels.labels(role="exit", outcome=outcome).inc()
        log.debug(
            "tunnel_ended",
            role="exit",
            peer_id=stream.peer_id,
            outcome=outcome,
            duration_s=round(trio.current_time() - started, 3),
        )

    async def _serve(self, stream: MeshStream) -> str:
        frames = FrameReader(stream, MAX_HEADER_BYTES)
        with trio.fail_after(_HEADER_TIMEOUT):
            service_id = decode_request(await frames.expect_frame()).service_id
        status = self._services.admit(service_id)
        if status != "ok":
            return await self._refuse(stream, service_id, status, "")
        with self._services.claim(service_id, stream.peer_id):
            # Only a connected service is promised: until then the asker can go elsewhere.
            try:
                backend = await self._services.connect(service_id)
            except PeerUnreachable as exc:
                return await self._refuse(stream, service_id, "backend_unreachable", str(exc))
            try:
                await self._reply(stream, service_id, "ok", "")
            except BaseException:
                backend.reset()
                raise
            end = await splice(
                TunnelStream(stream, frames.take_rest()),
                backend,
                count_to_upstream=self._metrics.tunnel_bytes.labels(direction="to_service").inc,
                count_to_client=self._metrics.tunnel_bytes.labels(direction="to_client").inc,
                idle_timeout=self._idle_timeout,
            )
        return end.outcome.value

    async def _refuse(
        self, stream: MeshStream, service_id: str, status: Status, message: str
    ) -> str:
        with trio.fail_after(_REFUSAL_TIMEOUT):
            await self._reply(stream, service_id, status, message)
            await stream.aclose()
        return status

    async def _reply(
        self, stream: MeshStream, service_id: str, status: Status, message: str
    ) -> None:
        reply = TunnelReply(
            status=status,
            in_flight=self._services.in_flight_of_others(service_id, stream.peer_id),
            available_vram=self._free_vram() or 0,
            message=message[:256],
        )
        await stream.send_all(encode_frame(encode_reply(reply)))
