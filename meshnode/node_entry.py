"""What stands behind the proxy's port: the HTTP gateway, or the plain carrier of connections."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog
import trio

from meshnode.config import Config
from meshnode.core.api_keys import ClientKey, ClientKeys, parse_client_keys
from meshnode.errors import ConfigError
from meshnode.http.gateway.access import Access
from meshnode.http.gateway.choice import Aim, ModelChooser
from meshnode.http.gateway.listing import Listing
from meshnode.http.gateway.server import Gateway
from meshnode.http.gateway.settings import GatewaySettings
from meshnode.http.unavailable import looks_like_http, refuse
from meshnode.metrics import Metrics
from meshnode.net.accept import AcceptLimits
from meshnode.net.federation_entry import EntryPoint, EntrySettings
from meshnode.net.member import Member
from meshnode.tracing import NO_TRACER, Tracer

log = structlog.get_logger(__name__)


class Entry(Protocol):
    """Serves clients."""

    async def serve_forever(self, listeners: Sequence[trio.SocketListener]) -> None:
        """Accept clients until cancelled."""

    def close(self) -> None:
        """Accept nobody any more; who is connected is served to the end."""


def build_entry(
    config: Config,
    member: Member,
    *,
    choose_service: Callable[[], str],
    client_keys: ClientKeys | None,
    metrics: Metrics,
    wall_time: Callable[[], float],
    tracer: Tracer,
) -> Entry:
    """Return what the settings ask for; ``choose_service`` names that of a plain connection."""
    limits = _accept_limits(config)
    if config.proxy_mode == "tcp":
        return EntryPoint(
            member.router,
            member.upstreams,
            member.queue,
            choose_service=choose_service,
            refuse=refuse,
            metrics=metrics,
            wall_time=wall_time,
            settings=EntrySettings(target=config.target, limits=limits, may_repeat=looks_like_http),
            tracer=tracer,
        )
    return Gateway(
        ModelChooser(
            member.models,
            member.ledger,
            member.queue,
            aim=Aim(config.service, config.target, config.session_header),
            wall_time=wall_time,
        ),
        member.upstreams,
        listing=Listing(member.ledger, service_id=config.service),
        access=Access(
            loopback_only=config.proxy is None or config.proxy.is_loopback,
            cors_origins=config.cors_origin,
        ),
        metrics=metrics,
        settings=GatewaySettings(
            first_byte_timeout=config.first_byte_timeout,
            response_headers=config.response_headers,
            client_keys=client_keys,
            accept=limits,
        ),
        tracer=tracer,
    )


def client_keys_of(config: Config) -> tuple[ClientKey, ...] | None:
    """Return the keys of clients that may use the proxy; None: it asks for none.

    Raises:
        ConfigError: the file of keys is wrong.
    """
    if config.client_keys is None:
        return None
    try:
        return parse_client_keys(config.client_keys)
    except ValueError as exc:
        source = config.sources.get("client_keys_file", "default")
        raise ConfigError(
            f"client_keys_file={config.client_keys_file} from {source} {exc}"
        ) from exc


def _accept_limits(config: Config) -> AcceptLimits:
    wished = AcceptLimits(config.max_clients, config.max_clients_per_ip)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = wished if soft == resource.RLIM_INFINITY else wished.within_descriptors(soft)
    if config.proxy is not None and limits.in_all < wished.in_all:
        log.warning(
            "fewer_clients_than_set",
            max_clients=limits.in_all,
            error=f"this process may open {soft} files only",
            advice="raise the file limit (ulimit -n, LimitNOFILE)",
        )
    return limits


def make_tracer(
    config: Config, peer_id: str, network: str
) -> tuple[Tracer, Callable[[], None] | None]:
    """Return the tracer, and what sends its last spans; OpenTelemetry is loaded only for one.

    Raises:
        ConfigError: traces are wanted, and their library is not installed.
    """
    if config.otlp_endpoint is None:
        return NO_TRACER, None
    try:
        from meshnode.otel import OtelTracer
    except ImportError as exc:
        raise ConfigError(
            f"otlp_endpoint={config.otlp_endpoint} from {config.sources['otlp_endpoint']} needs "
            f"OpenTelemetry ({exc.name} is missing); install it with: pip install 'meshnode[otel]'"
        ) from exc
    tracer = OtelTracer(config.otlp_endpoint, node=config.name, peer_id=peer_id, network=network)
    return tracer, tracer.close
