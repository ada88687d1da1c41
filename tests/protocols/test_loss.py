from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core import loss_report
from meshnode.core.loss_report import decode, encode
from meshnode.errors import WireError

PROTOCOL = "loss/1.0.0"


@pytest.mark.vectors(PROTOCOL, "canonical")
@pytest.mark.vectors(PROTOCOL, "valid")
def test_a_valid_report_decodes_as_written(vector: dict[str, Any]) -> None:
    report = decode(bytes.fromhex(vector["hex"]))
    assert report.model_dump(mode="json", by_alias=True) == vector["json"]


@pytest.mark.vectors(PROTOCOL, "canonical")
def test_a_canonical_report_is_encoded_byte_for_byte(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    assert encode(decode(data)) == data


@pytest.mark.vectors(PROTOCOL, "invalid")
def test_an_invalid_report_fails_with_the_code_named(vector: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        decode(bytes.fromhex(vector["hex"]))
    assert caught.value.code == vector["error"]


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    try:
        outcome = type(decode(data)).__name__
    except WireError as exc:
        outcome = exc.code
    assert outcome in {"LossReport"} | loss_report.ERROR_CODES
