"""The folder protocols/ against the code: schemas, and every table that a reader would rely on."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import jsonschema
import msgpack
import pytest

from meshnode.core import (
    affinity_batch,
    ledger_exchange,
    loss_report,
    membership,
    node_data,
    parting,
    token,
    tunnel,
    wire,
)

GENERATOR = Path(__file__).parent / "generator"
MODULES: dict[str, ModuleType] = {
    "announce/1.0.0": node_data,
    "membership/1.0.0": membership,
    "ledger/2.0.0": ledger_exchange,
    "loss/1.0.0": loss_report,
    "affinity/1.0.0": affinity_batch,
    "tunnel/2.0.0": tunnel,
    "parting/1.0.0": parting,
}
each_protocol = pytest.mark.parametrize("name", MODULES)

Row = dict[str, str]


def tables(text: str) -> Iterator[tuple[str, list[Row]]]:
    """Yield (the heading above it, rows) of every Markdown table; cells without backticks."""
    heading, lines = "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            lines.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        elif lines:
            header, _, *rows = lines
            yield heading, [dict(zip(header, row, strict=True)) for row in rows]
            lines = []


def table(protocols: Path, name: str, heading: str, column: str) -> list[Row]:
    """Return the one table under ``heading`` that has ``column``."""
    text = (protocols / name / "SPEC.md").read_text()
    (rows,) = [rows for h, rows in tables(text) if h == heading and column in rows[0]]
    return rows


def schema_of(protocols: Path, name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((protocols / name / "schema.json").read_text())
    return schema


def all_vectors(protocols: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((protocols / name / "vectors").glob("*.json")):
        for vector in json.loads(path.read_text())["vectors"]:
            yield path.stem, vector


def test_schemas_and_vectors_are_what_the_code_makes(protocols: Path, tmp_path: Path) -> None:
    """After a deliberate change of the wire run: python tests/protocols/generator."""
    subprocess.run([sys.executable, str(GENERATOR), str(tmp_path)], check=True, timeout=60)
    made = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*.json")}
    kept = {str(p.relative_to(protocols)): p.read_text() for p in protocols.rglob("*.json")}
    assert sorted(made) == sorted(kept)
    for name, text in made.items():
        assert text == kept[name], f"{name} differs; run: python tests/protocols/generator"


def test_the_index_names_every_protocol_and_where_it_is_spoken(protocols: Path) -> None:
    index = (protocols / "README.md").read_text()
    folders = {f"{p.parent.parent.name}/{p.parent.name}" for p in protocols.glob("*/*/SPEC.md")}
    assert folders == set(MODULES)
    for name, module in MODULES.items():
        assert f"]({name}/SPEC.md)" in index
        spoken = getattr(module, "PROTOCOL_ID", f"/meshnode/<network>/{name}")
        assert f"`{spoken}`" in index
        assert f"`{spoken}`" in (protocols / name / "SPEC.md").read_text()


@each_protocol
def test_the_error_codes_of_the_specification_are_those_of_the_code(
    protocols: Path, name: str
) -> None:
    codes = [row["Code"] for row in table(protocols, name, "Error codes", "Code")]
    assert len(codes) == len(set(codes))
    assert set(codes) == MODULES[name].ERROR_CODES


@each_protocol
def test_every_error_code_has_a_vector(protocols: Path, name: str) -> None:
    shown = {v.get("error") or v.get("outcome") for _, v in all_vectors(protocols, name)}
    # Ten thousand records make no vector; a unit test sends them.
    assert MODULES[name].ERROR_CODES - {"too_many"} <= shown


def test_no_code_is_raised_that_no_specification_names() -> None:
    raised = set()
    for module in (wire, token, *MODULES.values()):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "WireError":
                assert isinstance(node.args[0], ast.Constant)
                raised.add(node.args[0].value)
    named = set().union(*(module.ERROR_CODES for module in MODULES.values()))
    assert raised == named - {"bad_envelope"}  # that one is raised where signatures are checked


@each_protocol
def test_the_limits_of_the_specification_are_those_of_the_code(protocols: Path, name: str) -> None:
    for row in table(protocols, name, "Limits", "Value"):
        assert getattr(MODULES[name], row["Name"]) == int(row["Value"]), row["Name"]


@each_protocol
def test_the_keys_of_the_specification_are_those_of_the_schema(protocols: Path, name: str) -> None:
    text = (protocols / name / "SPEC.md").read_text()
    for message, schema in schema_of(protocols, name)["$defs"].items():
        assert f"### {message}\n" in text, f"{message} is not specified"
        found = [rows for h, rows in tables(text) if h == message and "Key" in rows[0]]
        rows = found[0] if found else []
        properties = schema.get("properties", {})
        # The same order, too: it is the canonical one.
        assert [row["Key"] for row in rows] == list(properties)
        assert {r["Key"] for r in rows if r["Required"] == "yes"} == set(schema.get("required", []))
        for row in rows:
            if row["Required"] == "no":
                assert json.loads(row["Default"]) == properties[row["Key"]]["default"]


def test_the_closed_sets_of_words_are_those_of_the_code(protocols: Path) -> None:
    statuses = table(protocols, "tunnel/2.0.0", "TunnelReply", "Status")
    assert tuple(row["Status"] for row in statuses) == get_args(tunnel.Status)
    answers = table(protocols, "parting/1.0.0", "PartingReply", "Answer")
    assert tuple(row["Answer"] for row in answers) == get_args(parting.Answer)
    states = [
        r for r in table(protocols, "announce/1.0.0", "NodeData", "Key") if r["Key"] == "State"
    ]
    words = re.findall(r"\w+", states[0]["Type"].replace("or", ""))
    assert tuple(words) == get_args(node_data.State)
    refusals = {r["Refusal"] for r in table(protocols, "membership/1.0.0", "Refusal", "Refusal")}
    assert refusals == {membership.WRONG_TOKEN, "too_many", "duplicate", "blocked"}


def test_the_bounds_of_any_map_are_those_of_the_index(protocols: Path) -> None:
    index = (protocols / "README.md").read_text()
    bounds = (wire.MAX_STR_BYTES, wire.MAX_BIN_BYTES, wire.MAX_ARRAY_ITEMS, wire.MAX_MAP_ITEMS)
    said = re.search(
        r"at most ([\d,]+) bytes, binary data ([\d,]+), an array ([\d,]+) items, a map ([\d,]+)",
        index,
    )
    assert said is not None
    assert tuple(int(number.replace(",", "")) for number in said.groups()) == bounds


@each_protocol
def test_what_is_valid_fits_the_schema(protocols: Path, name: str) -> None:
    schema = schema_of(protocols, name)
    jsonschema.Draft202012Validator.check_schema(schema)
    checked = 0
    for file, vector in all_vectors(protocols, name):
        if file in {"canonical", "valid"}:
            message = vector.get("message", "NodeData")
            validator_of(schema, message).validate(vector["json"])
            checked += 1
    assert checked > 5


@each_protocol
def test_what_has_a_bad_field_does_not_fit_the_schema(protocols: Path, name: str) -> None:
    schema = schema_of(protocols, name)
    checked = 0
    for file, vector in all_vectors(protocols, name):
        # JSON can't tell 7.0 from 7, nor text from hexadecimal, nor write NaN.
        beyond_json = re.search("is a float|is text|is binary|infinite|no number", vector["name"])
        if file == "invalid" and vector["error"] == "bad_field" and not beyond_json:
            fields = as_json(msgpack.unpackb(bytes.fromhex(vector["hex"])))
            message = vector.get("message", {"announce/1.0.0": "NodeData"}.get(name))
            validator = (
                validator_of(schema, message)
                if message in schema["$defs"]
                else jsonschema.Draft202012Validator(
                    schema | {"anyOf": [{"$ref": f"#/$defs/{fields['Type'].capitalize()}"}]}
                )
            )
            assert not validator.is_valid(fields), vector["name"]
            checked += 1
    assert checked > 3


def validator_of(schema: dict[str, Any], message: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema | {"anyOf": [{"$ref": f"#/$defs/{message}"}]})


def as_json(value: Any) -> Any:
    match value:
        case bytes():
            return value.hex()
        case dict():
            return {key: as_json(inner) for key, inner in value.items()}
        case list():
            return [as_json(inner) for inner in value]
        case _:
            return value
