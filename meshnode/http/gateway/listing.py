"""The lists of models that the gateway answers itself: the union over the mesh."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import unquote

import trio

from meshnode.core.api_keys import ClientKey
from meshnode.core.ledger import Ledger
from meshnode.core.model_listing import (
    ListedModel,
    anthropic_models,
    find_model,
    list_models,
    ollama_running,
    ollama_tags,
    openai_model,
    openai_models,
)
from meshnode.http.gateway.heads import RequestHead

_ONE = "/v1/models/"


class Listing:
    """Answers ``GET /v1/models``, ``/v1/models/{model}``, ``/api/tags`` and ``/api/ps``.

    Args:
        service_id: only this service's models; None: everybody's.
    """

    def __init__(self, ledger: Ledger, *, service_id: str | None) -> None:
        self._ledger = ledger
        self._service_id = service_id

    def answer(self, head: RequestHead, client: ClientKey | None = None) -> bytes | None:
        """Return the JSON of the answer; None where an engine is to answer.

        That is for any other path, and where no engine tells its models: one of them knows best.

        Args:
            client: who asks, where keys are wanted; it sees what it may have.
        """
        if head.method not in (b"GET", b"HEAD"):
            return None
        path = head.target.partition(b"?")[0].decode("latin-1")
        shape: Callable[[list[ListedModel]], dict[str, object]]
        if path in ("/v1/models", "/models"):
            is_anthropic = head.value(b"anthropic-version") is not None
            shape = anthropic_models if is_anthropic else openai_models
        elif path == "/api/tags":
            shape = ollama_tags
        elif path == "/api/ps":
            shape = ollama_running
        elif not path.startswith(_ONE):
            return None
        models = list_models(
            self._ledger.entries(), trio.current_time(), service_id=self._service_id
        )
        if client is not None and not client.any_model:
            models = [model for model in models if client.allows(model.name)]
        elif not models:
            return None
        if not path.startswith(_ONE):
            return json.dumps(shape(models)).encode()
        one = find_model(models, unquote(path.removeprefix(_ONE)))
        return None if one is None else json.dumps(openai_model(one)).encode()
