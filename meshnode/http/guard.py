"""Who may use the control API: turned away before any route is looked at.

The law here:

- A page in a browser must not reach it through a name that resolves to loopback (DNS rebinding),
  so the Host header is checked first.
- What only reads is open on loopback where no key was configured, because nobody but this
  machine's own users gets there. What changes the node, or tells its token, wants a key always:
  the configured one, or the node's own of this run, which stands in its state folder for whoever
  may read that. A web page can guess neither.
- A request that a browser says another site made is refused where it would change something.
- Whoever comes through the Unix socket has passed the file system's check, and needs no key.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from meshnode.http.answers import error_response
from meshnode.state_files import write_atomically

LOCAL_KEY_FILE = "api.key"
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# Told without a key: that the node is alive, what a browser needs to ask for the key, and what
# the API is. Nothing of it says anything about this node.
_PUBLIC = ("/healthz", "/", "/openapi.json")
_PUBLIC_FOLDER = "/dashboard/"
# Reading these gives away what opens the mesh.
_SECRET = frozenset({"/api/p2p/token"})
_READING = frozenset({"GET", "HEAD"})


@dataclass(frozen=True, slots=True)
class Access:
    """Which keys and host names open the control API."""

    api_key: str | None = field(default=None, repr=False)  # what the operator configured
    local_key: str | None = field(default=None, repr=False)  # this run's own
    allowed_hosts: Iterable[str] = ()  # names besides the loopback ones that Host may carry
    is_unix: bool = False  # whether the API listens on a Unix socket

    def admits(self, shown: str) -> bool:
        """Say whether ``shown`` is one of the keys."""
        given = shown.encode("utf-8", "surrogateescape")
        keys = [key.encode() for key in (self.api_key, self.local_key) if key]
        return any(hmac.compare_digest(given, key) for key in keys)


def make_local_key(state_dir: Path) -> str:
    """Write a new random key for this run, readable by this user alone, and return it.

    Raises:
        OSError: the state folder can't be written to.
    """
    key = secrets.token_urlsafe(32)
    write_atomically(state_dir / LOCAL_KEY_FILE, key.encode() + b"\n")
    return key


def forget_local_key(state_dir: Path) -> None:
    """Remove the key of a run that ends: it opens nothing any more."""
    with suppress(OSError):
        (state_dir / LOCAL_KEY_FILE).unlink(missing_ok=True)


class Guard:
    """Lets through to ``app`` whoever may come."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._hosts = frozenset(h.lower() for h in access.allowed_hosts) | _LOOPBACK_NAMES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ConnectionRefusedError(f"the control API speaks no {scope['type']}")
        request = Request(scope)
        await (self._refuse(request) or self._app)(scope, receive, send)

    def _refuse(self, request: Request) -> Response | None:
        access = self._access
        if access.is_unix:
            return None
        host = _host_name(request.headers.get("host", ""))
        # With a key a page in a browser can't get in anyway, and an address is no name to rebind.
        if host not in self._hosts and not (access.api_key is not None and _is_address(host)):
            return error_response(
                403,
                "host_not_allowed",
                f"this API is not served under the host name {host[:100]!r}; "
                "if it is yours, allow it: --api-host-allow NAME",
            )
        changing = request.method not in _READING
        if changing and request.headers.get("sec-fetch-site", "none") not in (
            "none",
            "same-origin",
        ):
            return error_response(
                403, "cross_site", "another site's page may not change anything here"
            )
        path = request.url.path
        if not changing and (path in _PUBLIC or path.startswith(_PUBLIC_FOLDER)):
            return None
        if access.api_key is None and not changing and path not in _SECRET:
            return None
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and access.admits(key.strip()):
            return None
        return error_response(
            401,
            "api_key_required",
            "send the node's API key as Authorization: Bearer KEY; on its own host the file "
            f"{LOCAL_KEY_FILE} in its state folder holds one",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _host_name(header: str) -> str:
    """Return the host of a Host header, in lower case, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower().rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
