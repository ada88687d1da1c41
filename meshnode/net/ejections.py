"""What the log and the metrics say of a peer that is put aside for its failures."""

from __future__ import annotations

import structlog

from meshnode.core.lease_book import Ejection
from meshnode.metrics import Metrics

log = structlog.get_logger(__name__)


def tell_ejection(metrics: Metrics, ejection: Ejection) -> None:
    """Count one ejection, and log it."""
    metrics.ejections.labels(reason=ejection.grounds.reason).inc()
    log.info(
        "peer_ejected",
        peer_id=ejection.peer_id,
        service=ejection.service_id,
        reason=ejection.grounds.text,
        duration_s=round(ejection.seconds, 1),
    )
