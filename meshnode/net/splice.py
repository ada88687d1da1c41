"""Two byte streams joined: each end of file is passed on by itself, an error cuts both.

The law here: a stream that is spliced ends in one of two ways. Either both directions reached
their clean end and both streams were closed, or both were reset. A cut answer never looks whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import trio

from meshnode.errors import LinkLost, StreamClosed, StreamReset
from meshnode.net.mesh import ByteStream

# A thinking model may say nothing for minutes; a client that lost its network, for ever.
IDLE_TIMEOUT = 15 * 60.0  # seconds without a byte either way
_CHUNK_BYTES = 64 * 1024
# The idle deadline moves at most this often: moving it for every chunk costs more than it tells.
_DEADLINE_STEP = 1.0  # seconds

CountBytes = Callable[[int], None]


class SpliceOutcome(Enum):
    """How a splice ended."""

    COMPLETE = "complete"  # both ends of file were passed on
    CLIENT_GONE = "client_gone"  # the first stream was reset or died
    UPSTREAM_CUT = "upstream_cut"  # the second one was
    IDLE = "idle"  # nothing moved for ``idle_timeout``


@dataclass(frozen=True, slots=True)
class SpliceEnd:
    """How a splice ended, and the error that ended it, in words."""

    outcome: SpliceOutcome
    error: str | None = None
    is_lost: bool = False  # the connection under the stream died, which nobody cut


class _CutError(Exception):
    """One of the two streams failed."""

    def __init__(self, outcome: SpliceOutcome, error: Exception) -> None:
        super().__init__(str(error))
        self.end = SpliceEnd(outcome, str(error), isinstance(error, LinkLost))


async def splice(
    client: ByteStream,
    upstream: ByteStream,
    *,
    count_to_upstream: CountBytes,
    count_to_client: CountBytes,
    idle_timeout: float = IDLE_TIMEOUT,
) -> SpliceEnd:
    """Carry bytes both ways until both ends of file, an error, or ``idle_timeout`` of silence.

    Closes both streams when complete; resets both on any other way out, cancellation included.
    ``count_to_client`` is told of bytes before they are sent on, so that its first call is the
    first byte of the answer.
    """
    end = SpliceEnd(SpliceOutcome.IDLE, f"nothing moved for {idle_timeout:g} s")
    try:
        with trio.move_on_after(idle_timeout) as idle:
            activity = _Activity(idle, idle_timeout)
            end = await _carry_both_ways(
                _Direction(client, upstream, count_to_upstream, activity),
                _Direction(upstream, client, count_to_client, activity),
            )
        if end.outcome is SpliceOutcome.COMPLETE:
            await client.aclose()
            await upstream.aclose()
    except BaseException:
        client.reset()
        upstream.reset()
        raise
    if end.outcome is not SpliceOutcome.COMPLETE:
        client.reset()
        upstream.reset()
    return end


@dataclass(slots=True)
class _Activity:
    """Moves the idle deadline when something was carried."""

    scope: trio.CancelScope
    idle_timeout: float

    def touch(self) -> None:
        deadline = trio.current_time() + self.idle_timeout
        if deadline - self.scope.deadline >= min(_DEADLINE_STEP, self.idle_timeout / 4):
            self.scope.deadline = deadline


@dataclass(frozen=True, slots=True)
class _Direction:
    source: ByteStream
    sink: ByteStream
    count: CountBytes
    activity: _Activity

    async def carry(self, source_fails: SpliceOutcome, sink_fails: SpliceOutcome) -> None:
        while True:
            try:
                data = await self.source.receive_some(_CHUNK_BYTES)
            except (StreamReset, StreamClosed) as exc:
                raise _CutError(source_fails, exc) from exc
            self.activity.touch()
            try:
                if not data:
                    await self.sink.send_eof()
                    return
                self.count(len(data))
                await self.sink.send_all(data)
            except (StreamReset, StreamClosed) as exc:
                raise _CutError(sink_fails, exc) from exc
            self.activity.touch()


async def _carry_both_ways(to_upstream: _Direction, to_client: _Direction) -> SpliceEnd:
    gone, cut = SpliceOutcome.CLIENT_GONE, SpliceOutcome.UPSTREAM_CUT
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(to_upstream.carry, gone, cut)
            await to_client.carry(cut, gone)
    except* _CutError as failures:
        first = failures.exceptions[0]
        # Both directions may fail at once; one of them is reason enough.
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        end = first.end
    else:
        end = SpliceEnd(SpliceOutcome.COMPLETE)
    return end
