"""The control API: what a node says of itself to people, scripts and Prometheus, as JSON.

A page in a browser must not reach it through a name that resolves to loopback (DNS rebinding),
so the Host header is checked before anything else. Beyond loopback every path but ``/healthz``
wants the API key.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from meshnode.errors import MeshnodeError, NoCandidate, PeerUnreachable

SCHEMA_VERSION = 1

_log = structlog.get_logger(__name__)
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# A name longer than this is no peer's and no service's.
_MAX_PARAMETER = 256

Json = Mapping[str, object]


class NodeView(Protocol):
    """What the control API needs of a node. Every call reads only, and all but ping at once."""

    def status(self) -> Json: ...

    def peers(self) -> Json: ...

    def decisions(self) -> Json: ...

    def explain(self, service: str | None, target: str | None) -> Json:
        """Say who would serve a request now; changes nothing.

        Raises:
            NoCandidate: nobody would.
        """
        ...

    async def ping(self, peer: str) -> Json:
        """Return one round trip to a peer, named by peer ID or by name.

        Raises:
            PeerUnreachable: nobody is called that, or it can't be reached.
        """
        ...

    def readiness(self) -> tuple[bool, list[str]]:
        """Return whether the node can serve, and what is missing if not."""
        ...

    def metrics(self) -> CollectorRegistry:
        """Return the registry, its gauges brought up to now."""
        ...


def build_app(
    view: NodeView, *, api_key: str | None = None, allowed_hosts: Iterable[str] = ()
) -> ASGIApp:
    """Return the control API of ``view`` as an ASGI application.

    Args:
        view: the node.
        api_key: what a client must show as ``Authorization: Bearer``; None on loopback.
        allowed_hosts: names besides the loopback ones that a Host header may carry.
    """
    pages: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/healthz": _page(lambda request: _json({"status": "alive"})),
        "/readyz": _page(lambda request: _readiness(view)),
        "/metrics": _page(lambda request: _metrics(view, request)),
        "/api/status": _page(lambda request: _json(view.status())),
        "/api/peers": _page(lambda request: _json(view.peers())),
        "/api/decisions": _page(lambda request: _json(view.decisions())),
        "/api/explain": _page(lambda request: _explain(view, request)),
        "/api/ping": partial(_ping, view),
    }
    app = Starlette(
        routes=[Route(path, page, methods=["GET"]) for path, page in pages.items()],
        exception_handlers={
            HTTPException: _on_http_error,
            MeshnodeError: _on_mesh_error,
            _BadParameter: _on_bad_parameter,
            Exception: _on_bug,
        },
    )
    # Otherwise /healthz/ would be answered by a redirect built from the client's Host header.
    app.router.redirect_slashes = False
    return _Guard(app, api_key, frozenset(allowed_hosts) | _LOOPBACK_NAMES)


def error_response(
    status: int,
    code: str,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an error in the shape that OpenAI's clients read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "code": code, "param": param}}
    return JSONResponse(body, status, headers={**_HEADERS, **(headers or {})})


class _Guard:
    """Turns away who has no business here, before any route is looked at."""

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: frozenset[str]) -> None:
        self._app = app
        self._api_key = api_key
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ConnectionRefusedError(f"the control API speaks no {scope['type']}")
        request = Request(scope)
        refusal = self._refuse(request)
        await (refusal or self._app)(scope, receive, send)

    def _refuse(self, request: Request) -> Response | None:
        host = _host_name(request.headers.get("host", ""))
        # With a key a page in a browser can't get in anyway, and an address is no name to rebind.
        if host not in self._hosts and not (self._api_key is not None and _is_address(host)):
            return error_response(
                403,
                "host_not_allowed",
                f"this API is not served under the host name {host[:100]!r}",
            )
        if self._api_key is None or request.url.path == "/healthz":
            return None
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(
            key.strip().encode("latin-1"), self._api_key.encode("ascii")
        ):
            return None
        return error_response(
            401,
            "api_key_required",
            "send the node's API key as Authorization: Bearer KEY",
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


def _page(build: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        return build(request)

    return page


def _json(body: Json, status: int = 200) -> Response:
    return JSONResponse({"schema_version": SCHEMA_VERSION, **body}, status, headers=_HEADERS)


def _readiness(view: NodeView) -> Response:
    ready, missing = view.readiness()
    body = {"status": "ready" if ready else "not ready", "missing": missing}
    return _json(body, 200 if ready else 503)


def _metrics(view: NodeView, request: Request) -> Response:
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(view.metrics()), media_type=content_type, headers=_HEADERS)


def _explain(view: NodeView, request: Request) -> Response:
    chosen = _parameters(request, "service", "target")
    return _json(view.explain(chosen.get("service"), chosen.get("target")))


async def _ping(view: NodeView, request: Request) -> Response:
    peer = _parameters(request, "peer").get("peer")
    if peer is None:
        raise _BadParameter("peer", "missing_parameter", "say whom: peer=PEER_ID_OR_NAME")
    return _json(await view.ping(peer))


class _BadParameter(Exception):
    """A query parameter that nobody asked for, or with a value that can't be."""

    def __init__(self, name: str, code: str, message: str) -> None:
        super().__init__(message)
        self.name = name
        self.code = code


def _parameters(request: Request, *known: str) -> dict[str, str]:
    """Return the query's parameters that have a value.

    Raises:
        _BadParameter: one is not known, or longer than any name.
    """
    chosen: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            message = f"no such parameter; these are: {', '.join(known)}"
            raise _BadParameter(name, "unknown_parameter", message)
        if len(value) > _MAX_PARAMETER:
            raise _BadParameter(name, "too_long", "the value is too long")
        if value:
            chosen[name] = value
    return chosen


async def _on_bad_parameter(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, _BadParameter)
    return error_response(400, exc.code, str(exc), param=exc.name)


async def _on_http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    if exc.status_code == 404:
        return error_response(404, "not_found", f"there is nothing at {request.url.path[:200]}")
    if exc.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
        return error_response(405, "method_not_allowed", message, headers=exc.headers)
    return error_response(exc.status_code, "http_error", exc.detail, headers=exc.headers)


async def _on_mesh_error(request: Request, exc: Exception) -> Response:
    if isinstance(exc, NoCandidate):
        return error_response(503, "no_candidate", str(exc))
    if isinstance(exc, PeerUnreachable):
        return error_response(504, "peer_unreachable", str(exc))
    return error_response(500, "node_error", str(exc))


async def _on_bug(request: Request, exc: Exception) -> Response:
    _log.error("control API failed", path=request.url.path, error=repr(exc))
    return error_response(500, "internal_error", "the node failed to answer; its log says why")
