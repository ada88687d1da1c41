"""What all requests of one gateway share: its parts, the room for bodies, and what is counted."""

from __future__ import annotations

from collections.abc import Callable

from meshnode.http.gateway.access import Access
from meshnode.http.gateway.attempts import Chooser
from meshnode.http.gateway.deadlines import Deadlines
from meshnode.http.gateway.listing import Listing
from meshnode.http.gateway.settings import GatewaySettings
from meshnode.metrics import Metrics
from meshnode.net.upstream import Upstreams
from meshnode.tracing import Tracer

# Bodies kept for routing and for another attempt, all requests together.
MAX_KEPT_BYTES = 1024 * 1024 * 1024


class Shared:
    """The parts of one gateway; see ``Gateway`` for what each is."""

    def __init__(
        self,
        chooser: Chooser,
        upstreams: Upstreams,
        *,
        access: Access,
        listing: Listing,
        metrics: Metrics,
        settings: GatewaySettings,
        tracer: Tracer,
    ) -> None:
        self.chooser = chooser
        self.upstreams = upstreams
        self.access = access
        self.listing = listing
        self.metrics = metrics
        self.settings = settings
        self.tracer = tracer
        self.deadlines = Deadlines()
        self.count_to_client = metrics.tunnel_bytes.labels(direction="to_client").inc
        self._kept_bytes = 0
        self._outcomes: dict[str, Callable[[], None]] = {}
        self._tiers: dict[str, Callable[[], None]] = {}

    def keep_bytes(self, change: int) -> bool:
        """Count bytes of bodies that are kept; False where that would be too many."""
        if change > 0 and self._kept_bytes + change > MAX_KEPT_BYTES:
            return False
        self._kept_bytes += change
        return True

    def count(self, outcome: str) -> None:
        """Count a request that ended so."""
        count = self._outcomes.get(outcome)
        if count is None:
            count = self._outcomes[outcome] = self.metrics.requests.labels(outcome=outcome).inc
        count()

    def count_decision(self, tier: str) -> None:
        """Count a peer that was picked by ``tier``."""
        count = self._tiers.get(tier)
        if count is None:
            count = self._tiers[tier] = self.metrics.routing_decisions.labels(tier=tier).inc
        count()
