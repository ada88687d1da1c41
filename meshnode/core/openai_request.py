"""What a client asks of which model: the APIs that engines serve, read as far as routing needs.

A body is refused (``ParseError``, HTTP 400) only where nothing could be routed by it, or where
engines would differ on which model it names. Anything else that is wrong with it is the engine's
to say, in its own words: a missing model, messages that are no list, a temperature of "hot".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from meshnode.core import canonical_prompt
from meshnode.core.canonical_prompt import Canon
from meshnode.core.form_body import form_field
from meshnode.core.json_body import parse_object
from meshnode.errors import ParseError

Api = Literal["openai", "anthropic", "ollama", "other"]

# Twice what a node can announce: a longer name is nobody's, and needs no search.
MAX_MODEL = 256  # characters


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What routing needs to know of one request."""

    api: Api
    model: str | None = None  # as the client wrote it; None: it names none
    prompt: str = ""  # canonical; empty where no prompt's cache could be warm
    stream: bool = False  # whether the client asked for the answer piece by piece


@dataclass(frozen=True, slots=True)
class _Endpoint:
    api: Api
    canon: Canon = canonical_prompt.none
    streams: bool = False  # unless the body says otherwise
    model_keys: tuple[str, ...] = ("model",)


_OPENAI = _Endpoint("openai")
_ENDPOINTS = {
    "/v1/chat/completions": _Endpoint("openai", canonical_prompt.chat),
    "/v1/completions": _Endpoint("openai", canonical_prompt.completion),
    "/v1/responses": _Endpoint("openai", canonical_prompt.responses),
    "/v1/embeddings": _OPENAI,
    "/v1/moderations": _OPENAI,
    "/v1/rerank": _OPENAI,
    "/v2/rerank": _OPENAI,
    "/v1/score": _OPENAI,
    "/v1/images/generations": _OPENAI,
    "/v1/images/edits": _OPENAI,
    "/v1/images/variations": _OPENAI,
    "/v1/audio/speech": _OPENAI,
    "/v1/audio/transcriptions": _OPENAI,
    "/v1/audio/translations": _OPENAI,
    "/v1/messages": _Endpoint("anthropic", canonical_prompt.anthropic),
    "/v1/messages/count_tokens": _Endpoint("anthropic"),
    # Ollama streams unless it is told not to, and has called a model "name" before.
    "/api/chat": _Endpoint("ollama", canonical_prompt.chat, streams=True),
    "/api/generate": _Endpoint("ollama", canonical_prompt.ollama_generate, streams=True),
    "/api/embed": _Endpoint("ollama"),
    "/api/embeddings": _Endpoint("ollama"),
    "/api/show": _Endpoint("ollama", model_keys=("model", "name")),
}
# Engines serve these without the version as well.
_UNVERSIONED = frozenset(
    {"/chat/completions", "/completions", "/embeddings", "/responses", "/rerank"}
)


def routes_by_body(method: str, path: str, content_type: str) -> bool:
    """Say whether the body must be read before the request can be routed.

    Of a multipart form (``is_form``) its first ``FORM_HEAD_BYTES`` are enough. curl sends JSON
    as a plain form unless told otherwise, so no other type of content is turned away.
    """
    return method == "POST" and _endpoint(path) is not None


@lru_cache(maxsize=64)  # asked twice for each request
def is_form(content_type: str) -> bool:
    """Say whether the body is a multipart form, of which the beginning is enough."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def api_of(path: str) -> Api:
    """Return whose API a path belongs to, and so in whose shape errors are answered."""
    endpoint = _endpoint(path)
    if endpoint is not None:
        return endpoint.api
    plain = _plain(path)
    if plain.startswith("/api/"):
        return "ollama"
    return "openai" if plain.startswith("/v1/") else "other"


def parse_request(method: str, path: str, content_type: str, body: bytes) -> RoutedRequest:
    """Return what routing needs of a request.

    Args:
        path: the request target, with or without a query.
        body: whole; of a multipart form what has come of it, ``FORM_HEAD_BYTES`` at the most.

    Raises:
        ParseError: the body is not of the kind that the path takes, or ambiguous.
    """
    endpoint = _endpoint(path)
    if method != "POST" or endpoint is None:
        return RoutedRequest(api_of(path), model=_model_in_query(path))
    if is_form(content_type):
        return RoutedRequest(endpoint.api, _checked(form_field(content_type, body, "model")))
    fields = parse_object(body)
    stream = fields.get("stream", endpoint.streams)
    return RoutedRequest(
        api=endpoint.api,
        model=_model(fields, endpoint),
        prompt=endpoint.canon(fields),
        stream=stream if isinstance(stream, bool) else endpoint.streams,
    )


@lru_cache(maxsize=64)  # asked thrice for each request; a target has 16 KiB at the most
def _endpoint(path: str) -> _Endpoint | None:
    plain = _plain(path)
    return _ENDPOINTS.get("/v1" + plain if plain in _UNVERSIONED else plain)


def _plain(path: str) -> str:
    return path.partition("?")[0].rstrip("/")


def _model(fields: canonical_prompt.Body, endpoint: _Endpoint) -> str | None:
    # Ollama takes keys in any case of letters; parse_object saw to it that only one is a model.
    model = fields.get("model")
    if model is None:
        model = next((value for key, value in fields.items() if key.lower() == "model"), None)
    for key in endpoint.model_keys:
        value = model if key == "model" else fields.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ParseError(f"{key} is no text; write the model's name", param=key)
        return _checked(value)
    return None


def _model_in_query(path: str) -> str | None:
    """Return the model of a realtime connection, which has no body to name it in."""
    if _plain(path) != "/v1/realtime":
        return None
    from urllib.parse import parse_qsl

    try:
        pairs = parse_qsl(path.partition("?")[2], max_num_fields=32)
    except ValueError as exc:
        raise ParseError("the query has more than 32 fields") from exc
    models = [value for key, value in pairs if key == "model"]
    if len(models) > 1:
        raise ParseError("the query names its model more than once; leave one", param="model")
    return _checked(models[0]) if models else None


def _checked(model: str | None) -> str | None:
    if model is not None and len(model) > MAX_MODEL:
        raise ParseError(f"model is longer than {MAX_MODEL} characters", param="model")
    # It ends up in headers and logs, and half a surrogate pair can't even be encoded.
    if model is not None and not model.isprintable():
        raise ParseError("model has characters that are not printable", param="model")
    return model or None
