"""What pubsub keeps and bounds per peer: frames, queues, seen messages, verified origins.

Nothing here reads a socket. Every number that a peer can drive up has its limit in this file.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypeAlias

import trio
from google.protobuf.message import Message as ProtobufMessage
from libp2p.crypto.keys import PublicKey
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX

from meshnode.errors import WireError

# An announcement is at most 16 KiB, and its envelope adds 120 bytes; four times that is room.
MAX_MESSAGE_BYTES = 64 * 1024
# One RPC: several whole messages, or the 5,000 message IDs that go-libp2p puts into one IHAVE.
MAX_RPC_BYTES = 256 * 1024
# A member needs one topic per network; the rest is room for later ones.
MAX_TOPICS_PER_PEER = 16
MAX_TOPIC_BYTES = 256
# GRAFT and PRUNE name each topic once, IHAVE and IWANT come as one entry per topic.
MAX_CONTROL_ENTRIES = 2 * MAX_TOPICS_PER_PEER
MAX_MESSAGE_IDS = 5_000  # go-libp2p's GossipSubMaxIHaveLength
# An origin's peer ID has at most 42 bytes and its sequence number 8; twice that is room.
MAX_MESSAGE_ID_BYTES = 128
# What one peer that reads slowly can keep waiting here.
MAX_QUEUED_BYTES = 2 * 1024 * 1024
MAX_QUEUED_FRAMES = 4_096
# One noise message carries 65,519 bytes, and yamux's header takes its share.
WRITE_BYTES = 60 * 1024
# Ten thousand nodes that announce every ten seconds, remembered for a minute.
MAX_SEEN = 60_000
SEEN_SECONDS = 120.0
_MAX_ORIGINS = 10_000  # as many as the ledger holds

# The multihash "identity" of an Ed25519 key: the peer ID is the key.
_KEY_INSIDE = b"\x00"
_SIGNING_PREFIX = PUBSUB_SIGNING_PREFIX.encode()


class FrameBuffer:
    """Cuts a byte stream into its varint-length-prefixed frames.

    Feeding whole reads, instead of asking the stream for the length byte by byte, saves two reads
    and two window updates per frame.
    """

    def __init__(self, max_frame_bytes: int = MAX_RPC_BYTES) -> None:
        self._max = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def frames(self) -> Iterator[bytes]:
        """Take each complete frame's payload; what is left waits for more bytes.

        Raises:
            WireError: ``rpc_too_large`` or ``bad_length``; the stream can't be read further.
        """
        at = 0
        try:
            while (span := self._next_span(at)) is not None:
                start, at = span
                yield bytes(memoryview(self._buffer)[start:at])
        finally:
            del self._buffer[:at]

    def _next_span(self, at: int) -> tuple[int, int] | None:
        length = shift = 0
        for start, byte in enumerate(self._buffer[at : at + 5], at + 1):
            length |= (byte & 0x7F) << shift
            if length > self._max:
                raise WireError("rpc_too_large", f"an RPC has more than {self._max} bytes")
            if not byte & 0x80:
                end = start + length
                return (start, end) if end <= len(self._buffer) else None
            shift += 7
        if shift == 35:
            raise WireError("bad_length", "an RPC's length prefix doesn't end")
        return None


def encode_frame(message: ProtobufMessage) -> bytes:
    """Return ``message`` behind its varint length."""
    body = message.SerializeToString()
    prefix = bytearray()
    length = len(body)
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + body


def encode_frames(rpc: rpc_pb2.RPC) -> list[bytes]:
    """Return ``rpc`` as one frame, or as several where it is larger than peers accept."""
    if rpc.ByteSize() <= MAX_RPC_BYTES:
        return [encode_frame(rpc)]
    parts = RpcQueue(max_message_size=MAX_RPC_BYTES).split_rpc(rpc)
    return [encode_frame(part) for part in parts if part.ByteSize() <= MAX_RPC_BYTES]


class OutboundQueue:
    """Frames that wait for one peer; they outlive the stream, which may be opened anew.

    Frames are bytes that all peers' queues share: a message is encoded once, however many get it.
    """

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._urgent: deque[bytes] = deque()
        self._bytes = 0
        self._filled = trio.Event()

    def __len__(self) -> int:
        return len(self._frames) + len(self._urgent)

    def push(self, frame: bytes, *, urgent: bool = False) -> bool:
        """Append ``frame``; return False, dropping it, where the peer reads too slowly."""
        frames = self._urgent if urgent else self._frames
        if len(frames) >= MAX_QUEUED_FRAMES or self._bytes + len(frame) > MAX_QUEUED_BYTES:
            return False
        frames.append(frame)
        self._bytes += len(frame)
        self._filled.set()
        return True

    async def take(self) -> list[bytes]:
        """Wait for frames, and return as many as one write carries, urgent ones first."""
        while not len(self):
            self._filled = trio.Event()
            await self._filled.wait()
        batch: list[bytes] = []
        size = 0
        for frames in (self._urgent, self._frames):
            while frames and (not batch or size + len(frames[0]) <= WRITE_BYTES):
                size += len(frames[0])
                batch.append(frames.popleft())
        self._bytes -= size
        return batch

    def put_back(self, batch: list[bytes]) -> None:
        """Return frames whose write failed; whoever got them all the same knows them as seen."""
        self._frames.extendleft(reversed(batch))
        self._bytes += sum(map(len, batch))
        self._filled.set()

    def close(self) -> None:
        """Drop what waits; libp2p's own queues are closed so when a peer is gone."""
        self._frames.clear()
        self._urgent.clear()
        self._bytes = 0


class SeenMessages:
    """The IDs of messages taken lately, oldest forgotten first.

    In libp2p's place for its LastSeenCache, which has no bound and a thread of its own.
    """

    def __init__(self, *, seconds: float = SEEN_SECONDS, max_entries: int = MAX_SEEN) -> None:
        self._seconds = seconds
        self._max = max_entries
        self._added: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._added)

    def has(self, message_id: bytes) -> bool:
        return message_id in self._added

    def add(self, message_id: bytes) -> bool:
        """Remember ``message_id``; return whether it is new."""
        now = trio.current_time()
        is_new = message_id not in self._added
        self._added.setdefault(message_id, now)
        while len(self._added) > self._max:
            self._added.popitem(last=False)
        return is_new

    def forget_old(self) -> None:
        oldest_kept = trio.current_time() - self._seconds
        while self._added and next(iter(self._added.values())) < oldest_kept:
            self._added.popitem(last=False)


OriginOf: TypeAlias = Callable[[rpc_pb2.Message], str]


def verify_origin(message: rpc_pb2.Message) -> str:
    """Return the peer ID that signed ``message``.

    Raises:
        WireError: ``bad_signature``: no key, a key that isn't the peer ID's, or ill signed.
    """
    is_inside = message.from_id.startswith(_KEY_INSIDE)
    peer_id, key = _read_inside(message.from_id) if is_inside else _read_beside(message)
    unsigned = rpc_pb2.Message(
        data=message.data,
        topicIDs=message.topicIDs,
        from_id=message.from_id,
        seqno=message.seqno,
    )
    try:
        genuine = key.verify(_SIGNING_PREFIX + unsigned.SerializeToString(), message.signature)
    # Ed25519 raises ValueError on odd lengths, other kinds raise what their library raises.
    except Exception as exc:
        raise WireError("bad_signature", f"signature of {peer_id} can't be read") from exc
    if not genuine:
        raise WireError("bad_signature", f"not signed by {peer_id}")
    return peer_id


def shared_verification(at_most: int) -> OriginOf:
    """Return a ``verify_origin`` for the hosts of one process, of which the first asked verifies.

    Args:
        at_most: messages whose origin is remembered.
    """

    @lru_cache(maxsize=at_most)
    def verify_once(message: bytes) -> str:
        return verify_origin(rpc_pb2.Message.FromString(message))

    return lambda message: verify_once(message.SerializeToString())


# To read a key and write it as a peer ID costs more than to verify a signature.
@lru_cache(maxsize=_MAX_ORIGINS)
def _read_inside(from_id: bytes) -> tuple[str, PublicKey]:
    """Return the peer ID of a short key, and that key, which it has inside."""
    return _read_origin(from_id, lambda origin: origin.extract_public_key())


def _read_beside(message: rpc_pb2.Message) -> tuple[str, PublicKey]:
    """Return the peer ID of a long key, and that key, which is beside the signature."""
    return _read_origin(message.from_id, lambda _: deserialize_public_key(message.key))


def _read_origin(from_id: bytes, key_of: Callable[[ID], PublicKey | None]) -> tuple[str, PublicKey]:
    """Return the peer ID and key that a message claims, known to belong together.

    Raises:
        WireError: ``bad_signature``.
    """
    try:
        origin = ID(from_id)
        key = key_of(origin)
        belongs = key is not None and ID.from_pubkey(key) == origin
    # Junk keys make the crypto libraries raise what they like.
    except Exception as exc:
        raise WireError("bad_signature", "an origin's key can't be read") from exc
    if key is None or not belongs:
        raise WireError("bad_signature", "an origin's key is not its peer ID's")
    return origin.to_base58(), key
