from __future__ import annotations

from typing import Any

import pytest

from meshnode.core import token
from meshnode.core.membership import (
    MAX_MESSAGE_BYTES,
    DiallerSide,
    Exchange,
    ListenerSide,
    Refusal,
    decode,
    encode,
    key_id,
)
from meshnode.core.wire import FrameDecoder
from meshnode.errors import PeerRefused, TokenInvalid, TokenRefused, WireError

PROTOCOL = "membership/1.0.0"


@pytest.mark.vectors(PROTOCOL, "frames")
def test_a_stream_is_cut_into_the_frames_written(vector: dict[str, Any]) -> None:
    decoder, bodies, error = FrameDecoder(MAX_MESSAGE_BYTES), [], None
    decoder.feed(bytes.fromhex(vector["stream"]))
    try:
        while (body := decoder.next_frame()) is not None:
            bodies.append(body.hex())
        decoder.finish()
    except WireError as exc:
        error = exc.code
    assert (bodies, error) == (vector["bodies"], vector.get("error"))


@pytest.mark.vectors(PROTOCOL, "proofs")
def test_key_ids_and_proofs_are_those_written(vector: dict[str, Any]) -> None:
    key = bytes.fromhex(vector["key"])
    nonces = (bytes.fromhex(vector["dialler_nonce"]), bytes.fromhex(vector["listener_nonce"]))
    exchange = Exchange(vector["dialler"], vector["listener"], *nonces)
    assert key_id(key).hex() == vector["key_id"]
    assert exchange.listener_proof(key).hex() == vector["listener_proof"]
    assert exchange.dialler_proof(key).hex() == vector["dialler_proof"]


@pytest.mark.vectors(PROTOCOL, "exchanges")
def test_each_side_answers_and_ends_as_written(vector: dict[str, Any]) -> None:
    kind = DiallerSide if vector["role"] == "dialler" else ListenerSide
    keys = [bytes.fromhex(key) for key in vector["keys"]]
    side = kind(keys, vector["own_id"], vector["peer_id"], bytes.fromhex(vector["nonce"]))
    assert play(side, vector["steps"]) == vector["outcome"]
    assert (side.outcome == "member") == (vector["outcome"] == "member")


def play(side: DiallerSide | ListenerSide, steps: list[dict[str, str]]) -> str:
    for step in steps:
        try:
            reply = (
                side.receive(decode(bytes.fromhex(step["receive"])))
                if "receive" in step
                else side.hello()  # type: ignore[union-attr]
            )
        except WireError as exc:
            return exc.code
        except TokenRefused:
            return "wrong_token"
        except PeerRefused:
            refusal = decode(bytes.fromhex(step["receive"]))
            assert isinstance(refusal, Refusal)
            return refusal.code
        assert (encode(reply).hex() if reply else None) == step.get("send")
        if isinstance(reply, Refusal):
            return reply.code
    return side.outcome or "unfinished"


@pytest.mark.vectors(PROTOCOL, "tokens")
def test_a_token_says_what_is_written_and_is_made_byte_for_byte(vector: dict[str, Any]) -> None:
    made = token.decode(vector["text"])
    assert (made.network, made.key.hex()) == (vector["network"], vector["key"])
    assert (list(made.bootstraps), made.fingerprint()) == (
        vector["bootstraps"],
        vector["fingerprint"],
    )
    assert token.encode(made) == vector["text"]


@pytest.mark.vectors(PROTOCOL, "invalid_tokens")
def test_a_damaged_token_is_refused_in_words_that_help(vector: dict[str, Any]) -> None:
    with pytest.raises(TokenInvalid) as caught:
        token.decode(vector["text"])
    assert vector["says"] in str(caught.value)


@pytest.mark.vectors(PROTOCOL, "open_keys")
def test_an_open_network_has_the_key_written(vector: dict[str, Any]) -> None:
    key = token.open_network_key(vector["name"])
    assert key.hex() == vector["key"]
    assert token.network_fingerprint(key) == vector["fingerprint"]
