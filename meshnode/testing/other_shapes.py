"""The request and answer shapes of Anthropic's and Ollama's APIs that the test engine speaks.

References: https://docs.anthropic.com/en/api/messages,
https://github.com/ollama/ollama/blob/main/docs/api.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pydantic import BaseModel, Field

from meshnode.testing.openai_shapes import Answer, ChatMessage, ChatRequest, GenerateRequest

_CREATED_AT = "2023-11-14T22:13:20Z"


class MessagesRequest(ChatRequest):
    """Anthropic's POST /v1/messages."""

    max_tokens: int | None = Field(ge=1)


class OllamaOptions(BaseModel):
    """``options`` of Ollama's requests."""

    num_predict: int | None = Field(default=None, ge=1)


class _OllamaRequest(GenerateRequest):
    stream: bool = True
    options: OllamaOptions | None = None

    @property
    def limit(self) -> int | None:
        return None if self.options is None else self.options.num_predict


class OllamaChatRequest(_OllamaRequest):
    """Ollama's POST /api/chat."""

    messages: list[ChatMessage] = Field(default_factory=list)

    def prompt_text(self) -> str:
        return " ".join(message.text() for message in self.messages)


class OllamaGenerateRequest(_OllamaRequest):
    """Ollama's POST /api/generate."""

    prompt: str = ""

    def prompt_text(self) -> str:
        return self.prompt


@dataclass(frozen=True)
class AnthropicAnswer(Answer):
    """A message of Anthropic's API."""

    def whole(self) -> dict[str, object]:
        content = [{"type": "text", "text": "".join(self.pieces)}]
        return self._message(content, self._stop_reason, len(self.pieces))

    def chunk(self, index: int) -> bytes:
        begin = b""
        if index == 0:
            block = {"type": "text", "text": ""}
            begin = _event({"type": "message_start", "message": self._message([], None, 0)})
            begin += _event({"type": "content_block_start", "index": 0, "content_block": block})
        delta = {"type": "text_delta", "text": self.pieces[index]}
        return begin + _event({"type": "content_block_delta", "index": 0, "delta": delta})

    def end(self) -> bytes:
        delta = {"stop_reason": self._stop_reason, "stop_sequence": None}
        usage = {"output_tokens": len(self.pieces)}
        return (
            _event({"type": "content_block_stop", "index": 0})
            + _event({"type": "message_delta", "delta": delta, "usage": usage})
            + _event({"type": "message_stop"})
        )

    @property
    def _stop_reason(self) -> str:
        return "max_tokens" if self.finish_reason == "length" else "end_turn"

    def _message(
        self, content: list[dict[str, str]], stop_reason: str | None, tokens: int
    ) -> dict[str, object]:
        return {
            "id": f"msg_{self.engine}_{self.number}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {"input_tokens": self.prompt_tokens, "output_tokens": tokens},
        }


@dataclass(frozen=True)
class OllamaAnswer(Answer):
    """An answer of Ollama's API: one JSON object a line."""

    media_type = "application/x-ndjson"
    is_chat = True

    def whole(self) -> dict[str, object]:
        return self._part("".join(self.pieces), done=True)

    def chunk(self, index: int) -> bytes:
        return json.dumps(self._part(self.pieces[index], done=False)).encode() + b"\n"

    def end(self) -> bytes:
        return json.dumps(self._part("", done=True)).encode() + b"\n"

    def _part(self, text: str, *, done: bool) -> dict[str, object]:
        said: dict[str, object] = {"response": text}
        if self.is_chat:
            said = {"message": {"role": "assistant", "content": text}}
        part = {"model": self.model, "created_at": _CREATED_AT, **said, "done": done}
        if not done:
            return part
        counts = {"prompt_eval_count": self.prompt_tokens, "eval_count": len(self.pieces)}
        return {**part, "done_reason": self.finish_reason, **counts}


@dataclass(frozen=True)
class OllamaText(OllamaAnswer):
    """An answer to /api/generate."""

    is_chat = False


def _event(event: dict[str, object]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
