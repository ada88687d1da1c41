from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.catalogue import fit_models
from meshnode.core.node_data import (
    MAX_ANNOUNCEMENT_BYTES,
    MAX_MODELS,
    NodeData,
    ServiceData,
    decode,
    encode,
)
from meshnode.errors import WireError


def host(*services: ServiceData) -> NodeData:
    return NodeData(id="12D3KooWA", seq=1, services=services)


def models(count: int, *, length: int = 100, prefix: str = "m") -> tuple[str, ...]:
    return tuple(f"{prefix}{n:0{length}}" for n in range(count))


def test_what_fits_is_announced_as_it_is() -> None:
    node = host(ServiceData(service_id="llm", models=("a", "b"), loaded=("b",)))
    assert fit_models(node) == (node, 0)


def test_a_catalogue_too_large_is_cut_and_still_announced() -> None:
    node, unnamed = fit_models(host(ServiceData(service_id="llm", models=models(256))))
    kept = node.services[0].models
    assert len(kept) + unnamed == 256
    assert kept == models(256)[: len(kept)]
    # As many as there is room for: one more would not fit.
    assert MAX_ANNOUNCEMENT_BYTES - len(encode(node)) < 120
    assert decode(encode(node)) == node


def test_loaded_models_are_named_before_any_other() -> None:
    names = models(256)
    node, _ = fit_models(host(ServiceData(service_id="llm", models=names, loaded=names[-3:])))
    assert set(names[-3:]) <= set(node.services[0].models)
    assert node.services[0].loaded == names[-3:]


def test_a_service_with_thousands_of_models_does_not_crowd_out_its_neighbour() -> None:
    few = models(5, prefix="few")
    node, _ = fit_models(
        host(
            ServiceData(service_id="hub", models=models(256)),
            ServiceData(service_id="llm", models=few),
        )
    )
    assert node.services[1].models == few


def test_even_the_largest_host_is_announced() -> None:
    names = models(MAX_MODELS, length=127)
    services = [
        ServiceData(service_id=f"{n:064}", models=names, loaded=names, in_flight=2**64 - 1)
        for n in range(32)
    ]
    largest = host(*services).model_copy(update={"addrs": ("/dns4/" + "a" * 250,) * 16})
    node, unnamed = fit_models(largest)
    assert len(node.services) == 32 and unnamed > 0
    assert len(encode(node)) <= MAX_ANNOUNCEMENT_BYTES


def test_what_is_too_large_without_models_is_an_error_of_ours() -> None:
    services = [ServiceData(service_id="\U0001f600" * 64) for _ in range(32)]
    with pytest.raises(WireError):
        fit_models(host(*services).model_copy(update={"addrs": ("\U0001f600" * 256,) * 16}))


name = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1)


@given(
    st.lists(
        st.tuples(st.lists(name.map(lambda n: n[:128]), max_size=40), st.sets(st.integers(0, 39))),
        max_size=5,
    ),
    st.integers(1200, 6000),
)
def test_whatever_the_engines_list_it_fits_and_nothing_is_invented(
    engines: list[tuple[list[str], set[int]]], max_bytes: int
) -> None:
    services = [
        ServiceData(
            service_id=f"s{place}",
            models=tuple(names),
            loaded=tuple(names[n] for n in sorted(warm) if n < len(names)),
        )
        for place, (names, warm) in enumerate(engines)
    ]
    node, unnamed = fit_models(host(*services), max_bytes)
    assert len(encode(node)) <= max_bytes
    for before, after in zip(services, node.services, strict=True):
        assert set(after.models) <= set(before.models)
        assert set(after.loaded) <= set(before.loaded)
    left_out = sum(
        len(set(before.models) - set(after.models))
        for before, after in zip(services, node.services, strict=True)
    )
    assert unnamed == left_out >= 0
