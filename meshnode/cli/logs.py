"""Where log lines go and how they look: stderr, one line each, for people or as JSON."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import MutableMapping
from functools import partial
from typing import Literal

import structlog
from structlog.typing import Processor, WrappedLogger

from meshnode.cli.log_rate import LogRate


def set_up_logs(level: str, form: Literal["pretty", "json"]) -> None:
    """Send this program's log lines, and the warnings of its libraries, to stderr."""
    number = logging.getLevelNamesMapping()[level.upper()]
    rate = LogRate()
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
        # Not structlog's own choice, which with rich prints each frame's values: prompts, keys.
        plain = structlog.dev.plain_traceback
        last = [
            structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=30, exception_formatter=plain)
        ]
    structlog.configure(
        processors=[partial(_limit, rate), *shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    _adopt_libraries(number, rate, [*shared, _name_library], last)


def _limit(
    rate: LogRate, logger: WrappedLogger, name: str, event: MutableMapping[str, object]
) -> MutableMapping[str, object]:
    left_out = rate.take(str(event.get("event")), time.monotonic())
    if left_out is None:
        raise structlog.DropEvent
    return _with_left_out(event, left_out)


def _with_left_out(
    event: MutableMapping[str, object], left_out: object
) -> MutableMapping[str, object]:
    if left_out:
        event["left_out"] = left_out  # lines of this kind before this one
    return event


class _LibraryLimit(logging.Filter):
    """The same for what libraries log: a kind is a library's message before its values."""

    def __init__(self, rate: LogRate) -> None:
        super().__init__()
        self._rate = rate

    def filter(self, record: logging.LogRecord) -> bool:
        left_out = self._rate.take(f"{record.name} {record.msg}"[:200], time.monotonic())
        record.__dict__["left_out"] = left_out
        return left_out is not None


def _adopt_libraries(
    number: int, rate: LogRate, shared: list[Processor], last: list[Processor]
) -> None:
    """Give what libraries log through ``logging`` the same form; below warning only on demand."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_LibraryLimit(rate))
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
        _with_left_out(event, getattr(record, "left_out", None))
    return event
