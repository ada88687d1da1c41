"""Every log event in a package's source, found by reading it: no line has to be logged for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_LOGGERS = ("log", "_log")
# What a method of a logger writes as the line's level.
_LEVELS = {
    "debug": "debug",
    "info": "info",
    "warning": "warning",
    "error": "error",
    "exception": "error",
    "critical": "critical",
}


@dataclass
class LogEvent:
    """One event: the levels it is logged at, and the fields that any of its calls gives."""

    levels: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)


def find_log_events(package: Path) -> dict[str, LogEvent]:
    """Return the events of all modules below ``package``, by name.

    Raises:
        ValueError: a call can't be read as one event with named fields; says which and why.
    """
    events: dict[str, LogEvent] = {}
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(), str(path))
        called = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for node in _loggers_under_other_names(tree):
            raise ValueError(f"{path}:{node.lineno}: a logger is called {' or '.join(_LOGGERS)}")
        methods = {id(call.func) for call in called}
        for node in ast.walk(tree):
            if not _is_log_method(node):
                continue
            if id(node) not in methods:
                raise ValueError(f"{path}:{node.lineno}: a log method is called where it is named")
        for call in called:
            if isinstance(call.func, ast.Attribute) and _is_log_method(call.func):
                name, fields = _read(call, path)
                event = events.setdefault(name, LogEvent())
                event.levels.add(_LEVELS[call.func.attr])
                event.fields |= fields
                if call.func.attr == "exception":
                    event.fields.add("exception")
    return events


def _is_log_method(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr in _LEVELS
        and isinstance(node.value, ast.Name)
        and node.value.id in _LOGGERS
    )


def _loggers_under_other_names(tree: ast.Module) -> Iterator[ast.Assign]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.value).startswith("structlog.get_logger(")
            and ast.unparse(node.targets[0]) not in _LOGGERS
        ):
            yield node


def _read(call: ast.Call, path: Path) -> tuple[str, set[str]]:
    where = f"{path}:{call.lineno}"
    if len(call.args) != 1 or not isinstance(call.args[0], ast.Constant):
        raise ValueError(f"{where}: an event is one constant word, and the rest named fields")
    fields = {keyword.arg for keyword in call.keywords}
    if None in fields:
        raise ValueError(f"{where}: each field is named, so that it can be found")
    return str(call.args[0].value), {name for name in fields if name is not None}
