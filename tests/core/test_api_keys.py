"""Keys of clients: who is known, what each may ask, how often, and that no key ever shows."""

from __future__ import annotations

from typing import Any

import pytest

from meshnode.core.api_keys import NO_KEY, WRONG_KEY, ClientKey, ClientKeys, parse_client_keys

ALICE, BOB = "alice-key-0123456789", "bob-key-0123456789"
KEYS = parse_client_keys(
    {"alice": {"key": ALICE}, "bob": {"key": BOB, "models": ["llama3*", "phi3"], "rpm": 2}}
)


def shown(key: str, header: str = "authorization") -> list[tuple[bytes, bytes]]:
    value = f"Bearer {key}" if header == "authorization" else key
    return [(b"host", b"x"), (header.encode(), value.encode())]


def bob(keys: ClientKeys) -> ClientKey:
    client = keys.identify(shown(BOB))
    assert isinstance(client, ClientKey)
    return client


def test_a_key_is_taken_from_either_header_and_names_its_client() -> None:
    keys = ClientKeys(KEYS)
    for headers in (
        shown(ALICE),
        shown(ALICE, "x-api-key"),
        [(b"authorization", b"bEARER " + ALICE.encode())],
    ):
        client = keys.identify(headers)
        assert isinstance(client, ClientKey) and client.name == "alice"


def test_no_key_and_a_wrong_key_are_told_apart_and_neither_gets_in() -> None:
    keys = ClientKeys(KEYS)
    assert keys.identify([]) is NO_KEY
    assert keys.identify([(b"authorization", b"Basic abc")]) is NO_KEY
    for wrong in (ALICE[:-1], ALICE + "x", ALICE.upper(), "\xff" * 20):
        assert keys.identify(shown(wrong)) is WRONG_KEY
    assert (NO_KEY.status, WRONG_KEY.status) == (401, 401)


def test_a_key_with_models_is_for_those_however_they_are_spelled() -> None:
    keys = ClientKeys(KEYS)
    client = bob(keys)
    for model in ("llama3", "llama3:8b", "LLAMA3:latest", "phi3:latest"):
        assert client.allows(model)
    for model in ("phi3:mini", "qwen3"):
        refusal = keys.permit(client, model, computes=True, now=0.0)
        assert refusal is not None and (refusal.status, refusal.code) == (403, "model_not_allowed")
    nameless = keys.permit(client, None, computes=True, now=0.0)
    assert nameless is not None and nameless.status == 403
    deleting = keys.permit(client, "llama3", computes=False, now=0.0)
    assert deleting is not None and deleting.code == "not_allowed"


def test_a_key_for_all_models_may_ask_anything_as_often_as_it_likes() -> None:
    keys = ClientKeys(KEYS)
    client = keys.identify(shown(ALICE))
    assert isinstance(client, ClientKey)
    for _ in range(1000):
        assert keys.permit(client, None, computes=False, now=0.0) is None


def test_so_many_requests_a_minute_and_then_the_seconds_to_wait() -> None:
    keys = ClientKeys(KEYS)
    client = bob(keys)
    results = [keys.permit(client, "phi3", computes=True, now=now) for now in (0.0, 0.0, 1.0, 30.0)]
    assert [r.status if r else 200 for r in results] == [200, 200, 429, 200]
    assert results[2] is not None and results[2].retry_after == 29
    assert keys.permit(client, "phi3", computes=True, now=30.0) is not None


def test_newer_keys_hold_at_once_and_keep_the_counts_of_who_stays() -> None:
    keys = ClientKeys(KEYS)
    for _ in range(2):
        keys.permit(bob(keys), "phi3", computes=True, now=0.0)
    keys.replace(KEYS[1:])
    assert keys.identify(shown(ALICE)) is WRONG_KEY
    assert keys.permit(bob(keys), "phi3", computes=True, now=0.0) is not None


def test_no_key_shows_in_what_is_printed_of_it() -> None:
    assert ALICE not in repr(KEYS) and KEYS[0].digest.hex() not in repr(KEYS)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({}, "names no client"),
        ({"a": "text"}, "outside a table"),
        ({"a": {}}, "no usable key"),
        ({"a": {"key": "short"}}, "no usable key"),
        ({"a": {"key": "with a space in it all"}}, "no usable key"),
        ({"a": {"key": ALICE, "modles": []}}, "unknown key 'modles'"),
        ({"a": {"key": ALICE, "models": []}}, "no list of models"),
        ({"a": {"key": ALICE, "models": [1]}}, "no text"),
        ({"a": {"key": ALICE, "rpm": 0}}, "rpm"),
        ({"a": {"key": ALICE, "rpm": True}}, "rpm"),
        ({"a": {"key": ALICE}, "b": {"key": ALICE}}, "one key to two clients"),
        ({f"c{n}": {"key": ALICE} for n in range(1001)}, "more than 1000"),
    ],
)
def test_a_file_of_keys_that_is_wrong_says_where_and_never_shows_a_key(
    table: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at below
        parse_client_keys(table)
    assert says in str(caught.value) and ALICE not in str(caught.value)
