"""The gateway's own answers, in the shape that the clients of each API expect."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http import HTTPStatus

from meshnode.core.openai_request import Api

# The text that LocalAI's users and their scripts know.
WAITING = "Sorry, waiting for nodes to connect"

# Anthropic's names for what went wrong, which its client raises exceptions by.
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


# What a client is told to wait before it comes again, where nothing says how long.
RETRY_AFTER = 5  # seconds


@dataclass(frozen=True, slots=True)
class Answer:
    """One error of the gateway, before it has a shape."""

    status: int
    message: str
    code: str  # short and stable, for programs
    param: str | None = None
    retry_after: int | None = None  # seconds
    extra: dict[str, object] = field(default_factory=dict)  # beside the error's own keys

    @property
    def type(self) -> str:
        """OpenAI's kind of error: whose fault it was."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"


def render(
    answer: Answer, api: Api, lines: list[bytes], *, close: bool, is_head: bool = False
) -> bytes:
    """Return an answer of the gateway's own as bytes."""
    body = body_of(answer, api)
    head = [
        b"HTTP/1.1 %d %b" % (answer.status, reason_of(answer.status).encode()),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        *lines,
    ]
    if answer.retry_after is not None:
        head.append(b"retry-after: %d" % answer.retry_after)
    if close:
        head.append(b"connection: close")
    return b"\r\n".join(head) + b"\r\n\r\n" + (b"" if is_head else body)


def body_of(answer: Answer, api: Api) -> bytes:
    """Return the JSON of an error as clients of ``api`` read it."""
    return json.dumps(_shape(answer, api), separators=(",", ":")).encode()


def event_of(answer: Answer, api: Api) -> bytes:
    """Return a server-sent event that tells a client of ``api`` that its stream broke."""
    name = b"event: error\n" if api == "anthropic" else b""
    return name + b"data: " + body_of(answer, api) + b"\n\n"


def line_of(answer: Answer) -> bytes:
    """Return a line that tells a client of Ollama's API that its stream broke."""
    return body_of(answer, "ollama") + b"\n"


def reason_of(status: int) -> str:
    """Return the phrase that stands behind a status code."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def _shape(answer: Answer, api: Api) -> dict[str, object]:
    if api == "ollama":
        return {"error": answer.message, **answer.extra}
    if api == "anthropic":
        kind = _ANTHROPIC_TYPES.get(answer.status, "api_error")
        if answer.status < 500:
            kind = _ANTHROPIC_TYPES.get(answer.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": answer.message}}
    error = {
        "message": answer.message,
        "type": answer.type,
        "code": answer.code,
        "param": answer.param,
    }
    return {"error": {**error, **answer.extra}}
