"""``POST /api/forward``: ports to every peer of a service, for as long as the request is open.

The answer is a stream of JSON lines, each the whole list of ports as it stands. It ends when the
client goes, and the ports with it: nothing is left open for a program that is no more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from meshnode.http.answers import HEADERS, error_response
from meshnode.net.forwards import Forward, Forwards

# How often the list is said again though it is the same: a dead client is found out by it.
REPEAT = 5.0  # seconds
# Each is a program that runs a model over several hosts; a host runs a few.
MAX_FOLLOWERS = 8
_MAX_NAME = 64


class ForwardApi:
    """An ASGI application over ``forwards``."""

    def __init__(self, forwards: Forwards) -> None:
        self._forwards = forwards
        self._followers = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = Request(scope).query_params
        service_id = query.get("service", "")
        refusal = self._refuse(list(query), service_id)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._followers += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_wait_for_disconnect, receive, nursery.cancel_scope)
                await _stream(self._forwards, service_id, send)
        finally:
            self._followers -= 1

    def _refuse(self, names: list[str], service_id: str) -> Response | None:
        for name in names:
            if name != "service":
                message = "no such parameter; this is one: service"
                return error_response(400, "unknown_parameter", message, param=name)
        if not service_id:
            message = "say which service: service=NAME"
            return error_response(400, "missing_parameter", message, param="service")
        if len(service_id) > _MAX_NAME:
            return error_response(400, "too_long", "the value is too long", param="service")
        if self._followers >= MAX_FOLLOWERS:
            message = f"{MAX_FOLLOWERS} programs follow services here already; end one"
            return error_response(503, "too_many_followers", message)
        return None


async def _stream(forwards: Forwards, service_id: str, send: Send) -> None:
    headers = {**HEADERS, "Content-Type": "application/x-ndjson", "Connection": "close"}
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }
    )

    async def tell(listed: Sequence[Forward]) -> None:
        rows = [{"peer_id": f.peer_id, "name": f.name, "address": f.address} for f in listed]
        line = json.dumps({"schema_version": 1, "service": service_id, "forwards": rows})
        body = line.encode() + b"\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})

    await forwards.follow(service_id, tell, repeat=REPEAT)


async def _wait_for_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
