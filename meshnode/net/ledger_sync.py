"""Ledgers handed over: one member is asked for every record that it has (protocols/ledger).

Repairs what gossip lost, and tells a newcomer of everybody in one round trip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import structlog
import trio

from meshnode.core.ledger import Ledger, Observation
from meshnode.core.ledger_exchange import (
    MAX_RECORD_BYTES,
    MAX_REQUEST_BYTES,
    PROTOCOL_ID,
    TIMEOUT,
    AnswerReader,
    Record,
    Request,
    decode_request,
    encode_frames,
    encode_request,
)
from meshnode.core.wire import encode_frame
from meshnode.errors import MeshError, PeerUnreachable, WireError
from meshnode.metrics import Metrics
from meshnode.net.framed import FrameReader
from meshnode.net.mesh import Mesh, MeshStream

# Sent at once; a record takes some 700 bytes, and each write costs a frame of its own.
_BATCH_BYTES = 48 * 1024
# Answers under way at a time: each may hold a whole ledger's worth of frames in its window.
_MAX_ANSWERS = 16

log = structlog.get_logger(__name__)

TakeRecord = Callable[[bytes, float], Observation]


class LedgerSync:
    """Asks peers for their ledger, and answers theirs.

    Args:
        take_record: (envelope, age in seconds) -> what the ledger made of it; raises WireError.
    """

    def __init__(
        self, mesh: Mesh, ledger: Ledger, *, take_record: TakeRecord, metrics: Metrics
    ) -> None:
        self._mesh = mesh
        self._ledger = ledger
        self._take_record = take_record
        self._metrics = metrics
        self._answers = 0
        mesh.serve(PROTOCOL_ID, self.answer)

    async def fetch(self, peer_id: str) -> int:
        """Take in the ledger of ``peer_id``; return how many of its records were news.

        Raises:
            MeshError: the peer is gone, refused, or broke the protocol.
        """
        try:
            with trio.fail_after(TIMEOUT):
                news = await self._fetch(peer_id)
        except trio.TooSlowError as exc:
            raise PeerUnreachable(f"the ledger took longer than {TIMEOUT:g} s") from exc
        log.debug("ledger_fetched", peer_id=peer_id, records=news)
        return news

    async def answer(self, stream: MeshStream) -> None:
        """Send every record of a node that is online here."""
        if self._answers >= _MAX_ANSWERS:
            stream.reset()
            return
        self._answers += 1
        try:
            with trio.fail_after(TIMEOUT):
                decode_request(await FrameReader(stream, MAX_REQUEST_BYTES).expect_frame())
                batch = bytearray()
                for frame in encode_frames(self._records()):
                    batch += frame
                    if len(batch) >= _BATCH_BYTES:
                        await stream.send_all(bytes(batch))
                        batch.clear()
                await stream.send_all(bytes(batch))
                await stream.aclose()
        except WireError as exc:
            self._metrics.protocol_faults.labels(protocol="ledger", code=exc.code).inc()
            stream.reset()
        except (MeshError, trio.TooSlowError) as exc:
            log.debug("ledger_not_sent", peer_id=stream.peer_id, error=str(exc))
            stream.reset()
        finally:
            self._answers -= 1

    async def _fetch(self, peer_id: str) -> int:
        stream = await self._mesh.open_stream(peer_id, PROTOCOL_ID, timeout=TIMEOUT)
        complete = False
        try:
            await stream.send_all(encode_frame(encode_request(Request())))
            await stream.send_eof()
            news = await self._read_answer(FrameReader(stream, MAX_RECORD_BYTES))
            await stream.aclose()
            complete = True
            return news
        except WireError as exc:
            self._metrics.protocol_faults.labels(protocol="ledger", code=exc.code).inc()
            raise PeerUnreachable(f"{peer_id} sent a damaged ledger: {exc}") from exc
        finally:
            if not complete:
                stream.reset()

    async def _read_answer(self, frames: FrameReader) -> int:
        answer = AnswerReader()
        news = 0
        while not answer.ended:
            record = answer.receive(await frames.expect_frame())
            if record is not None:
                news += self._take(record)
        return news

    def _take(self, record: Record) -> bool:
        """Take in one record; a bad one among many is skipped, not the whole answer."""
        try:
            observation = self._take_record(record.envelope, record.age)
        except WireError as exc:
            self._metrics.announcements_rejected.labels(reason=exc.code).inc()
            return False
        return observation not in (Observation.STALE, Observation.FULL)

    def _records(self) -> Iterator[Record]:
        """Yield what is online here, the freshest first; ages are those of the moment of asking."""
        now = trio.current_time()
        known = [entry for entry in self._ledger.online(now) if entry.envelope]
        for entry in sorted(known, key=lambda entry: -entry.last_seen):
            yield Record(envelope=entry.envelope, age=max(0.0, now - entry.last_seen))
