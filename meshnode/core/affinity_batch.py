"""Whose cache is warm for which prompts, as entry nodes tell each other (``protocols/affinity``).

The law here: a batch is a hint whom to try first. What is wrong in it can cost a cache miss and
nothing else, because the load guard of ``prefix_select`` stands before every hint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field, WithJsonSchema

from meshnode.core.prefix_chain import SHORT_BITS
from meshnode.core.wire import (
    MAP_ERROR_CODES,
    Text64,
    Text128,
    WireModel,
    decode_model,
    encode_model,
)
from meshnode.errors import WireError

# What one entry node routes in a busy second: some 1,300 blocks, 300 requests' worth. Taking it in
# keeps the receiver's event loop for 2 ms.
MAX_BATCH_BYTES = 8192
MAX_MODELS = 64
MAX_PLACES = 256  # services of peers
MAX_RUNS = 512  # a run takes 24 bytes at least
BLOCK_BYTES = SHORT_BITS // 8

ERROR_CODES = MAP_ERROR_CODES | {"bad_index", "bad_length"}

Blocks = Annotated[
    bytes,
    Field(min_length=BLOCK_BYTES, max_length=MAX_BATCH_BYTES),
    WithJsonSchema(  # as hexadecimal
        {
            "type": "string",
            "minLength": 2 * BLOCK_BYTES,
            "maxLength": 2 * MAX_BATCH_BYTES,
        }
    ),
]


class AffinityPlace(WireModel):
    """One service of one peer."""

    id: Annotated[Text128, Field(min_length=1)] = Field(alias="ID")  # peer ID, base58
    service_id: Text64 = Field(default="", alias="ServiceID")


class AffinityRun(WireModel):
    """Blocks of prompts that one service served last."""

    model: Annotated[int, Field(ge=0, lt=MAX_MODELS)] = Field(alias="Model")  # in Models
    place: Annotated[int, Field(ge=0, lt=MAX_PLACES)] = Field(alias="Place")  # in Places
    blocks: Blocks = Field(alias="Blocks")  # 6 bytes each, big endian


class AffinityBatch(WireModel):
    """What one entry node routed lately."""

    models: tuple[Annotated[Text128, Field(min_length=1)], ...] = Field(
        alias="Models", min_length=1, max_length=MAX_MODELS
    )
    places: tuple[AffinityPlace, ...] = Field(alias="Places", min_length=1, max_length=MAX_PLACES)
    runs: tuple[AffinityRun, ...] = Field(alias="Runs", min_length=1, max_length=MAX_RUNS)


def pack_blocks(blocks: Iterable[int]) -> bytes:
    """Return hashes, each below 2**48, as a run carries them."""
    return b"".join([block.to_bytes(BLOCK_BYTES, "big") for block in blocks])


def unpack_blocks(data: bytes) -> tuple[int, ...]:
    """Return the hashes of a run."""
    return tuple(
        int.from_bytes(data[at : at + BLOCK_BYTES], "big")
        for at in range(0, len(data), BLOCK_BYTES)
    )


def encode(batch: AffinityBatch) -> bytes:
    """Return ``batch`` canonically."""
    return encode_model(batch, MAX_BATCH_BYTES)


def decode(data: bytes) -> AffinityBatch:
    """Return the batch that ``data`` is; its indices are those of entries that are there.

    Raises:
        WireError: ``too_large``, ``bad_msgpack``, ``bad_field``, ``bad_index`` or ``bad_length``.
    """
    batch = decode_model(AffinityBatch, data, MAX_BATCH_BYTES)
    for run in batch.runs:
        if run.model >= len(batch.models) or run.place >= len(batch.places):
            raise WireError("bad_index", "a run names a model or a place that is not listed")
        if len(run.blocks) % BLOCK_BYTES:
            raise WireError("bad_length", f"{len(run.blocks)} bytes are no whole blocks")
    return batch
