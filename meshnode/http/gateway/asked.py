"""One request as the gateway handles it, with a body that can be sent again."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshnode.core.openai_request import RoutedRequest
from meshnode.core.tries import Tries
from meshnode.http.gateway.bodies import LAST_CHUNK, encode_chunk
from meshnode.http.gateway.client import RequestBody
from meshnode.http.gateway.headers import request_for_engine
from meshnode.http.gateway.heads import RequestHead

# What leaves with the head, before the peer's answer to the request for admission: a refusal
# wastes no more than this.
FIRST_BYTES = 64 * 1024
_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})


class Upload:
    """What follows the first bytes, as far as it has come; kept so that it can be sent again.

    Args:
        known: bytes that were read already.
        body: what is still to be read from the client, if there is more.
        chunked: whether the engine gets the body in chunks.
        limit: bytes to keep; beyond that the request can't be sent again.
    """

    def __init__(
        self, known: bytes, body: RequestBody | None, *, chunked: bool, limit: int
    ) -> None:
        self._kept = [known] if known else []
        self._size = len(known)
        self._body = body
        self._chunked = chunked
        self._limit = limit
        self.is_whole = body is None  # nothing more is to be read
        self.can_repeat = True

    async def piece(self, index: int) -> bytes | None:
        """Return a piece, in order from 0; None behind the last.

        Raises:
            BadRequest, ClientGone: as ``RequestBody.read``.
        """
        if self.can_repeat and index < len(self._kept):
            return self._kept[index]
        if self._body is None:
            return None
        data = await self._body.read()
        if not data:
            self._body = None
            self.is_whole = True
            data = LAST_CHUNK if self._chunked else b""
        elif self._chunked:
            data = encode_chunk(data)
        if not data:
            return None
        self._size += len(data)
        if self._size > self._limit:
            self.can_repeat = False
            self._kept.clear()
        else:
            self._kept.append(data)
        return data


@dataclass(slots=True)
class Asked:
    """One request: as the client sent it, as routing reads it, as the engine gets it."""

    head: RequestHead
    routed: RoutedRequest
    request_id: bytes
    first: bytes  # for the engine: the head, and the beginning of the body
    upload: Upload | None  # the rest of the body
    is_inference: bool  # it asks for a computation: sent twice, it only costs time
    waits_for_continue: bool  # the client holds its body back until it is asked for
    began_at: float  # trio.current_time() when its head had come
    tries: Tries = field(default_factory=Tries)

    @property
    def may_repeat(self) -> bool:
        """Whether it does no harm if two engines get it, and it is all here to be sent again."""
        if self.upload is not None and not self.upload.can_repeat:
            return False
        return self.is_inference or self.head.method in _IDEMPOTENT


def for_engine(
    head: RequestHead,
    request_id: bytes,
    known: bytes,
    body: RequestBody | None,
    *,
    without: frozenset[bytes],
    keep_limit: int,
    traceparent: bytes | None = None,
) -> tuple[bytes, Upload | None]:
    """Return what leaves first, and what follows it.

    Args:
        known: what was read of the body.
        body: what is still to be read of it; None: ``known`` is all.
        without: fields that are not passed on.
        keep_limit: bytes of the body to keep for another attempt.
        traceparent: what the engine is told of the trace; None: what the client said.
    """
    if body is None:
        length = len(known) if head.has_body or head.length is not None else None
        lines = request_for_engine(
            head, request_id, length=length, without=without, traceparent=traceparent
        )
        payload = lines + known
        if len(payload) <= FIRST_BYTES:
            return payload, None
        rest = Upload(payload[FIRST_BYTES:], None, chunked=False, limit=keep_limit + FIRST_BYTES)
        return payload[:FIRST_BYTES], rest
    lines = request_for_engine(
        head, request_id, length=None, without=without, traceparent=traceparent
    )
    known = encode_chunk(known) if head.chunked else known
    return lines, Upload(known, body, chunked=head.chunked, limit=keep_limit)
