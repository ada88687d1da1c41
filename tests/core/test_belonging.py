from __future__ import annotations

import pytest

from meshnode.core.belonging import Belonging, Membership, by_keys
from meshnode.core.membership import key_id

OLD, NEW = b"o" * 32, b"n" * 32


def test_without_lists_whoever_has_a_key_belongs():
    assert Belonging((OLD,)).objection("anybody") is None


def test_the_block_list_goes_before_the_allow_list():
    belonging = Belonging((OLD,), allowed=frozenset({"a", "b"}), blocked=frozenset({"b"}))
    assert belonging.objection("a") is None
    assert belonging.objection("b") == "it is on this node's block-list"
    assert belonging.objection("c") == "it is not on this node's allow-list"


def test_an_empty_allow_list_lets_in_nobody():
    assert Belonging((OLD,), allowed=frozenset()).objection("a") is not None


def test_a_key_is_held_until_it_is_dropped():
    assert Belonging((NEW, OLD)).holds(key_id(OLD))
    assert not Belonging((NEW,)).holds(key_id(OLD))


@pytest.mark.parametrize("keys", [(), (OLD,) * 9])
def test_a_number_of_keys_that_no_exchange_could_carry_is_refused(keys):
    with pytest.raises(ValueError, match="1 to 8 keys"):
        Belonging(keys)


def test_watchers_hear_of_changes_alone():
    membership, heard = by_keys((OLD,)), []
    membership.watch(lambda: heard.append(membership.now.keys))
    assert not membership.change(Belonging((OLD,)))
    assert membership.change(Belonging((NEW, OLD)))
    assert heard == [(NEW, OLD)]
    assert isinstance(membership, Membership)
