"""A broad catch hides bugs: each raises again, or is a guard named here that logs and counts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "meshnode"
BROAD = {"Exception", "BaseException"}

# Where a bug, or a stranger's bytes, must not end what goes on beside it.
GUARDS = {
    "http/gateway/server.py:serve_client": "one client",
    "http/server.py:_guard_connection": "one connection to the control API",
    "net/federation_entry.py:serve_client": "one client",
    "net/libp2p/tolerant_pubsub.py:_guard": "one task of pubsub",
    "net/libp2p/tolerant_pubsub.py:_ask": "one listener's look at a message",
    "net/memory_mesh.py:_handle_stream": "one stream of the in-process mesh, for swarms and tests",
    "cli/__init__.py:_guard_command": "the command, whose last line says what to do",
}
# Kept to be raised in the same function, out of its nursery.
RAISED_LATER = {"http/gateway/request.py:_proxy"}
# A command's line on stderr is its log; an in-process mesh has no metrics of its own.
NOT_COUNTED = {"cli/__init__.py:_guard_command", "net/memory_mesh.py:_handle_stream"}


def broad_catches() -> Iterator[tuple[str, ast.ExceptHandler]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(), str(path))
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.ExceptHandler) and _is_broad(node):
                    yield f"{path.relative_to(PACKAGE)}:{function.name}", node


def _is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(each, ast.Name) and each.id in BROAD for each in caught)


def _always_raises(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], ast.Raise)


def test_whatever_is_caught_broadly_is_raised_again_or_met_by_a_guard_that_is_named() -> None:
    caught = list(broad_catches())
    assert len(caught) > 20
    swallowing = {place for place, handler in caught if not _always_raises(handler.body)}
    assert swallowing == set(GUARDS) | RAISED_LATER


def test_a_guard_logs_and_counts_what_it_met() -> None:
    for place, handler in broad_catches():
        if place not in GUARDS:
            continue
        text = ast.unparse(ast.Module(handler.body, []))
        assert "log." in text or "_complain(" in text, place
        if place not in NOT_COUNTED:
            assert "count(" in text or ".inc()" in text or "_complain(" in text, place


def test_a_catch_that_turns_one_error_into_another_says_why() -> None:
    for place, handler in broad_catches():
        last = handler.body[-1]
        if not isinstance(last, ast.Raise) or last.exc is None:
            continue  # raised again as it came
        module, _, function = place.partition(":")
        source = (PACKAGE / module).read_text()
        lines = source.splitlines()
        near = "\n".join(lines[handler.lineno - 4 : handler.lineno])
        docstrings = [
            ast.get_docstring(node) or ""
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function
        ]
        assert "#" in near or any("whatever" in text.lower() for text in docstrings), place
