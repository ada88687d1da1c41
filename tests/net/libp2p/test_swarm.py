"""What is left of the library's swarm and host, and the limits that are no longer there."""

from __future__ import annotations

import pytest
import trio
from libp2p import new_host
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from multiaddr import Multiaddr

from meshnode.net.libp2p.identity import ephemeral_identity

ADDR = Multiaddr("/ip4/192.0.2.1/tcp/4001")


def strangers(count: int) -> list[ID]:
    return [ID(b"\x00\x24\x08\x01\x12\x20" + number.to_bytes(32, "big")) for number in range(count)]


def test_a_node_keeps_its_own_key_whatever_its_address_book_holds(make_node):
    node = make_node()
    store = node._swarm.peerstore
    for stranger in strangers(1_100):
        store.add_addrs(stranger, [ADDR], 3600)
    assert store.privkey(ID.from_base58(node.peer_id))


@pytest.mark.stock
def test_the_library_evicts_a_nodes_own_key():
    store = PeerStore()
    identity = ephemeral_identity()
    own = ID.from_base58(identity.peer_id)
    store.add_key_pair(own, identity.key_pair)
    for stranger in strangers(1_100):
        store.add_addrs(stranger, [ADDR], 3600)
    with pytest.raises(PeerStoreError):
        store.privkey(own)


@pytest.mark.stock
def test_the_library_offers_connections_that_prove_nobodys_identity():
    offered = new_host().get_network().upgrader.security_multistream.transports
    assert "/plaintext/2.0.0" in offered


def test_a_node_offers_noise_alone_and_yamux_alone(make_node):
    upgrader = make_node()._swarm.upgrader
    assert list(upgrader.security_multistream.transports) == ["/noise"]
    assert list(upgrader.muxer_multistream.transports) == ["/yamux/1.0.0"]


async def test_a_member_is_told_addresses_and_protocols_by_identify(make_node, run_nodes):
    one, two = make_node(announce_addrs=("/dns4/gpu.example/tcp/4001",)), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            await one.dial(two.addrs[0], timeout=2)
            stream = await two.open_stream(one.peer_id, "/ipfs/id/1.0.0", timeout=2)
            data = b""
            while more := await stream.receive_some():
                data += more
            await stream.aclose()
    length, start = data[0], 1
    if length & 0x80:
        length, start = length & 0x7F | data[1] << 7, 2
    told = Identify.FromString(data[start : start + length])
    assert len(told.listen_addrs) == 1
    assert b"gpu.example" in told.listen_addrs[0]
