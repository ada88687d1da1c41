"""The control API: what a node says of itself to people, scripts and Prometheus, as JSON.

Who may ask for it is decided in ``guard``, before anything here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from meshnode.core.explain_request import MAX_BYTES, ExplainRequest, parse_explain
from meshnode.errors import (
    MeshnodeError,
    NoCandidate,
    NoSuchPeer,
    ParseError,
    PeerUnreachable,
)
from meshnode.http import openapi, page
from meshnode.http.answers import HEADERS, error_response
from meshnode.http.body import BodyRefused, read_body
from meshnode.http.guard import Access, Guard
from meshnode.metrics import Metrics

SCHEMA_VERSION = 1

_log = structlog.get_logger(__name__)
# A name longer than this is no peer's and no service's.
_MAX_PARAMETER = 256

Json = Mapping[str, object]


class NodeView(Protocol):
    """What the control API needs of a node. All calls but drain read only; all but ping at once."""

    def status(self) -> Json: ...

    def peers(self) -> Json: ...

    def decisions(self) -> Json: ...

    def explain(self, service: str | None, target: str | None) -> Json:
        """Say who would serve a request now; changes nothing.

        Raises:
            NoCandidate: nobody would.
        """
        ...

    def explain_model(self, asked: ExplainRequest) -> Json:
        """Say who would serve a request for a model, and its prompt, now; changes nothing.

        Raises:
            NoCandidate: nobody would.
        """
        ...

    async def ping(self, peer: str) -> Json:
        """Return one round trip to a peer, named by peer ID or by name.

        Raises:
            NoSuchPeer: nobody is called that.
            PeerUnreachable: it can't be reached.
        """
        ...

    def drain(self) -> Json:
        """Begin to drain, unless that has begun; say what still runs."""
        ...

    def readiness(self) -> tuple[bool, list[str]]:
        """Return whether the node can serve, and what is missing if not."""
        ...

    def metrics(self) -> CollectorRegistry:
        """Return the registry, its gauges brought up to now."""
        ...


def build_app(
    view: NodeView,
    *,
    access: Access | None = None,
    events: ASGIApp | None = None,
    more: Sequence[Route] = (),
    metrics: Metrics | None = None,
) -> ASGIApp:
    """Return the control API of ``view`` as an ASGI application.

    Args:
        view: the node.
        access: who may use it; by default whoever reaches it under a loopback name may read.
        events: what answers ``/api/events``, if anything does.
        more: further routes, behind the same guard.
        metrics: where an answer of 500 for a bug is counted, besides being logged.
    """
    pages: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/healthz": _page(lambda request: _json({"status": "alive"})),
        "/readyz": _page(lambda request: _readiness(view)),
        "/metrics": _page(lambda request: _metrics(view, request)),
        "/api/status": _page(lambda request: _json(view.status())),
        "/api/peers": _page(lambda request: _json(view.peers())),
        "/api/decisions": _page(lambda request: _json(view.decisions())),
        "/api/ping": partial(_ping, view),
    }
    routes = [Route(path, build, methods=["GET"]) for path, build in pages.items()]
    # One route for both, so that whoever tries another method is told of both.
    routes.append(Route("/api/explain", partial(_explain, view), methods=["GET", "POST"]))
    routes += more
    drain = _page(lambda request: _json(view.drain(), 202))
    routes.append(Route("/api/drain", drain, methods=["POST"]))
    if events is not None:
        routes.append(Route("/api/events", events, methods=["GET"]))
    routes += [openapi.route(routes), *page.routes()]
    # There from the start: an alert on its increase would not see a counter begin at one.
    faults = (metrics or Metrics()).protocol_faults
    failed = faults.labels(protocol="control_api", code="request_failed")
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: _on_http_error,
            MeshnodeError: _on_mesh_error,
            _BadParameter: _on_bad_parameter,
            BodyRefused: _on_body_refused,
            Exception: partial(_on_bug, failed),
        },
    )
    # Otherwise /healthz/ would be answered by a redirect built from the client's Host header.
    app.router.redirect_slashes = False
    return Guard(app, access or Access())


def _page(build: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        return build(request)

    return page


def _json(body: Json, status: int = 200) -> Response:
    return JSONResponse({"schema_version": SCHEMA_VERSION, **body}, status, headers=HEADERS)


def _readiness(view: NodeView) -> Response:
    ready, missing = view.readiness()
    body = {"status": "ready" if ready else "not ready", "missing": missing}
    return _json(body, 200 if ready else 503)


def _metrics(view: NodeView, request: Request) -> Response:
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(view.metrics()), media_type=content_type, headers=HEADERS)


async def _explain(view: NodeView, request: Request) -> Response:
    """Answer; a prompt comes by POST, as it has no room in a URL, and URLs end up in logs."""
    if request.method == "POST":
        _parameters(request)
        body = await read_body(request, MAX_BYTES)
        return _json(view.explain_model(parse_explain(body)))
    chosen = _parameters(request, "service", "target", "model")
    service, target, model = (chosen.get(name) for name in ("service", "target", "model"))
    if model is None:
        return _json(view.explain(service, target))
    return _json(view.explain_model(ExplainRequest(model, service_id=service, target=target)))


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
            message = f"no such parameter; these are: {', '.join(known) or 'none'}"
            raise _BadParameter(name, "unknown_parameter", message)
        if len(value) > _MAX_PARAMETER:
            raise _BadParameter(name, "too_long", "the value is too long")
        if value:
            chosen[name] = value
    return chosen


async def _on_bad_parameter(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, _BadParameter)
    return error_response(400, exc.code, str(exc), param=exc.name)


async def _on_body_refused(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, BodyRefused)
    # What is left of the body must not be taken for the next request.
    return error_response(exc.status, exc.code, str(exc), headers={"Connection": "close"})


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
    if isinstance(exc, ParseError):
        return error_response(400, "invalid_request", str(exc), param=exc.param)
    if isinstance(exc, NoSuchPeer):
        return error_response(404, "no_such_peer", str(exc), param="peer")
    if isinstance(exc, PeerUnreachable):
        return error_response(504, "peer_unreachable", str(exc))
    return error_response(500, "node_error", str(exc))


async def _on_bug(failed: Counter, request: Request, exc: Exception) -> Response:
    failed.inc()
    _log.error("control_api_failed", path=request.url.path, error=repr(exc))
    return error_response(500, "internal_error", "the node failed to answer; its log says why")
