"""What the operator chose for the gateway."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshnode.core.api_keys import ClientKeys
from meshnode.http.gateway.client import ClientLimits
from meshnode.net.accept import AcceptLimits
from meshnode.net.splice import IDLE_TIMEOUT


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Each of them; the defaults are those of ``meshnode up``."""

    first_byte_timeout: float = 300.0  # seconds for an engine to begin its answer
    idle_timeout: float = IDLE_TIMEOUT  # seconds without a byte of an answer
    response_headers: bool = True  # x-meshnode-peer and x-meshnode-reason
    client_keys: ClientKeys | None = None  # of those who may ask; None: anybody may
    accept: AcceptLimits = field(default_factory=AcceptLimits)
    limits: ClientLimits = field(default_factory=ClientLimits)
