"""A prompt as a chain of block hashes: prompts that begin alike have chains that begin alike.

The UTF-8 bytes are cut at fixed offsets from 0 into windows, and each block's hash covers the one
before it, so that equal hashes mean equal prompts up to there. Semantics: LocalAI
core/services/nodes/prefixcache.
"""

from __future__ import annotations

import hmac

from xxhash import xxh64_intdigest

WINDOW = 256  # bytes
MAX_DEPTH = 64  # blocks; 16 KiB of a prompt tell conversations apart

# Other entry nodes hear of hashes by gossip, where each byte counts. With 48 bits, an index of
# 65,536 blocks mistakes a prompt for another once in 60 million.
SHORT_BITS = 48

_SESSION = "\x00session\x00"  # no canonical prompt begins so


def network_seed(key: bytes) -> int:
    """Return the seed (uint64) of a network, from its key.

    Members can tell from it whether a prompt that they guess was asked, as they could by serving
    it; nobody else can tell anything from a hash.
    """
    return int.from_bytes(hmac.digest(key, b"meshnode prompt hashes", "sha256")[:8], "big")


def extract_chain(
    model: str, prompt: str, *, window: int = WINDOW, max_depth: int = MAX_DEPTH, seed: int = 0
) -> list[int]:
    """Return the hashes (uint64) of the prompt's blocks; an empty prompt has none.

    Args:
        seed: of each hash, uint64. With a number of the network's own, the same prompt has
            other hashes in each network.
    """
    # Two characters of the cut are enough for one that needs more bytes than one.
    data = prompt[: window * max_depth].encode("utf-8", "replace")[: window * max_depth]
    previous = xxh64_intdigest(model.encode("utf-8", "replace"), seed)
    chain = []
    for start in range(0, len(data), window):
        block = previous.to_bytes(8, "little") + data[start : start + window]
        previous = xxh64_intdigest(block, seed)
        chain.append(previous)
    return chain


def short_chain(model: str, prompt: str, *, seed: int = 0) -> tuple[int, ...]:
    """Return the chain by which prompts are remembered and gossiped: ``SHORT_BITS`` of each."""
    shift = 64 - SHORT_BITS
    return tuple(value >> shift for value in extract_chain(model, prompt, seed=seed))


def session_chain(model: str, session: str, *, seed: int = 0) -> tuple[int, ...]:
    """Return the chain of a session, which is one block: it is known or it is not."""
    blocks = extract_chain(model, _SESSION + session, max_depth=1, window=4096, seed=seed)
    return tuple(value >> (64 - SHORT_BITS) for value in blocks)
