"""Looking for members on the local network, under the name of each key that is valid now."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from meshnode.core.belonging import Membership
from meshnode.core.token import network_fingerprint
from meshnode.net.mdns import Mdns


async def discover_forever(membership: Membership, make: Callable[[str], Mdns]) -> None:
    """Run one discovery for each key until cancelled; while a token is rotated, there are two.

    Args:
        make: (the network's fingerprint) -> its discovery.
    """
    send, changes = trio.open_memory_channel[None](1)

    def note_change() -> None:
        with suppress(trio.WouldBlock):  # one is waiting already
            send.send_nowait(None)

    membership.watch(note_change)
    while True:
        keys = membership.now.keys
        async with trio.open_nursery() as nursery:
            for key in keys:
                await nursery.start(make(network_fingerprint(key)).run_forever)
            while membership.now.keys == keys:
                await changes.receive()
            nursery.cancel_scope.cancel()
