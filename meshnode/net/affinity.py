"""Entry nodes tell each other whose cache is warm for which prompt, in small batches.

The law here: nothing in a batch is believed further than a hint goes. It names only services that
the ledger has online, and that offer the model; whom a hint names gets no request that the load
guard would not let it have. So a member that lies or floods can make requests miss a cache, and
nothing else. Nodes that route nothing by prompts pass batches on, and keep nothing of them.
"""

from __future__ import annotations

import structlog
import trio

from meshnode.core.affinity_batch import AffinityBatch, decode, encode, unpack_blocks
from meshnode.core.affinity_outbox import TOTAL_BYTES, Outbox, Share
from meshnode.core.model_router import ModelRouter, Observed
from meshnode.core.prefix_cache import MAX_ENTRIES, TTL
from meshnode.core.rate import RateLimit
from meshnode.errors import WireError
from meshnode.metrics import Metrics
from meshnode.net.mesh import Mesh, Verdict
from meshnode.net.rng import Rng

# A burst of requests shares one batch; the second turn of a conversation comes later than this.
_GATHER = (0.05, 0.15)  # seconds, from and to
# Per origin: twice what one that speaks at its fastest sends.
_BATCHES_PER_SECOND = 2.0
_BATCH_BURST = 4.0
_MAX_ORIGINS = 20_000  # twice as many as a ledger holds
# From all together: twice what they may say, as not all hear of each other at once.
_BYTES_PER_SECOND = 2.0 * TOTAL_BYTES
_BYTES_BURST = 2.0 * TOTAL_BYTES
# When the index is this full, no origin may fill more than its part of it: whoever makes up
# blocks shall not push out what the others told.
_CROWDED = MAX_ENTRIES * 3 // 4
_PART = MAX_ENTRIES / 4

log = structlog.get_logger(__name__)


def affinity_topic(network: str) -> str:
    """Return the topic on which the entry nodes of ``network`` tell of warm caches."""
    return f"/meshnode/{network}/affinity/1.0.0"


class AffinityGossip:
    """Tells what this node routed by prompts, and takes in what others did.

    Args:
        takes_part: whether this node routes by prompts; otherwise it only passes batches on.
    """

    def __init__(
        self,
        mesh: Mesh,
        models: ModelRouter,
        *,
        topic: str,
        takes_part: bool,
        rng: Rng,
        metrics: Metrics,
    ) -> None:
        self._mesh = mesh
        self._models = models
        self._topic = topic
        self._takes_part = takes_part
        self._rng = rng
        self._metrics = metrics
        self._outbox = Outbox()
        self._share = Share()
        self._filled = trio.Event()
        self._dropped = 0  # as counted last
        self._batches = RateLimit(
            per_s=_BATCHES_PER_SECOND, burst=_BATCH_BURST, max_keys=_MAX_ORIGINS
        )
        self._bytes = RateLimit(per_s=_BYTES_PER_SECOND, burst=_BYTES_BURST, max_keys=1)
        self._blocks = RateLimit(per_s=_PART / TTL, burst=_PART, max_keys=_MAX_ORIGINS)
        mesh.subscribe(topic, self.hear)
        if takes_part:
            models.on_observed = self._observed

    # Telling

    def _observed(self, observed: Observed) -> None:
        self._outbox.add(observed, trio.current_time())
        self._filled.set()

    async def share_forever(self) -> None:
        """Tell what was routed here until cancelled."""
        while True:
            await self._filled.wait()
            await trio.sleep(self._rng.uniform(*_GATHER))
            await trio.sleep_until(self._share.next_at(trio.current_time()))
            self._filled = trio.Event()
            await self._tell()
            if self._outbox:
                self._filled.set()

    async def _tell(self) -> None:
        now = trio.current_time()
        taken = self._outbox.take(self._share.room(now), now)
        counted = self._metrics.affinity_blocks
        counted.labels(outcome="dropped").inc(self._outbox.dropped - self._dropped)
        self._dropped = self._outbox.dropped
        if taken is None:
            return
        batch, blocks = taken
        data = encode(batch)
        self._share.said(len(data), now)
        self._metrics.affinity_batches.labels(direction="sent").inc()
        counted.labels(outcome="sent").inc(blocks)
        await self._mesh.publish(self._topic, data)

    # Hearing

    def hear(self, sender: str, data: bytes) -> Verdict:
        """Judge one gossiped batch; ``sender`` is its proven origin, not who forwarded it."""
        now = trio.current_time()
        rejected = self._metrics.affinity_batches_rejected
        if not self._batches.allows(sender, now):
            rejected.labels(reason="rate").inc()
            return Verdict.IGNORE
        try:
            batch = decode(data)
        except WireError as exc:
            self._metrics.protocol_faults.labels(protocol="affinity", code=exc.code).inc()
            rejected.labels(reason=exc.code).inc()
            return Verdict.REJECT
        if not self._bytes.allows("all", now, len(data)):
            rejected.labels(reason="budget").inc()
            return Verdict.IGNORE
        self._metrics.affinity_batches.labels(direction="received").inc()
        self._share.heard(sender, now)
        if self._takes_part:
            self._take(sender, batch, now)
        return Verdict.ACCEPT

    def _take(self, sender: str, batch: AffinityBatch, now: float) -> None:
        counted = self._metrics.affinity_blocks
        for run in batch.runs:
            place = batch.places[run.place]
            blocks = unpack_blocks(run.blocks)
            observed = Observed(batch.models[run.model], blocks, (place.id, place.service_id))
            may = self._blocks.allows(sender, now, len(blocks))
            if not may and self._models.blocks_known > _CROWDED:
                counted.labels(outcome="crowded").inc(len(blocks))
            elif self._models.take_observed(observed, now):
                counted.labels(outcome="taken").inc(len(blocks))
            else:
                counted.labels(outcome="not_offered").inc(len(blocks))
