"""The gateway: accepts clients, reads their requests, and lets peers answer them.

Each request is routed by itself. What a client may not do is answered here; everything else is
the engine's to answer, and passed on byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
import trio

from meshnode.core.api_keys import ClientKey, ClientKeys, KeyRefusal
from meshnode.core.form_body import FORM_HEAD_BYTES
from meshnode.core.openai_request import (
    Api,
    api_of,
    is_form,
    parse_request,
    routes_by_body,
)
from meshnode.errors import NoCandidate, Overloaded, ParseError, UnknownModel
from meshnode.http.gateway.access import Access
from meshnode.http.gateway.answers import WAITING, Answer, body_of, reason_of
from meshnode.http.gateway.asked import Asked, for_engine
from meshnode.http.gateway.attempts import Attempts, Chooser, FirstByteTimeout, Served, Unserved
from meshnode.http.gateway.client import Client, ClientGone, ClientLimits, RequestBody
from meshnode.http.gateway.delivery import Delivered, Delivery
from meshnode.http.gateway.headers import printable, request_id_of
from meshnode.http.gateway.heads import BadRequest, RequestHead
from meshnode.http.gateway.listing import Listing
from meshnode.http.gateway.watch import GoneWatch
from meshnode.metrics import Metrics
from meshnode.net.accept import AcceptLimits, Acceptor
from meshnode.net.splice import IDLE_TIMEOUT
from meshnode.net.tcp_stream import TcpStream
from meshnode.net.upstream import Upstreams
from meshnode.tracing import NO_TRACER, Tracer

# Bodies kept for routing and for another attempt, all requests together.
MAX_KEPT_BYTES = 1024 * 1024 * 1024
RETRY_AFTER = 5  # seconds
# They are for this gateway and nobody behind it.
_KEY_FIELDS = frozenset({b"authorization", b"x-api-key"})

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What the operator chose for the gateway."""

    first_byte_timeout: float = 300.0  # seconds for an engine to begin its answer
    idle_timeout: float = IDLE_TIMEOUT  # seconds without a byte of an answer
    response_headers: bool = True  # x-meshnode-peer and x-meshnode-reason
    client_keys: ClientKeys | None = None  # of those who may ask; None: anybody may
    accept: AcceptLimits = field(default_factory=AcceptLimits)
    limits: ClientLimits = field(default_factory=ClientLimits)


class Gateway:
    """Routes each request of each client.

    Args:
        access: who may ask.
        listing: the lists that are answered here.
    """

    def __init__(
        self,
        chooser: Chooser,
        upstreams: Upstreams,
        *,
        access: Access,
        listing: Listing,
        metrics: Metrics,
        settings: GatewaySettings,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._chooser = chooser
        self._upstreams = upstreams
        self._access = access
        self._listing = listing
        self._metrics = metrics
        self._settings = settings
        self._tracer = tracer
        self._watch = GoneWatch()
        self._open: set[Client] = set()
        self._acceptor = Acceptor(settings.accept, metrics=metrics)
        self._kept_bytes = 0
        self._count_to_client = metrics.tunnel_bytes.labels(direction="to_client").inc
        self._outcomes: dict[str, Callable[[], None]] = {}
        self._tiers: dict[str, Callable[[], None]] = {}

    @property
    def clients(self) -> int:
        """Connections open now."""
        return self._acceptor.clients

    def close(self) -> None:
        """Accept nobody any more; what is under way is served to its end, quiet clients go."""
        self._acceptor.close()
        for client in self._open:
            client.is_last = True
            if client.quiet_since is not None:
                client.stream.close()

    async def serve_forever(self, listeners: Sequence[trio.SocketListener]) -> None:
        """Accept clients until cancelled; then cut those that are left."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch.watch_forever)
            nursery.start_soon(self._close_quiet_forever)
            await self._acceptor.serve_forever(self.serve_client, listeners)
            nursery.cancel_scope.cancel()

    async def serve_client(self, socket: trio.SocketStream) -> None:
        """Serve one connection to its end; never raises for what client or peers do."""
        stream = TcpStream(socket)
        client = Client(stream, self._settings.limits)
        fd = socket.socket.fileno()
        self._watch.add(fd, client)
        self._open.add(client)
        try:
            # Who goes away ends this scope, through the watch.
            with client.connection:
                while await self._serve_request(client):
                    pass
            if client.connection.cancelled_caught:
                self._count("client_gone")
        except ClientGone:
            pass
        except Exception as exc:  # the guard of every client: the node must live
            self._count("failed")
            log.exception("client_failed", error=repr(exc))
        finally:
            self._open.discard(client)
            self._watch.remove(fd, client)
            stream.reset()  # closed already on every way out but an error's or a cancellation's

    async def _serve_request(self, client: Client) -> bool:
        """Serve one request; return whether another may follow on the connection."""
        try:
            head = await client.read_head()
        except BadRequest as exc:
            return await self._refuse_unread(client, exc)
        if head is None:
            client.stream.close()
            return False
        request = _Request(self, client, head)
        client.begin_request()
        try:
            return await request.serve()
        except ClientGone:
            self._count("client_gone")
            return False
        finally:
            client.scope = None

    async def _close_quiet_forever(self) -> None:
        """Close connections on which no request came for long; one task for all of them."""
        limit = self._settings.limits.keep_alive
        while True:
            await trio.sleep(min(1.0, limit / 4))
            due = trio.current_time() - limit
            for client in self._open:
                if client.quiet_since is not None and client.quiet_since <= due:
                    client.stream.close()

    async def _refuse_unread(self, client: Client, exc: BadRequest) -> bool:
        """Answer a request that could not be read; nothing is known of what follows it."""
        self._count("refused")
        answer = Answer(exc.status, str(exc), exc.code)
        with trio.move_on_after(self._settings.limits.head_timeout):
            await client.send(render(answer, "openai", [], close=True))
            await client.end()
        return False

    def keep_bytes(self, change: int) -> bool:
        """Count bytes of bodies that are kept; False where that would be too many."""
        if change > 0 and self._kept_bytes + change > MAX_KEPT_BYTES:
            return False
        self._kept_bytes += change
        return True

    def _count(self, outcome: str) -> None:
        count = self._outcomes.get(outcome)
        if count is None:
            count = self._outcomes[outcome] = self._metrics.requests.labels(outcome=outcome).inc
        count()

    def _count_decision(self, tier: str) -> None:
        count = self._tiers.get(tier)
        if count is None:
            count = self._tiers[tier] = self._metrics.routing_decisions.labels(tier=tier).inc
        count()


class _Request:
    """One request of a client, from its head to the end of its answer."""

    def __init__(self, gateway: Gateway, client: Client, head: RequestHead) -> None:
        self._gateway = gateway
        self._client = client
        self._head = head
        self._settings = gateway._settings
        self._began_at = trio.current_time()
        self._path = head.target.decode("latin-1")
        self._method = head.method.decode("ascii")
        self._api = api_of(self._path)
        self._id = request_id_of(head)
        self._body = client.body_of(head)
        self._waits_for_continue = head.expects_continue
        self._kept = 0  # bytes of the body that count as kept
        self._key: ClientKey | None = None  # who asks, where keys are wanted
        self._span = gateway._tracer.begin(self._method, head.value(b"traceparent"))

    async def serve(self) -> bool:
        """Answer the request; return whether another may follow."""
        gateway = self._gateway
        try:
            refusal = gateway._access.refusal(self._head)
            if refusal is not None:
                return await self._answer(refusal, close=True)
            preflight = gateway._access.preflight(self._head)
            if preflight is not None:
                return await self._permit(preflight)
            refusal = self._identify()
            if refusal is not None:
                return await self._answer(refusal)
            listed = gateway._listing.answer(self._head, self._key)
            if listed is not None:
                return await self._tell(listed)
            asked = await self._read()
            refusal = self._permit_request(asked)
            if refusal is not None:
                return await self._answer(refusal)
            return await self._proxy(asked)
        except BadRequest as exc:
            return await self._answer(Answer(exc.status, str(exc), exc.code), close=True)
        except ParseError as exc:
            return await self._answer(Answer(400, str(exc), "invalid_request", param=exc.param))
        except NoCandidate as exc:
            return await self._answer(_unserved(exc))
        except Unserved as exc:
            return await self._answer(
                Answer(502, str(exc), "no_peer_served", retry_after=RETRY_AFTER)
            )
        except FirstByteTimeout:
            limit = self._settings.first_byte_timeout
            return await self._answer(
                Answer(504, f"the engine did not begin to answer within {limit:g} s", "timeout")
            )
        finally:
            self._span.end("client_gone")  # unless it ended otherwise
            gateway.keep_bytes(-self._kept)

    @property
    def _is_last(self) -> bool:
        """Whether the client's connection ends with this request."""
        return self._client.is_last or not self._head.keeps_alive

    # Who asks

    def _identify(self) -> Answer | None:
        """Find out whose key the request shows; return why it is refused, if it is."""
        keys = self._settings.client_keys
        if keys is None:
            return None
        found = keys.identify((name, value) for name, value, _ in self._head.fields)
        if isinstance(found, KeyRefusal):
            return _refused(found)
        self._key = found
        return None

    def _permit_request(self, asked: Asked) -> Answer | None:
        keys = self._settings.client_keys
        if keys is None or self._key is None:
            return None
        refusal = keys.permit(
            self._key,
            asked.routed.model,
            computes=asked.is_inference,
            now=trio.current_time(),
        )
        return None if refusal is None else _refused(refusal)

    # Reading

    async def _read(self) -> Asked:
        """Return the request with as much of its body as routing needs."""
        head = self._head
        try:
            self._gateway._chooser.check_offers()
        except NoCandidate:
            await self._skip_body()
            raise
        content_type = head.text(b"content-type")
        is_inference = routes_by_body(self._method, self._path, content_type)
        known, rest = b"", self._body if head.has_body else None
        if is_inference and rest is not None:
            known, rest = await self._read_body(content_type)
        first, upload = for_engine(
            head,
            self._id,
            known,
            rest,
            without=_KEY_FIELDS if self._settings.client_keys else frozenset(),
            keep_limit=self._settings.limits.body_bytes if self._keep_more(rest) else 0,
            traceparent=self._span.traceparent,
        )
        return Asked(
            head=head,
            routed=parse_request(self._method, self._path, content_type, known),
            request_id=self._id,
            first=first,
            upload=upload,
            is_inference=is_inference,
            waits_for_continue=self._waits_for_continue and rest is not None,
            began_at=self._began_at,
        )

    async def _read_body(self, content_type: str) -> tuple[bytes, RequestBody | None]:
        """Return (what routing needs of the body, what is left to be read)."""
        limit = self._settings.limits.body_bytes
        form = is_form(content_type)
        if not form and self._head.length is not None and self._head.length > limit:
            raise BadRequest(413, f"the body is more than {limit} bytes", "too_large")
        size = self._head.length if self._head.length is not None else limit
        if not self._keep(min(size, FORM_HEAD_BYTES) if form else size):
            raise Overloaded("too many large requests are under way", retry_after=RETRY_AFTER)
        if self._waits_for_continue:
            self._waits_for_continue = False
            await self._client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not form:
            return await self._body.read_whole(limit), None
        pieces: list[bytes] = []
        while sum(map(len, pieces)) < FORM_HEAD_BYTES and (piece := await self._body.read()):
            pieces.append(piece)
        return b"".join(pieces), None if self._body.done else self._body

    async def _skip_body(self) -> None:
        """Read the body for nothing: an answer written before would be lost."""
        if self._head.has_body and not self._head.expects_continue:
            await self._drain()

    async def _drain(self) -> None:
        limits = self._settings.limits
        left = limits.body_bytes
        with trio.move_on_after(limits.body_pause):
            while left > 0 and (piece := await self._body.read()):
                left -= len(piece)

    def _keep_more(self, rest: RequestBody | None) -> bool:
        """Count the rest of a body that streams through as kept, if there is room for it."""
        if rest is None:
            return False
        length = self._head.length
        limit = self._settings.limits.body_bytes
        return self._keep(limit if length is None else min(length, limit))

    def _keep(self, size: int) -> bool:
        if not self._gateway.keep_bytes(size):
            return False
        self._kept += size
        return True

    # Answering by a peer

    async def _proxy(self, asked: Asked) -> bool:
        if asked.upload is None:
            return await self._exchange(asked, None)
        outcome: list[bool] = []
        failure: Exception | None = None
        async with trio.open_nursery() as tasks:
            try:
                outcome.append(await self._exchange(asked, tasks))
            except Exception as exc:  # noqa: BLE001 - raised again, without the nursery's group
                failure = exc
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return outcome[0]

    async def _exchange(self, asked: Asked, tasks: trio.Nursery | None) -> bool:
        gateway = self._gateway
        attempts = Attempts(
            asked,
            self._client,
            chooser=gateway._chooser,
            upstreams=gateway._upstreams,
            metrics=gateway._metrics,
            count_decision=gateway._count_decision,
            first_byte_timeout=self._settings.first_byte_timeout,
            tasks=tasks,
        )
        served = await attempts.run()
        if self._span.is_recording:
            self._span.say(
                served.lease.decision.attributes() | {"meshnode.retries": served.retries}
            )
        gateway._metrics.request_ttft_seconds.observe(trio.current_time() - self._began_at)
        try:
            delivered = await self._deliver(asked, served)
        except BaseException:
            served.drop("client_gone")
            raise
        served.settle(delivered.outcome)
        gateway._count(delivered.outcome)
        self._span.end(delivered.outcome, failed=delivered.outcome in ("upstream_cut", "idle"))
        if not delivered.keeps_alive:
            await self._client.end()
        return delivered.keeps_alive

    async def _deliver(self, asked: Asked, served: Served) -> Delivered:
        delivery = Delivery(
            asked,
            served,
            self._client,
            ours=self._our_lines(served),
            count_bytes=self._gateway._count_to_client,
            idle_timeout=self._settings.idle_timeout,
        )
        delivered = await delivery.run()
        if delivered.outcome in ("upstream_cut", "idle"):
            served.lease.failed("cut", now=trio.current_time())
        return delivered

    def _our_lines(self, served: Served) -> list[bytes]:
        lines = self._common_lines()
        if self._settings.response_headers:
            lines.append(b"x-meshnode-peer: " + served.lease.peer_id.encode())
            lines.append(b"x-meshnode-reason: " + served.lease.decision.tier.encode())
        return lines

    def _common_lines(self) -> list[bytes]:
        lines = [b"x-request-id: " + self._id]
        if self._head.value(b"origin") is not None:
            lines += self._gateway._access.permissions(self._head)
        return lines

    # Answering here

    async def _answer(self, answer: Answer, *, close: bool = False) -> bool:
        """Answer the request here; return whether another may follow."""
        outcome = "unserved" if answer.status >= 500 else "refused"
        self._gateway._count(outcome)
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
        if self._settings.response_headers and answer.status >= 500:
            lines.append(b"x-meshnode-reason: " + printable(answer.message))
        await self._client.send(
            render(answer, self._api, lines, close=close, is_head=self._head.method == b"HEAD")
        )
        if close:
            await self._client.end()
        return not close

    async def _tell(self, body: bytes) -> bool:
        """Answer with a list of the gateway's own."""
        self._gateway._count("complete")
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

    async def _permit(self, lines: list[bytes]) -> bool:
        self._span.end("complete")
        close = self._head.has_body or self._is_last
        await self._client.send(
            b"HTTP/1.1 204 No Content\r\n"
            + b"".join(line + b"\r\n" for line in (*lines, *self._id_line()))
            + (b"connection: close\r\n\r\n" if close else b"\r\n")
        )
        if close:
            await self._client.end()
        return not close

    def _id_line(self) -> list[bytes]:
        return [b"x-request-id: " + self._id]


def render(
    answer: Answer, api: Api, lines: list[bytes], *, close: bool, is_head: bool = False
) -> bytes:
    """Return an answer of the gateway's own as bytes."""
    body = body_of(answer, api)
    head = [
        b"HTTP/1.1 %d %b" % (answer.status, reason_of(answer.status).encode()),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        *lines,
    ]
    if answer.retry_after is not None:
        head.append(b"retry-after: %d" % answer.retry_after)
    if close:
        head.append(b"connection: close")
    return b"\r\n".join(head) + b"\r\n\r\n" + (b"" if is_head else body)


def _refused(refusal: KeyRefusal) -> Answer:
    return Answer(refusal.status, refusal.message, refusal.code, retry_after=refusal.retry_after)


def _unserved(exc: NoCandidate) -> Answer:
    if isinstance(exc, UnknownModel):
        return Answer(404, str(exc), "model_not_found", param="model")
    if isinstance(exc, Overloaded):
        return Answer(503, str(exc), "overloaded", retry_after=max(1, math.ceil(exc.retry_after)))
    return Answer(503, f"{WAITING}: {exc}", "no_candidate", retry_after=RETRY_AFTER)
