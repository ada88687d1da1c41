"""Config: every setting of one node, as a value that nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from meshnode.values import ApiAddress, ExposedService, HealthCheck, HostPort

DEFAULT_LISTEN = "/ip4/0.0.0.0/tcp/4201"
DEFAULT_API: ApiAddress = HostPort("127.0.0.1", 4280)
DEFAULT_PROXY = HostPort("127.0.0.1", 8080)
DEFAULT_OPEN_NETWORK = "open"


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting of one node. ``sources`` tells for each field where its value came from."""

    state_dir: str
    name: str
    token_texts: tuple[str, ...] = field(default=(), repr=False)  # the first is the newest
    token_file: str | None = None
    open: bool = False
    network: str | None = None  # only with ``open``; a token brings its own
    allow_peers_file: str | None = None
    allowed_peers: frozenset[str] | None = None  # peer IDs; None lets in whoever has the token
    block_peers_file: str | None = None
    blocked_peers: frozenset[str] = frozenset()
    listen: tuple[str, ...] = (DEFAULT_LISTEN,)
    announce_addr: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    mdns: bool = True
    relay: bool = False
    expose: tuple[ExposedService, ...] = ()
    health: tuple[tuple[str, HealthCheck], ...] = ()  # by service; "auto" where none is named
    max_in_flight: tuple[tuple[str, int], ...] = ()  # by service; no limit where none is named
    drain_grace: float = 30.0  # seconds
    max_clients: int = 4096  # connected to the proxy at a time
    max_clients_per_ip: int = 1024  # from one address that is not this host's
    proxy: HostPort | None = None
    proxy_mode: Literal["http", "tcp"] = "http"
    first_byte_timeout: float = 300.0  # seconds for an engine to begin its answer
    cors_origin: tuple[str, ...] = ()  # whose pages may use the proxy
    response_headers: bool = True  # x-meshnode-peer and x-meshnode-reason
    affinity: Literal["off", "prefix", "session"] = "prefix"  # what makes a peer warm
    session_header: str = "x-session-id"  # where clients name their sessions; lower case
    client_keys_file: str | None = None
    # The parsed file: one table for each client that may use the proxy; None asks for no key.
    client_keys: Mapping[str, object] | None = field(default=None, repr=False)
    open_proxy: bool = False  # beyond loopback without keys
    service: str | None = None
    target: str | None = None
    policy: Literal["vram", "rotate", "random"] = "vram"
    vram: int | None = None  # bytes to pretend
    api: ApiAddress = DEFAULT_API
    api_host_allow: tuple[str, ...] = ()  # names under which the API may be asked for
    api_key_file: str | None = None
    api_key: str | None = field(default=None, repr=False)
    otlp_endpoint: str | None = None  # the base URL of a collector; None: no traces
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["pretty", "json"] = "pretty"
    announce_interval: float = 10.0  # seconds
    online_window: float = 40.0  # seconds
    queue_length: int = 256  # requests that may wait while every peer is full
    queue_timeout: float = 30.0  # seconds
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    warnings: tuple[str, ...] = ()  # allowed, but worth a line in the log

    @property
    def token_text(self) -> str | None:
        """The token to join with; None in an open mesh."""
        return self.token_texts[0] if self.token_texts else None


def field_names() -> tuple[str, ...]:
    """Return every setting that flags, environment and file may hold."""
    derived = {
        *("token_texts", "allowed_peers", "blocked_peers", "api_key", "client_keys"),
        *("sources", "warnings"),
    }
    return tuple(entry.name for entry in fields(Config) if entry.name not in derived)
