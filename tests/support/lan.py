"""Hosts on local networks of their own: network namespaces joined by bridges."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_OTHER_SIDE = 99  # the segment that hosts are parted to


def ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")


def within(netns: str, work: Callable[[], T]) -> T:
    """Do ``work`` on a thread inside a network namespace; its sockets stay there."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        descriptor = os.open(f"/run/netns/{netns}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {netns}")
            results.append(work())
        except BaseException as exc:  # noqa: BLE001 - handed on to the caller
            failures.append(exc)
        finally:
            os.close(descriptor)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


class Lan:
    """Bridges in a namespace of their own, and hosts at their ports; nobody forwards."""

    def __init__(self) -> None:
        self.tag = secrets.token_hex(3)
        self.switch = f"mn{self.tag}s"
        self.namespaces: list[str] = []
        self._bridges: set[int] = set()

    @classmethod
    def open_or_skip(cls) -> Lan:
        if shutil.which("ip") is None:
            pytest.skip("network namespaces need the ip command")
        lan = cls()
        try:
            lan._namespace(lan.switch)
            lan._bridge(0)
        except OSError as exc:
            lan.close()
            pytest.skip(f"network namespaces are not permitted here: {exc}")
        return lan

    def host(self, *segments: int) -> str:
        """Add a host at 10.77.SEGMENT.N on each of ``segments`` (0 alone); return its namespace."""
        number = len(self.namespaces)
        name = f"mn{self.tag}{number}"
        self._namespace(name)
        for segment in segments or (0,):
            self._bridge(segment)
            port, cable = f"port{number}s{segment}", f"eth{segment}"
            peer = ("peer", "name", port, "netns", self.switch)
            ip("-n", name, "link", "add", cable, "type", "veth", *peer)
            ip("-n", self.switch, "link", "set", port, "master", f"br{segment}", "up")
            ip("-n", name, "addr", "add", f"10.77.{segment}.{number}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
        return name

    def addr(self, host: str, segment: int = 0) -> str:
        """The IP address of a host."""
        return f"10.77.{segment}.{self.namespaces.index(host)}"

    def unplug(self, *hosts: str) -> None:
        """Let nothing come or go any more and tell nobody: a cable cut beyond the next switch."""
        for name in hosts:
            ip("-n", self.switch, "link", "set", self._port(name), "nomaster")

    def part(self, *hosts: str) -> None:
        """Put some hosts of segment 0 behind a bridge of their own: two networks of one."""
        self._bridge(_OTHER_SIDE)
        for name in hosts:
            ip("-n", self.switch, "link", "set", self._port(name), "master", f"br{_OTHER_SIDE}")

    def heal(self, *hosts: str) -> None:
        """Undo ``unplug`` or ``part``."""
        for name in hosts:
            ip("-n", self.switch, "link", "set", self._port(name), "master", "br0")

    def _port(self, name: str) -> str:
        return f"port{self.namespaces.index(name)}s0"

    def close(self) -> None:
        for name in self.namespaces:
            ip("netns", "del", name)

    def _bridge(self, segment: int) -> None:
        if segment in self._bridges:
            return
        self._bridges.add(segment)
        bridge = f"br{segment}"
        ip("-n", self.switch, "link", "add", bridge, "type", "bridge", "mcast_snooping", "0")
        ip("-n", self.switch, "link", "set", bridge, "up")

    def _namespace(self, name: str) -> None:
        ip("netns", "add", name)
        self.namespaces.append(name)
        ip("-n", name, "link", "set", "lo", "up")
