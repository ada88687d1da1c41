"""The shapes that every answer of the control API has: its headers, and its errors."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse, Response

# No answer may be framed, guessed at, cached, or read by another site's page.
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def error_response(
    status: int,
    code: str,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an error in the shape that OpenAI's clients read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "code": code, "param": param}}
    return JSONResponse(body, status, headers={**HEADERS, **(headers or {})})
