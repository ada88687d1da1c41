from __future__ import annotations

import socket

import pytest
import trio
from libp2p import new_host
from multiaddr import Multiaddr

from meshnode.errors import ConfigError, ListenFailed
from meshnode.net.libp2p.addrs import dialable
from meshnode.net.libp2p.tcp import TcpStream, bind_listeners, open_tcp, parse_tcp_addr, tune

PEER = "12D3KooWFSzZQwk1aGVzjnkj6dqUQiifxDRu1NkjhD749wqHr6JX"


def port_of(listener: trio.SocketListener) -> int:
    return int(listener.socket.getsockname()[1])


@pytest.mark.parametrize(
    "addr",
    [
        "",
        "10.0.0.1:4001",
        "/ip4/300.1.1.1/tcp/1",
        "/ip4/1.2.3.4/tcp/99999",
        "/ip4/1.2.3.4/udp/1",
        "/ip4/1.2.3.4/tcp/1/ws",
        "/ip4/1.2.3.4/tcp/1/p2p/garbage",
        f"/p2p/{PEER}",
    ],
)
def test_what_is_no_tcp_multiaddr_is_refused_with_its_text(addr: str) -> None:
    with pytest.raises(ConfigError, match=r"multiaddr|/p2p/PEER_ID") as caught:
        parse_tcp_addr(addr)
    assert repr(addr) in str(caught.value)


def test_an_address_is_read_with_and_without_its_peer() -> None:
    assert parse_tcp_addr(f"/ip6/::1/tcp/4001/p2p/{PEER}").peer_id == PEER
    assert parse_tcp_addr(f"/dns4/host.example/tcp/4001/p2p/{PEER}").multiaddr == (
        "/dns4/host.example/tcp/4001"
    )
    assert parse_tcp_addr("/ip4/127.0.0.1/tcp/0").peer_id is None


async def test_a_taken_port_is_named_with_what_to_do() -> None:
    with trio.fail_after(5):
        (first,) = await bind_listeners(("/ip4/127.0.0.1/tcp/0",))
        async with first:
            addr = f"/ip4/127.0.0.1/tcp/{port_of(first)}"
            with pytest.raises(ListenFailed, match="listen on another port") as caught:
                await bind_listeners((addr,))
            assert addr in str(caught.value)


@pytest.mark.stock
async def test_the_library_lets_two_hosts_share_one_port() -> None:
    with trio.fail_after(10):
        one, two = new_host(), new_host()
        async with one.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            shared = one.get_addrs()[0].decapsulate_code(421)
            async with two.run([shared]):
                assert two.get_addrs()[0].decapsulate_code(421) == shared


async def test_no_address_is_left_bound_when_a_later_one_fails() -> None:
    with trio.fail_after(5):
        (taken,) = await bind_listeners(("/ip4/127.0.0.1/tcp/0",))
        (free,) = await bind_listeners(("/ip4/127.0.0.1/tcp/0",))
        first = f"/ip4/127.0.0.1/tcp/{port_of(free)}"
        await free.aclose()
        async with taken:
            with pytest.raises(ListenFailed):
                await bind_listeners((first, f"/ip4/127.0.0.1/tcp/{port_of(taken)}"))
        (again,) = await bind_listeners((first,))
        await again.aclose()


@pytest.mark.parametrize(
    ("addr", "advice"),
    [
        ("/ip4/192.0.2.1/tcp/0", "no such address"),
        ("/dns4/localhost/tcp/0", "give an IP address"),
        (f"/ip4/127.0.0.1/tcp/0/p2p/{PEER}", "nothing more"),
        ("nonsense", "can't listen there"),
    ],
)
async def test_an_address_that_can_not_be_listened_on_is_explained(addr: str, advice: str) -> None:
    with trio.fail_after(5), pytest.raises(ListenFailed, match=advice):
        await bind_listeners((addr,))


async def test_sockets_give_up_on_a_dead_link_and_send_small_frames_at_once() -> None:
    with trio.fail_after(5):
        (listener,) = await bind_listeners(("/ip4/127.0.0.1/tcp/0",))
        async with listener, await open_tcp(parse_tcp_addr(_addr_of(listener))) as stream:
            tune(stream.socket, user_timeout=8.0)
            sock = stream.socket
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 8000
            # Three probes two seconds apart after two idle ones: eight seconds.
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 2
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3


async def test_a_name_with_several_addresses_is_tried_one_after_another() -> None:
    # "localhost" is ::1 and 127.0.0.1 where IPv6 is there; nobody listens on ::1.
    with trio.fail_after(5):
        (listener,) = await bind_listeners(("/ip4/127.0.0.1/tcp/0",))
        async with listener:
            endpoint = parse_tcp_addr(f"/dns/localhost/tcp/{port_of(listener)}")
            async with await open_tcp(endpoint):
                pass


async def test_the_remote_address_is_known_over_ipv6_too() -> None:
    with trio.fail_after(5):
        try:
            (listener,) = await bind_listeners(("/ip6/::1/tcp/0",))
        except ListenFailed:
            pytest.skip("no IPv6 on this host")
        async with listener, await open_tcp(parse_tcp_addr(_addr_of(listener))) as stream:
            assert TcpStream(stream).remote_multiaddr == _addr_of(listener)
            assert TcpStream(stream).get_remote_address() == ("::1", port_of(listener))


async def test_a_wildcard_is_given_out_as_the_addresses_of_this_host() -> None:
    (listener,) = await bind_listeners(("/ip4/0.0.0.0/tcp/0",))
    async with listener:
        addrs = dialable([listener], (), PEER)
        assert addrs
        assert not any("/0.0.0.0/" in addr for addr in addrs)
        # Loopback leads others to themselves; it is given out only where there is nothing else.
        assert len(addrs) == 1 or not any("/127." in addr for addr in addrs)
        assert all(addr.endswith(f"/tcp/{port_of(listener)}/p2p/{PEER}") for addr in addrs)


async def test_addresses_to_announce_replace_those_listened_on() -> None:
    (listener,) = await bind_listeners(("/ip4/0.0.0.0/tcp/0",))
    async with listener:
        announced = dialable([listener], ("/dns4/gpu.example/tcp/4001",), PEER)
        assert announced == (f"/dns4/gpu.example/tcp/4001/p2p/{PEER}",)


def _addr_of(listener: trio.SocketListener) -> str:
    host = listener.socket.getsockname()[0]
    return f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port_of(listener)}"
