"""affinity/1.0.0: batches of warm prompts, and the hashes in them."""

from __future__ import annotations

from typing import Any

from common import A, B, pack, schema, shown, vectors

from meshnode.core.affinity_batch import (
    MAX_BATCH_BYTES,
    AffinityBatch,
    AffinityPlace,
    AffinityRun,
    encode,
    pack_blocks,
)
from meshnode.core.prefix_chain import network_seed, short_chain

FOLDER = "affinity/1.0.0"
NETWORK_KEY = bytes(range(32))

ONE = AffinityBatch(
    models=("llama3:8b",),
    places=(AffinityPlace(id=A, service_id="ollama"),),
    runs=(AffinityRun(model=0, place=0, blocks=pack_blocks([0x0102030405FF])),),
)
SEVERAL = AffinityBatch(
    models=("llama3:8b", "qwen3"),
    places=(AffinityPlace(id=A, service_id="ollama"), AffinityPlace(id=B, service_id="vllm")),
    runs=(
        AffinityRun(model=0, place=0, blocks=pack_blocks([1, 2, 3])),
        AffinityRun(model=1, place=1, blocks=pack_blocks([2**48 - 1])),
        AffinityRun(model=0, place=1, blocks=pack_blocks([0, 4])),
    ),
)
LONG = AffinityBatch(
    models=("m",),
    places=(AffinityPlace(id=A, service_id="llm"),),
    runs=(AffinityRun(model=0, place=0, blocks=pack_blocks(range(1, 65))),),
)
RUN = {"Model": 0, "Place": 0, "Blocks": bytes(range(6))}
PLAIN: dict[str, Any] = {"Models": ["m"], "Places": [{"ID": A, "ServiceID": "x"}], "Runs": [RUN]}


def files() -> dict[str, object]:
    return {
        f"{FOLDER}/schema.json": schema("meshnode affinity", [AffinityBatch]),
        f"{FOLDER}/vectors/canonical.json": vectors(
            "Each decodes to json, and encoding that gives hex again.",
            [
                {"name": name, "message": "AffinityBatch", "hex": encode(b).hex(), "json": shown(b)}
                for name, b in (("one block", ONE), ("several runs", SEVERAL), ("64 blocks", LONG))
            ],
        ),
        f"{FOLDER}/vectors/valid.json": vectors(
            "Batches that decode to json, though a canonical encoder would write others.",
            [
                {
                    "name": name,
                    "message": "AffinityBatch",
                    "hex": pack(fields).hex(),
                    "json": shown(AffinityBatch.model_validate(_tuples(fields))),
                }
                for name, fields in _valid().items()
            ],
        ),
        f"{FOLDER}/vectors/invalid.json": vectors(
            "Decoding hex as a batch fails with the error named.", _invalid()
        ),
        f"{FOLDER}/vectors/chains.json": vectors(
            "Under network_key, the prompt (text, times over) to the model has these blocks.",
            [_chain(*row) for row in CHAINS],
        ),
    }


def _valid() -> dict[str, dict[str, Any]]:
    return {
        "another order": dict(reversed(PLAIN.items())),
        "keys of a later version": PLAIN | {"Since": 7, "Runs": [RUN | {"Age": 1}]},
        "a service without a name": PLAIN | {"Places": [{"ID": A}]},
        "a place that no run names": PLAIN | {"Places": [{"ID": A}, {"ID": B}]},
        "two runs of one service": PLAIN | {"Runs": [RUN, RUN]},
    }


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {k: _tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def _invalid() -> list[dict[str, object]]:
    def runs(**changed: object) -> bytes:
        return pack(PLAIN | {"Runs": [RUN | changed]})

    rows = {
        "bad_field": {
            "no models": pack(PLAIN | {"Models": []}),
            "65 models": pack(PLAIN | {"Models": ["m"] * 65}),
            "a model without a name": pack(PLAIN | {"Models": [""]}),
            "a model of 129 characters": pack(PLAIN | {"Models": ["m" * 129]}),
            "a model with an escape sequence": pack(PLAIN | {"Models": ["\x1b[2J"]}),
            "no places": pack(PLAIN | {"Places": []}),
            "257 places": pack(PLAIN | {"Places": [{"ID": "x"}] * 257}),
            "a place without an ID": pack(PLAIN | {"Places": [{"ServiceID": "x"}]}),
            "a service of 65 characters": pack(
                PLAIN | {"Places": [{"ID": A, "ServiceID": "x" * 65}]}
            ),
            "no runs": pack(PLAIN | {"Runs": []}),
            "513 runs": pack(PLAIN | {"Runs": [{}] * 513}),
            "a run without blocks": pack(PLAIN | {"Runs": [{"Model": 0, "Place": 0}]}),
            "a run of no bytes": runs(Blocks=b""),
            "blocks that are text": runs(Blocks="abcdef"),
            "an index that is a float": runs(Model=0.0),
            "a negative index": runs(Place=-1),
            "an index past every table": runs(Place=256),
        },
        "bad_index": {
            "a model that is not listed": runs(Model=1),
            "a place that is not listed": runs(Place=1),
        },
        "bad_length": {"a block and a half": runs(Blocks=bytes(9))},
        "bad_msgpack": {"nothing": b"", "a list": b"\x90", "two maps": b"\x80\x80"},
        "too_large": {"one byte too many": bytes(MAX_BATCH_BYTES + 1)},
    }
    return [
        {"name": name, "message": "AffinityBatch", "hex": data.hex(), "error": code}
        for code, cases in rows.items()
        for name, data in cases.items()
    ]


CHAINS = (
    ("a short prompt", "llama3", "hello", 1),
    ("exactly one block", "llama3", "x", 256),
    ("a byte more", "llama3", "x", 257),
    ("two bytes for a letter", "llama3", "ü", 200),
    ("a turn of a chat", "qwen3:4b", "\x1euser\x1fhi", 1),
    ("longer than what counts", "llama3", "hello world ", 2000),
)


def _chain(name: str, model: str, text: str, times: int) -> dict[str, object]:
    chain = short_chain(model, text * times, seed=network_seed(NETWORK_KEY))
    return {
        "name": name,
        "network_key": NETWORK_KEY.hex(),
        "model": model,
        "text": text,
        "times": times,
        "blocks": pack_blocks(chain).hex(),
    }
