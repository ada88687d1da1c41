"""Plain backends for each test, cleaned up on every way out."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from support.cluster import Backend


@pytest.fixture
def backend() -> Iterator[Callable[[Callable[[socket.socket], None]], Backend]]:
    made: list[Backend] = []

    def make(serve: Callable[[socket.socket], None]) -> Backend:
        made.append(Backend(serve))
        return made[-1]

    yield make
    for one in made:
        one.close()
