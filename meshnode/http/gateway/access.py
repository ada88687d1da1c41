"""Which pages and hosts may speak to the gateway.

A browser runs the scripts of every page that it shows. On a laptop any of them can reach the
loopback, under the page's own name too (DNS rebinding), so names and origins are checked.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from meshnode.http.gateway.answers import Answer
from meshnode.http.gateway.heads import RequestHead

# Names that lead to this machine alone, whatever DNS says.
_LOOPBACK_NAMES = frozenset({"localhost", "host.docker.internal"})
_ALLOWED_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_PREFLIGHT_AGE = 600  # seconds that a browser may remember the permission


class Access:
    """Checks Host and Origin, and answers what browsers ask beforehand.

    Args:
        loopback_only: whether the gateway listens on loopback; only then Host is checked, as
            beyond it the names of this machine are not known.
        cors_origins: origins whose pages may use the gateway; ``*`` is all of them.
    """

    def __init__(self, *, loopback_only: bool, cors_origins: tuple[str, ...] = ()) -> None:
        self._loopback_only = loopback_only
        self._any_origin = "*" in cors_origins
        self._origins = frozenset(origin.encode() for origin in cors_origins)

    def refusal(self, head: RequestHead) -> Answer | None:
        """Return why the request is refused, or None if it is not."""
        host = head.host.decode("ascii")
        if self._loopback_only and host and not _is_this_machine(_name_of(host)):
            return Answer(
                403,
                f"the Host header {host} does not name this machine; use 127.0.0.1 or localhost",
                "host_not_allowed",
            )
        origin = head.value(b"origin")
        if origin is None or self._allows(origin) or _is_same(origin, head.host):
            return None
        shown = origin[:100].decode("latin-1")
        return Answer(
            403,
            f"pages of {shown} may not use this gateway; allow it with --cors-origin",
            "origin_not_allowed",
        )

    def permissions(self, head: RequestHead) -> list[bytes]:
        """Return the lines that let the page which asks read the answer."""
        origin = head.value(b"origin")
        if origin is None or not self._allows(origin):
            return []
        return [
            b"access-control-allow-origin: " + (b"*" if self._any_origin else origin),
            b"access-control-expose-headers: x-request-id, x-meshnode-peer, x-meshnode-reason",
            b"vary: origin",
        ]

    def preflight(self, head: RequestHead) -> list[bytes] | None:
        """Return the lines of the answer to a preflight of an allowed page; None if it is none."""
        if head.method != b"OPTIONS" or head.value(b"access-control-request-method") is None:
            return None
        permissions = self.permissions(head)
        if not permissions:
            return None
        wanted = head.value(b"access-control-request-headers") or b"*"
        return [
            *permissions,
            b"access-control-allow-methods: " + _ALLOWED_METHODS,
            b"access-control-allow-headers: " + wanted,
            b"access-control-max-age: %d" % _PREFLIGHT_AGE,
        ]

    def _allows(self, origin: bytes) -> bool:
        return self._any_origin or origin in self._origins


def _name_of(host: str) -> str:
    if host.startswith("["):
        return host[1 : host.index("]")]
    return host.partition(":")[0]


@lru_cache(maxsize=256)  # clients say the same few names, request after request
def _is_this_machine(name: str) -> bool:
    name = name.lower().rstrip(".")
    if name in _LOOPBACK_NAMES or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)  # no DNS server can give an address another meaning
    except ValueError:
        return False
    return True


def _is_same(origin: bytes, host: bytes) -> bool:
    """Whether the page came from this very gateway."""
    return origin in (b"http://" + host, b"https://" + host)
