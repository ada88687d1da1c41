"""Inbound tunnels: a member's requests, carried to the services that this host exposes."""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from meshnode.core.tunnel import PROTOCOL_ID
from meshnode.errors import MeshError, WireError
from meshnode.metrics import Metrics
from meshnode.net.local_services import LocalServices
from meshnode.net.mesh import Mesh, MeshStream
from meshnode.net.served_tunnel import ServedTunnel
from meshnode.net.splice import IDLE_TIMEOUT

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
        """Serve one tunnel to its end."""
        started = trio.current_time()
        tunnel = ServedTunnel(
            stream,
            self._services,
            free_vram=self._free_vram,
            metrics=self._metrics,
            idle_timeout=self._idle_timeout,
        )
        try:
            outcome = await tunnel.serve()
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
            requests=tunnel.requests,
            duration_s=round(trio.current_time() - started, 3),
        )
