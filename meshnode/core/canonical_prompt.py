"""The prompt of a request as the engine's cache sees it: tools, system, then turns in order.

Two requests whose canonical prompts begin alike make an engine do the same work first, however
their JSON is laid out; a longer conversation only appends. Settings such as the temperature are
no part of it. Images and the like stand as a digest of theirs, as they are long and only need to
be told apart.

What is not of the shape that the API documents is passed over here: whether to refuse it is the
engine's business. No input raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import blake2b

# In UTF-8 this is at least as much as the longest chain covers (64 blocks of 256 bytes), so that
# a prompt of megabytes costs no more than a long one.
PROMPT_LIMIT = 64 * 256  # characters

_RECORD = "\x1e"  # before each turn
_UNIT = "\x1f"  # between its role and its contents

Body = Mapping[str, object]


class _Prompt:
    """Text that is put together in order, up to the limit."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._room = PROMPT_LIMIT

    @property
    def is_full(self) -> bool:
        return self._room <= 0

    def turn(self, role: object) -> None:
        self.add(_RECORD + (role if isinstance(role, str) else "") + _UNIT)

    def add(self, text: str) -> None:
        if self._room > 0:
            piece = text[: self._room]
            self._pieces.append(piece)
            self._room -= len(piece)

    def section(self, role: str, content: object) -> None:
        """Add one turn, unless there is nothing in it."""
        if content not in (None, "", [], {}):
            self.turn(role)
            self.content(content)

    def content(self, content: object) -> None:
        """Add what one turn holds: text, or a list of parts."""
        if isinstance(content, str):
            self.add(content)
        elif isinstance(content, list):
            for part in content:
                if self.is_full:
                    return
                self._part(part)

    def structure(self, value: object) -> None:
        """Add a value that is no text, such as a tool's schema, with its keys in order."""
        if not self.is_full:
            self.add(_ordered(value))

    def text(self) -> str:
        # JSON may hold halves of surrogate pairs, which UTF-8 has no form for.
        return "".join(self._pieces).encode("utf-8", "replace").decode()

    def _part(self, part: object) -> None:
        if isinstance(part, str):
            self.add(part)
        elif isinstance(part, dict):
            text = part.get("text")
            if isinstance(text, str):
                self.add(text)
            elif part.get("type") in ("tool_use", "tool_result", "thinking"):
                self.structure(part)
            else:
                self.add(f"[{part.get('type')!s:.40} {_digest(part)}]")


def chat(body: Body) -> str:
    """Return the prompt of OpenAI's chat completions, and of Ollama's chat."""
    prompt = _Prompt()
    _tools(prompt, body, "tools", "functions")
    _messages(prompt, body.get("messages"))
    return prompt.text()


def completion(body: Body) -> str:
    """Return the prompt of OpenAI's completions; of several, their texts one after another."""
    prompt = _Prompt()
    given = body.get("prompt")
    for text in given if isinstance(given, list) else [given]:
        if prompt.is_full:
            break
        prompt.add(text if isinstance(text, str) else "" if text is None else f"{_ordered(text)},")
    return prompt.text()


def responses(body: Body) -> str:
    """Return the prompt of OpenAI's responses."""
    prompt = _Prompt()
    _tools(prompt, body, "tools")
    prompt.section("system", body.get("instructions"))
    given = body.get("input")
    if isinstance(given, str):
        prompt.section("user", given)
    else:
        _messages(prompt, given)
    return prompt.text()


def anthropic(body: Body) -> str:
    """Return the prompt of Anthropic's messages."""
    prompt = _Prompt()
    _tools(prompt, body, "tools")
    prompt.section("system", body.get("system"))
    _messages(prompt, body.get("messages"))
    return prompt.text()


def conversation(body: Body) -> str:
    """Return the prompt of a chat, whether OpenAI's, Ollama's or Anthropic's."""
    prompt = _Prompt()
    _tools(prompt, body, "tools", "functions")
    prompt.section("system", body.get("system"))
    _messages(prompt, body.get("messages"))
    return prompt.text()


def ollama_generate(body: Body) -> str:
    """Return the prompt of Ollama's generate."""
    prompt = _Prompt()
    prompt.section("system", body.get("system"))
    prompt.turn("user")
    _images(prompt, body)
    prompt.content(body.get("prompt"))
    return prompt.text()


def none(body: Body) -> str:
    """Return no prompt: where no cache of a prompt is kept, none can be warm."""
    return ""


Canon = Callable[[Body], str]


def _tools(prompt: _Prompt, body: Body, *keys: str) -> None:
    # Templates write the tools before everything else, whatever the order of the JSON's keys.
    for key in keys:
        tools = body.get(key)
        if isinstance(tools, list) and tools:
            prompt.turn(key)
            for tool in tools:
                prompt.structure(tool)


def _messages(prompt: _Prompt, messages: object) -> None:
    for message in messages if isinstance(messages, list) else []:
        if prompt.is_full:
            return
        if not isinstance(message, dict):
            continue
        prompt.turn(message.get("role", message.get("type")))
        _images(prompt, message)
        prompt.content(message.get("content"))
        for key in ("tool_calls", "function_call", "arguments", "output"):
            if message.get(key):
                prompt.structure(message[key])


def _images(prompt: _Prompt, holder: Body) -> None:
    images = holder.get("images")
    for image in images if isinstance(images, list) else []:
        if prompt.is_full:
            return
        prompt.add(f"[image {_digest(image)}]")


def _digest(value: object) -> str:
    return blake2b(_ordered(value).encode("utf-8", "replace"), digest_size=8).hexdigest()


def _ordered(value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except RecursionError:
        return "…"  # the engine's business
