"""Ledgers compared: two members tell each other what the other has not heard (protocols/ledger).

Repairs what gossip lost and what a partition kept apart, and tells a newcomer, whose digest is
empty, of everybody in one exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import structlog
import trio

from meshnode.core.ledger import Ledger, Observation
from meshnode.core.ledger_digest import chosen, compare, digest_entries, records, split_keys
from meshnode.core.ledger_exchange import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_ID,
    TIMEOUT,
    Digest,
    PartReader,
    Record,
    Want,
    digest_frames,
    end_frame,
    record_frames,
    want_frames,
)
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
    """Compares ledgers with peers, and answers theirs.

    Args:
        take_record: (envelope, age in seconds) -> what the ledger made of it; raises WireError.
    """

    def __init__(
        self, mesh: Mesh, ledger: Ledger, *, take_record: TakeRecord, metrics: Metrics
    ) -> None:
        # Told how many peers one exchange showed to be there that this node did not know of.
        self.on_discovery: Callable[[int], None] = lambda _: None
        # Told (asker's peer ID, peer IDs) of those whom only one of two ledgers has online, though
        # both have the same announcement: one side knows of a death, or of a life, by itself.
        self.on_dispute: Callable[[str, list[str]], None] = lambda _asker, _peer_ids: None
        self._mesh = mesh
        self._ledger = ledger
        self._take_record = take_record
        self._metrics = metrics
        self._answering: set[str] = set()  # one exchange for each peer at a time
        mesh.serve(PROTOCOL_ID, self.answer)

    async def exchange(self, peer_id: str) -> int:
        """Bring this ledger and that of ``peer_id`` to the same state; return the news in it.

        Raises:
            MeshError: the peer is gone, refused, or broke the protocol.
        """
        try:
            with trio.fail_after(TIMEOUT):
                news = await self._exchange(peer_id)
        except trio.TooSlowError as exc:
            raise PeerUnreachable(f"comparing ledgers took longer than {TIMEOUT:g} s") from exc
        log.debug("ledgers_compared", peer_id=peer_id, news=news)
        return news

    async def answer(self, stream: MeshStream) -> None:
        """Take the asker's digest, send what it lacks, and take what it has beyond."""
        peer_id = stream.peer_id
        if len(self._answering) >= _MAX_ANSWERS or peer_id in self._answering:
            stream.reset()
            return
        self._answering.add(peer_id)
        try:
            with trio.fail_after(TIMEOUT):
                await self._answer(stream)
                await stream.aclose()
        except WireError as exc:
            self._metrics.protocol_faults.labels(protocol="ledger", code=exc.code).inc()
            stream.reset()
        except (MeshError, trio.TooSlowError) as exc:
            log.debug("ledger_not_sent", peer_id=peer_id, error=str(exc))
            stream.reset()
        finally:
            self._answering.discard(peer_id)

    async def _answer(self, stream: MeshStream) -> None:
        frames = FrameReader(stream, MAX_MESSAGE_BYTES)
        part = PartReader(Digest)
        digests: list[Digest] = []
        while not part.ended:
            message = part.receive(await frames.expect_frame())
            if isinstance(message, Digest):
                digests.append(message)
        now = trio.current_time()
        difference = compare(self._ledger, digests, now)
        if difference.disputed:
            self.on_dispute(stream.peer_id, [entry.peer_id for entry in difference.disputed])
        await _send(stream, record_frames(records(difference.to_send, now)))
        await _send(stream, [*want_frames(difference.wanted), end_frame()])
        await self._take_part(frames, PartReader(Record, max_records=len(difference.wanted)))

    async def _exchange(self, peer_id: str) -> int:
        stream = await self._mesh.open_stream(peer_id, PROTOCOL_ID, timeout=TIMEOUT)
        complete = False
        try:
            online, gone = digest_entries(self._ledger, trio.current_time())
            await _send(stream, digest_frames(online, gone=False))
            await _send(stream, [*digest_frames(gone, gone=True), end_frame()])
            frames = FrameReader(stream, MAX_MESSAGE_BYTES)
            news, wanted = await self._take_part(frames, PartReader(Record, Want))
            mine = records(chosen(self._ledger, wanted), trio.current_time())
            await _send(stream, [*record_frames(mine), end_frame()])
            await stream.send_eof()
            await stream.aclose()
            complete = True
            return news
        except WireError as exc:
            self._metrics.protocol_faults.labels(protocol="ledger", code=exc.code).inc()
            raise PeerUnreachable(f"{peer_id} sent a damaged ledger: {exc}") from exc
        finally:
            if not complete:
                stream.reset()

    async def _take_part(self, frames: FrameReader, part: PartReader) -> tuple[int, list[bytes]]:
        """Take in records until the part's end; return how many were news, and the keys wanted."""
        news = discovered = 0
        wanted: list[bytes] = []
        try:
            while not part.ended:
                message = part.receive(await frames.expect_frame())
                if isinstance(message, Want):
                    wanted += split_keys(message.keys)
                elif isinstance(message, Record):
                    observation = self._take(message)
                    news += observation not in (None, Observation.STALE, Observation.FULL)
                    discovered += observation in (Observation.NEW, Observation.RETURNED)
        finally:
            if discovered:
                self.on_discovery(discovered)
        return news, wanted

    def _take(self, record: Record) -> Observation | None:
        """Take in one record; a bad one among many is skipped, not the whole answer."""
        try:
            return self._take_record(record.envelope, record.age)
        except WireError as exc:
            self._metrics.announcements_rejected.labels(reason=exc.code).inc()
            return None


async def _send(stream: MeshStream, frames: Iterable[bytes]) -> None:
    for batch in _batches(frames):
        await stream.send_all(batch)


def _batches(frames: Iterable[bytes]) -> Iterator[bytes]:
    batch = bytearray()
    for frame in frames:
        batch += frame
        if len(batch) >= _BATCH_BYTES:
            yield bytes(batch)
            batch.clear()
    if batch:
        yield bytes(batch)
