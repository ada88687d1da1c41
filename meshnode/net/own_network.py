"""What this host can tell about its own network when nobody is heard any more."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterable, Mapping

import psutil

NO_INTERFACE = "this host has no network interface that is up"


def own_fault(addrs: Iterable[str]) -> str | None:
    """Return what is wrong with this host's network, or None if nothing is seen.

    Args:
        addrs: multiaddrs of this node; one that is on loopback alone needs no interface.
    """
    if all(addr.startswith(("/ip4/127.", "/ip6/::1/")) for addr in addrs):
        return None
    up = [name for name, stats in psutil.net_if_stats().items() if stats.isup]
    found = {
        name: [each.address for each in each_of if each.family in (socket.AF_INET, socket.AF_INET6)]
        for name, each_of in psutil.net_if_addrs().items()
    }
    return None if has_way_out(found, up) else NO_INTERFACE


def has_way_out(addresses: Mapping[str, Iterable[str]], up: Collection[str]) -> bool:
    """Say whether an interface is up and has an address by which others can be reached.

    Args:
        addresses: the IP addresses of each interface, by its name.
        up: names of those that are up and have their cable, or their access point.
    """
    return any(
        not ipaddress.ip_address(address.partition("%")[0]).is_loopback
        for name, listed in addresses.items()
        if name in up
        for address in listed
    )
