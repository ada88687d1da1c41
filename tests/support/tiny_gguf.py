"""A language model of a few kilobytes, so that a real engine has something to serve.

GGUF version 3 by hand: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A llama of two
small blocks with random weights; its tokens are single bytes, and what it says are random letters
that never end by themselves.
"""

from __future__ import annotations

import random
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32  # bytes
F32 = 0  # a tensor's type
# Types of metadata.
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
# Types of tokens.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6

WIDTH = 32  # of the embedding
HIDDEN = 64  # of the feed-forward layers
HEADS = 2
BLOCKS = 2
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes one
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}assistant:"
)

LETTERS = [SPACE, *"abcdefghijklmnopqrstuvwxyz"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
KINDS = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(LETTERS)]
# The last letters are said, the other tokens only understood.
FIRST_SAID = len(TOKENS) - len(LETTERS)


@dataclass(frozen=True)
class Tensor:
    """Rows of one length, or one row for a vector."""

    name: str
    width: int
    rows: int | None
    values: array[float]

    def dimensions(self) -> tuple[int, ...]:
        return (self.width,) if self.rows is None else (self.width, self.rows)


def write_tiny_gguf(path: Path, *, context: int = 32_768, seed: int = 1) -> None:
    """Write the model; ``context`` is how many tokens a prompt and its answer may have."""
    tensors = make_tensors(random.Random(seed))
    metadata = make_metadata(context)
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    for key, kind, value in metadata:
        head += text(key) + struct.pack("<I", kind) + value
    offset = 0
    data = b""
    for tensor in tensors:
        dimensions = tensor.dimensions()
        head += text(tensor.name) + struct.pack("<I", len(dimensions))
        head += struct.pack(f"<{len(dimensions)}Q", *dimensions)
        head += struct.pack("<IQ", F32, offset)
        data += padded(struct.pack(f"<{len(tensor.values)}f", *tensor.values))
        offset = len(data)
    path.write_bytes(padded(head) + data)


def make_metadata(context: int) -> list[tuple[str, int, bytes]]:
    scores = [0.0] * len(TOKENS)
    return [
        ("general.architecture", STRING, text("llama")),
        ("general.name", STRING, text("tiny")),
        ("llama.context_length", UINT32, struct.pack("<I", context)),
        ("llama.embedding_length", UINT32, struct.pack("<I", WIDTH)),
        ("llama.block_count", UINT32, struct.pack("<I", BLOCKS)),
        ("llama.feed_forward_length", UINT32, struct.pack("<I", HIDDEN)),
        ("llama.attention.head_count", UINT32, struct.pack("<I", HEADS)),
        ("llama.attention.head_count_kv", UINT32, struct.pack("<I", HEADS)),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, struct.pack("<f", 1e-5)),
        ("llama.rope.dimension_count", UINT32, struct.pack("<I", WIDTH // HEADS)),
        ("tokenizer.ggml.model", STRING, text("llama")),
        ("tokenizer.ggml.tokens", ARRAY, listed(STRING, b"".join(map(text, TOKENS)))),
        ("tokenizer.ggml.scores", ARRAY, listed(FLOAT32, struct.pack(f"<{len(scores)}f", *scores))),
        ("tokenizer.ggml.token_type", ARRAY, listed(INT32, struct.pack(f"<{len(KINDS)}i", *KINDS))),
        ("tokenizer.ggml.unknown_token_id", UINT32, struct.pack("<I", 0)),
        ("tokenizer.ggml.bos_token_id", UINT32, struct.pack("<I", 1)),
        ("tokenizer.ggml.eos_token_id", UINT32, struct.pack("<I", 2)),
        ("tokenizer.chat_template", STRING, text(CHAT_TEMPLATE)),
    ]


def make_tensors(rng: random.Random) -> list[Tensor]:
    def matrix(name: str, width: int, rows: int, *, scale: float = 0.3) -> Tensor:
        values = array("f", (rng.gauss(0, scale) for _ in range(width * rows)))
        return Tensor(name, width, rows, values)

    def ones(name: str) -> Tensor:
        return Tensor(name, WIDTH, None, array("f", [1.0] * WIDTH))

    embedding = matrix("token_embd.weight", WIDTH, len(TOKENS), scale=1.0)
    said = matrix("output.weight", WIDTH, len(TOKENS), scale=1.0)
    # The first place of the state is 4 for every token, as no block writes to it. So the last
    # matrix can forbid what is no letter: the end too, and bytes that make no character.
    for token in range(len(TOKENS)):
        embedding.values[token * WIDTH] = 4.0
        said.values[token * WIDTH] = 0.0 if token >= FIRST_SAID else -100.0
    tensors = [embedding]
    for block in range(BLOCKS):
        prefix = f"blk.{block}."
        into_state = [
            matrix(f"{prefix}attn_output.weight", WIDTH, WIDTH),
            matrix(f"{prefix}ffn_down.weight", HIDDEN, WIDTH),
        ]
        for tensor in into_state:
            tensor.values[: tensor.width] = array("f", [0.0] * tensor.width)
        tensors += [
            *into_state,
            ones(f"{prefix}attn_norm.weight"),
            ones(f"{prefix}ffn_norm.weight"),
            *(matrix(f"{prefix}attn_{part}.weight", WIDTH, WIDTH) for part in "qkv"),
            *(matrix(f"{prefix}ffn_{part}.weight", WIDTH, HIDDEN) for part in ("gate", "up")),
        ]
    return [*tensors, ones("output_norm.weight"), said]


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def listed(kind: int, items: bytes) -> bytes:
    """An array of as many items as there are tokens."""
    return struct.pack("<IQ", kind, len(TOKENS)) + items


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
