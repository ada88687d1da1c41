"""The addresses under which others can reach this node."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import trio
from libp2p.utils.address_validation import expand_wildcard_address
from multiaddr import Multiaddr

from meshnode.net.libp2p.tcp import parse_tcp_addr


def dialable(
    listeners: Sequence[trio.SocketListener], announce: tuple[str, ...], peer_id: str
) -> tuple[str, ...]:
    """Return multiaddrs that end in ``/p2p/<peer_id>``: ``announce``, or what is listened on.

    A wildcard becomes every address of this host but loopback (others would dial themselves),
    unless it has nothing else.
    """
    plain = [parse_tcp_addr(addr).multiaddr for addr in announce]
    if not plain:
        plain = [addr for listener in listeners for addr in _bound(listener)]
    return tuple(f"{addr}/p2p/{peer_id}" for addr in dict.fromkeys(plain))


def _bound(listener: trio.SocketListener) -> list[str]:
    host, port = listener.socket.getsockname()[:2]
    name = "ip6" if ":" in host else "ip4"
    addr = f"/{name}/{host}/tcp/{port}"
    if not ipaddress.ip_address(host).is_unspecified:
        return [addr]
    found = [_ip_of(str(each)) for each in expand_wildcard_address(Multiaddr(addr))]
    # A link-local address means nothing without its interface, which a multiaddr can't name here.
    usable = [
        str(ip)
        for ip in found
        if f"ip{ip.version}" == name
        and not (ip.is_unspecified or ip.is_loopback or ip.is_link_local)
    ]
    loopback = "::1" if name == "ip6" else "127.0.0.1"
    return [f"/{name}/{ip}/tcp/{port}" for ip in usable or [loopback]]


def _ip_of(addr: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(addr.split("/")[2])
