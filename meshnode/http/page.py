"""The dashboard: static files, read once, that a browser may take from here and nowhere else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from meshnode.http.answers import HEADERS

# Nothing inline, nothing from elsewhere, and no other page around it.
_CSP = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'"
)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "LICENSE": "text/plain; charset=utf-8",
}
_INDEX = "index.html"


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def routes() -> list[Route]:
    """Return a route for each file: ``/`` for the page, ``/dashboard/…`` for its parts."""
    return [
        Route("/" if path == _INDEX else f"/dashboard/{path}", _Serve(file), methods=["GET"])
        for path, file in _read_files().items()
    ]


class _Serve:
    """Answers with one file: an ASGI application."""

    def __init__(self, file: _File) -> None:
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        file = self._file
        headers = {
            **HEADERS,
            "Content-Security-Policy": _CSP,
            "Cross-Origin-Opener-Policy": "same-origin",
            # Asked for again each time, and answered with 304: a new version shows at once.
            "Cache-Control": "no-cache",
            "ETag": file.etag,
        }
        if Request(scope).headers.get("if-none-match") == file.etag:
            response = Response(status_code=304, headers=headers)
        else:
            response = Response(file.content, headers=headers, media_type=file.media_type)
        await response(scope, receive, send)


def _read_files() -> dict[str, _File]:
    folder = resources.files("meshnode.http") / "dashboard"
    files: dict[str, _File] = {}
    for entry in [*folder.iterdir(), *(folder / "vendor").iterdir()]:
        kind = entry.name.rpartition(".")[2]
        if entry.is_file() and kind in _TYPES:
            content = entry.read_bytes()
            path = entry.name if (folder / entry.name).is_file() else f"vendor/{entry.name}"
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[path] = _File(content, _TYPES[kind], etag)
    return files
