"""Where log lines go and how they look: stderr, one line each, for people or as JSON."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Literal

import structlog
from structlog.typing import Processor, WrappedLogger


def set_up_logs(level: str, form: Literal["pretty", "json"]) -> None:
    """Send this program's log lines, and the warnings of its libraries, to stderr."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if form == "json":
        # A traceback is part of its line: every line is one object.
        last: list[Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        last = [structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=30)]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    _adopt_libraries(number, [*shared, _name_library], last)


def _adopt_libraries(number: int, shared: list[Processor], last: list[Processor]) -> None:
    """Give what libraries log through ``logging`` the same form; below warning only on demand."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if number <= logging.DEBUG else max(number, logging.WARNING))
    logging.captureWarnings(True)


def _name_library(
    logger: WrappedLogger, name: str, event: MutableMapping[str, object]
) -> MutableMapping[str, object]:
    record = event.get("_record")
    if isinstance(record, logging.LogRecord):
        event["logger"] = record.name
    return event
