"""Reading a request's body, as far as routing needs it, within the room that all share."""

from __future__ import annotations

import trio

from meshnode.core.form_body import FORM_HEAD_BYTES
from meshnode.core.openai_request import is_form
from meshnode.errors import Overloaded
from meshnode.http.gateway.answers import RETRY_AFTER
from meshnode.http.gateway.client import Client, RequestBody
from meshnode.http.gateway.heads import BadRequest, RequestHead
from meshnode.http.gateway.shared import Shared


class Reading:
    """One request's body on its way in; ``release`` gives its room back."""

    __slots__ = ("_client", "_head", "_kept", "_limits", "_shared", "body", "waits_for_continue")

    def __init__(self, shared: Shared, client: Client, head: RequestHead) -> None:
        self._shared = shared
        self._limits = shared.settings.limits
        self._client = client
        self._head = head
        self._kept = 0  # bytes of the body that count as kept
        self.body = client.body_of(head)
        self.waits_for_continue = head.expects_continue

    def release(self) -> None:
        """Count nothing of the body as kept any more."""
        self._shared.keep_bytes(-self._kept)

    async def for_routing(self, content_type: str) -> tuple[bytes, RequestBody | None]:
        """Return (what routing needs of the body, what is left to be read).

        Raises:
            BadRequest: it is too large, or no body.
            Overloaded: there is no room for it now.
            ClientGone: the client went away.
        """
        limit = self._limits.body_bytes
        form = is_form(content_type)
        if not form and self._head.length is not None and self._head.length > limit:
            raise BadRequest(413, f"the body is more than {limit} bytes", "too_large")
        size = self._head.length if self._head.length is not None else limit
        if not self._keep(min(size, FORM_HEAD_BYTES) if form else size):
            raise Overloaded("too many large requests are under way", retry_after=RETRY_AFTER)
        if self.waits_for_continue:
            self.waits_for_continue = False
            await self._client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not form:
            return await self.body.read_whole(limit), None
        pieces: list[bytes] = []
        while sum(map(len, pieces)) < FORM_HEAD_BYTES and (piece := await self.body.read()):
            pieces.append(piece)
        return b"".join(pieces), None if self.body.done else self.body

    async def skip(self) -> None:
        """Read the body for nothing: an answer written before would be lost."""
        if self._head.has_body and not self._head.expects_continue:
            await self._drain()

    async def _drain(self) -> None:
        left = self._limits.body_bytes
        with trio.move_on_after(self._limits.body_pause):
            while left > 0 and (piece := await self.body.read()):
                left -= len(piece)

    def keep_rest(self, rest: RequestBody | None) -> bool:
        """Count the rest of a body that streams through as kept, if there is room for it."""
        if rest is None:
            return False
        length = self._head.length
        limit = self._limits.body_bytes
        return self._keep(limit if length is None else min(length, limit))

    def _keep(self, size: int) -> bool:
        if not self._shared.keep_bytes(size):
            return False
        self._kept += size
        return True
