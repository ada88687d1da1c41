"""The membership protocol: both sides of a connection prove that they hold a common key.

The law here: nothing is proven by what could be replayed or reflected. Every proof covers the
role, both peer IDs (which the secure channel has already authenticated) and both nonces.

Sans-IO. Whoever carries the messages does, on either side::

    send(encode(side.hello()))                       # the dialling side alone
    while side.outcome is None:
        reply = side.receive(decode(next_frame()))   # may raise WireError, TokenRefused, ...
        if reply is not None:
            send(encode(reply))
    side.check()                                     # raises if this side refused the other
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, WithJsonSchema

from meshnode.core.wire import (
    FRAME_ERROR_CODES,
    Text64,
    Text256,
    TypedMessage,
    encode_model,
    parse_model,
    unpack_map,
)
from meshnode.errors import PeerRefused, TokenRefused, WireError

PROTOCOL_ID = "/meshnode/membership/1.0.0"
# From a new connection to its outcome; a stranger gets no longer. Long, since after a power cut all
# knock at one bootstrap, and whom that would not wait for would knock again.
TIMEOUT = 10.0  # seconds
MAX_MESSAGE_BYTES = 2048  # a refusal's text of 256 four-byte characters, and its keys
KEY_BYTES = 32
NONCE_BYTES = 32
KEY_ID_BYTES = 8
MAX_KEYS = 8  # a rotation needs two; the rest is room for several rotations at once

WRONG_TOKEN = "wrong_token"
BLOCKED = "blocked"

ERROR_CODES = FRAME_ERROR_CODES | {"unknown_type", "unexpected_message"}

_KEY_ID_LABEL = b"meshnode key id 1"
_LISTENER_LABEL = b"meshnode membership 1 listener"
_DIALLER_LABEL = b"meshnode membership 1 dialler"

# In JSON, as in the vectors and the schema, bytes are lower-case hexadecimal.
Bytes32 = Annotated[
    bytes,
    Field(min_length=32, max_length=32),
    WithJsonSchema({"type": "string", "contentEncoding": "base16", "pattern": "^[0-9a-f]{64}$"}),
]
KeyId = Annotated[
    bytes,
    Field(min_length=KEY_ID_BYTES, max_length=KEY_ID_BYTES),
    WithJsonSchema({"type": "string", "contentEncoding": "base16", "pattern": "^[0-9a-f]{16}$"}),
]


class Hello(TypedMessage):
    """Dialler to listener: a nonce, and which keys it holds."""

    type: Literal["hello"] = Field(default="hello", alias="Type")
    nonce: Bytes32 = Field(alias="Nonce")
    key_ids: tuple[KeyId, ...] = Field(alias="KeyIDs", min_length=1, max_length=MAX_KEYS)


class Challenge(TypedMessage):
    """Listener to dialler: its nonce, the key chosen, and the proof that it holds it."""

    type: Literal["challenge"] = Field(default="challenge", alias="Type")
    nonce: Bytes32 = Field(alias="Nonce")
    key_id: KeyId = Field(alias="KeyID")
    proof: Bytes32 = Field(alias="Proof")


class Proof(TypedMessage):
    """Dialler to listener: the proof that it holds the key chosen."""

    type: Literal["proof"] = Field(default="proof", alias="Type")
    proof: Bytes32 = Field(alias="Proof")


class Welcome(TypedMessage):
    """Listener to dialler: a member; other protocols may be used now."""

    type: Literal["welcome"] = Field(default="welcome", alias="Type")


class Refusal(TypedMessage):
    """Either way, instead of the next message: no, and why. The connection is closed."""

    type: Literal["refusal"] = Field(default="refusal", alias="Type")
    # No fixed set: a code of a later version is still a refusal.
    code: Text64 = Field(alias="Code", min_length=1)
    message: Text256 = Field(default="", alias="Message")


Message = Hello | Challenge | Proof | Welcome | Refusal
Outcome = Literal["member", "refused"]

MESSAGES: dict[str, type[Message]] = {
    "hello": Hello,
    "challenge": Challenge,
    "proof": Proof,
    "welcome": Welcome,
    "refusal": Refusal,
}


def encode(message: Message) -> bytes:
    """Return the body of the message's frame."""
    return encode_model(message, MAX_MESSAGE_BYTES)


def decode(body: bytes) -> Message:
    """Return the message in a frame's body.

    Raises:
        WireError: ``too_large``, ``bad_msgpack``, ``bad_field``, or ``unknown_type``.
    """
    fields = unpack_map(body, MAX_MESSAGE_BYTES)
    name = fields.get("Type")
    model = MESSAGES.get(name) if isinstance(name, str) else None
    if model is None:
        raise WireError("unknown_type", f"Type is none of {', '.join(MESSAGES)}")
    return parse_model(model, fields)


def key_id(key: bytes) -> bytes:
    """Return the 8 bytes that name ``key`` without giving it away."""
    return _hmac(key, _KEY_ID_LABEL)[:KEY_ID_BYTES]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Who proves membership to whom, with which nonces: what every proof is bound to."""

    dialler: str  # peer IDs, base58
    listener: str
    dialler_nonce: bytes  # 32 bytes each
    listener_nonce: bytes

    def listener_proof(self, key: bytes) -> bytes:
        """Return the 32 bytes that prove that the listener holds ``key``."""
        return _hmac(key, _LISTENER_LABEL + self._transcript())

    def dialler_proof(self, key: bytes) -> bytes:
        """Return the 32 bytes that prove that the dialler holds ``key``."""
        return _hmac(key, _DIALLER_LABEL + self._transcript())

    def _transcript(self) -> bytes:
        # Each part carries its length, so that no two different exchanges give the same bytes.
        ids = (self.dialler.encode(), self.listener.encode())
        parts = (*ids, self.dialler_nonce, self.listener_nonce)
        return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


class _Side:
    role: ClassVar[str]

    def __init__(self, keys: Sequence[bytes], own_id: str, peer_id: str, nonce: bytes) -> None:
        """Begin one exchange.

        Args:
            keys: 1 to 8 keys of 32 bytes, the preferred one first.
            own_id: this side's peer ID, base58.
            peer_id: the other's, as the secure channel proved it.
            nonce: 32 random bytes, never used before.
        """
        if not 1 <= len(keys) <= MAX_KEYS or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"membership needs 1 to {MAX_KEYS} keys of {KEY_BYTES} bytes")
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
        self._keys = {key_id(key): key for key in keys}
        self._own_id = own_id
        self._peer_id = peer_id
        self._nonce = nonce
        self._outcome: Outcome | None = None
        self._key_id: bytes | None = None  # of the key that was chosen

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None while a message is awaited. Send the last reply before acting."""
        return self._outcome

    def check(self) -> bytes:
        """Return the ID of the key by which the other side proved to be a member.

        Raises:
            TokenRefused: this side has refused it.
            WireError: ``truncated``: the exchange has not ended yet.
        """
        if self._outcome is None:
            raise WireError("truncated", "the membership exchange did not finish")
        if self._outcome == "refused":
            raise TokenRefused(f"peer {self._peer_id} holds another token than this node")
        assert self._key_id is not None  # nobody becomes a member without one
        return self._key_id

    def _refuse(self, message: str) -> Refusal:
        self._outcome = "refused"
        return Refusal(code=WRONG_TOKEN, message=message)

    def _read_refusal(self, refusal: Refusal) -> None:
        self._outcome = "refused"
        said = f": {refusal.message}" if refusal.message else ""
        if refusal.code == WRONG_TOKEN:
            raise TokenRefused(f"peer {self._peer_id} does not accept this node's token{said}")
        raise PeerRefused(f"peer {self._peer_id} refused this node ({refusal.code}){said}")

    def _unexpected(self, message: Message) -> WireError:
        return WireError(
            "unexpected_message", f"the {self.role} can't take a {message.type} at this point"
        )


class DiallerSide(_Side):
    """The side that made the connection; it speaks first."""

    role = "dialler"

    def __init__(self, keys: Sequence[bytes], own_id: str, peer_id: str, nonce: bytes) -> None:
        super().__init__(keys, own_id, peer_id, nonce)
        self._has_proven = False

    def hello(self) -> Hello:
        """Return the first message."""
        return Hello(nonce=self._nonce, key_ids=tuple(self._keys))

    def receive(self, message: Message) -> Message | None:
        """Take the listener's message; return the one to send, if any.

        Raises:
            TokenRefused: the listener doesn't accept the token.
            PeerRefused: the listener refuses for another reason.
            WireError: ``unexpected_message``.
        """
        if self._outcome is None and isinstance(message, Refusal):
            self._read_refusal(message)
        if self._outcome is None and isinstance(message, Challenge) and not self._has_proven:
            return self._answer(message)
        if self._outcome is None and isinstance(message, Welcome) and self._has_proven:
            self._outcome = "member"
            return None
        raise self._unexpected(message)

    def _answer(self, challenge: Challenge) -> Message:
        key = self._keys.get(challenge.key_id)
        if key is None:
            return self._refuse("the key chosen was not offered")
        exchange = Exchange(self._own_id, self._peer_id, self._nonce, challenge.nonce)
        if not hmac.compare_digest(challenge.proof, exchange.listener_proof(key)):
            return self._refuse("the listener's proof is wrong")
        self._has_proven = True
        self._key_id = challenge.key_id
        return Proof(proof=exchange.dialler_proof(key))


class ListenerSide(_Side):
    """The side that took the connection."""

    role = "listener"

    def __init__(self, keys: Sequence[bytes], own_id: str, peer_id: str, nonce: bytes) -> None:
        super().__init__(keys, own_id, peer_id, nonce)
        self._expected_proof: bytes | None = None

    def receive(self, message: Message) -> Message | None:
        """Take the dialler's message; return the one to send.

        Raises:
            TokenRefused: the dialler doesn't accept the token.
            PeerRefused: the dialler refuses for another reason.
            WireError: ``unexpected_message``.
        """
        if self._outcome is None and isinstance(message, Hello) and self._expected_proof is None:
            return self._challenge(message)
        if self._outcome is None and self._expected_proof is not None:
            if isinstance(message, Refusal):
                self._read_refusal(message)
            if isinstance(message, Proof):
                return self._conclude(message, self._expected_proof)
        raise self._unexpected(message)

    def _challenge(self, hello: Hello) -> Message:
        offered = set(hello.key_ids)
        exchange = Exchange(self._peer_id, self._own_id, hello.nonce, self._nonce)
        for identifier, key in self._keys.items():  # in this side's order of preference
            if identifier in offered:
                self._expected_proof = exchange.dialler_proof(key)
                proof = exchange.listener_proof(key)
                self._key_id = identifier
                return Challenge(nonce=self._nonce, key_id=identifier, proof=proof)
        return self._refuse("this mesh has another token")

    def _conclude(self, message: Proof, expected: bytes) -> Message:
        if not hmac.compare_digest(message.proof, expected):
            return self._refuse("the dialler's proof is wrong")
        self._outcome = "member"
        return Welcome()


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, hashlib.sha256)
