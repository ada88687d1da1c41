"""TCP sockets as this room needs them: bound to a port of their own, and sure to notice death.

The library's listener shares its port through SO_REUSEPORT, so that two nodes can be started on
one port and each lose half of its handshakes; its sockets wait about 15 minutes for a link that
went silent. Sockets are therefore made here, and only handed to it.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass

import trio
from libp2p.io.trio import TrioTCPStream
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from meshnode.errors import ConfigError, ListenFailed

_BACKLOG = 512
_HOST_PROTOCOLS = {
    "ip4": socket.AF_INET,
    "ip6": socket.AF_INET6,
    "dns": socket.AF_UNSPEC,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
}
# Errors of bind() that a person can do something about.
_BIND_ADVICE = {
    errno.EADDRINUSE: "another program has it; stop that one, or listen on another port",
    errno.EACCES: "not permitted; ports below 1024 need privileges, so choose a higher one",
    errno.EADDRNOTAVAIL: "this host has no such address; listen on one of its own, or on 0.0.0.0",
}


@dataclass(frozen=True, slots=True)
class TcpAddr:
    """The TCP endpoint that a multiaddr names, and the peer ID at its end, if any."""

    protocol: str  # ip4, ip6, dns, dns4 or dns6
    host: str
    port: int
    peer_id: str | None

    @property
    def family(self) -> socket.AddressFamily:
        return _HOST_PROTOCOLS[self.protocol]

    @property
    def multiaddr(self) -> str:
        """The address without ``/p2p/``."""
        return f"/{self.protocol}/{self.host}/tcp/{self.port}"


def parse_tcp_addr(addr: str) -> TcpAddr:
    """Read ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/PEER_ID]``.

    Raises:
        ConfigError: ``addr`` is anything else.
    """
    try:
        parts = [(part.name, value) for part, value in Multiaddr(addr).items()]
    except (MultiaddrError, ValueError) as exc:
        raise ConfigError(f"{addr!r} is not a multiaddr: {exc}") from exc
    match parts:
        case [(name, host), ("tcp", port), *rest] if name in _HOST_PROTOCOLS:
            pass
        case _:
            raise ConfigError(
                f"{addr!r} is not a TCP multiaddr; write it as /ip4/192.0.2.7/tcp/4001"
            )
    match rest:
        case []:
            peer_id = None
        case [("p2p", str(peer_id))]:
            pass
        case _:
            raise ConfigError(f"{addr!r}: after /tcp/PORT only /p2p/PEER_ID is understood")
    return TcpAddr(name, str(host), int(str(port)), peer_id)


async def bind_listeners(addrs: tuple[str, ...]) -> list[trio.SocketListener]:
    """Bind and listen on every address, or on none.

    Raises:
        ListenFailed: an address can't be bound; the message names it and says what to do.
    """
    listeners: list[trio.SocketListener] = []
    try:
        for addr in addrs:
            listeners.append(await _bind(addr))
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


async def _bind(addr: str) -> trio.SocketListener:
    try:
        endpoint = parse_tcp_addr(addr)
    except ConfigError as exc:
        raise ListenFailed(f"can't listen there: {exc}") from exc
    if endpoint.protocol not in ("ip4", "ip6") or endpoint.peer_id is not None:
        raise ListenFailed(f"can't listen on {addr}: give an IP address and a port, nothing more")
    sock = trio.socket.socket(endpoint.family, socket.SOCK_STREAM)
    try:
        # REUSEADDR lets a restart take over a port whose last connections linger in TIME_WAIT.
        # Without REUSEPORT, on purpose: a port that is taken must fail here.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family == socket.AF_INET6:
            # Else "::" would also take the IPv4 port, and /ip4/0.0.0.0 beside it would fail.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await sock.bind((endpoint.host, endpoint.port))
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        why = os.strerror(exc.errno) if exc.errno else str(exc)
        advice = _BIND_ADVICE.get(exc.errno or 0, "choose another address")
        raise ListenFailed(f"can't listen on {addr}: {why} ({advice})") from exc
    except BaseException:
        sock.close()
        raise
    return trio.SocketListener(sock)


async def open_tcp(endpoint: TcpAddr) -> trio.SocketStream:
    """Connect; a name with several addresses is tried one after another.

    Raises:
        OSError: nobody answers there, or the name is not known.
    """
    found = await trio.socket.getaddrinfo(
        endpoint.host, endpoint.port, endpoint.family, socket.SOCK_STREAM
    )
    refused: OSError | None = None
    for family, kind, proto, _, where in found:
        sock = trio.socket.socket(family, kind, proto)
        try:
            await sock.connect(where)
        except OSError as exc:
            sock.close()
            refused = exc
        except BaseException:
            sock.close()
            raise
        else:
            return trio.SocketStream(sock)
    raise refused or OSError(f"{endpoint.host} has no address")


async def connect_tcp(endpoint: TcpAddr, *, user_timeout: float) -> TcpStream:
    """Connect, and return the stream to put a secure connection on.

    Raises:
        OSError: as ``open_tcp``.
    """
    socket = await open_tcp(endpoint)
    try:
        tune(socket.socket, user_timeout=user_timeout)
        return TcpStream(socket)
    except OSError:
        await trio.aclose_forcefully(socket)
        raise


def tune(sock: trio.socket.SocketType, *, user_timeout: float) -> None:
    """Send small frames at once, and give up on a link ``user_timeout`` seconds after it died.

    Keepalive watches an idle link, TCP_USER_TIMEOUT one with bytes on the way (a full send
    buffer hides a dead peer from every probe above TCP). macOS lacks the latter.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    interval = max(1, int(user_timeout / 4))
    for name, value in (
        ("TCP_KEEPIDLE", interval),
        ("TCP_KEEPINTVL", interval),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", int(user_timeout * 1000)),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


class TcpStream(TrioTCPStream):
    """The library's stream, which knows no remote address over IPv6 (it expects two fields)."""

    via: str | None = None  # nothing stands between

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        name = stream.socket.getpeername()
        self._cached_remote_address = (str(name[0]), int(name[1]))

    @property
    def remote_ip(self) -> str:
        assert self._cached_remote_address is not None
        return self._cached_remote_address[0]

    @property
    def remote_multiaddr(self) -> str:
        assert self._cached_remote_address is not None
        host, port = self._cached_remote_address
        return f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}"
