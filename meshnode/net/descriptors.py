"""Descriptors kept back, so that the control API answers when there are none left."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

# errno of a system or a process that has no descriptor, or no memory for one, left.
OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
# A person with a dashboard and a script each hold one or two.
KEPT_BACK = 8


class DescriptorReserve:
    """Holds descriptors, and gives one up whenever somebody needs it."""

    def __init__(self, size: int = KEPT_BACK) -> None:
        self._size = size
        self._held: list[int] = []
        self.refill()

    def give_one_up(self) -> bool:
        """Free one descriptor for whoever asks for the next; return whether there was one."""
        if not self._held:
            return False
        os.close(self._held.pop())
        return True

    def refill(self) -> None:
        """Take back what was given up, as far as there are descriptors."""
        with suppress(OSError):
            while len(self._held) < self._size:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def close(self) -> None:
        """Let go of all of them, for good."""
        self._size = 0
        while self.give_one_up():
            pass
