"""The plain fields of a multipart form, read from its beginning alone.

An upload of audio may have hundreds of megabytes, and routing needs one short field of it, which
the official clients send before the file. So a form is looked at as far as it has come, and what
is not found there is not known.
"""

from __future__ import annotations

import re

from meshnode.errors import ParseError

# What the gateway holds back while it looks for the model.
FORM_HEAD_BYTES = 64 * 1024
# Fields before the file: the API has about ten. It bounds the work on a hostile form.
_MAX_PARTS = 64
_MAX_FIELD = 1024  # bytes of one value that routing could want

_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))', re.IGNORECASE)
_NAME = re.compile(rb';[ \t]*name="([^"\r\n]{0,200})"', re.IGNORECASE)
_FILE = re.compile(rb";[ \t]*filename\*?=", re.IGNORECASE)


def form_field(content_type: str, head: bytes, name: str) -> str | None:
    """Return the text of the field ``name``; None if ``head`` doesn't hold it whole.

    Args:
        content_type: of the request, with its boundary.
        head: the body, or what has come of it so far.

    Raises:
        ParseError: no boundary, not UTF-8, or the field stands twice before the first file.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise ParseError("the multipart form names no boundary in its Content-Type")
    mark = b"--" + (found[1] or found[2]).encode("latin-1", "replace")
    value: str | None = None
    for part in head.split(mark, _MAX_PARTS + 1)[1:-1]:  # the last one may be cut short
        headers, separator, content = part.partition(b"\r\n\r\n")
        disposition = _disposition(headers)
        if not separator or _FILE.search(disposition):
            break  # what stands behind a file is looked for by nobody who streams it
        named = _NAME.search(disposition)
        if named is None or named[1] != name.encode():
            continue
        if value is not None:
            raise ParseError(f"the form names its {name} more than once; leave one", param=name)
        value = _text(content, name)
    return value


def _disposition(headers: bytes) -> bytes:
    for line in headers.split(b"\r\n"):
        if line[:20].lower() == b"content-disposition:":
            return line
    return b""


def _text(content: bytes, name: str) -> str:
    value = content.removesuffix(b"\r\n")
    if len(value) > _MAX_FIELD:
        raise ParseError(f"the form's {name} is longer than {_MAX_FIELD} bytes", param=name)
    try:
        return value.decode("utf-8").strip()
    except UnicodeDecodeError as exc:
        raise ParseError(f"the form's {name} is not UTF-8", param=name) from exc
