"""What a node says of itself, and its wire form (``protocols/announce``).

The law here: ``decode`` takes any bytes and returns a ``NodeData`` whose every value is within
the bounds below, or raises ``WireError``; it believes nothing else about it. Whether the node is
alive is the ledger's business, whether it may speak under that ID the envelope's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from meshnode.core.wire import (
    MAP_ERROR_CODES,
    Text64,
    Text128,
    Text256,
    Uint64,
    WireModel,
    decode_model,
    pack_map,
)
from meshnode.errors import WireError

# Seconds of silence after which a node counts as gone, unless it announced another window.
# LocalAI's edgevpn nodes use the same 40.
NODE_ONLINE_WINDOW = 40.0
# A reader never waits less or more than this, whatever a peer asks for: below 10 s one lost
# announcement drops a live peer, above an hour the dead would fill the ledger.
MIN_ONLINE_WINDOW = 10.0
MAX_ONLINE_WINDOW = 3600.0

# The payload without its envelope. A node with one service and a few addresses needs 400 bytes.
MAX_ANNOUNCEMENT_BYTES = 16 * 1024
# With its envelope. An Ed25519 signer's adds 140 bytes; the rest is room for fields of later ones.
MAX_ENVELOPE_BYTES = 20 * 1024
MAX_SERVICES = 32
# Room for an engine's whole catalogue; the 16 KiB are what really bounds it.
MAX_MODELS = 256
MAX_ADDRS = 16
# More than any host has by a factor of a hundred: a report above it is a lie or a broken driver.
MAX_CREDIBLE_VRAM = 16 * 2**40  # bytes

# bad_envelope comes from net, where signatures are checked.
ERROR_CODES = MAP_ERROR_CODES | {"bad_envelope", "wrong_signer"}

State = Literal["up", "draining", "leaving"]
ServiceName = Annotated[Text64, Field(min_length=1)]
# Names like "hf.co/org/model-GGUF:Q4_K_M" reach 100 characters.
MAX_MODEL_NAME = 128
ModelName = Annotated[Text128, Field(min_length=1)]


class ServiceData(WireModel):
    """One service that a node exposes."""

    service_id: ServiceName = Field(alias="ServiceID")
    models: tuple[ModelName, ...] = Field(default=(), alias="Models", max_length=MAX_MODELS)
    in_flight: Uint64 = Field(default=0, alias="InFlight")  # requests open on it, everyone's
    max_in_flight: Uint64 = Field(default=0, alias="MaxInFlight")  # 0 = no limit
    healthy: bool = Field(default=True, alias="Healthy")
    # Models in memory now, as far as its engine tells; those also named in ``models`` count.
    loaded: tuple[ModelName, ...] = Field(default=(), alias="Loaded", max_length=MAX_MODELS)


class NodeData(WireModel):
    """What a node says of itself."""

    id: Annotated[Text128, Field(min_length=1)] = Field(alias="ID")  # peer ID, base58
    name: Text64 = Field(default="", alias="Name")  # for people
    # The service that AvailableVRAM and TunnelAddress speak of; "" = none exposed.
    service_id: Text64 = Field(default="", alias="ServiceID")
    # Filled in by the reader, for LocalAI's worker mode; never sent by us.
    tunnel_address: Text256 = Field(default="", alias="TunnelAddress")
    last_seen: Uint64 = Field(default=0, alias="LastSeen")  # sender's Unix ms, display only
    available_vram: Uint64 = Field(default=0, alias="AvailableVRAM")  # bytes; 0 = unknown
    total_vram: Uint64 = Field(default=0, alias="TotalVRAM")  # bytes; 0 = unknown
    gpu_count: Uint64 = Field(default=0, alias="GPUCount")
    services: tuple[ServiceData, ...] = Field(default=(), alias="Services", max_length=MAX_SERVICES)
    addrs: tuple[Text256, ...] = Field(default=(), alias="Addrs", max_length=MAX_ADDRS)
    seq: Uint64 = Field(alias="Seq")  # rises with every announcement and across restarts
    state: State = Field(default="up", alias="State")
    online_window: Uint64 = Field(default=int(NODE_ONLINE_WINDOW), alias="OnlineWindow")  # seconds
    version: Text64 = Field(default="", alias="Version")
    # Whether it carries connections for members that can only dial out.
    relay: bool = Field(default=False, alias="Relay")

    @property
    def window_s(self) -> float:
        """Seconds of silence after which this node is taken for gone."""
        return float(min(max(self.online_window, MIN_ONLINE_WINDOW), MAX_ONLINE_WINDOW))

    @property
    def usable_vram(self) -> int:
        """Free VRAM in bytes as far as it is credible; 0 = unknown, the lowest tier."""
        return self.credible_vram(self.available_vram)

    def credible_vram(self, claimed: int) -> int:
        """Return what the peer says is free, in bytes; 0 where it can't have so much."""
        if claimed > MAX_CREDIBLE_VRAM or (self.total_vram and claimed > self.total_vram):
            return 0
        return claimed

    def service(self, service_id: str) -> ServiceData | None:
        """Return what it says of ``service_id``, or None; of two equal names the first counts."""
        for service in self.services:
            if service.service_id == service_id:
                return service
        return None


def decode(data: bytes) -> NodeData:
    """Return the announcement that ``data`` is.

    Raises:
        WireError: ``too_large``, ``bad_msgpack`` or ``bad_field``.
    """
    return decode_model(NodeData, data, MAX_ANNOUNCEMENT_BYTES)


def decode_signed(signer: str, data: bytes) -> NodeData:
    """Return the announcement that ``data`` is, if ``signer`` may make it.

    Args:
        signer: the peer ID whose signature covers ``data``, already verified.

    Raises:
        WireError: as ``decode``; ``wrong_signer``: it speaks for another peer.
    """
    node = decode(data)
    if node.id != signer:
        raise WireError("wrong_signer", "the announcement's ID is not its signer's")
    return node


def encode(node: NodeData) -> bytes:
    """Return ``node`` canonically: every key but TunnelAddress, in the order of the SPEC.

    Raises:
        WireError: ``too_large``: it needs more than ``MAX_ANNOUNCEMENT_BYTES``; let
            ``catalogue.fit_models`` name fewer models.
    """
    fields = node.model_dump(by_alias=True, exclude={"tunnel_address"})
    return pack_map(fields, MAX_ANNOUNCEMENT_BYTES)
