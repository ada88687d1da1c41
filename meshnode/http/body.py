"""The body of a request to the control API, read within limits."""

from __future__ import annotations

import trio
from starlette.requests import ClientDisconnect, Request

# A program on this machine sends a megabyte within milliseconds.
BODY_TIMEOUT = 10.0  # seconds
# Of a body that is too long, so much is read for nothing: an answer that is written while the
# client still sends is lost with the connection.
_DRAINED = 16  # times the limit


class BodyRefused(Exception):
    """A body that is not read: ``status`` and ``code`` say why."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


async def read_body(request: Request, limit: int) -> bytes:
    """Return the whole body.

    Raises:
        BodyRefused: it has more than ``limit`` bytes (413), or did not come in time (408).
    """
    pieces: list[bytes] = []
    size = 0
    with trio.move_on_after(BODY_TIMEOUT):
        try:
            async for piece in request.stream():
                size += len(piece)
                if size <= limit:
                    pieces.append(piece)
                elif size > _DRAINED * limit:
                    break
        except ClientDisconnect as exc:
            raise BodyRefused(400, "cut_short", "the body was cut short") from exc
        if size > limit:
            raise BodyRefused(413, "too_large", f"the body is more than {limit:,} bytes")
        return b"".join(pieces)
    raise BodyRefused(408, "timeout", f"the body did not come within {BODY_TIMEOUT:g} s")
