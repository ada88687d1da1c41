"""Makes one trio run play the same game twice.

Trio shuffles the tasks that are ready at the same time, on purpose, with dice of its own. It keeps
a switch for property tests that makes the order depend on those dice alone; there is no public
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trio._core import _run


@contextmanager
def repeatable_scheduling(seed: int) -> Iterator[None]:
    """Let the order of ready tasks follow from ``seed``, in every trio run within the block."""
    switch, dice = _run._ALLOW_DETERMINISTIC_SCHEDULING, _run._r.getstate()
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    _run._r.seed(seed)
    try:
        yield
    finally:
        _run._ALLOW_DETERMINISTIC_SCHEDULING = switch  # type: ignore[misc]
        _run._r.setstate(dice)
