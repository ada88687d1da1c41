"""AutoNAT v1: a member asks another whether its addresses can be dialled from there.

The specification lets a server dial only the address that it sees the asker at, because a stranger
could make it dial anybody. Here only proven members may ask, and each of them can make every other
dial the addresses that it announces; so what it names is dialled, few at a time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
import trio
from libp2p.host.autonat.pb.autonat_pb2 import Message

from meshnode.core.rate import RateLimit
from meshnode.errors import MeshError, PeerRefused, StreamReset, WireError
from meshnode.metrics import Metrics
from meshnode.net.libp2p.delimited import encode_message, read_message
from meshnode.net.libp2p.relay import addrs as circuit_addrs
from meshnode.net.libp2p.stream import Libp2pStream
from meshnode.net.libp2p.swarm import MeshConn

AUTONAT = "/libp2p/autonat/1.0.0"
MAX_ADDRS_DIALLED = 4
# Every address at once, each a TCP connection and a noise handshake.
DIAL_BACK_TIMEOUT = 3.0  # seconds
_MESSAGE_TIMEOUT = 5.0  # seconds
# An honest node asks every few minutes, and some times more while its network changes.
_REQUESTS_PER_S, _REQUESTS_BURST = 0.1, 8.0
_MAX_RATED = 8192
# Dial-backs under way for all: each holds a few sockets.
_MAX_AT_ONCE = 16

log = structlog.get_logger(__name__)

# (peer ID, TCP multiaddr without /p2p/): whether that peer answers there; raises nothing.
DialBack = Callable[[str, str], Awaitable[bool]]


class AutoNat:
    """The answering side."""

    def __init__(self, dial_back: DialBack, metrics: Metrics) -> None:
        self._dial_back = dial_back
        self._metrics = metrics
        self._under_way = 0
        self._rates = RateLimit(per_s=_REQUESTS_PER_S, burst=_REQUESTS_BURST, max_keys=_MAX_RATED)

    async def answer(self, conn: MeshConn, stream: Libp2pStream) -> None:
        """Serve one request of a member."""
        status, addr = await self._judge(conn, stream)
        response = Message.DialResponse(status=status)  # type: ignore[arg-type]
        if addr is not None:
            response.addr = circuit_addrs.to_bytes([addr])[0]
        message = Message(type=Message.DIAL_RESPONSE, dialResponse=response)
        await stream.send_all(encode_message(message))

    async def _judge(self, conn: MeshConn, stream: Libp2pStream) -> tuple[int, str | None]:
        with trio.move_on_after(_MESSAGE_TIMEOUT) as scope:
            try:
                request = await read_message(stream, Message)
            except WireError as exc:
                self._metrics.protocol_faults.labels(protocol="autonat", code=exc.code).inc()
                return Message.E_BAD_REQUEST, None
        if scope.cancelled_caught:
            raise StreamReset("no request came")
        peer = request.dial.peer
        if request.type != Message.DIAL or peer.id != circuit_addrs.id_bytes(conn.peer_id):
            return Message.E_BAD_REQUEST, None
        addrs = circuit_addrs.tcp_addrs(peer.addrs, conn.peer_id, self._metrics)
        # Over a relay the asker could be anywhere; and dialling costs us more than asking does.
        if conn.via is not None or not addrs or self._under_way >= _MAX_AT_ONCE:
            return Message.E_DIAL_REFUSED, None
        if not self._rates.allows(conn.peer_id, trio.current_time()):
            return Message.E_DIAL_REFUSED, None
        self._under_way += 1
        try:
            worked = await self._first_that_works(conn.peer_id, addrs[:MAX_ADDRS_DIALLED])
        finally:
            self._under_way -= 1
        log.debug("dial_back", peer_id=conn.peer_id, addr=worked)
        return (Message.E_DIAL_ERROR, None) if worked is None else (Message.OK, worked)

    async def _first_that_works(self, peer_id: str, addrs: tuple[str, ...]) -> str | None:
        worked: list[str] = []
        with trio.move_on_after(DIAL_BACK_TIMEOUT):
            async with trio.open_nursery() as nursery:

                async def try_one(addr: str) -> None:
                    if await self._dial_back(peer_id, addr):
                        worked.append(addr)
                        nursery.cancel_scope.cancel()

                for addr in addrs:
                    nursery.start_soon(try_one, addr)
        return worked[0] if worked else None


async def ask_dial_back(stream: Libp2pStream, own_id: str, addrs: tuple[str, ...]) -> bool:
    """Ask whether this node can be dialled at one of ``addrs``; closes the stream.

    Raises:
        PeerRefused: it would not try.
        WireError, StreamReset: the answer is none.
    """
    peer = Message.PeerInfo(id=circuit_addrs.id_bytes(own_id), addrs=circuit_addrs.to_bytes(addrs))
    request = Message(type=Message.DIAL, dial=Message.Dial(peer=peer))
    try:
        await stream.send_all(encode_message(request))
        answer = await read_message(stream, Message)
    except (MeshError, WireError):
        stream.reset()
        raise
    await stream.aclose()
    match answer.dialResponse.status:
        case Message.OK if answer.type == Message.DIAL_RESPONSE:
            return True
        case Message.E_DIAL_ERROR:
            return False
    raise PeerRefused(f"{stream.peer_id} would not dial this node back")
