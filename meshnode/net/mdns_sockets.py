"""The multicast socket that mDNS shares with every other responder of this host, and nothing else.

IPv4 alone: every local network that people put GPUs on has it, and a socket for ``ff02::fb``
can't be bound without also taking the unicast answers that other programs wait for.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import trio

from meshnode.net.mdns_packets import MAX_PACKET

GROUP = "224.0.0.251"
PORT = 5353
# Linux lets one socket join 20 groups; a host of containers has more interfaces than that.
MAX_INTERFACES = 16
_IP_MULTICAST_ALL = 49  # Linux; the socket module has no name for it
_HOPS = 255  # RFC 6762 section 11


@dataclass(frozen=True, slots=True)
class Interface:
    """One of this host's ways to a local network."""

    name: str
    index: int  # another one once the interface was taken away and came back
    ip: str  # its first IPv4 address

    @property
    def is_loopback(self) -> bool:
        return self.ip.startswith("127.")


def interfaces() -> tuple[Interface, ...]:
    """Return what has an IPv4 address now, loopback last."""
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        ip = next((a.address for a in addresses if a.family is socket.AF_INET), None)
        if ip is not None:
            with suppress(OSError):  # gone since it was listed
                found.append(Interface(name, socket.if_nametoindex(name), ip))
    found.sort(key=lambda each: each.is_loopback)
    return tuple(found[:MAX_INTERFACES])


class MulticastSocket:
    """Port 5353, on the group of every interface; sending never waits."""

    def __init__(self, sock: socket.socket) -> None:
        self.joined: tuple[Interface, ...] = ()
        self._sock = sock
        self._receiver = trio.socket.from_stdlib_socket(sock)

    def follow(self, now_there: tuple[Interface, ...]) -> tuple[Interface, ...]:
        """Join what is new and leave what is gone; return what was joined."""
        for gone in set(self.joined) - set(now_there):
            with suppress(OSError):  # with its interface, a membership is gone already
                self._set(socket.IP_DROP_MEMBERSHIP, _membership(gone))
        kept = tuple(each for each in now_there if each in self.joined)
        new = tuple(each for each in now_there if each not in kept and self._join(each))
        self.joined = kept + new
        return new

    def send(self, interface: Interface, packet: bytes) -> bool:
        """Send to all on the interface's network; return whether it went out.

        It waits for nothing, so that no other sender can change the interface in between.
        """
        try:
            self._set(socket.IP_MULTICAST_IF, socket.inet_aton(interface.ip))
            self._sock.sendto(packet, (GROUP, PORT))
        except OSError:  # the interface is down or gone, or its queue full: asked again later
            return False
        return True

    async def receive(self) -> tuple[bytes, str]:
        """Return the next packet and the IP address it came from.

        Raises:
            OSError: the network went down; later ones may arrive.
        """
        data, (source, _) = await self._receiver.recvfrom(MAX_PACKET + 1)
        return data, source

    def _join(self, interface: Interface) -> bool:
        try:
            self._set(socket.IP_ADD_MEMBERSHIP, _membership(interface))
        except OSError:  # without multicast, such as some tunnels
            return False
        return True

    def _set(self, option: int, value: bytes) -> None:
        self._sock.setsockopt(socket.IPPROTO_IP, option, value)


@contextmanager
def open_multicast_socket() -> Iterator[MulticastSocket]:
    """Open the port beside its other users.

    Raises:
        OSError: another program holds it for itself, or it is forbidden here.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Nodes on one host find each other too.
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, _HOPS)
        if sys.platform == "linux":
            sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
        sock.setblocking(False)
        # Bound to any address, it would be handed unicast answers meant for the host's responder.
        sock.bind((GROUP, PORT))
        yield MulticastSocket(sock)


def _membership(interface: Interface) -> bytes:
    return struct.pack("=4s4s", socket.inet_aton(GROUP), socket.inet_aton(interface.ip))
