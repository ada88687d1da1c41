"""The gateway: accepts clients, reads their requests, and lets peers answer them.

Each request is routed by itself. What a client may not do is answered here; everything else is
the engine's to answer, and passed on byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog
import trio

from meshnode.http.gateway.access import Access
from meshnode.http.gateway.answers import Answer, render
from meshnode.http.gateway.attempts import Chooser
from meshnode.http.gateway.client import Client, ClientGone
from meshnode.http.gateway.heads import BadRequest
from meshnode.http.gateway.listing import Listing
from meshnode.http.gateway.request import Request
from meshnode.http.gateway.settings import GatewaySettings
from meshnode.http.gateway.shared import Shared
from meshnode.http.gateway.watch import GoneWatch
from meshnode.metrics import Metrics
from meshnode.net.accept import Acceptor
from meshnode.net.tcp_stream import TcpStream
from meshnode.net.upstream import Upstreams
from meshnode.tracing import NO_TRACER, Tracer

log = structlog.get_logger(__name__)


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
        self._shared = Shared(
            chooser,
            upstreams,
            access=access,
            listing=listing,
            metrics=metrics,
            settings=settings,
            tracer=tracer,
        )
        self._limits = settings.limits
        self._watch = GoneWatch()
        self._open: set[Client] = set()
        self._acceptor = Acceptor(settings.accept, metrics=metrics)

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
            nursery.start_soon(self._shared.deadlines.look_forever)
            nursery.start_soon(self._close_quiet_forever)
            await self._acceptor.serve_forever(self.serve_client, listeners)
            nursery.cancel_scope.cancel()

    async def serve_client(self, socket: trio.SocketStream) -> None:
        """Serve one connection to its end; never raises for what client or peers do."""
        stream = TcpStream(socket)
        client = Client(stream, self._limits)
        fd = socket.socket.fileno()
        self._watch.add(fd, client)
        self._open.add(client)
        try:
            # Who goes away ends this scope, through the watch.
            with client.connection:
                while await self._serve_request(client):
                    pass
            if client.connection.cancelled_caught:
                self._shared.count("client_gone")
        except ClientGone:
            pass
        except Exception as exc:  # the guard of every client: the node must live
            self._shared.count("failed")
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
        request = Request(self._shared, client, head)
        client.begin_request()
        try:
            return await request.serve()
        except ClientGone:
            self._shared.count("client_gone")
            return False
        finally:
            client.scope = None

    async def _close_quiet_forever(self) -> None:
        """Close connections on which no request came for long; one task for all of them."""
        limit = self._limits.keep_alive
        while True:
            await trio.sleep(min(1.0, limit / 4))
            due = trio.current_time() - limit
            for client in self._open:
                if client.quiet_since is not None and client.quiet_since <= due:
                    client.stream.close()

    async def _refuse_unread(self, client: Client, exc: BadRequest) -> bool:
        """Answer a request that could not be read; nothing is known of what follows it."""
        self._shared.count("refused")
        answer = Answer(exc.status, str(exc), exc.code)
        with trio.move_on_after(self._limits.head_timeout):
            await client.send(render(answer, "openai", [], close=True))
            await client.end()
        return False
