"""Every bound and every wait of the libp2p room, in one place, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.core.membership import TIMEOUT


@dataclass(frozen=True, slots=True)
class Limits:
    """What peers may cost this node. Times are seconds on ``trio.current_time()``."""

    # A full mesh is cheap up to some hundreds of links; a hub of a sparse one may have more.
    max_links: int = 4096
    # Connections that have not proven membership yet. A real one takes some milliseconds.
    max_pending: int = 512
    max_pending_per_ip: int = 16
    # Many nodes share one host's loopback (swarms, tests, containers), and no stranger does.
    max_pending_on_loopback: int = 256
    # A pending connection this old makes room for a newcomer: real ones are long done.
    pending_yields_after: float = 1.0
    # From TCP accept to a noise-secured, muxed connection, and from there to a proven member. A
    # crowd that restarts at once takes seconds; idle sockets make room for others long before.
    handshake_timeout: float = TIMEOUT
    membership_timeout: float = TIMEOUT
    # A member that is asked to prove another key, since that of its link is withdrawn.
    renewal_timeout: float = 3.0
    # A relay on the way to somebody, until it is linked.
    relay_timeout: float = 6.0
    # How long a refused peer may take to read why before the connection is closed under it.
    farewell_timeout: float = 1.0
    # A peer that says "we are already connected" is given this long to be right.
    duplicate_timeout: float = 1.0
    # Streams that arrive before their connection is a member's wait for it, up to this many.
    max_waiting_streams: int = 16
    # Choosing a protocol on an inbound stream takes one message; a silent stream is let go.
    negotiate_timeout: float = 5.0
    # Streams of one peer that are being served at once; tunnels are the bulk of them.
    max_streams_served: int = 4096
    # Closing everything on the way out.
    shutdown_timeout: float = 3.0
    # Unacknowledged bytes, or a silent idle link, this old mean a dead connection. The kernel's
    # own limit is about 15 minutes.
    tcp_user_timeout: float = 8.0


DEFAULT_LIMITS = Limits()
