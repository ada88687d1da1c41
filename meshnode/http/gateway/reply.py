"""What a client is told of one request: the gateway's own answers, and its lines in a peer's."""

from __future__ import annotations

import structlog

from meshnode.core.openai_request import Api
from meshnode.http.gateway.answers import Answer, render
from meshnode.http.gateway.attempts import Served
from meshnode.http.gateway.client import Client, RequestBody
from meshnode.http.gateway.headers import printable
from meshnode.http.gateway.heads import RequestHead
from meshnode.http.gateway.shared import Shared
from meshnode.tracing import Span

log = structlog.get_logger(__name__)


class Reply:
    """Answers one request here. What writes returns whether another request may follow.

    Args:
        api: whose clients' shape an error has.
        body: what was asked with; unread bytes of it must not be taken for the next request.
    """

    __slots__ = ("_api", "_body", "_client", "_head", "_id", "_shared", "_span")

    def __init__(
        self,
        shared: Shared,
        client: Client,
        head: RequestHead,
        *,
        request_id: bytes,
        api: Api,
        body: RequestBody,
        span: Span,
    ) -> None:
        self._shared = shared
        self._client = client
        self._head = head
        self._id = request_id
        self._api: Api = api
        self._body = body
        self._span = span

    @property
    def _is_last(self) -> bool:
        """Whether the client's connection ends with this request."""
        return self._client.is_last or not self._head.keeps_alive

    async def refuse(self, answer: Answer, *, close: bool = False) -> bool:
        """Answer with an error of the gateway's own."""
        outcome = "unserved" if answer.status >= 500 else "refused"
        self._shared.count(outcome)
        self._span.say({"http.response.status_code": answer.status})
        self._span.end(outcome, failed=answer.status >= 500)
        log.info(
            "request_refused",
            status=answer.status,
            code=answer.code,
            error=answer.message,
            request_id=self._id.decode(),
        )
        close = close or not self._body.done or self._is_last
        lines = self._common_lines()
        if self._shared.settings.response_headers and answer.status >= 500:
            lines.append(b"x-meshnode-reason: " + printable(answer.message))
        await self._client.send(
            render(answer, self._api, lines, close=close, is_head=self._head.method == b"HEAD")
        )
        if close:
            await self._client.end()
        return not close

    async def tell(self, body: bytes) -> bool:
        """Answer with a list of the gateway's own."""
        self._shared.count("complete")
        self._span.end("complete")
        close = self._head.has_body or self._is_last
        lines = [b"HTTP/1.1 200 OK", b"content-type: application/json"]
        lines += [b"content-length: %d" % len(body), *self._common_lines()]
        if close:
            lines.append(b"connection: close")
        is_head = self._head.method == b"HEAD"
        await self._client.send(b"\r\n".join(lines) + b"\r\n\r\n" + (b"" if is_head else body))
        if close:
            await self._client.end()
        return not close

    async def permit(self, lines: list[bytes]) -> bool:
        """Answer a browser that asks whether a page may ask; ``lines`` say what it may."""
        self._span.end("complete")
        close = self._head.has_body or self._is_last
        await self._client.send(
            b"HTTP/1.1 204 No Content\r\n"
            + b"".join(line + b"\r\n" for line in (*lines, b"x-request-id: " + self._id))
            + (b"connection: close\r\n\r\n" if close else b"\r\n")
        )
        if close:
            await self._client.end()
        return not close

    def lines_of(self, served: Served) -> list[bytes]:
        """Return the lines that the head of a peer's answer gets here."""
        lines = self._common_lines()
        if self._shared.settings.response_headers:
            lines.append(b"x-meshnode-peer: " + served.lease.peer_id.encode())
            lines.append(b"x-meshnode-reason: " + served.lease.decision.tier.encode())
        return lines

    def _common_lines(self) -> list[bytes]:
        lines = [b"x-request-id: " + self._id]
        if self._head.value(b"origin") is not None:
            lines += self._shared.access.permissions(self._head)
        return lines
