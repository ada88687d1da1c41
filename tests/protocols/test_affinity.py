from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.affinity_batch import (
    AffinityBatch,
    AffinityPlace,
    AffinityRun,
    decode,
    encode,
    pack_blocks,
    unpack_blocks,
)
from meshnode.core.prefix_chain import network_seed, short_chain

PROTOCOL = "affinity/1.0.0"
NAMES = st.text("abc:/é", min_size=1, max_size=20)


@pytest.mark.vectors(PROTOCOL, "chains")
def test_a_prompt_has_the_blocks_written(vector: dict[str, Any]) -> None:
    seed = network_seed(bytes.fromhex(vector["network_key"]))
    chain = short_chain(vector["model"], vector["text"] * vector["times"], seed=seed)
    assert pack_blocks(chain).hex() == vector["blocks"]
    assert unpack_blocks(bytes.fromhex(vector["blocks"])) == chain


@given(
    models=st.lists(NAMES, min_size=1, max_size=5),
    peers=st.lists(NAMES, min_size=1, max_size=5),
    runs=st.lists(
        st.tuples(
            st.integers(0, 4),
            st.integers(0, 4),
            st.lists(st.integers(0, 2**48 - 1), min_size=1, max_size=64),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_what_is_encoded_decodes_to_the_same(
    models: list[str], peers: list[str], runs: list[tuple[int, int, list[int]]]
) -> None:
    batch = AffinityBatch(
        models=tuple(models),
        places=tuple(AffinityPlace(id=peer, service_id=peer) for peer in peers),
        runs=tuple(
            AffinityRun(model=m % len(models), place=p % len(peers), blocks=pack_blocks(blocks))
            for m, p, blocks in runs
        ),
    )
    read = decode(encode(batch))
    assert read == batch
    assert [list(unpack_blocks(run.blocks)) for run in read.runs] == [b for _, _, b in runs]
