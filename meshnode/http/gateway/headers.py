"""Which header fields pass the gateway, and which stop there (RFC 9110, section 7.6)."""

from __future__ import annotations

import os
import re
from itertools import count
from uuid import uuid4

from meshnode.http.gateway.answers import reason_of
from meshnode.http.gateway.heads import Field, RequestHead, ResponseHead

# Of one connection only, whoever names them in Connection or not.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# Written anew for each side, from what was understood of them.
_OF_THE_REQUEST = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"x-request-id"}
# An engine that lets every page in must not let them in through here: the operator says who may.
_CORS = frozenset(
    b"access-control-" + name
    for name in (
        b"allow-origin",
        b"allow-credentials",
        b"allow-headers",
        b"allow-methods",
        b"expose-headers",
        b"max-age",
        b"allow-private-network",
    )
)
_OF_THE_ANSWER = (
    _HOP_BY_HOP
    | _CORS
    | {b"content-length", b"x-request-id", b"x-meshnode-peer", b"x-meshnode-reason"}
)
# A Connection header can't name these away: they say where the message goes, and for whom.
_NEVER_NAMED = frozenset({b"host", b"content-length", b"authorization", b"cookie", b"content-type"})

CREDENTIALS = frozenset({b"authorization", b"x-api-key"})

_REQUEST_ID = re.compile(rb"[0-9A-Za-z._:/+=@-]{1,128}")
# A UUID in form, as llama-cpp-python's server answers 400 to any other.
_id_prefix = str(uuid4())[:24].encode()
_id_numbers = count(int.from_bytes(os.urandom(3), "big"))


def request_id_of(head: RequestHead) -> bytes:
    """Return the client's own ID of the request if it is one, else a new one."""
    given = head.value(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return b"%b%012x" % (_id_prefix, next(_id_numbers) & 0xFFFF_FFFF_FFFF)


def request_for_engine(
    head: RequestHead,
    request_id: bytes,
    *,
    length: int | None,
    without: frozenset[bytes],
    traceparent: bytes | None = None,
) -> bytes:
    """Return the head of the request as the engine gets it, its empty line included.

    Args:
        length: bytes of the body where they are known; None: as the client frames it.
        without: further fields that stay here (lower case).
        traceparent: what the engine is told of the trace; None: what the client said.
    """
    if traceparent is not None:
        without = without | {b"traceparent"}
    like = head.rendered.get(without)
    if like is None:
        like = head.rendered[without] = b"\r\n".join(
            (
                b"%b %b HTTP/1.1\r\nhost: %b"
                % (head.method, head.target, head.host or b"localhost"),
                *_passing(head.fields, _OF_THE_REQUEST | without, head.connection),
                b"via: 1.%d meshnode" % head.minor,
            )
        )
    lines = [like, b"x-request-id: " + request_id]
    if traceparent is not None:
        lines.append(b"traceparent: " + traceparent)
    if length is not None:
        lines.append(b"content-length: %d" % length)
    elif head.chunked:
        lines.append(b"transfer-encoding: chunked")
    elif head.length is not None:
        lines.append(b"content-length: %d" % head.length)
    if head.upgrade is not None:
        lines.append(b"connection: upgrade\r\nupgrade: " + head.upgrade)
    return b"\r\n".join(lines) + b"\r\n\r\n"


def answer_for_client(
    head: ResponseHead, ours: list[bytes], *, chunked: bool, close: bool
) -> bytes:
    """Return the head of the answer as the client gets it, its empty line included.

    Args:
        ours: whole lines of the gateway's own, without their line ends.
        chunked: whether the body follows in chunks of the gateway's.
        close: whether this is the last answer on the connection.
    """
    like = head.rendered.get(b"")
    if like is None:
        reason = head.reason or reason_of(head.status).encode()
        like = head.rendered[b""] = b"\r\n".join(
            (
                b"HTTP/1.1 %d %b" % (head.status, reason),
                *_passing(head.fields, _OF_THE_ANSWER, head.connection),
            )
        )
    lines = [like, *ours]
    if chunked:
        lines.append(b"transfer-encoding: chunked")
    elif head.length is not None:
        lines.append(b"content-length: %d" % head.length)
    if head.status == 101 and head.upgrade is not None:
        lines.append(b"connection: upgrade\r\nupgrade: " + head.upgrade)
    elif close:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def interim_for_client(head: ResponseHead) -> bytes:
    """Return a 1xx as the client gets it, its empty line included; it has no body."""
    reason = head.reason or reason_of(head.status).encode()
    lines = [
        b"HTTP/1.1 %d %b" % (head.status, reason),
        *_passing(head.fields, _OF_THE_ANSWER, head.connection),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _passing(
    fields: tuple[Field, ...], stopping: frozenset[bytes], connection: frozenset[bytes]
) -> list[bytes]:
    if connection and connection - {b"keep-alive", b"close"}:
        stopping = stopping | (connection - _NEVER_NAMED)
    return [line for name, _, line in fields if name not in stopping]


def printable(text: str, limit: int = 200) -> bytes:
    """Return text as a field's value; what peers chose must not end the line."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:limit]).encode("ascii")
