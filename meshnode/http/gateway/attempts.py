"""Asking peers in turn until one answers; nothing final reaches the client before.

The law here: a request is sent again only where nobody can have served it, or where being served
twice does no harm. A refusal says for certain that no engine has seen a byte of it. Interim
answers (1xx) are passed on at once: they promise nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog
import trio

from meshnode.core.lease import Lease
from meshnode.core.tries import Tries
from meshnode.errors import MeshError, NoCandidate, StreamClosed
from meshnode.http.gateway.asked import Asked, Upload
from meshnode.http.gateway.bodies import Body, BodyError, ChunkedBody, EofBody, LengthBody
from meshnode.http.gateway.client import Client, ClientGone
from meshnode.http.gateway.deadlines import Deadlines, Wait
from meshnode.http.gateway.headers import interim_for_client
from meshnode.http.gateway.heads import (
    MAX_HEAD_BYTES,
    BadRequest,
    BadResponse,
    ResponseHead,
    parse_response,
)
from meshnode.metrics import Metrics
from meshnode.net.exchange import Exchange
from meshnode.net.upstream import OPEN_TIMEOUT, PEER_FAILURES, AttemptError, Upstreams

# An engine that is starting, or the proxy before it: nothing was done.
_NOT_READY = frozenset({502, 503, 504})
# How engines say that a model is not (or no more) theirs: OpenAI's code, Ollama's words, vLLM's.
_NO_MODEL = re.compile(
    rb"model_not_found|\bmodel\b.{0,300}(?:not found|does not exist)", re.I | re.S
)
_MAX_REFUSAL_BYTES = 16 * 1024  # of a 404 that is looked at
_REFUSAL_TIMEOUT = 2.0  # seconds for it to come
# Interim answers (1xx) before the answer itself: servers that give hints send one or two, and one
# that says "still at it" every few seconds has said enough.
MAX_INTERIM = 32

log = structlog.get_logger(__name__)


class FirstByteTimeout(Exception):
    """A peer took the request and did not begin to answer in time."""


class Unserved(Exception):
    """Peers were tried, and none served the request."""


class Chooser(Protocol):
    """Who decides which peer serves a request."""

    def check_offers(self) -> None:
        """See that anybody serves anything. Raises NoCandidate."""

    async def lease(self, asked: Asked, *, may_wait: bool) -> Lease:
        """Pick a peer that was not tried yet, and count the request on it.

        Raises:
            NoCandidate: nobody can serve it.
        """


@dataclass(eq=False, slots=True)
class Served:
    """An answer that has begun."""

    lease: Lease
    exchange: Exchange
    head: ResponseHead
    body: Body
    first: bytes  # payload that came with the head
    upload: Uploading | None
    picked_at: float  # trio.current_time()
    retries: int

    def settle(self, outcome: str) -> None:
        """Write into the list of decisions how it ended, and give the lease back."""
        self.lease.settle(
            outcome, duration=trio.current_time() - self.picked_at, retries=self.retries
        )
        self.lease.release()

    def drop(self, outcome: str) -> None:
        """Give up what is left of it."""
        if self.upload is not None:
            self.upload.cancel()
        self.exchange.reset()
        self.settle(outcome)


class Uploading:
    """Sends the rest of a request's body while the answer is awaited."""

    def __init__(self, upload: Upload, exchange: Exchange, client: Client) -> None:
        self.done = False
        self.fault: BadRequest | None = None  # the client's
        self._upload = upload
        self._exchange = exchange
        self._client = client
        self._scope = trio.CancelScope()

    def cancel(self) -> None:
        self._scope.cancel()

    async def run(self) -> None:
        with self._scope:
            try:
                index = 0
                while (piece := await self._upload.piece(index)) is not None:
                    await self._exchange.send_all(piece)
                    index += 1
                self.done = True
            except BadRequest as exc:
                self.fault = exc
                self._exchange.reset()
            except ClientGone:
                self._client.on_gone()
            except MeshError:
                pass  # who reads the answer learns of it, and may find one all the same


class Attempts:
    """The peers that one request is sent to, one after another.

    Args:
        tasks: where a body is uploaded; None for a request that has left with its first bytes.
        first_byte_timeout: seconds for a peer to begin its answer.
    """

    def __init__(
        self,
        asked: Asked,
        client: Client,
        *,
        chooser: Chooser,
        upstreams: Upstreams,
        metrics: Metrics,
        count_decision: Callable[[str], None],
        deadlines: Deadlines,
        first_byte_timeout: float,
        tasks: trio.Nursery | None,
    ) -> None:
        self._asked = asked
        self._client = client
        self._chooser = chooser
        self._upstreams = upstreams
        self._metrics = metrics
        self._count_decision = count_decision
        self._deadlines = deadlines
        self._first_byte_timeout = first_byte_timeout
        self._tasks = tasks

    async def run(self) -> Served:
        """Return the first answer that is worth passing on.

        Raises:
            NoCandidate: nobody can serve the request.
            Unserved: those that were tried did not.
            FirstByteTimeout: the peer that took it did not answer.
            BadRequest, ClientGone: what the client sent meanwhile.
        """
        asked = self._asked
        lease = await self._chooser.lease(asked, may_wait=True)
        while True:
            try:
                served = await self._attempt(lease)
            except AttemptError as exc:
                asked.tries = asked.tries.after(lease.peer_id, exc.reason, trio.current_time())
                self._give_up(lease, exc.reason, str(exc))
                if not (exc.is_untouched or asked.may_repeat):
                    raise Unserved(
                        f"{exc}; it may have been served, so it was not sent elsewhere"
                    ) from exc
                lease = await self._next(exc)
                continue
            elsewhere = await self._why_elsewhere(served)
            if elsewhere is None:
                return served
            before = asked.tries
            asked.tries = before.after(lease.peer_id, elsewhere, trio.current_time())
            try:
                other = await self._chooser.lease(asked, may_wait=False)
            except NoCandidate:
                asked.tries = before
                return served  # its refusal is better than one of ours
            served.exchange.reset()
            if served.upload is not None:
                served.upload.cancel()
            self._give_up(lease, elsewhere, f"the engine answered {served.head.status}")
            lease = other

    async def _next(self, failure: AttemptError) -> Lease:
        tries = self._asked.tries
        if tries.may_go_on():
            try:
                return await self._chooser.lease(self._asked, may_wait=True)
            except NoCandidate as exc:
                if not tries.passed_over:
                    raise  # all were busy, and none failed
                raise Unserved(f"{_said(tries)}; nobody else can: {exc}") from failure
        raise Unserved(_said(tries)) from failure

    async def _attempt(self, lease: Lease) -> Served:
        """Send the request to the leased peer, and return the beginning of its answer."""
        asked = self._asked
        picked_at = trio.current_time()
        self._count_decision(lease.decision.tier)
        exchange: Exchange | None = None
        uploading: Uploading | None = None
        accepted_at: float | None = None
        wait: Wait | None = None
        try:
            fresh = not asked.may_repeat
            exchange = await self._upstreams.begin(lease, asked.first, fresh=fresh)
            wait = self._deadlines.begin(exchange, trio.current_time() + OPEN_TIMEOUT)
            await exchange.wait_accepted()
            accepted_at = trio.current_time()
            wait.due = accepted_at + self._first_byte_timeout
            if asked.upload is not None:
                uploading = await self._start_upload(asked.upload, exchange)
            head, body, first = await self._read_head(exchange)
            if asked.is_inference and asked.may_repeat and not first:
                first = await self._read_first(exchange, body)
            self._deadlines.end(wait)
            if wait.is_over:
                raise StreamClosed("the wait ended as the answer began")
        except BaseException as failure:  # noqa: BLE001 - it is raised again, or what it means
            exc: BaseException = failure
            if wait is not None:
                self._deadlines.end(wait)
                if wait.is_over and isinstance(exc, MeshError):
                    exc = trio.TooSlowError() if accepted_at is None else FirstByteTimeout()
            if isinstance(exc, PEER_FAILURES):
                exc = self._upstreams.failure(lease, exc, is_untouched=False)
            if uploading is not None:
                uploading.cancel()
            if exchange is not None:
                if isinstance(exc, AttemptError) and exc.is_untouched:
                    await exchange.finish()  # refused: the tunnel is as good as before
                else:
                    exchange.reset()
            if not isinstance(exc, AttemptError):
                self._abandon(lease, exc, picked_at)
            if uploading is not None and uploading.fault is not None:
                raise uploading.fault from exc
            raise exc from failure.__cause__
        assert accepted_at is not None
        lease.succeeded(accepted_at - picked_at, now=trio.current_time())
        return Served(lease, exchange, head, body, first, uploading, picked_at, asked.tries.count)

    async def _start_upload(self, upload: Upload, exchange: Exchange) -> Uploading:
        if self._asked.waits_for_continue:
            self._asked.waits_for_continue = False
            await self._tell(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert self._tasks is not None
        uploading = Uploading(upload, exchange, self._client)
        self._tasks.start_soon(uploading.run)
        return uploading

    async def _read_head(self, exchange: Exchange) -> tuple[ResponseHead, Body, bytes]:
        data = b""
        interim = 0
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD_BYTES:
                    raise _bad_answer("its headers are too long")
                more = await exchange.receive_some()
                if not more:
                    raise AttemptError(
                        "closed_early",
                        "the engine closed the connection without an answer",
                        is_untouched=False,
                    )
                data += more
                continue
            try:
                head = parse_response(data[:end])
            except BadResponse as exc:
                raise _bad_answer(str(exc)) from exc
            data = data[end + 4 :]
            if head.status >= 200:
                break
            if head.status == 101:
                if self._asked.head.upgrade is None:
                    raise _bad_answer("it changes the protocol, which nobody asked for")
                break
            interim += 1
            if interim > MAX_INTERIM:
                raise _bad_answer(f"more than {MAX_INTERIM} interim answers")
            await self._pass_interim(head)
        body = _framing(head, self._asked.head.method)
        try:
            first = body.feed(data) if data else b""
        except BodyError as exc:
            raise _bad_answer(str(exc)) from exc
        return head, body, first

    async def _pass_interim(self, head: ResponseHead) -> None:
        """Pass a 1xx on (RFC 9110, section 15.2); it is no beginning of an answer.

        Another peer may still be asked: a client reads any number of them before the final one.
        Not 100, which was said here to a client that asked; HTTP/1.0 knows none.
        """
        if head.status != 100 and self._asked.head.minor == 1:
            await self._tell(interim_for_client(head))

    async def _tell(self, words: bytes) -> None:
        """Send the client what goes before an answer, within the time that an answer has."""
        with trio.move_on_after(self._first_byte_timeout) as telling:
            await self._client.send(words)
        if telling.cancelled_caught:
            raise FirstByteTimeout

    async def _read_first(self, exchange: Exchange, body: Body) -> bytes:
        """Return the first payload, or nothing where there is none.

        Many engines send their head when a request has come, long before its first token: until
        that token another peer can still serve the request, if the client has seen nothing.
        """
        try:
            while not body.done:
                data = await exchange.receive_some()
                if not data:
                    body.finish()
                elif payload := body.feed(data):
                    return payload
        except BodyError as exc:
            raise _bad_answer(str(exc)) from exc
        return b""

    async def _why_elsewhere(self, served: Served) -> str | None:
        """Return why another peer should be asked, if that may be done; a word for a metric."""
        status = served.head.status
        if status not in _NOT_READY and status != 404:
            return None
        if not (self._asked.may_repeat and self._asked.tries.may_go_on(failing=1)):
            return None
        if status in _NOT_READY:
            return f"status_{status}"
        if self._asked.routed.model is None:
            return None
        await self._read_refusal(served)
        return "model_not_found" if _NO_MODEL.search(served.first) else None

    async def _read_refusal(self, served: Served) -> None:
        """Read what the engine says beside its 404, as far as is needed to know it."""
        with trio.move_on_after(_REFUSAL_TIMEOUT):
            while not served.body.done and len(served.first) < _MAX_REFUSAL_BYTES:
                try:
                    data = await served.exchange.receive_some()
                    if data:
                        served.first += served.body.feed(data)
                        continue
                    served.body.finish()
                except (MeshError, BodyError):
                    return  # whoever passes the answer on meets the same, and says so
                return

    def _give_up(self, lease: Lease, reason: str, error: str) -> None:
        tries = self._asked.tries
        if reason != "model_not_found":  # a peer that has other models is none the worse for it
            lease.failed(reason, now=trio.current_time())
        lease.settle(reason, retries=tries.count - 1)
        lease.release()
        self._metrics.retries.labels(reason=reason).inc()
        log.info(
            "peer_given_up",
            peer_id=lease.peer_id,
            service=lease.service_id,
            attempt=tries.count,
            reason=reason,
            error=error,
        )

    def _abandon(self, lease: Lease, exc: BaseException, picked_at: float) -> None:
        outcome = "client_gone"
        if isinstance(exc, FirstByteTimeout):
            outcome = "timeout"
            lease.failed(outcome, now=trio.current_time())
        lease.settle(
            outcome,
            duration=trio.current_time() - picked_at,
            retries=self._asked.tries.count,
        )
        lease.release()


def _framing(head: ResponseHead, method: bytes) -> Body:
    if method == b"HEAD" or head.status in (101, 204, 304):
        return LengthBody(0) if head.status != 101 else EofBody()
    if head.chunked:
        return ChunkedBody()
    return EofBody() if head.length is None else LengthBody(head.length)


def _bad_answer(why: str) -> AttemptError:
    return AttemptError(
        "bad_answer", f"the engine's answer is malformed: {why}", is_untouched=False
    )


def _said(tries: Tries) -> str:
    count = len(tries.passed_over)
    return f"{count} of the peers were tried, and none served this request: {tries}"
