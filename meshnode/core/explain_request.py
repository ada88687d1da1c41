"""What somebody asks who wants to know where a prompt would go, read from JSON; pure.

The law here: what is not known is refused. A misspelt field would give an answer that is wrong in
silence, as the prompt's beginning decides where it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshnode.core import canonical_prompt
from meshnode.core.canonical_prompt import Canon
from meshnode.core.json_body import parse_object
from meshnode.core.openai_request import MAX_MODEL
from meshnode.errors import ParseError

# Of a prompt the first 16 KiB decide where it goes; as JSON, with its tools, it may be longer.
MAX_BYTES = 1024 * 1024
# Names of peers and services are shorter.
MAX_NAME = 256  # characters

# Where the prompt stands, and which of the other fields an engine reads before or beside it.
_PROMPTS: Mapping[str, tuple[Canon, frozenset[str]]] = {
    "prompt": (canonical_prompt.completion, frozenset()),
    "messages": (canonical_prompt.conversation, frozenset({"system", "tools", "functions"})),
    "input": (canonical_prompt.responses, frozenset({"instructions", "tools"})),
}
_NAMES = ("model", "service", "target")
PROMPTS = frozenset(_PROMPTS)  # the fields of which a body has one
# All that makes a prompt; a request's other fields are settings of the engine.
PROMPT_FIELDS = PROMPTS.union(*(beside for _, beside in _PROMPTS.values()))


@dataclass(frozen=True, slots=True)
class ExplainRequest:
    """A request as far as routing goes, which nobody makes."""

    model: str
    prompt: str = ""  # canonical
    service_id: str | None = None  # nobody's other services will do
    target: str | None = None  # a peer ID or a name


def parse_explain(body: bytes) -> ExplainRequest:
    """Return what a body asks.

    It holds ``model``, and either ``prompt`` as of a completion, or ``messages`` as of a chat
    (with ``tools``, ``functions``, ``system``), or ``input`` as of a response (with
    ``instructions``, ``tools``); ``service`` and ``target`` if it should be those.

    Raises:
        ParseError: it is not that.
    """
    fields = parse_object(body)
    given = [name for name in _PROMPTS if name in fields]
    if len(given) != 1:
        found = f"it has {' and '.join(given)}" if given else "it has none"
        raise ParseError(f"give one of prompt, messages or input; {found}")
    canon, beside = _PROMPTS[given[0]]
    for name, value in fields.items():
        if name in _NAMES:
            _check_name(name, value)
        elif name == given[0] or name in beside:
            _check_shape(name, value)
        else:
            known = ", ".join((*_NAMES, *sorted(beside)))
            raise ParseError(f"beside {given[0]} there is only {known}", param=name[:MAX_NAME])
    model, service, target = (fields.get(name) for name in _NAMES)
    if not isinstance(model, str):
        raise ParseError('say which model: "model": NAME', param="model")
    assert service is None or isinstance(service, str)
    assert target is None or isinstance(target, str)
    return ExplainRequest(model, canon(fields), service, target)


def _check_name(name: str, value: object) -> None:
    most = MAX_MODEL if name == "model" else MAX_NAME
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        raise ParseError(f"{name} is text of 1 to {most} characters", param=name)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ParseError(f"{name} holds half a surrogate pair, which is no character", param=name)


def _check_shape(name: str, value: object) -> None:
    is_right, shape = _SHAPES[name]
    if not is_right(value):
        raise ParseError(f"{name} is {shape}", param=name)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _is_text_or_objects(value: object) -> bool:
    return _is_text(value) or _is_objects(value)


_SHAPES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "prompt": (_is_text, "text"),
    "instructions": (_is_text, "text"),
    "messages": (_is_objects, "a list of objects"),
    "tools": (_is_objects, "a list of objects"),
    "functions": (_is_objects, "a list of objects"),
    "system": (_is_text_or_objects, "text or a list of objects"),
    "input": (_is_text_or_objects, "text or a list of objects"),
}
