from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core import token
from meshnode.core.token import Token, decode, encode, new_token, open_network_key
from meshnode.errors import TokenInvalid

ADDR = "/ip4/192.168.1.20/tcp/4201/p2p/12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf"
TOKEN = new_token("home", (ADDR,), bytes(range(32)))
TEXT = encode(TOKEN)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def refusal_of(text: str) -> str:
    with pytest.raises(TokenInvalid) as caught:
        decode(text)
    return str(caught.value)


def forged(body: bytes) -> str:
    return "mesh1" + token._to_base64url(body + token._checksum(body))


@given(
    st.from_regex(r"[a-z0-9-]{1,32}", fullmatch=True),
    st.binary(min_size=32, max_size=32),
    st.lists(st.integers(1, 65535).map(lambda p: f"/ip4/10.0.0.1/tcp/{p}/p2p/x"), max_size=16),
)
def test_a_token_comes_back_as_made(network: str, key: bytes, addrs: list[str]) -> None:
    made = new_token(network, tuple(addrs), key)
    assert decode(encode(made)) == made


def test_a_token_is_one_line_that_survives_being_wrapped_by_a_terminal() -> None:
    assert TEXT.startswith("mesh1") and TEXT.isprintable() and " " not in TEXT
    assert decode(f"  {TEXT[:40]}\n {TEXT[40:]}\r\n") == TOKEN


def test_neither_repr_nor_an_error_shows_the_key() -> None:
    assert "key" not in repr(TOKEN)
    assert TEXT[30:50] not in refusal_of(TEXT[:-1] + ("A" if TEXT[-1] != "A" else "B"))


def test_every_single_mistyped_character_is_noticed() -> None:
    for at in range(5, len(TEXT)):
        for other in (ALPHABET[(ALPHABET.index(TEXT[at]) + 1) % 64], "-", "!"):
            if other != TEXT[at]:
                assert "the token is damaged" in refusal_of(TEXT[:at] + other + TEXT[at + 1 :])


def test_a_token_cut_short_anywhere_is_noticed() -> None:
    for length in range(5, len(TEXT)):
        assert "copy it again whole" in refusal_of(TEXT[:length])


def test_a_damaged_token_says_what_to_do() -> None:
    swapped = TEXT[:20] + TEXT[21] + TEXT[20] + TEXT[22:]
    assert refusal_of(swapped) == (
        "the token is damaged: its checksum does not match; "
        "copy it again whole from the host that made it"
    )


def test_text_that_is_no_token_is_told_apart_from_a_damaged_one() -> None:
    assert refusal_of("") == "the token is empty; make one with: meshnode token new"
    assert refusal_of("hello").startswith("this is no token: a token begins with mesh1")
    assert "damaged" in refusal_of("mesh1")


def test_a_token_of_another_version_says_so() -> None:
    assert "this is a token of version 2, and this meshnode reads version 1" in refusal_of(
        "mesh2" + TEXT[5:]
    )


def test_a_huge_file_is_not_taken_for_a_token() -> None:
    assert "is this the right file?" in refusal_of("mesh1" + "A" * 10_000)


def test_a_well_sealed_token_with_odd_content_is_still_refused() -> None:
    good = {"Network": "home", "Key": bytes(32), "Bootstraps": []}
    assert decode(forged(msgpack.packb(good | {"Later": 1}))).network == "home"
    for odd in (
        {"Network": "Home"},
        {"Network": "home\n"},
        {"Key": bytes(31)},
        {"Key": "x" * 32},
        {"Bootstraps": ["\x1b[31m"]},
    ):
        assert "meshnode token new" in refusal_of(forged(msgpack.packb(good | odd)))
    assert "no multiaddr" in refusal_of(forged(msgpack.packb(good | {"Bootstraps": ["x"]})))
    assert "not understood" in refusal_of(forged(b"\xc1"))


@given(st.text(max_size=60), st.binary(max_size=60))
def test_no_text_raises_anything_but_token_invalid(text: str, body: bytes) -> None:
    for candidate in (text, "mesh1" + text, forged(body)):
        with pytest.raises(TokenInvalid):
            decode(candidate)


@pytest.mark.parametrize("network", ["", "Home", "a b", "x" * 33, "ü", "home\n"])
def test_a_network_name_is_short_and_plain(network: str) -> None:
    with pytest.raises(TokenInvalid, match="is not 1 to 32 of a-z, 0-9 and -"):
        new_token(network, (), bytes(32))


def test_bootstraps_are_checked_when_a_token_is_made() -> None:
    with pytest.raises(TokenInvalid, match="no multiaddr with a peer ID"):
        new_token("home", ("/ip4/10.0.0.1/tcp/4201",), bytes(32))
    with pytest.raises(TokenInvalid, match="more than the 16"):
        new_token("home", (ADDR,) * 17, bytes(32))
    with pytest.raises(TokenInvalid, match="32 bytes, not 3"):
        new_token("home", (), b"abc")


def test_a_fingerprint_names_the_network_and_an_open_network_has_its_own_key() -> None:
    assert len(TOKEN.fingerprint()) == 16
    assert TOKEN.fingerprint() != Token("home", bytes(32)).fingerprint()
    assert open_network_key("home") != open_network_key("lab")
    assert len(open_network_key("home")) == 32
