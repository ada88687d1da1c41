"""Plaintext messages over a secured connection, many per system call.

libp2p's noise reads two bytes for a length, then the body, each through three layers with a lock,
and so pays for a message of 20 bytes as for one of 60,000. Here one read takes what the kernel
has, and one write carries several messages. Where the connection is not noise over a socket of
ours (a relayed one, say), libp2p's own reading and writing is used.
"""

from __future__ import annotations

from typing import Protocol

import trio
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession
from noise.exceptions import NoiseInvalidMessage, NoiseMaxNonceError

from meshnode.errors import PeerUnreachable, WireError

# Four full noise messages; beyond that the gain is lost in the noise of the scheduler.
_READ_BYTES = 256 * 1024
_LENGTH_BYTES = 2  # before each noise message, big endian

_BROKEN = (
    BaseLibp2pError,
    EOFError,
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
)


class SecureChannel(Protocol):
    """Messages in order, both ways. Cancelling ``send`` breaks it; ``receive`` may be cancelled."""

    async def receive(self) -> list[bytes]:
        """Return the messages that came, at least one; none at the other side's end.

        Raises:
            PeerUnreachable: the connection broke.
            WireError: what came is not what the other side encrypted.
        """

    async def send(self, messages: list[bytes]) -> None:
        """Encrypt and send, in one write.

        Raises:
            PeerUnreachable: the connection broke.
        """

    async def send_eof(self) -> None:
        """End the sending side, where the transport can."""


class _Pipe(Protocol):
    async def receive_some(self, max_bytes: int) -> bytes | bytearray: ...
    async def send_all(self, data: bytes) -> None: ...


class _RawPipe:
    """A raw connection of libp2p's under the names of a trio stream."""

    def __init__(self, raw: IRawConnection) -> None:
        self.receive_some = raw.read
        self.send_all = raw.write


class NoiseChannel:
    """Noise messages of one connection, whose handshake is over."""

    def __init__(self, session: SecureSession, noise: NoiseTransportReadWriter) -> None:
        self._session = session
        self._encrypt = noise.encrypt
        self._decrypt = noise.decrypt
        self._pipe = _pipe_of(noise.conn)
        self._partial = b""  # of a noise message

    async def receive(self) -> list[bytes]:
        """See ``SecureChannel``."""
        left_over = self._session.high_watermark - self._session.low_watermark
        if left_over:
            # Came in one message with the end of the muxer's negotiation.
            return [await self._session.read(left_over)]
        messages: list[bytes] = []
        while not messages:
            try:
                data = await self._pipe.receive_some(_READ_BYTES)
            except _BROKEN as exc:
                raise PeerUnreachable(f"the connection broke: {exc}") from exc
            if not data:
                return []
            try:
                self._open(self._partial + data if self._partial else bytes(data), messages)
            except (NoiseInvalidMessage, NoiseMaxNonceError) as exc:
                raise WireError("bad_ciphertext", f"noise: {exc}") from exc
        return messages

    def _open(self, data: bytes, messages: list[bytes]) -> None:
        """Decrypt every whole message in ``data``, and keep what is left for the next time."""
        start, end = 0, len(data)
        while end - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            stop = body + (data[start] << 8 | data[start + 1])
            if stop > end:
                break
            message = self._decrypt(data[body:stop])
            if message:
                messages.append(message)
            start = stop
        self._partial = data[start:]

    async def send(self, messages: list[bytes]) -> None:
        """See ``SecureChannel``."""
        parts: list[bytes] = []
        for message in messages:
            sealed = self._encrypt(message)
            parts.append(len(sealed).to_bytes(_LENGTH_BYTES, "big"))
            parts.append(sealed)
        # From here on nothing but the end of the connection may cancel: the nonce has moved.
        try:
            await self._pipe.send_all(b"".join(parts))
        except _BROKEN as exc:
            raise PeerUnreachable(f"the connection broke: {exc}") from exc

    async def send_eof(self) -> None:
        """See ``SecureChannel``."""
        if isinstance(self._pipe, trio.SocketStream):
            await _send_eof(self._pipe)


class SessionChannel:
    """Any secured connection through libp2p's own reading and writing."""

    def __init__(self, secured: ISecureConn) -> None:
        self._secured = secured

    async def receive(self) -> list[bytes]:
        """See ``SecureChannel``."""
        try:
            data = await self._secured.read(None)
        except _BROKEN as exc:
            raise PeerUnreachable(f"the connection broke: {exc}") from exc
        return [data] if data else []

    async def send(self, messages: list[bytes]) -> None:
        """See ``SecureChannel``."""
        try:
            for message in messages:
                await self._secured.write(message)
        except _BROKEN as exc:
            raise PeerUnreachable(f"the connection broke: {exc}") from exc

    async def send_eof(self) -> None:
        """Do nothing: there is no way to."""


def channel_over(secured: ISecureConn) -> SecureChannel:
    """Return the quickest channel that this connection allows."""
    if type(secured) is SecureSession and type(secured.conn) is NoiseTransportReadWriter:
        return NoiseChannel(secured, secured.conn)
    return SessionChannel(secured)


def _pipe_of(raw: object) -> _Pipe:
    """Return the socket under a raw connection, or the connection where it is something else."""
    if type(raw) is RawConnection and isinstance(raw.stream, TrioTCPStream):
        tcp = raw.stream
        # A subclass that sees every byte must go on to see it.
        if type(tcp).read is TrioTCPStream.read and type(tcp).write is TrioTCPStream.write:
            return tcp.stream
    assert isinstance(raw, IRawConnection)
    return _RawPipe(raw)


async def _send_eof(stream: trio.SocketStream) -> None:
    try:
        await stream.send_eof()
    except _BROKEN as exc:
        raise PeerUnreachable(f"the connection broke: {exc}") from exc
