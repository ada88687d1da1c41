from __future__ import annotations

import pytest

from support.gateway_mesh import GatewayMesh


@pytest.fixture
async def mesh(nursery):
    """A gateway of its own that knows nobody yet; ``await mesh.open()`` starts it."""
    yield GatewayMesh(nursery)
    nursery.cancel_scope.cancel()
