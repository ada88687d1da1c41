"""Small repairs of the library that fit nowhere else, each beside its reason."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from libp2p.network.connection import swarm_connection

from meshnode.metrics import Metrics

_SILENT = logging.CRITICAL + 1


@cache  # of one process; with a hundred nodes in it, each going over the loggers takes seconds
def quiet_libp2p_loggers() -> None:
    """Keep the library's loggers to themselves.

    What it logs is either of no use to our users or about to be told by us in our words.
    ``network.auto_connector`` forces its own logger to INFO, and ``swarm_connection`` logs to the
    root logger through ``logging.debug``, which installs a handler on standard error for the
    whole program when there is none.
    """
    root = logging.getLogger("libp2p")
    root.setLevel(_SILENT)
    root.propagate = False
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("libp2p."):
            logging.getLogger(name).setLevel(logging.NOTSET)
    # A Logger answers to the same names as the module: debug, warning, getLogger is not used.
    vars(swarm_connection)["logging"] = logging.getLogger(swarm_connection.__name__)


class ForeignError(Exception):
    """Something inside the library or a handler raised; the cause says what."""


@contextmanager
def foreign_faults(
    metrics: Metrics, protocol: str, *, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn whatever the library raises over a peer's bytes into one exception, and count it.

    This is the room's one broad catch. Noise, protobuf, multistream and the key codecs raise a
    dozen unrelated types between them over bytes that a stranger chose, and any of them would
    end the host if it escaped.

    Args:
        metrics: where the fault is counted.
        protocol: under which name; one of ours, never a peer's words.
        passing: exceptions that the caller handles itself.

    Raises:
        ForeignError: instead of any other ``Exception``.
    """
    try:
        yield
    except passing:
        raise
    except ForeignError:
        raise
    except Exception as exc:
        metrics.protocol_faults.labels(protocol=protocol, code=type(exc).__name__).inc()
        raise ForeignError(f"{type(exc).__name__}: {exc}") from exc
