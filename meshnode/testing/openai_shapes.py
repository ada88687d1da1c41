"""The request and answer shapes of OpenAI's API that the test engine speaks; no I/O.

Reference: https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

# All answers carry one moment, so that a test may compare them whole.
CREATED = 1_700_000_000

EMBEDDING_SIZE = 8

TextInput = str | list[str] | list[int] | list[list[int]]


class ModelRequest(BaseModel):
    """What every request has."""

    # Clients send dozens of settings that mean nothing to words made up beforehand.
    model_config = ConfigDict(extra="ignore")

    model: str


class StreamOptions(BaseModel):
    """``stream_options``."""

    include_usage: bool = False


class GenerateRequest(ModelRequest):
    """What both endpoints that generate text have."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def prompt_text(self) -> str:
        raise NotImplementedError


class ChatMessage(BaseModel):
    """One message; parts that are not text are accepted and ignored."""

    role: str
    content: str | list[dict[str, object]] | None = None

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return " ".join(str(part.get("text", "")) for part in self.content or ())


class ChatRequest(GenerateRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)

    def prompt_text(self) -> str:
        return " ".join(message.text() for message in self.messages)


class CompletionRequest(GenerateRequest):
    """POST /v1/completions."""

    prompt: TextInput = ""

    def prompt_text(self) -> str:
        return str(self.prompt)


class EmbeddingRequest(ModelRequest):
    """POST /v1/embeddings."""

    input: TextInput
    encoding_format: str = "float"

    def inputs(self) -> list[str]:
        # A list of numbers is one text, already cut into tokens.
        if isinstance(self.input, str) or (self.input and isinstance(self.input[0], int)):
            return [str(self.input)]
        return [str(text) for text in self.input]


@dataclass(frozen=True)
class Shape:
    """How one endpoint writes an answer: whole, and as chunks."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    whole_choice: Callable[[str], dict[str, object]]
    chunk_choice: Callable[[str | None, bool], dict[str, object]]  # piece (None: end), first?


def _chat_delta(piece: str | None, first: bool) -> dict[str, object]:
    if piece is None:
        return {"delta": {}}
    return {"delta": {"role": "assistant", "content": piece} if first else {"content": piece}}


CHAT = Shape(
    id_prefix="chatcmpl",
    whole_object="chat.completion",
    chunk_object="chat.completion.chunk",
    whole_choice=lambda text: {"message": {"role": "assistant", "content": text}},
    chunk_choice=_chat_delta,
)
TEXT = Shape(
    id_prefix="cmpl",
    whole_object="text_completion",
    chunk_object="text_completion",
    whole_choice=lambda text: {"text": text},
    chunk_choice=lambda piece, first: {"text": piece or ""},
)


@dataclass(frozen=True)
class Answer:
    """One answer, decided before its first word is sent."""

    media_type = "text/event-stream"  # of a streamed one

    shape: Shape
    number: int
    model: str
    engine: str
    pieces: tuple[str, ...]  # one per token
    prompt_tokens: int
    finish_reason: str
    usage_wanted: bool

    def whole(self) -> dict[str, object]:
        choice = _choice(self.shape.whole_choice("".join(self.pieces)), self.finish_reason)
        return self._envelope(self.shape.whole_object, [choice]) | {"usage": self._usage()}

    def chunk(self, index: int) -> bytes:
        choice = _choice(self.shape.chunk_choice(self.pieces[index], index == 0), None)
        return _event(self._envelope(self.shape.chunk_object, [choice]))

    def end(self) -> bytes:
        choice = _choice(self.shape.chunk_choice(None, False), self.finish_reason)
        events = [self._envelope(self.shape.chunk_object, [choice])]
        if self.usage_wanted:
            events.append(self._envelope(self.shape.chunk_object, []) | {"usage": self._usage()})
        return b"".join(map(_event, events)) + b"data: [DONE]\n\n"

    def _usage(self) -> dict[str, int]:
        count = len(self.pieces)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": count,
            "total_tokens": self.prompt_tokens + count,
        }

    def _envelope(self, kind: str, choices: list[dict[str, object]]) -> dict[str, object]:
        return {
            "id": f"{self.shape.id_prefix}-{self.engine}-{self.number}",
            "object": kind,
            "created": CREATED,
            "model": self.model,
            "system_fingerprint": self.engine,
            "choices": choices,
        }


def _choice(content: dict[str, object], finish_reason: str | None) -> dict[str, object]:
    return {"index": 0, "logprobs": None, "finish_reason": finish_reason, **content}


def _event(event: dict[str, object]) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()


def embedding(text: str, encoding_format: str) -> list[float] | str:
    """Return a vector that only depends on ``text``; base64 is what the official client asks."""
    digest = hashlib.sha256(text.encode()).digest()[:EMBEDDING_SIZE]
    vector = [byte / 128.0 - 1.0 for byte in digest]
    if encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{EMBEDDING_SIZE}f", *vector)).decode()
    return vector


def error_body(status: int, message: str, *, code: str | None, param: str | None = None) -> object:
    """Return the body of an error answer."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
