"""Plaintext messages over a secured connection, many per system call.

libp2p's noise reads two bytes for a length, then the body, each through three layers with a lock,
and so pays for a message of 20 bytes as for one of 60,000. Here one read takes what the kernel
has, and one write carries several messages. Where the connection is not noise over a socket of
ours, or a relayed one of ours, libp2p's own reading and writing is used.
"""

from __future__ import annotations

import os
from typing import Protocol

import trio
from cryptography.exceptions import InvalidTag
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession
from noise.exceptions import NoiseMaxNonceError

from meshnode.errors import PeerUnreachable, StreamClosed, StreamReset, WireError
from meshnode.net.libp2p.relay.circuit import CircuitStream

# Four full noise messages; beyond that the gain is lost in the noise of the scheduler.
_READ_BYTES = 256 * 1024
_LENGTH_BYTES = 2  # before each noise message, big endian

_BROKEN = (
    BaseLibp2pError,
    EOFError,
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    StreamClosed,  # of a circuit
    StreamReset,
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

    @property
    def sends_now(self) -> bool:
        """Whether ``send_now`` can be called; other connections can only wait."""

    def send_now(self, messages: list[bytes]) -> bytes:
        """Encrypt, and send what there is room for at once; return the sealed bytes that are left.

        Those go to ``send_rest`` before anything else is sent. Never raises: what is broken says
        so to ``send_rest``.
        """

    async def send_rest(self, sealed: bytes) -> None:
        """Send what ``send_now`` left. Raises as ``send``."""

    async def send_eof(self) -> None:
        """End the sending side, where the transport can."""


class _Pipe(Protocol):
    async def receive_some(self, max_bytes: int) -> bytes: ...
    async def send_all(self, parts: list[bytes]) -> None: ...
    async def send_eof(self) -> None: ...


class _SocketPipe:
    """A socket without the checkpoint that trio's own stream adds to every send.

    That one costs a quarter of a small round trip. The muxer's writer takes turns with other
    tasks in its own loop.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    def _fd(self) -> int:
        # Asked each time: the number of a closed socket soon belongs to another one.
        fd = self._stream.socket.fileno()
        if fd < 0:
            raise trio.ClosedResourceError("the socket was closed on this side")
        return fd

    async def receive_some(self, max_bytes: int) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._fd())
            try:
                return os.read(self._fd(), max_bytes)
            except BlockingIOError:
                continue

    async def send_all(self, parts: list[bytes]) -> None:
        left = memoryview(b"")
        try:
            sent = os.writev(self._fd(), parts)
        except BlockingIOError:
            sent = 0
        if sent < sum(map(len, parts)):
            left = memoryview(b"".join(parts))[sent:]
        while left:
            await trio.lowlevel.wait_writable(self._fd())
            try:
                left = left[os.write(self._fd(), left) :]
            except BlockingIOError:
                continue

    def send_now(self, parts: list[bytes]) -> bytes:
        """Send what there is room for; return the rest, which is all of it where sending fails."""
        try:
            sent = os.writev(self._fd(), parts)
        except (OSError, trio.ClosedResourceError):  # BlockingIOError too: there is no room
            sent = 0
        return b"" if sent == sum(map(len, parts)) else b"".join(parts)[sent:]

    async def send_eof(self) -> None:
        await self._stream.send_eof()


class _RawPipe:
    """A raw connection of libp2p's under the same names."""

    def __init__(self, raw: IRawConnection) -> None:
        self._raw = raw

    async def receive_some(self, max_bytes: int) -> bytes:
        return bytes(await self._raw.read(max_bytes))

    async def send_all(self, parts: list[bytes]) -> None:
        await self._raw.write(b"".join(parts))

    async def send_eof(self) -> None:
        """Do nothing: there is no way to."""


class NoiseChannel:
    """Noise messages of one connection, whose handshake is over."""

    def __init__(self, session: SecureSession, noise: NoiseTransportReadWriter) -> None:
        self._session = session
        # The cipher states themselves take views; the calls above them insist on bytes, a copy.
        self._encrypt = noise.noise_state.noise_protocol.cipher_state_encrypt.encrypt_with_ad
        self._decrypt = noise.noise_state.noise_protocol.cipher_state_decrypt.decrypt_with_ad
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
                self._open(data, messages)
            except (InvalidTag, NoiseMaxNonceError) as exc:
                raise WireError("bad_ciphertext", "a noise message fails its check") from exc
        return messages

    def _open(self, data: bytes, messages: list[bytes]) -> None:
        """Decrypt every whole message in ``data``, and keep what is left for the next time."""
        start, end = 0, len(data)
        view = memoryview(data)
        if self._partial:
            # Only the one message that lies across two reads is put together.
            partial = self._partial
            if len(partial) < _LENGTH_BYTES:
                start = _LENGTH_BYTES - len(partial)
                partial += data[:start]
                if len(partial) < _LENGTH_BYTES:
                    self._partial = partial
                    return
            missing = _LENGTH_BYTES + (partial[0] << 8 | partial[1]) - len(partial)
            partial += view[start : start + missing]
            if end - start < missing:
                self._partial = partial
                return
            start += missing
            if message := self._decrypt(None, memoryview(partial)[_LENGTH_BYTES:]):
                messages.append(message)
        while end - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            stop = body + (data[start] << 8 | data[start + 1])
            if stop > end:
                break
            if message := self._decrypt(None, view[body:stop]):
                messages.append(message)
            start = stop
        self._partial = data[start:]

    async def send(self, messages: list[bytes]) -> None:
        """See ``SecureChannel``."""
        # From here on nothing but the end of the connection may cancel: the nonce has moved.
        await self._send(self._seal(messages))

    @property
    def sends_now(self) -> bool:
        """See ``SecureChannel``."""
        return isinstance(self._pipe, _SocketPipe)

    def send_now(self, messages: list[bytes]) -> bytes:
        """See ``SecureChannel``."""
        assert isinstance(self._pipe, _SocketPipe)
        return self._pipe.send_now(self._seal(messages))

    async def send_rest(self, sealed: bytes) -> None:
        """See ``SecureChannel``."""
        await self._send([sealed])

    def _seal(self, messages: list[bytes]) -> list[bytes]:
        parts: list[bytes] = []
        for message in messages:
            sealed = self._encrypt(None, message)
            parts.append(len(sealed).to_bytes(_LENGTH_BYTES, "big"))
            parts.append(sealed)
        return parts

    async def _send(self, parts: list[bytes]) -> None:
        try:
            await self._pipe.send_all(parts)
        except _BROKEN as exc:
            raise PeerUnreachable(f"the connection broke: {exc}") from exc

    async def send_eof(self) -> None:
        """See ``SecureChannel``."""
        try:
            await self._pipe.send_eof()
        except _BROKEN as exc:
            raise PeerUnreachable(f"the connection broke: {exc}") from exc


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

    @property
    def sends_now(self) -> bool:
        """See ``SecureChannel``."""
        return False

    def send_now(self, messages: list[bytes]) -> bytes:
        """See ``SecureChannel``."""
        raise NotImplementedError("this connection can only wait")

    async def send_rest(self, sealed: bytes) -> None:
        """See ``SecureChannel``."""
        raise NotImplementedError("nothing is ever left")

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
            return _SocketPipe(tcp.stream)
    if type(raw) is RawConnection and isinstance(raw.stream, CircuitStream):
        return raw.stream
    assert isinstance(raw, IRawConnection)
    return _RawPipe(raw)
