"""membership/1.0.0: the token, where a network's key comes from."""

from __future__ import annotations

from common import A, vectors

from meshnode.core.token import Token, encode, network_fingerprint, open_network_key

FOLDER = "membership/1.0.0"
ADDR = f"/ip4/192.168.1.20/tcp/4201/p2p/{A}"


def files() -> dict[str, object]:
    tokens = [
        ("no bootstrap", Token("home", bytes(range(32)))),
        ("one bootstrap", Token("lab-2", bytes(range(32, 64)), (ADDR,))),
        ("the longest name", Token("a" * 32, b"\xff" * 32, (ADDR, ADDR.replace("20", "21")))),
    ]
    text = encode(tokens[1][1])
    swapped = text[:30] + text[31] + text[30] + text[32:]
    return {
        f"{FOLDER}/vectors/tokens.json": vectors(
            "Each text decodes to the rest, and encoding that gives text again.",
            [
                {
                    "name": name,
                    "text": encode(token),
                    "network": token.network,
                    "key": token.key.hex(),
                    "bootstraps": list(token.bootstraps),
                    "fingerprint": token.fingerprint(),
                }
                for name, token in tokens
            ],
        ),
        f"{FOLDER}/vectors/invalid_tokens.json": vectors(
            "Each text is refused, and the refusal contains says.",
            [
                {"name": "nothing", "text": "", "says": "empty"},
                {"name": "something else", "text": "hello", "says": "no token"},
                {"name": "a later version", "text": "mesh2" + text[5:], "says": "version 2"},
                {"name": "two characters swapped", "text": swapped, "says": "checksum"},
                {"name": "cut short", "text": text[:-4], "says": "damaged"},
                {"name": "the prefix alone", "text": "mesh1", "says": "damaged"},
                {"name": "a strange character", "text": text[:-1] + "+", "says": "character"},
            ],
        ),
        f"{FOLDER}/vectors/open_keys.json": vectors(
            "The key of an open network follows from its name.",
            [
                {
                    "name": network,
                    "key": open_network_key(network).hex(),
                    "fingerprint": network_fingerprint(open_network_key(network)),
                }
                for network in ("home", "lab-2")
            ],
        ),
    }
