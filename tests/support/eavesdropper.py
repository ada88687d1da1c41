"""A member that prints what it hears, for tests that look into it.

    MESHNODE_TOKEN=mesh1... python -m support.eavesdropper MULTIADDR

joins through that address, prints ``{"event": "ready"}``, then one JSON line for every message on
the network's topics: the topic, who signed it, and the payload in base64.
"""

from __future__ import annotations

import base64
import json
import os
import sys

import trio

from meshnode.core import token as tokens
from meshnode.core.belonging import by_keys
from meshnode.metrics import Metrics
from meshnode.net.gossip import announce_topic
from meshnode.net.libp2p.host import Libp2pMesh
from meshnode.net.libp2p.identity import ephemeral_identity
from meshnode.net.loss_reports import loss_topic
from meshnode.net.mesh import Verdict


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


async def listen(addr: str) -> None:
    token = tokens.decode(os.environ["MESHNODE_TOKEN"])
    mesh = Libp2pMesh(
        identity=ephemeral_identity(),
        listen=("/ip4/127.0.0.1/tcp/0",),
        membership=by_keys([token.key]),
        metrics=Metrics(),
    )

    def hear_on(topic: str) -> None:
        def hear(signer: str, data: bytes) -> Verdict:
            say(topic=topic, signer=signer, data=base64.b64encode(data).decode())
            return Verdict.ACCEPT

        mesh.subscribe(topic, hear)

    hear_on(announce_topic(token.network))
    hear_on(loss_topic(token.network))
    async with trio.open_nursery() as nursery:
        await nursery.start(mesh.run_forever)
        await mesh.dial(addr, timeout=20)
        say(event="ready")


if __name__ == "__main__":
    trio.run(listen, sys.argv[1])
