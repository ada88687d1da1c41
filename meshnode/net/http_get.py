"""One bounded HTTP GET to a server of this host, which may be anything.

The law here: whatever answers, or does not, this returns or raises within the time limit, and
holds no more than the limit of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import h11
import trio

from meshnode.errors import OutOfDescriptors, PeerUnreachable, ProbeFailed, StreamReset
from meshnode.net.tcp_stream import TcpStream, connect_tcp
from meshnode.values import HostPort

# Of one header block. Servers send a few hundred bytes; informational ones may repeat.
_MAX_HEADERS = 16 * 1024
_CHUNK = 64 * 1024


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A whole answer."""

    status: int
    body: bytes


class NotHttp(ProbeFailed):
    """What answers speaks something other than HTTP."""


async def http_get(address: HostPort, path: str, *, timeout: float, max_bytes: int) -> HttpAnswer:
    """Return the answer to ``GET path``, with a body of ``max_bytes`` at most.

    Raises:
        NotHttp: it answers something else.
        OutOfDescriptors: no socket could be made here.
        ProbeFailed: nothing accepts (then ``is_certain``); too late, too long, or cut short.
    """
    try:
        with trio.fail_after(timeout):
            stream = await _connect(address, timeout)
            try:
                answer = await _exchange(stream, address, path, max_bytes)
            except BaseException:
                stream.reset()  # a backend that goes on sending is not listened to
                raise
            await stream.aclose()
            return answer
    except trio.TooSlowError as exc:
        raise ProbeFailed(
            f"GET {path} was not answered within {timeout:g} s", is_certain=False
        ) from exc


async def _connect(address: HostPort, timeout: float) -> TcpStream:
    try:
        return await connect_tcp(address.host, address.port, timeout=timeout)
    except OutOfDescriptors:
        raise
    except PeerUnreachable as exc:
        is_late = isinstance(exc.__cause__, trio.TooSlowError)
        raise ProbeFailed(str(exc), is_certain=not is_late) from exc


async def _exchange(stream: TcpStream, address: HostPort, path: str, max_bytes: int) -> HttpAnswer:
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADERS)
    headers = [
        ("Host", str(address)),
        ("User-Agent", "meshnode-health"),
        ("Accept", "*/*"),
        ("Connection", "close"),
    ]
    request = h11.Request(method="GET", target=path, headers=headers)
    try:
        await stream.send_all(parser.send(request) or b"")
        parser.send(h11.EndOfMessage())
        return await _read_answer(stream, parser, path, max_bytes)
    except h11.RemoteProtocolError as exc:
        raise NotHttp(f"what answers GET {path} is no HTTP", is_certain=False) from exc
    except StreamReset as exc:
        raise ProbeFailed(f"GET {path} was cut off", is_certain=False) from exc


async def _read_answer(
    stream: TcpStream, parser: h11.Connection, path: str, max_bytes: int
) -> HttpAnswer:
    status, body, received = 0, bytearray(), 0
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            data = await stream.receive_some(_CHUNK)
            received += len(data)
            # Also of what is no body: a server could send informational answers for ever.
            if received > max_bytes + _MAX_HEADERS:
                break
            parser.receive_data(data)
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > max_bytes:
                break
        elif isinstance(event, h11.EndOfMessage):
            return HttpAnswer(status, bytes(body))
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            raise NotHttp(f"GET {path} was closed without an answer", is_certain=False)
    raise ProbeFailed(
        f"the answer to GET {path} is longer than {max_bytes} bytes", is_certain=False
    )
