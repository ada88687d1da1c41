from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core import membership
from meshnode.core.membership import (
    Challenge,
    DiallerSide,
    Exchange,
    Hello,
    ListenerSide,
    Message,
    Proof,
    Refusal,
    Welcome,
    decode,
    encode,
    key_id,
)
from meshnode.errors import PeerRefused, TokenRefused, WireError

KEY, OLD_KEY, OTHER_KEY = b"k" * 32, b"o" * 32, b"x" * 32
D_NONCE, L_NONCE = b"d" * 32, b"l" * 32


def dialler(*keys: bytes) -> DiallerSide:
    return DiallerSide(keys or (KEY,), "12D3KooWD", "12D3KooWL", D_NONCE)


def listener(*keys: bytes) -> ListenerSide:
    return ListenerSide(keys or (KEY,), "12D3KooWL", "12D3KooWD", L_NONCE)


def over_the_wire(message: Message | None) -> Message:
    assert message is not None
    return decode(encode(message))


def test_holders_of_one_key_welcome_each_other_in_four_messages() -> None:
    d, server = dialler(), listener()
    challenge = server.receive(over_the_wire(d.hello()))
    assert isinstance(challenge, Challenge)
    proof = d.receive(over_the_wire(challenge))
    assert isinstance(proof, Proof)
    assert (d.outcome, server.outcome) == (None, None)
    welcome = server.receive(over_the_wire(proof))
    assert welcome == Welcome()
    assert server.outcome == "member"
    assert d.receive(over_the_wire(welcome)) is None
    assert d.outcome == "member"
    d.check()
    server.check()


def test_a_wrong_token_is_named_to_both_sides_after_the_first_message() -> None:
    d, server = dialler(OTHER_KEY), listener()
    refusal = server.receive(over_the_wire(d.hello()))
    assert isinstance(refusal, Refusal)
    assert refusal.code == "wrong_token"
    with pytest.raises(TokenRefused, match="12D3KooWL does not accept this node's token"):
        d.receive(over_the_wire(refusal))
    with pytest.raises(TokenRefused, match="12D3KooWD holds another token than this node"):
        server.check()


def test_during_a_rotation_any_common_key_will_do_and_the_listener_prefers_its_first() -> None:
    d, server = dialler(OLD_KEY, KEY), listener(KEY, OLD_KEY)
    challenge = server.receive(d.hello())
    assert isinstance(challenge, Challenge)
    assert challenge.key_id == key_id(KEY)
    d.receive(server.receive(d.receive(challenge)))  # type: ignore[arg-type]
    assert (d.outcome, server.outcome) == ("member", "member")


def test_a_dialler_refuses_a_listener_that_knows_the_key_id_but_not_the_key() -> None:
    d = dialler()
    reply = d.receive(Challenge(nonce=L_NONCE, key_id=key_id(KEY), proof=b"\x00" * 32))
    assert isinstance(reply, Refusal)
    assert reply.code == "wrong_token"
    with pytest.raises(TokenRefused):
        d.check()


def test_a_dialler_refuses_a_key_that_it_did_not_offer() -> None:
    reply = dialler().receive(Challenge(nonce=L_NONCE, key_id=b"\x00" * 8, proof=b"\x00" * 32))
    assert isinstance(reply, Refusal)


def test_a_listener_refuses_its_own_proof_reflected() -> None:
    server = listener()
    challenge = server.receive(dialler().hello())
    assert isinstance(challenge, Challenge)
    reply = server.receive(Proof(proof=challenge.proof))
    assert isinstance(reply, Refusal)
    assert server.outcome == "refused"


def test_a_proof_made_for_another_peer_or_nonce_does_not_fit() -> None:
    base = Exchange("D", "L", D_NONCE, L_NONCE)
    others = [
        Exchange("E", "L", D_NONCE, L_NONCE),
        Exchange("D", "M", D_NONCE, L_NONCE),
        Exchange("L", "D", D_NONCE, L_NONCE),
        Exchange("D", "L", L_NONCE, D_NONCE),
        Exchange("D", "L", D_NONCE, b"m" * 32),
        Exchange("DL", "", D_NONCE, L_NONCE),
    ]
    proofs = [e.dialler_proof(KEY) for e in (base, *others)]
    proofs += [e.listener_proof(KEY) for e in (base, *others)]
    proofs.append(base.dialler_proof(OTHER_KEY))
    assert len(set(proofs)) == len(proofs)


def test_a_key_id_does_not_give_the_key_away_and_is_no_proof() -> None:
    assert len(key_id(KEY)) == 8
    assert key_id(KEY) != key_id(OTHER_KEY)
    assert key_id(KEY) not in Exchange("D", "L", D_NONCE, L_NONCE).dialler_proof(KEY)


def test_a_refusal_for_another_reason_is_no_matter_of_tokens() -> None:
    with pytest.raises(PeerRefused, match=r"too_many.*: 512 wait already"):
        dialler().receive(Refusal(code="too_many", message="512 wait already"))


def test_a_listener_takes_the_diallers_refusal_of_its_proof() -> None:
    server = listener()
    server.receive(dialler().hello())
    with pytest.raises(TokenRefused):
        server.receive(Refusal(code="wrong_token"))
    assert server.outcome == "refused"


@pytest.mark.parametrize(
    "message",
    [Welcome(), Proof(proof=b"\x00" * 32), Hello(nonce=D_NONCE, key_ids=(key_id(KEY),))],
)
def test_a_dialler_takes_nothing_but_a_challenge_first(message: Message) -> None:
    with pytest.raises(WireError) as caught:
        dialler().receive(message)
    assert caught.value.code == "unexpected_message"


def test_a_listener_takes_each_message_once_and_in_order() -> None:
    server = listener()
    for message in (Proof(proof=b"\x00" * 32), Welcome(), Refusal(code="wrong_token")):
        with pytest.raises(WireError) as caught:
            server.receive(message)
        assert caught.value.code == "unexpected_message"
    server.receive(dialler().hello())
    with pytest.raises(WireError) as caught:
        server.receive(dialler().hello())
    assert caught.value.code == "unexpected_message"


def test_nothing_is_taken_after_the_outcome() -> None:
    server = listener()
    server.receive(dialler(OTHER_KEY).hello())
    for message in (dialler().hello(), Proof(proof=b"\x00" * 32), Refusal(code="x")):
        with pytest.raises(WireError):
            server.receive(message)
    assert server.outcome == "refused"


def test_an_unfinished_exchange_proves_nothing() -> None:
    with pytest.raises(WireError) as caught:
        listener().check()
    assert caught.value.code == "truncated"


def test_wrong_keys_and_nonces_of_our_own_are_value_errors() -> None:
    with pytest.raises(ValueError, match="1 to 8 keys of 32 bytes"):
        DiallerSide((), "a", "b", D_NONCE)
    with pytest.raises(ValueError, match="1 to 8 keys of 32 bytes"):
        ListenerSide((b"short",), "a", "b", D_NONCE)
    with pytest.raises(ValueError, match="a nonce has 32 bytes, not 3"):
        ListenerSide((KEY,), "a", "b", b"abc")


@given(st.binary(max_size=150))
def test_random_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    try:
        outcome = type(decode(data)).__name__
    except WireError as exc:
        outcome = exc.code
    assert outcome in membership.ERROR_CODES


messages = st.one_of(
    st.builds(
        lambda n, k: Hello(nonce=n, key_ids=(k,)),
        st.binary(min_size=32, max_size=32),
        st.binary(min_size=8, max_size=8) | st.just(key_id(KEY)),
    ),
    st.builds(
        lambda n, p: Challenge(nonce=n, key_id=key_id(KEY), proof=p),
        st.binary(min_size=32, max_size=32),
        st.binary(min_size=32, max_size=32),
    ),
    st.builds(lambda p: Proof(proof=p), st.binary(min_size=32, max_size=32)),
    st.just(Welcome()),
    st.just(Refusal(code="wrong_token")),
)


@given(st.lists(messages, max_size=6), st.booleans())
def test_whoever_lacks_the_key_never_becomes_a_member(sent: list[Message], dials: bool) -> None:
    side = listener() if dials else dialler()
    for message in sent:
        try:
            side.receive(message)
        except (WireError, TokenRefused):
            break
    assert side.outcome != "member"
