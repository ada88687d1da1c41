"""What a node says of peers that it has just lost, and its wire form (``protocols/loss``).

The law here: a report is a hint where to look. Nothing in it is believed; whoever hears it asks
the peer itself.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from meshnode.core.wire import (
    MAP_ERROR_CODES,
    Text64,
    Text128,
    Uint64,
    WireModel,
    decode_model,
    encode_model,
)

# Peers named in one report. A host that dies takes one or a few with it; a rack's fill several.
MAX_LOST = 16
# A peer takes some 75 bytes; the rest is room for later keys.
MAX_REPORT_BYTES = 4096

ERROR_CODES = MAP_ERROR_CODES


class LostPeer(WireModel):
    """One peer that the reporter can't reach any more."""

    id: Annotated[Text128, Field(min_length=1)] = Field(alias="ID")  # peer ID, base58
    seq: Uint64 = Field(alias="Seq")  # of its newest announcement that the reporter has


class LossReport(WireModel):
    """One node's word that it has just lost its link to some peers."""

    lost: tuple[LostPeer, ...] = Field(alias="Lost", min_length=1, max_length=MAX_LOST)
    reason: Text64 = Field(default="", alias="Reason")  # for people


def encode(report: LossReport) -> bytes:
    """Return ``report`` canonically."""
    return encode_model(report, MAX_REPORT_BYTES)


def decode(data: bytes) -> LossReport:
    """Return the report that ``data`` is.

    Raises:
        WireError: ``too_large``, ``bad_msgpack`` or ``bad_field``.
    """
    return decode_model(LossReport, data, MAX_REPORT_BYTES)
