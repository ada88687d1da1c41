"""Traces to an OpenTelemetry collector over HTTP; needs the extra ``otel``.

Spans leave in batches from a thread of the exporter's own: no request waits for the collector,
and one that is away costs its spans alone. Prompts and keys are in none of the attributes.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span as ApiSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from meshnode import __version__
from meshnode.tracing import Attribute, Span

# What waits for a collector that is slow or away: some 2 MB.
_MAX_QUEUED = 2048
# How long the last batch may take when the node ends.
_FLUSH_LIMIT = 1000  # milliseconds
_EXPORT_TIMEOUT = 5.0  # seconds

_propagator = TraceContextTextMapPropagator()


class OtelTracer:
    """Sends a span for each request to ``endpoint``.

    Args:
        endpoint: the collector's base URL, like http://127.0.0.1:4318; /v1/traces is added.
        node: this node's name.
        exporter: where spans go instead of to the endpoint.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        node: str,
        peer_id: str,
        network: str,
        exporter: SpanExporter | None = None,
    ) -> None:
        resource = Resource.create(
            {
                "service.name": "meshnode",
                "service.version": __version__,
                "service.instance.id": peer_id,
                "meshnode.node": node,
                "meshnode.network": network,
            }
        )
        target = exporter or OTLPSpanExporter(
            endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=_EXPORT_TIMEOUT
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(target, max_queue_size=_MAX_QUEUED)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("meshnode", __version__)

    def begin(self, name: str, traceparent: bytes | None = None) -> Span:
        parent = None
        if traceparent is not None:
            carrier = {"traceparent": traceparent.decode("latin-1")}
            parent = _propagator.extract(carrier)  # what is malformed begins a new trace
        return _OtelSpan(self._tracer.start_span(name, parent, kind=SpanKind.SERVER))

    def close(self) -> None:
        """Send what is left, within a second."""
        self._provider.force_flush(_FLUSH_LIMIT)
        self._provider.shutdown()


class _OtelSpan:
    """One request."""

    __slots__ = ("_ended", "_span")

    def __init__(self, span: ApiSpan) -> None:
        self._span = span
        self._ended = False

    @property
    def is_recording(self) -> bool:
        return self._span.is_recording()

    @property
    def traceparent(self) -> bytes | None:
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, set_span_in_context(self._span))
        told = carrier.get("traceparent")
        return None if told is None else told.encode("ascii")

    def say(self, attributes: Mapping[str, Attribute]) -> None:
        self._span.set_attributes(dict(attributes))

    def end(self, outcome: str, *, failed: bool = False) -> None:
        if self._ended:
            return
        self._ended = True
        self._span.set_attribute("meshnode.outcome", outcome)
        if failed:
            self._span.set_status(Status(StatusCode.ERROR, outcome))
        self._span.end()
