"""JSON from a client: one object, in bounded time and memory, read as every engine would read it.

Two readers that differ on what a body says could be played against each other: a key may allow
one model while the engine serves another. So whatever engines read differently is refused here:
a second "model" among the top keys (some take the first, some the last), in any case of letters
(Ollama's reader ignores case), and text that is not UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from meshnode.errors import ParseError

# Brackets, braces and commas. A body of 32 MiB made of "[]," would become a gigabyte of lists;
# a million of them take some 0.3 s and 100 MB. Code of 20 MB as a prompt stays below.
MAX_STRUCTURE = 1_000_000


def parse_object(body: bytes) -> Mapping[str, object]:
    """Return the JSON object that ``body`` is; of equal keys below the top the last counts.

    Raises:
        ParseError: it is none, or readers would differ on what it says.
    """
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > MAX_STRUCTURE:
        raise ParseError(
            f"the body has more than {MAX_STRUCTURE:,} values; send it in several requests"
        )
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ParseError(f"the body is not UTF-8 (byte {exc.start}); encode it as UTF-8") from exc
    # One that says "model" once, and writes no letter as \u and four digits, can't name it twice.
    is_plain = b"\\u" not in body and body.lower().count(b'"model"') <= 1
    pairs = _Pairs()
    try:
        value: object = json.loads(text, object_pairs_hook=None if is_plain else pairs.take)
    except RecursionError as exc:
        raise ParseError("the body nests too deep; hardly any request needs ten levels") from exc
    # json.JSONDecodeError, and int() for a number of more than 4,300 digits.
    except ValueError as exc:
        raise ParseError(f"the body is no JSON: {str(exc)[:200]}") from exc
    if not isinstance(value, dict):
        raise ParseError("the body is no JSON object; it begins with a brace")
    models = [key for key, _ in pairs.last if key.lower() == "model"]
    if len(models) > 1:
        raise ParseError(
            "the body names its model more than once, and engines differ on which one counts; "
            "leave one",
            param="model",
        )
    return value


class _Pairs:
    """Keeps the pairs of the object read last, which is the outermost."""

    def __init__(self) -> None:
        self.last: list[tuple[str, object]] = []

    def take(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        self.last = pairs
        return dict(pairs)
