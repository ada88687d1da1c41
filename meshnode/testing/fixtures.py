"""Fixtures for pytest-trio: a swarm per test, on the virtual clock or on real sockets.

Import them in a conftest.py, and set ``trio_mode = true`` in pytest's settings. Ten lines:

    from meshnode.testing.fixtures import swarm_of  # noqa: F401

    async def test_a_killed_host_is_missed_at_once(swarm_of, autojump_clock):
        async with swarm_of(20, seed=1) as swarm:
            await swarm.wait_converged(within=10)
            await trio.sleep(5)  # virtual: it takes no time
            swarm.kill(7)
            missed_after = await swarm.wait_gone(7, within=5)
            assert len(missed_after) == 19 and max(missed_after.values()) < 1
            assert not swarm.watch.false_evictions

``autojump_clock`` is pytest-trio's own; the test itself has to name it. It jumps only while nothing
real is waited for, so a test on sockets takes ``real_swarm_of`` and lives on real time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import pytest
import trio
from trio.testing import MockClock

from meshnode.errors import ConfigError
from meshnode.testing.swarm import Swarm, open_swarm

OpenSwarm: TypeAlias = Callable[..., AbstractAsyncContextManager[Swarm]]


@pytest.fixture
def swarm_of() -> OpenSwarm:
    """Return ``open_swarm`` on the memory mesh; it refuses to run on real time by mistake."""
    return _open_virtual


@pytest.fixture
def real_swarm_of() -> OpenSwarm:
    """Return ``open_swarm`` on libp2p over loopback."""
    return partial(open_swarm, mesh="libp2p")


@asynccontextmanager
async def _open_virtual(n: int, **settings: Any) -> AsyncIterator[Swarm]:
    if not isinstance(trio.lowlevel.current_clock(), MockClock):
        raise ConfigError(
            "swarm_of runs on a virtual clock; name autojump_clock among the test's arguments"
        )
    async with open_swarm(n, mesh="memory", **settings) as swarm:
        yield swarm
