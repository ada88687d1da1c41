"""One request of a client, from its head to the end of its answer.

The law here: who may ask is decided before anything is read, and what may be asked before anybody
is asked. Each way out is answered in one place, or is the client's going away.
"""

from __future__ import annotations

import math

import trio

from meshnode.core.api_keys import ClientKey, KeyRefusal
from meshnode.core.openai_request import api_of, parse_request, routes_by_body
from meshnode.errors import NoCandidate, Overloaded, ParseError, UnknownModel
from meshnode.http.gateway.answers import RETRY_AFTER, WAITING, Answer
from meshnode.http.gateway.asked import Asked, for_engine
from meshnode.http.gateway.attempts import Attempts, FirstByteTimeout, Served, Unserved
from meshnode.http.gateway.client import Client
from meshnode.http.gateway.delivery import Delivered, Delivery
from meshnode.http.gateway.headers import request_id_of
from meshnode.http.gateway.heads import BadRequest, RequestHead
from meshnode.http.gateway.reading import Reading
from meshnode.http.gateway.reply import Reply
from meshnode.http.gateway.shared import Shared

# They are for this gateway and nobody behind it.
_KEY_FIELDS = frozenset({b"authorization", b"x-api-key"})


class Request:
    """One request of a client, from its head to the end of its answer."""

    def __init__(self, shared: Shared, client: Client, head: RequestHead) -> None:
        self._shared = shared
        self._settings = shared.settings
        self._client = client
        self._head = head
        self._began_at = trio.current_time()
        self._path = head.target.decode("latin-1")
        self._method = head.method.decode("ascii")
        self._id = request_id_of(head)
        self._reading = Reading(shared, client, head)
        self._key: ClientKey | None = None  # who asks, where keys are wanted
        self._span = shared.tracer.begin(self._method, head.value(b"traceparent"))
        self._reply = Reply(
            shared,
            client,
            head,
            request_id=self._id,
            api=api_of(self._path),
            body=self._reading.body,
            span=self._span,
        )

    async def serve(self) -> bool:
        """Answer the request; return whether another may follow."""
        shared, reply = self._shared, self._reply
        try:
            refusal = shared.access.refusal(self._head)
            if refusal is not None:
                return await reply.refuse(refusal, close=True)
            preflight = shared.access.preflight(self._head)
            if preflight is not None:
                return await reply.permit(preflight)
            refusal = self._identify()
            if refusal is not None:
                return await reply.refuse(refusal)
            listed = shared.listing.answer(self._head, self._key)
            if listed is not None:
                return await reply.tell(listed)
            asked = await self._read()
            refusal = self._permit_request(asked)
            if refusal is not None:
                return await reply.refuse(refusal)
            return await self._proxy(asked)
        except BadRequest as exc:
            return await reply.refuse(Answer(exc.status, str(exc), exc.code), close=True)
        except ParseError as exc:
            return await reply.refuse(Answer(400, str(exc), "invalid_request", param=exc.param))
        except NoCandidate as exc:
            return await reply.refuse(_unserved(exc))
        except Unserved as exc:
            return await reply.refuse(
                Answer(502, str(exc), "no_peer_served", retry_after=RETRY_AFTER)
            )
        except FirstByteTimeout:
            limit = self._settings.first_byte_timeout
            return await reply.refuse(
                Answer(504, f"the engine did not begin to answer within {limit:g} s", "timeout")
            )
        finally:
            self._span.end("client_gone")  # unless it ended otherwise
            self._reading.release()

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
            self._shared.chooser.check_offers()
        except NoCandidate:
            await self._reading.skip()
            raise
        content_type = head.text(b"content-type")
        is_inference = routes_by_body(self._method, self._path, content_type)
        known, rest = b"", self._reading.body if head.has_body else None
        if is_inference and rest is not None:
            known, rest = await self._reading.for_routing(content_type)
        first, upload = for_engine(
            head,
            self._id,
            known,
            rest,
            without=_KEY_FIELDS if self._settings.client_keys else frozenset(),
            keep_limit=self._settings.limits.body_bytes if self._reading.keep_rest(rest) else 0,
            traceparent=self._span.traceparent,
        )
        return Asked(
            head=head,
            routed=parse_request(self._method, self._path, content_type, known),
            request_id=self._id,
            first=first,
            upload=upload,
            is_inference=is_inference,
            waits_for_continue=self._reading.waits_for_continue and rest is not None,
            began_at=self._began_at,
        )

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
        shared = self._shared
        attempts = Attempts(
            asked,
            self._client,
            chooser=shared.chooser,
            upstreams=shared.upstreams,
            metrics=shared.metrics,
            count_decision=shared.count_decision,
            deadlines=shared.deadlines,
            first_byte_timeout=self._settings.first_byte_timeout,
            tasks=tasks,
        )
        served = await attempts.run()
        if self._span.is_recording:
            self._span.say(
                served.lease.decision.attributes() | {"meshnode.retries": served.retries}
            )
        shared.metrics.request_ttft_seconds.observe(trio.current_time() - self._began_at)
        try:
            delivered = await self._deliver(asked, served)
        except BaseException:
            served.drop("client_gone")
            raise
        served.settle(delivered.outcome)
        shared.count(delivered.outcome)
        self._span.end(delivered.outcome, failed=delivered.outcome in ("upstream_cut", "idle"))
        if not delivered.keeps_alive:
            await self._client.end()
        return delivered.keeps_alive

    async def _deliver(self, asked: Asked, served: Served) -> Delivered:
        delivery = Delivery(
            asked,
            served,
            self._client,
            ours=self._reply.lines_of(served),
            count_bytes=self._shared.count_to_client,
            idle_timeout=self._settings.idle_timeout,
        )
        delivered = await delivery.run()
        if delivered.outcome in ("upstream_cut", "idle"):
            served.lease.failed("cut", now=trio.current_time())
        return delivered


def _refused(refusal: KeyRefusal) -> Answer:
    return Answer(refusal.status, refusal.message, refusal.code, retry_after=refusal.retry_after)


def _unserved(exc: NoCandidate) -> Answer:
    if isinstance(exc, UnknownModel):
        return Answer(404, str(exc), "model_not_found", param="model")
    if isinstance(exc, Overloaded):
        return Answer(503, str(exc), "overloaded", retry_after=max(1, math.ceil(exc.retry_after)))
    return Answer(503, f"{WAITING}: {exc}", "no_candidate", retry_after=RETRY_AFTER)
