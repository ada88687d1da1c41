"""Heads of requests and responses, read as strictly as two parsers in a row must.

The law here: what is passed on has one meaning only. Where RFC 9112 lets a recipient guess (a bare
LF, a folded line, two lengths, a length beside chunks) a guess that differs from the engine's
would let one client's bytes become another one's request, so all of that is refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

# Heads of browsers with all their cookies stay below 16 KiB; engines refuse more than 64 KiB.
MAX_HEAD_BYTES = 64 * 1024
MAX_TARGET_BYTES = 16 * 1024
MAX_FIELDS = 128
# 2^63 - 1 has 19 digits; nobody sends a petabyte.
_MAX_LENGTH_DIGITS = 15

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb"{1,32}) ([\x21-\x7e]+) HTTP/1\.([01])")
_ANY_VERSION = re.compile(_TOKEN + rb"{1,32} [\x21-\x7e]+ HTTP/\d+(?:\.\d+)?")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: ([\t\x20-\x7e\x80-\xff]*))?")
_FIELD = re.compile(rb"(" + _TOKEN + rb"+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_HOST = re.compile(rb"(?:[0-9A-Za-z._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_ABSOLUTE = re.compile(rb"https?://([^/?#@]+)(/[^#]*|\?[^#]*)?", re.IGNORECASE)
_BARE_LF = re.compile(rb"(?<!\r)\n")

# One client's heads are alike from request to request, and an engine's answers too, but for the
# length of the body: they are read once, with another length in its place. Exact bytes are
# compared, so that one head is never taken for another. Those kept
# hold clients' keys for a while, as the clients' connections do.
_LENGTH_LINE = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,15})(?=\r\n|\Z)")
_KEPT_HEAD_BYTES = 2048  # as long as those of programs are; with cookies each is another one
_KEPT_HEADS = 256  # of requests, and as many of answers: some 4 MB together, at most

_SPECIAL = frozenset(
    {b"host", b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade"}
)

Field = tuple[bytes, bytes, bytes]  # the name in lower case, the value, the line as it came


class BadRequest(Exception):
    """A request that is answered with ``status`` and not passed on."""

    def __init__(self, status: int, message: str, code: str = "bad_request") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class BadResponse(Exception):
    """An engine answered with something that is not HTTP, or ambiguous."""


class RequestHead(NamedTuple):
    """A request up to its body."""

    method: bytes
    target: bytes  # path and query; * for OPTIONS of the whole server
    minor: int  # of HTTP/1.x
    host: bytes  # b"" only with HTTP/1.0
    fields: tuple[Field, ...]
    length: int | None  # bytes of the body; None: chunked, or there is none
    chunked: bool
    connection: frozenset[bytes]  # options of Connection, in lower case
    expects_continue: bool
    upgrade: bytes | None
    # What was rendered of it, by whoever did: shared by heads that differ in their length alone.
    rendered: dict[object, bytes]

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.length)

    @property
    def keeps_alive(self) -> bool:
        """Whether the client wants to go on with this connection."""
        if self.minor == 0:
            return b"keep-alive" in self.connection and b"close" not in self.connection
        return b"close" not in self.connection

    def value(self, name: bytes) -> bytes | None:
        """Return the first field of that name (lower case)."""
        return _first(self.fields, name)

    def text(self, name: bytes) -> str:
        """Return the first field of that name as text; empty if there is none."""
        return (self.value(name) or b"").decode("latin-1")


class ResponseHead(NamedTuple):
    """A response up to its body."""

    status: int
    reason: bytes
    minor: int
    fields: tuple[Field, ...]
    length: int | None
    chunked: bool
    connection: frozenset[bytes]
    upgrade: bytes | None
    rendered: dict[object, bytes]  # as a request's

    @property
    def keeps_alive(self) -> bool:
        """Whether the engine will take another request on its connection."""
        if self.minor == 0:
            return b"keep-alive" in self.connection
        return b"close" not in self.connection

    def value(self, name: bytes) -> bytes | None:
        """Return the first field of that name (lower case)."""
        return _first(self.fields, name)


def _first(fields: tuple[Field, ...], name: bytes) -> bytes | None:
    for key, value, _ in fields:
        if key == name:
            return value
    return None


def check_beginning(data: bytes) -> None:
    """Refuse a head that is not whole yet and never will be a good one.

    Raises:
        BadRequest: it is too long, or has lines that end without CR.
    """
    if _BARE_LF.search(data):
        raise BadRequest(400, "a line of the request ends without CR before its LF")
    if len(data) > MAX_HEAD_BYTES:
        if b"\r\n" not in data[: MAX_TARGET_BYTES + 64]:
            raise BadRequest(414, "the request's target is too long", "uri_too_long")
        raise BadRequest(431, f"the headers are more than {MAX_HEAD_BYTES} bytes", "too_large")


def parse_request(head: bytes) -> RequestHead:
    """Return the request whose head, without its empty line, is ``head``.

    Raises:
        BadRequest: it is malformed or ambiguous.
    """
    if len(head) > _KEPT_HEAD_BYTES:
        return _parse_request(head)
    match = _LENGTH_LINE.search(head)
    if match is None:
        return _parse_kept_request(head)
    # A second length, or one beside chunks, is refused with the other digits as with these.
    like = _parse_kept_request(b"%b0%b" % (head[: match.start(1)], head[match.end(1) :]))
    # By position: _replace costs three times as much.
    return RequestHead(
        like.method,
        like.target,
        like.minor,
        like.host,
        _with_length(like.fields, match),
        int(match[1]),
        like.chunked,
        like.connection,
        like.expects_continue,
        like.upgrade,
        like.rendered,
    )


def _parse_request(head: bytes) -> RequestHead:
    check_beginning(head)
    first, *lines = head.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(first)
    if match is None:
        if _ANY_VERSION.fullmatch(first):
            raise BadRequest(505, "only HTTP/1.0 and HTTP/1.1 are served", "bad_version")
        raise BadRequest(400, "the first line is no HTTP request")
    method, target, minor = match[1], match[2], int(match[3])
    if len(target) > MAX_TARGET_BYTES:
        raise BadRequest(414, "the request's target is too long", "uri_too_long")
    fields, special = _fields(lines)
    host = _host(special, minor)
    options = _options(special.get(b"connection", ()))
    length, chunked = _framing(special, minor)
    return RequestHead(
        method=method,
        target=_origin_form(method, target, host),
        minor=minor,
        host=host,
        fields=fields,
        length=length,
        chunked=chunked,
        connection=options,
        expects_continue=_expects_continue(special, minor),
        upgrade=_upgrade(special, options) if minor else None,
        rendered={},
    )


_parse_kept_request = lru_cache(maxsize=_KEPT_HEADS)(_parse_request)


def parse_response(head: bytes) -> ResponseHead:
    """Return the response whose head, without its empty line, is ``head``.

    Raises:
        BadResponse: it is malformed or ambiguous.
    """
    if len(head) > _KEPT_HEAD_BYTES:
        return _parse_response(head)
    match = _LENGTH_LINE.search(head)
    if match is None:
        return _parse_kept_response(head)
    like = _parse_kept_response(b"%b0%b" % (head[: match.start(1)], head[match.end(1) :]))
    return ResponseHead(
        like.status,
        like.reason,
        like.minor,
        _with_length(like.fields, match),
        int(match[1]),
        like.chunked,
        like.connection,
        like.upgrade,
        like.rendered,
    )


def _parse_response(head: bytes) -> ResponseHead:
    first, *lines = head.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(first)
    if match is None:
        raise BadResponse("the engine's answer does not begin with an HTTP status line")
    minor, status = int(match[1]), int(match[2])
    try:
        fields, special = _fields(lines)
        length, chunked = _framing(special, minor)
    except BadRequest as exc:
        raise BadResponse(f"the engine's answer is ambiguous: {exc}") from exc
    options = _options(special.get(b"connection", ()))
    return ResponseHead(
        status=status,
        reason=match[3] or b"",
        minor=minor,
        fields=fields,
        length=length,
        chunked=chunked,
        connection=options,
        upgrade=_upgrade(special, options),
        rendered={},
    )


_parse_kept_response = lru_cache(maxsize=_KEPT_HEADS)(_parse_response)


def _with_length(fields: tuple[Field, ...], match: re.Match[bytes]) -> tuple[Field, ...]:
    """Return the fields with the length line that was found in the place of the other one."""
    for at, field in enumerate(fields):
        if field[0] == b"content-length":
            own = (b"content-length", match[1], match[0][2:])
            return (*fields[:at], own, *fields[at + 1 :])
    raise AssertionError("a length line is a field")


_Special = dict[bytes, list[bytes]]


def _fields(lines: list[bytes]) -> tuple[tuple[Field, ...], _Special]:
    """Return all fields, and the values of those that decide about the message."""
    if len(lines) > MAX_FIELDS:
        raise BadRequest(431, f"more than {MAX_FIELDS} header fields", "too_large")
    fields: list[Field] = []
    special: _Special = {}
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise BadRequest(400, _why_bad(line))
        name, value = match[1].lower(), match[2].rstrip(b" \t")
        fields.append((name, value, line))
        if name in _SPECIAL:
            special.setdefault(name, []).append(value)
    return tuple(fields), special


def _why_bad(line: bytes) -> str:
    if line[:1] in (b" ", b"\t"):
        return "a header line is folded; write it in one line"
    name, colon, _ = line.partition(b":")
    if colon and name.rstrip() != name:
        return "a header has blanks before its colon"
    return "a header line is malformed"


def _host(special: _Special, minor: int) -> bytes:
    hosts = special.get(b"host", [])
    if len(hosts) > 1:
        raise BadRequest(400, "there is more than one Host header")
    if not hosts:
        if minor:
            raise BadRequest(400, "there is no Host header")
        return b""
    if not _HOST.fullmatch(hosts[0]):
        raise BadRequest(400, "the Host header is no host")
    return hosts[0]


def _framing(special: _Special, minor: int) -> tuple[int | None, bool]:
    """Return (the body's length, whether it is chunked)."""
    codings = special.get(b"transfer-encoding")
    lengths = special.get(b"content-length")
    if codings is not None:
        if lengths is not None:
            raise BadRequest(400, "both Content-Length and Transfer-Encoding are given")
        if not minor:
            raise BadRequest(400, "HTTP/1.0 knows no Transfer-Encoding")
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise BadRequest(501, "the only Transfer-Encoding served is chunked", "bad_coding")
        return None, True
    if lengths is None:
        return None, False
    if len(lengths) > 1:
        raise BadRequest(400, "there is more than one Content-Length")
    if not lengths[0].isdigit() or len(lengths[0]) > _MAX_LENGTH_DIGITS:
        raise BadRequest(400, "the Content-Length is no length")
    return int(lengths[0]), False


def _options(values: list[bytes] | tuple[()]) -> frozenset[bytes]:
    if not values:
        return _NO_OPTIONS
    words = (word.strip(b" \t") for value in values for word in value.split(b","))
    return frozenset(word.lower() for word in words if word)


_NO_OPTIONS: frozenset[bytes] = frozenset()


def _origin_form(method: bytes, target: bytes, host: bytes) -> bytes:
    if target[:1] == b"/":
        if b"#" in target:
            raise BadRequest(400, "the request's target has a fragment")
        return target
    if method == b"CONNECT":
        raise BadRequest(405, "this is no forward proxy: CONNECT is not served", "bad_method")
    if target == b"*" and method == b"OPTIONS":
        return target
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise BadRequest(400, "the request's target is neither a path nor a URL")
    if match[1].lower() != host.lower():
        raise BadRequest(400, "the request's target and its Host header name different hosts")
    rest = match[2] or b"/"
    return rest if rest[:1] == b"/" else b"/" + rest


def _expects_continue(special: _Special, minor: int) -> bool:
    expected = special.get(b"expect")
    if expected is None:
        return False
    if len(expected) > 1 or expected[0].lower() != b"100-continue":
        raise BadRequest(417, "the only expectation served is 100-continue", "bad_expectation")
    return minor == 1  # a client of HTTP/1.0 can't mean it


def _upgrade(special: _Special, options: frozenset[bytes]) -> bytes | None:
    wanted = special.get(b"upgrade")
    return wanted[0] if wanted and len(wanted) == 1 and b"upgrade" in options else None
