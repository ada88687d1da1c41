"""The answer passed on to the client, each piece as it comes; a cut one never looks whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from meshnode.errors import MeshError
from meshnode.http.gateway.answers import Answer, event_of, line_of
from meshnode.http.gateway.asked import Asked
from meshnode.http.gateway.attempts import Served
from meshnode.http.gateway.bodies import (
    LAST_CHUNK,
    BodyError,
    ChunkedBody,
    EofBody,
    encode_chunk,
)
from meshnode.http.gateway.client import Client
from meshnode.http.gateway.headers import answer_for_client
from meshnode.net.exchange import Exchange
from meshnode.net.splice import splice

# The idle deadline moves at most this often: moving it for every chunk costs more than it tells.
_DEADLINE_STEP = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Delivered:
    """How an answer ended."""

    outcome: str
    keeps_alive: bool = False  # whether the client's connection can take another request


class Delivery:
    """Passes one answer on.

    Args:
        ours: lines of the gateway's own for the head.
        idle_timeout: seconds without a byte from the engine, or without the client taking one.
    """

    def __init__(
        self,
        asked: Asked,
        served: Served,
        client: Client,
        *,
        ours: list[bytes],
        count_bytes: Callable[[int], None],
        idle_timeout: float,
    ) -> None:
        self._asked = asked
        self._served = served
        self._client = client
        self._ours = ours
        self._count = count_bytes
        self._idle_timeout = idle_timeout
        self._tail = b"\n\n"  # the last bytes that were passed on
        self._closing = False  # whether the client was told that its connection ends
        self._chunked = (
            isinstance(served.body, ChunkedBody | EofBody)
            and asked.head.minor == 1
            and served.head.status != 101
        )

    async def run(self) -> Delivered:
        """Pass the answer on to its end.

        Raises:
            ClientGone: the client went away.
        """
        served = self._served
        if served.body.done and served.head.status != 101:
            left = self._send_at_once()
            if not left:
                return await self._finish()
            with trio.move_on_after(self._idle_timeout):
                await self._client.send(left)
                return await self._finish()
            return await self._cut("idle", "the client does not read")
        with trio.move_on_after(self._idle_timeout) as idle:
            if served.head.status == 101:
                return await self._upgrade(idle)
            try:
                await self._pass_on(idle)
            except (MeshError, BodyError) as exc:
                return await self._cut("upstream_cut", str(exc))
            return await self._finish()
        return await self._cut("idle", f"nothing moved for {self._idle_timeout:g} s")

    def _send_at_once(self) -> bytes:
        """Send an answer that is here whole, as small ones are; return what found no room."""
        self._closing = self._closes
        payload, chunked = self._served.first, self._chunked
        out = answer_for_client(self._served.head, self._ours, chunked=chunked, close=self._closing)
        out += encode_chunk(payload) + LAST_CHUNK if chunked else payload
        self._count(len(payload))
        left = self._client.send_now(out)
        if not left:
            self._client.scope = None  # whoever leaves from here on has the whole answer
        return left

    @property
    def _closes(self) -> bool:
        """Whether this is the last answer on the client's connection."""
        delimited_by_close = self._asked.head.minor == 0 and isinstance(
            self._served.body, ChunkedBody | EofBody
        )
        uploading = self._served.upload
        return (
            not self._asked.head.keeps_alive
            or self._client.is_last
            or delimited_by_close
            # Requests behind this one that nobody waited for: none of them is answered.
            or self._client.has_unread
            or (uploading is not None and not uploading.done)
        )

    async def _pass_on(self, idle: trio.CancelScope) -> None:
        served, client = self._served, self._client
        body, chunked = served.body, self._chunked
        self._closing = self._closes
        out = answer_for_client(served.head, self._ours, chunked=chunked, close=self._closing)
        payload = served.first
        receive, send = served.exchange.receive_some, client.send
        step = min(_DEADLINE_STEP, self._idle_timeout / 4)
        while True:
            if payload:
                self._tail = payload[-2:]
                self._count(len(payload))
                out += encode_chunk(payload) if chunked else payload
            if body.done:
                client.scope = None  # whoever leaves from here on has the whole answer
                await send(out + LAST_CHUNK if chunked else out)
                return
            if out:
                await send(out)
            data = await receive()
            deadline = trio.current_time() + self._idle_timeout
            if deadline - idle.deadline >= step:
                idle.deadline = deadline
            out = b""
            if data:
                payload = body.feed(data)
            else:
                body.finish()  # raises where more was to come
                payload = b""

    async def _finish(self) -> Delivered:
        served = self._served
        uploading = served.upload
        if uploading is not None and not uploading.done:
            # It answered before it had read everything: nobody reads the rest.
            uploading.cancel()
            served.exchange.reset()
        elif served.body.rest:
            served.exchange.reset()  # more than its answer: never to be taken for the next one
        elif served.head.keeps_alive and not isinstance(served.body, EofBody):
            await served.exchange.finish()
        else:
            await served.exchange.close()
        return Delivered("complete", keeps_alive=not self._closing)

    async def _cut(self, outcome: str, error: str) -> Delivered:
        """End the client's answer so that it can't be taken for a whole one."""
        self._served.exchange.reset()
        kind = (self._served.head.value(b"content-type") or b"").partition(b";")[0].strip().lower()
        answer = Answer(502, f"the answer was cut short: {error}", "upstream_cut")
        api = self._asked.routed.api
        if kind == b"text/event-stream":
            # A cut event ends with a blank line first, or this would be taken for its rest.
            pause = b"" if self._tail == b"\n\n" else b"\n\n"
            await self._say_and_end(pause + event_of(answer, api))
        elif kind == b"application/x-ndjson":
            pause = b"" if self._tail[-1:] == b"\n" else b"\n"
            await self._say_and_end(pause + line_of(answer))
        else:
            self._client.stream.reset()
        return Delivered(outcome)

    async def _say_and_end(self, last_words: bytes) -> None:
        # Without the last chunk: the connection's end alone does not make the answer whole.
        await self._client.send(encode_chunk(last_words) if self._chunked else last_words)
        await self._client.end()

    async def _upgrade(self, idle: trio.CancelScope) -> Delivered:
        """Join both connections: what they speak from here on is theirs."""
        served, client = self._served, self._client
        head = answer_for_client(served.head, self._ours, chunked=False, close=False)
        await client.send(head + served.first)
        early = client.take_unread()
        if early:
            await served.exchange.send_all(early)
        idle.deadline = float("inf")
        client.scope = None  # a client that half-closes is not gone
        end = await splice(
            client.stream,
            _Upgraded(served.exchange),
            count_to_upstream=lambda _: None,
            count_to_client=self._count,
            idle_timeout=self._idle_timeout,
        )
        return Delivered(end.outcome.value)


class _Upgraded:
    """An exchange as one end of a splice."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.receive_some = exchange.receive_some
        self.send_all = exchange.send_all
        self.send_eof = exchange.send_eof
        self.reset = exchange.reset

    async def aclose(self) -> None:
        await self._exchange.close()
