from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio

from meshnode.metrics import Metrics
from meshnode.net.libp2p.host import Libp2pMesh
from meshnode.net.libp2p.identity import ephemeral_identity
from meshnode.net.mesh import Mesh

KEY = b"k" * 32


@pytest.fixture
def libp2p_meshes() -> Callable[..., AbstractAsyncContextManager[list[Mesh]]]:
    """``async with libp2p_meshes(3, prepare=f) as meshes``: nodes on loopback, all linked.

    ``prepare(mesh)`` runs before each node does, for serve, subscribe and watch_links; ``keys``
    gives one tuple of keys per node; ``linked=False`` leaves the dialling to the test.
    """

    @asynccontextmanager
    async def run(
        count: int,
        *,
        prepare: Callable[[Mesh], None] | None = None,
        keys: tuple[tuple[bytes, ...], ...] | None = None,
        linked: bool = True,
    ) -> AsyncIterator[list[Mesh]]:
        meshes: list[Mesh] = [
            Libp2pMesh(
                identity=ephemeral_identity(),
                listen=("/ip4/127.0.0.1/tcp/0",),
                keys=keys[number] if keys else (KEY,),
                metrics=Metrics(),
            )
            for number in range(count)
        ]
        async with trio.open_nursery() as nursery:
            for number, mesh in enumerate(meshes):
                if prepare is not None:
                    prepare(mesh)
                await nursery.start(mesh.run_forever)
                for earlier in meshes[:number] if linked else ():
                    await mesh.dial(earlier.addrs[0], timeout=5)
            yield meshes
            nursery.cancel_scope.cancel()

    return run
