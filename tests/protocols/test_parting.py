from __future__ import annotations

from typing import Any

import pytest

from meshnode.core.parting import MAX_BYTES
from meshnode.errors import WireError
from meshnode.net.framed import FrameReader

PROTOCOL = "parting/1.0.0"


class Pieces:
    """A stream that brings what was written, in pieces, and then its end."""

    def __init__(self, data: bytes, step: int) -> None:
        self._left = [data[at : at + step] for at in range(0, len(data), step)]

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        return self._left.pop(0) if self._left else b""


@pytest.mark.vectors(PROTOCOL, "streams")
@pytest.mark.parametrize("step", [1, 3, 10_000])
async def test_a_stream_holds_its_frame_or_fails_with_the_code_named(
    vector: dict[str, Any], step: int
) -> None:
    frames = FrameReader(Pieces(bytes.fromhex(vector["stream"]), step), MAX_BYTES)  # type: ignore[arg-type]
    if error := vector.get("error"):
        with pytest.raises(WireError) as caught:
            await frames.expect_frame()
        assert caught.value.code == error
    else:
        assert (await frames.expect_frame()).hex() == vector["body"]
