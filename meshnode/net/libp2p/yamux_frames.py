"""What /yamux/1.0.0 looks like on the wire, and how much of it one connection may hold."""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

HEADER = Struct(">BBHII")  # version, type, flags, stream ID, length
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
GO_AWAY_NORMAL, GO_AWAY_PROTOCOL_ERROR = 0, 1
MAX_U32 = 2**32 - 1

# The protocol's own: both sides assume it before the first window update.
INITIAL_WINDOW = 256 * 1024  # bytes
# One noise message carries 65,535 bytes with its 16-byte tag.
MAX_MESSAGE = 65_535 - 16  # bytes of frames that are handed out at a time


@dataclass(frozen=True, slots=True)
class Limits:
    """Everything a peer, or a local caller, could otherwise grow."""

    streams: int = 4096  # each way; one tunnel is one stream
    accept_backlog: int = 256  # inbound streams nobody took yet, as in go-yamux
    max_window: int = 1024 * 1024  # bytes; one stalled stream holds no more than this
    growth: int = 32 * 1024 * 1024  # bytes that all windows together may grow by
    send_buffer: int = 256 * 1024  # bytes of one stream that wait to be sent
    control_frames: int = 16_384  # every stream reset at once, twice; 1 MB of memory
