"""Keys and lists of peers that change while links stand: they take effect at once."""

from __future__ import annotations

import pytest
import trio

from meshnode.core.belonging import Belonging
from meshnode.errors import PeerRefused, PeerUnreachable, TokenRefused
from meshnode.net.mesh import LinkState

OLD, NEW = b"o" * 32, b"n" * 32
ECHO = "/test/echo/1.0.0"


async def echo(stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.aclose()


def peers_of(node) -> set[str]:
    return {link.peer_id for link in node.links()}


async def until(condition) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


async def test_a_blocked_peer_is_cut_off_at_once_and_not_let_in_again(make_node, run_nodes):
    one, two, three = make_node(), make_node(), make_node()
    keys = one.membership.now.keys
    with trio.fail_after(10):
        async with run_nodes(one, two, three):
            one.membership.change(Belonging(keys, blocked=frozenset({two.peer_id})))
            await until(lambda: peers_of(one) == {three.peer_id})
            await until(lambda: peers_of(two) == {three.peer_id})
            with pytest.raises(PeerUnreachable, match="block-list"):
                await one.dial(two.addrs[0], timeout=3)
            with pytest.raises((PeerUnreachable, PeerRefused), match="block-list"):
                await two.dial(one.addrs[0], timeout=3)
            down = [e.reason for e in one.events if e.state is LinkState.DOWN]
            assert down == ["it is on this node's block-list"]
            one.membership.change(Belonging(keys))
            await two.dial(one.addrs[0], timeout=3)
            assert two.peer_id in peers_of(one)


async def test_with_an_allow_list_a_token_is_not_enough(make_node, run_nodes):
    one, two, three = make_node(), make_node(), make_node()
    allowed = frozenset({two.peer_id})
    one.membership.change(Belonging(one.membership.now.keys, allowed=allowed))
    with trio.fail_after(10):
        async with run_nodes(one, two, three, linked=False):
            await two.dial(one.addrs[0], timeout=3)
            with pytest.raises((PeerUnreachable, PeerRefused), match="allow-list"):
                await three.dial(one.addrs[0], timeout=3)
            assert peers_of(one) == {two.peer_id}


async def test_a_withdrawn_key_ends_the_links_that_rest_on_it_and_no_others(make_node, run_nodes):
    one, old, both = (make_node(keys=keys) for keys in ((NEW, OLD), (OLD,), (NEW, OLD)))
    for node in (one, both):
        node.serve(ECHO, echo)
    with trio.fail_after(10):
        async with run_nodes(one, old, both):
            stream = await one.open_stream(both.peer_id, ECHO, timeout=3)
            one.membership.change(Belonging((NEW,)))
            await until(lambda: peers_of(one) == {both.peer_id})
            await stream.send_all(b"still here")
            assert await stream.receive_some() == b"still here"
            with pytest.raises(TokenRefused):
                await old.dial(one.addrs[0], timeout=3)
            await stream.aclose()


async def test_links_that_rest_on_an_old_key_outlive_it_where_both_have_a_newer_one(
    make_node, run_nodes
):
    one, two = make_node(keys=(OLD,)), make_node(keys=(OLD,))
    one.serve(ECHO, echo)
    with trio.fail_after(10):
        async with run_nodes(one, two):
            stream = await two.open_stream(one.peer_id, ECHO, timeout=3)
            for keys in ((NEW, OLD), (NEW,)):
                for node in (one, two):
                    node.membership.change(Belonging(keys))
                    await stream.send_all(b"still here")
                    assert await stream.receive_some() == b"still here"
            await trio.sleep(0.1)
            assert one.links() and two.links()
            assert not [e for e in one.events if e.state is LinkState.DOWN]
            await stream.aclose()


async def test_a_key_that_is_added_lets_in_at_once(make_node, run_nodes):
    one, two = make_node(keys=(OLD,)), make_node(keys=(NEW,))
    with trio.fail_after(10):
        async with run_nodes(one, two, linked=False):
            with pytest.raises(TokenRefused):
                await two.dial(one.addrs[0], timeout=3)
            one.membership.change(Belonging((NEW, OLD)))
            await two.dial(one.addrs[0], timeout=3)
            assert peers_of(one) == {two.peer_id}
