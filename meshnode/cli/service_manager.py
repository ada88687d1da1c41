"""Telling systemd what this process does: ready, reloading, stopping (sd_notify's datagrams).

Protocol: sd_notify(3). Nothing is sent, and nothing fails, where no service manager asked for it.
"""

from __future__ import annotations

import os
import socket
import time

import structlog

_log = structlog.get_logger(__name__)

READY = "READY=1"
STOPPING = "STOPPING=1"


def is_listening() -> bool:
    """Say whether a service manager wants to be told."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(*lines: str) -> bool:
    """Send ``lines`` (``KEY=VALUE``) as one datagram; return whether it went out.

    Never raises: a service manager that can't be told must not end what it manages.
    """
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name:
        return False
    # A leading @ stands for the null byte of the abstract namespace.
    address = "\0" + name[1:] if name.startswith("@") else name
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            # A full queue must not hold up the node; the next word will come through.
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), address)
    except OSError as exc:
        _log.warning("service_manager_not_told", error=str(exc), path=name)
        return False
    return True


def status(text: str) -> str:
    """Return the line that ``systemctl status`` shows."""
    return "STATUS=" + " ".join(text.split())


def reloading() -> tuple[str, str]:
    """Return the lines that begin a reload; ``READY`` ends it."""
    return "RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
