"""The control API's own description, at ``/openapi.json``.

Written by hand, because a schema says more than what could be derived; a test holds it to the
routes that are there, and a fuzzer to the answers that they give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from meshnode import __version__
from meshnode.http.answers import HEADERS

PATH = "/openapi.json"

_Schema = Mapping[str, object]


def route(others: Iterable[BaseRoute]) -> Route:
    """Return the route that serves the document, which describes ``others``."""
    described = document(route.path for route in others if isinstance(route, Route))

    async def answer(request: Request) -> Response:
        return JSONResponse(described, headers=HEADERS)

    return Route(PATH, answer, methods=["GET"])


def document(served: Iterable[str] | None = None) -> dict[str, object]:
    """Return the OpenAPI document of those paths that are served; by default of all there are."""
    paths = _paths()
    there = set(paths if served is None else served)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "meshnode control API",
            "version": __version__,
            "description": "What one node says of itself and of the mesh as it knows it.",
        },
        "security": [{}, {"key": []}],
        "paths": {path: item for path, item in paths.items() if path in there},
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": _SCHEMAS,
        },
    }


# Building blocks


def _object(properties: Mapping[str, _Schema], *optional: str) -> dict[str, object]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required}


def _list(items: _Schema) -> _Schema:
    return {"type": "array", "items": items}


def _maybe(kind: str) -> _Schema:
    return {"type": [kind, "null"]}


def _ref(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(text: str, schema: _Schema, media_type: str = "application/json") -> _Schema:
    return {"description": text, "content": {media_type: {"schema": schema}}}


def _get(
    summary: str,
    schema: _Schema,
    *,
    media_type: str = "application/json",
    parameters: tuple[_Schema, ...] = (),
    others: Mapping[str, str] | None = None,
    needs_key: bool = False,
    is_post: bool = False,
    status: str = "200",
) -> dict[str, object]:
    failures = {
        "400": "A parameter is not known or can't be",
        "401": "The key is missing or wrong",
        "403": "The Host header or the site that asks is not allowed",
        **(others or {}),
    }
    operation: dict[str, object] = {
        "summary": summary,
        "parameters": list(parameters),
        "responses": {
            status: _answer("As asked", schema, media_type),
            **{code: _answer(text, _ref("Error")) for code, text in failures.items()},
        },
    }
    if needs_key:
        operation["security"] = [{"key": []}]
    return {"post" if is_post else "get": operation}


def _post_json(operation: dict[str, object], schema: _Schema) -> dict[str, object]:
    """Return a POST that takes a JSON body."""
    post = operation["post"]
    assert isinstance(post, dict)
    post["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _query(name: str, text: str, *, required: bool = False, longest: int = 256) -> _Schema:
    return {
        "name": name,
        "in": "query",
        "required": required,
        "description": text,
        "schema": {"type": "string", "maxLength": longest, "minLength": int(required)},
    }


def _body(properties: Mapping[str, _Schema], *optional: str) -> _Schema:
    return _object({"schema_version": {"type": "integer"}, **properties}, *optional)


_TEXT: _Schema = {"type": "string"}
_COUNT: _Schema = {"type": "integer", "minimum": 0}
_NUMBER: _Schema = {"type": "number"}
_FLAG: _Schema = {"type": "boolean"}

_P2P_ROW = _object(
    {
        **dict.fromkeys(("name", "id", "tunnelAddress", "serviceID", "lastSeen"), _TEXT),
        "isOnline": _FLAG,
    }
)
_P2P_STRUCT = _object(
    dict.fromkeys(("Name", "ID", "TunnelAddress", "ServiceID", "LastSeen"), _TEXT)
)
_P2P_COUNT = _object({"online": _COUNT, "total": _COUNT})

_DECISION: dict[str, _Schema] = {
    "age_s": _NUMBER,
    "wall_time": _maybe("number"),
    "service_id": _TEXT,
    "policy": {"enum": ["vram", "rotate", "random"]},
    "target": _maybe("string"),
    "attempt": {"type": "integer", "minimum": 1},
    "picked": _maybe("string"),
    "tier": _TEXT,
    "outcome": _maybe("string"),
    "duration_s": _maybe("number"),
    "retries": _maybe("integer"),
    "model": _maybe("string"),
    "match_ratio": _maybe("number"),
    "forced_off": _maybe("string"),
    "candidates_total": _COUNT,
    "candidates": _list(_ref("Candidate")),
}
_SCHEMAS: dict[str, _Schema] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _TEXT,
                    "type": _TEXT,
                    "code": _maybe("string"),
                    "param": _maybe("string"),
                }
            )
        }
    ),
    "Service": _object(
        {
            "service_id": _TEXT,
            "models": _list(_TEXT),
            "loaded": _list(_TEXT),
            "in_flight": _COUNT,
            "max_in_flight": _maybe("integer"),
            "healthy": _FLAG,
        }
    ),
    # How this node's own requests to the service went: closed is well, open is put aside.
    "Circuit": _object(
        {
            "circuit": {"enum": ["closed", "open", "half_open"]},
            "circuit_reason": _maybe("string"),
            "ejected_for_s": _maybe("number"),
            "proven": _FLAG,
        }
    ),
    "Peer": _object(
        {
            "peer_id": _TEXT,
            "name": _TEXT,
            "state": {"enum": ["up", "suspect", "draining", "left", "offline"]},
            "online": _FLAG,
            "last_seen_s": _NUMBER,
            "available_vram": _maybe("integer"),
            "total_vram": _maybe("integer"),
            "gpu_count": _maybe("integer"),
            "in_flight": _COUNT,
            "services": _list({"allOf": [_ref("Service"), _ref("Circuit")]}),
            "addrs": _list(_TEXT),
            "connected": _FLAG,
            "path": {"enum": ["direct", "relayed", None]},
            "rtt_ms": _maybe("number"),
            "version": _maybe("string"),
            "reason": _TEXT,
        }
    ),
    "Candidate": _object(
        {
            "peer_id": _TEXT,
            "name": _TEXT,
            "in_flight": _COUNT,
            "own_in_flight": _COUNT,
            "others_in_flight": _COUNT,
            "last_used_s": _maybe("number"),
            "available_vram": _maybe("integer"),
            "excluded": _maybe("string"),
            "service_id": _maybe("string"),
            "loaded": _maybe("boolean"),
            "match_ratio": _maybe("number"),
        }
    ),
    "Decision": _object(_DECISION),
}

_EXPLAINED = _body(
    # How many requests of the model the load drove off their warm cache within the last minute.
    {**_DECISION, "pressure": _COUNT},
    "pressure",
)
_NAME: _Schema = {"type": "string", "minLength": 1, "maxLength": 256}
_OBJECTS = _list({"type": "object"})
_TEXT_OR_OBJECTS: _Schema = {"anyOf": [_TEXT, _OBJECTS]}


def _prompt(where: str, schema: _Schema, beside: Mapping[str, _Schema]) -> _Schema:
    names = dict.fromkeys(("model", "service", "target"), _NAME)
    optional = ("service", "target", *beside)
    return _object({**names, where: schema, **beside}, *optional) | {"additionalProperties": False}


_ASKED: _Schema = {
    "oneOf": [
        _prompt("prompt", _TEXT, {}),
        _prompt(
            "messages",
            _OBJECTS,
            {"system": _TEXT_OR_OBJECTS, "tools": _OBJECTS, "functions": _OBJECTS},
        ),
        _prompt("input", _TEXT_OR_OBJECTS, {"instructions": _TEXT, "tools": _OBJECTS}),
    ]
}
_READY = _body({"status": _TEXT, "missing": _list(_TEXT)})
_STATUS = _body(
    {
        "peer_id": _TEXT,
        "name": _TEXT,
        "version": _TEXT,
        "network": _TEXT,
        "fingerprint": _TEXT,
        "open": _FLAG,
        "state": {"enum": ["up", "draining", "leaving"]},
        "ready": _FLAG,
        "missing": _list(_TEXT),
        "uptime_s": _NUMBER,
        "addrs": _list(_TEXT),
        "proxy": _maybe("string"),
        "api": _TEXT,
        "policy": _TEXT,
        "service": _maybe("string"),
        "target": _maybe("string"),
        "available_vram": _maybe("integer"),
        "total_vram": _maybe("integer"),
        "gpu_count": _maybe("integer"),
        "services": _list(_ref("Service")),
        "own_in_flight": _COUNT,
        "peers_online": _COUNT,
        "peers_known": _COUNT,
        "links": _COUNT,
    }
)


def _paths() -> dict[str, object]:
    ready = _get("Whether the node has joined and what it serves is well", _READY)
    ready["get"]["responses"]["503"] = _answer("Not ready; says why", _READY)  # type: ignore[index]
    p2p_rows = _object({"nodes": _list(_P2P_ROW)})
    return {
        "/healthz": _get("Whether the process lives", _body({"status": _TEXT})),
        "/readyz": ready,
        "/metrics": _get("Prometheus metrics", _TEXT, media_type="text/plain"),
        "/api/status": _get("This node", _STATUS),
        "/api/peers": _get(
            "Every node that this one knows", _body({"self": _TEXT, "peers": _list(_ref("Peer"))})
        ),
        "/api/decisions": _get(
            "The last routing decisions", _body({"decisions": _list(_ref("Decision"))})
        ),
        "/api/explain": _get(
            "Who would serve a request now; changes nothing",
            _EXPLAINED,
            parameters=(
                _query("service", "The service asked for; default the only one"),
                _query("target", "One peer, by peer ID or name"),
                _query("model", "The model asked for, in whichever service has it"),
            ),
            others={"503": "Nobody can serve"},
        )
        | _post_json(
            _get(
                "Who would serve this prompt now; changes nothing",
                _EXPLAINED,
                others={
                    "408": "The body did not come in time",
                    "413": "The body is too long",
                    "503": "Nobody can serve",
                },
                needs_key=True,
                is_post=True,
            ),
            _ASKED,
        ),
        "/api/ping": _get(
            "One round trip to a peer",
            _body({"peer_id": _TEXT, "name": _TEXT, "rtt_ms": _NUMBER}),
            parameters=(_query("peer", "A peer ID or a name", required=True),),
            others={
                "404": "Nobody else, or no single one, is called so",
                "504": "The peer can't be reached",
            },
        ),
        "/api/events": _get(
            "What changes, as server-sent events: a snapshot, then what differs",
            _TEXT,
            media_type="text/event-stream",
            others={"503": "Too many pages look on"},
        ),
        "/api/drain": _get(
            "Take nothing new, finish what runs, and leave",
            _body(
                {
                    "state": {"const": "draining"},
                    "served_here": _COUNT,
                    "sent_elsewhere": _COUNT,
                    "grace_s": _NUMBER,
                }
            ),
            needs_key=True,
            is_post=True,
            status="202",
        ),
        "/api/forward": _get(
            "Open one local port for each peer of a service while the request is open",
            _TEXT,
            media_type="application/x-ndjson",
            parameters=(_query("service", "The service", required=True, longest=64),),
            others={"503": "Too many programs follow services"},
            needs_key=True,
            is_post=True,
        ),
        "/api/p2p": _get(
            "LocalAI: its overview of nodes",
            _object(
                {
                    key: _list(_P2P_STRUCT)
                    for key in ("llama_cpp_nodes", "federated_nodes", "mlx_nodes")
                }
            ),
        ),
        "/api/p2p/workers": _get(
            "LocalAI: services named worker and mlx_worker",
            _object({"llama_cpp": p2p_rows, "mlx": p2p_rows, "nodes": _list(_P2P_ROW)}),
        ),
        "/api/p2p/federation": _get("LocalAI: all other services", p2p_rows),
        "/api/p2p/stats": _get(
            "LocalAI: how many of each kind",
            _object(dict.fromkeys(("llama_cpp_workers", "federated", "mlx_workers"), _P2P_COUNT)),
        ),
        "/api/p2p/token": _get(
            "LocalAI: the token that joins the mesh",
            _TEXT,
            media_type="text/plain",
            others={"404": "The mesh is open and has none"},
            needs_key=True,
        ),
    }
