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

    A wildcard becomes every address of this host, loopback last: only nodes on the same host can
    use it, and for others it is a wasted dial.
    """
    if announce:
        plain = [parse_tcp_addr(addr).multiaddr for addr in announce]
    else:
        plain = [addr for listener in listeners for addr in _bound(listener)]
        plain.sort(key=_is_loopback)
    return tuple(f"{addr}/p2p/{peer_id}" for addr in dict.fromkeys(plain))


def _bound(listener: trio.SocketListener) -> list[str]:
    host, port = listener.socket.getsockname()[:2]
    name = "ip6" if ":" in host else "ip4"
    addr = f"/{name}/{host}/tcp/{port}"
    if not ipaddress.ip_address(host).is_unspecified:
        return [addr]
    expanded = [str(each) for each in expand_wildcard_address(Multiaddr(addr))]
    return [each for each in expanded if each.startswith(f"/{name}/") and not _is_link_local(each)]


def _is_loopback(addr: str) -> bool:
    return _is(addr, "is_loopback")


def _is_link_local(addr: str) -> bool:
    # Such an address means nothing without the interface, which a multiaddr of ours can't name.
    return _is(addr, "is_link_local")


def _is(addr: str, quality: str) -> bool:
    try:
        return bool(getattr(ipaddress.ip_address(addr.split("/")[2]), quality))
    except ValueError:
        return False  # a DNS name
