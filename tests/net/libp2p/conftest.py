from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio

from meshnode.metrics import Metrics
from meshnode.net.libp2p.host import Libp2pMesh
from meshnode.net.libp2p.identity import ephemeral_identity
from meshnode.net.libp2p.limits import DEFAULT_LIMITS, Limits

KEY = b"k" * 32
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)

MakeMesh = Callable[..., Libp2pMesh]


@pytest.fixture
def make_mesh() -> MakeMesh:
    """Build a mesh node on loopback that is not running yet."""

    def make(
        *,
        seed: bytes | None = None,
        keys: tuple[bytes, ...] = (KEY,),
        listen: tuple[str, ...] = LOOPBACK,
        limits: Limits = DEFAULT_LIMITS,
        metrics: Metrics | None = None,
        announce_addrs: tuple[str, ...] = (),
    ) -> Libp2pMesh:
        return Libp2pMesh(
            identity=ephemeral_identity(seed),
            listen=listen,
            keys=keys,
            metrics=metrics or Metrics(),
            limits=limits,
            announce_addrs=announce_addrs,
        )

    return make


@asynccontextmanager
async def running(*meshes: Libp2pMesh, linked: bool = True) -> AsyncIterator[None]:
    """Run ``meshes`` inside the block, each dialling all before it if ``linked``."""
    async with trio.open_nursery() as nursery:
        for mesh in meshes:
            await nursery.start(mesh.run_forever)
        if linked:
            for number, mesh in enumerate(meshes):
                for earlier in meshes[:number]:
                    await mesh.dial(earlier.addrs[0], timeout=5)
        yield
        nursery.cancel_scope.cancel()


@pytest.fixture
def run_meshes() -> Callable[..., AbstractAsyncContextManager[None]]:
    return running
