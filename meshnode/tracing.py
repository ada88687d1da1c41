"""What is asked of tracing, and what stands there while nobody traces.

No module but ``otel`` knows OpenTelemetry, and that one is imported only where an endpoint is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

Attribute = str | int | float | bool


class Span(Protocol):
    """One request, from its first byte to its last."""

    @property
    def is_recording(self) -> bool:
        """Whether attributes are worth making."""
        ...

    @property
    def traceparent(self) -> bytes | None:
        """What the next hop is told (W3C Trace Context); None: pass on what came."""
        ...

    def say(self, attributes: Mapping[str, Attribute]) -> None: ...

    def end(self, outcome: str, *, failed: bool = False) -> None:
        """Close it; the first word stays."""
        ...


class Tracer(Protocol):
    """Makes spans."""

    def begin(self, name: str, traceparent: bytes | None = None) -> Span:
        """Begin a request that came with ``traceparent``, if it came with one."""
        ...


class _NoSpan:
    """A request that nobody traces."""

    is_recording = False
    traceparent = None

    def say(self, attributes: Mapping[str, Attribute]) -> None:
        return

    def end(self, outcome: str, *, failed: bool = False) -> None:
        return


class _NoTracer:
    """Nobody traces."""

    def begin(self, name: str, traceparent: bytes | None = None) -> Span:
        return _NO_SPAN


_NO_SPAN = _NoSpan()
NO_TRACER: Tracer = _NoTracer()
