"""Pages of the documentation that are made from what they describe, so that neither can drift.

A hook of MkDocs (see mkdocs.yml). Settings and commands come from the parser of the command line,
metrics from their registry, the control API from its OpenAPI document, and the protocol pages are
the files of ``protocols/`` themselves.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PROTOCOLS = ROOT / "protocols"
# Directions to the tests that run the commands of a page; readers need not see them.
DIRECTION = re.compile(r"^<!-- (?:on|file|not run:|exits|sample:)(?=\s).*?-->\n", re.M)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the protocols into the navigation, in the order in which they should be read."""
    pages: list[Any] = [{"On the wire": "protocols/README.md"}]
    pages += [{name: path} for name, path in protocol_pages()]
    assert config.nav is not None
    config.nav.append({"Protocols": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated, and what is taken from ``protocols/``."""
    for name, text in generated().items():
        files.append(File.generated(config, f"generated/{name}.md", content=text))
    for path in sorted(PROTOCOLS.rglob("*")):
        if path.is_file():
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Leave out what only the tests read."""
    return DIRECTION.sub("", markdown)


def generated() -> dict[str, str]:
    """Return the pages that are made here, by name."""
    return {"settings": settings(), "commands": commands(), "metrics": metrics(), "api": api()}


def protocol_pages() -> Iterator[tuple[str, str]]:
    """Yield each specification's name and path, in the order of ``protocols/README.md``."""
    index = (PROTOCOLS / "README.md").read_text()
    for name, path in re.findall(r"^\| \[([^\]]+)\]\(([^)]+SPEC\.md)\)", index, re.M):
        yield name, f"protocols/{path}"


def settings() -> str:
    """Return the page of every setting of ``meshnode up``."""
    from meshnode.cli.up import up
    from meshnode.config import Config, field_names

    app = typer.Typer(add_completion=False)
    app.command("up")(up)
    options = {option.name.rstrip("_"): option for option in typer.main.get_command(app).params}
    # Slots hide the defaults of a class; its signature has them.
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(Config).parameters.items()
    }
    rows = []
    for name in field_names():
        option = options[name]
        flags = " ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
        default = _default(name, defaults[name])
        rows.append(
            (
                f"`{name}`<br>{flags}<br>`MESHNODE_{name.upper()}`",
                _cell(option.metavar or ("" if option.is_flag else "TEXT")),
                default,
                _cell(option.help),
            )
        )
    return _page(
        "Settings",
        "Each setting is a flag of `meshnode up`, an environment variable, and a key of the TOML "
        "file that `--config` (or `MESHNODE_CONFIG`) names. A flag goes before the environment, "
        "that before the file, that before the default. What may be said several times is a list "
        "in the file, and separated by commas or blanks in the environment. An unknown key or "
        "variable is an error that names its source. `meshnode config show` prints what all of "
        "them come to and where each value is from.\n\n"
        "The token itself never stands in flags or in the file: it is in a file of its own "
        "(`token_file`), or in `MESHNODE_TOKEN`.",
        _table(("Setting", "Value", "Default", "Meaning"), rows),
    )


def _default(name: str, value: object) -> str:
    if name in ("state_dir", "name"):
        return "the platform's" if name == "state_dir" else "the host's name"
    if value is None or value is inspect.Parameter.empty or value == () or value is False:
        return "–" if value is not False else "`false`"
    if isinstance(value, tuple):
        return " ".join(f"`{item}`" for item in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def commands() -> str:
    """Return the page of every verb, as ``--help`` prints it."""
    parts = []
    for words, command in verbs():
        name = " ".join(("meshnode", *words))
        context = command.context_class(command, info_name=name, terminal_width=96)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```")
    return _page(
        "Command line",
        "Data goes to standard output, everything else to standard error. `--json` prints JSON "
        'with `"schema_version": 1`. Exit codes: 0 ok, 1 error, 2 usage or configuration, 3 no '
        "node is running, 4 no peer can serve, 5 the token was refused, 130 interrupted.",
        "\n\n".join(parts),
    )


def verbs() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each verb's words and its parser."""
    from meshnode.cli.app import build_app

    def found(words: tuple[str, ...]) -> Any:
        # A verb is loaded only by a command line that names it.
        command: Any = typer.main.get_command(build_app(list(words) or ["--help"]))
        for word in words:
            command = command.commands[word]
        return command

    def below(words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        command = found(words)
        inner: Mapping[str, Any] | None = getattr(command, "commands", None)
        if inner is None:
            yield words, command
            return
        for name in inner:
            yield from below((*words, name))

    yield from below(())


def metrics() -> str:
    """Return the page of every metric that a node exposes."""
    from meshnode.metrics import Metrics

    rows = []
    for metric in vars(Metrics()).values():
        family = next(iter(metric.describe()), None) if hasattr(metric, "describe") else None
        if family is None:
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = " ".join(f"`{label}`" for label in metric._labelnames)
        rows.append((f"`{name}`", family.type, labels or "–", _cell(family.documentation)))
    return _page(
        "Metrics",
        "Every node exposes them at `/metrics` of its control API, in Prometheus's and in "
        "OpenMetrics' format. Times are in seconds, sizes in bytes. No label is a peer ID: a mesh "
        "of ten thousand would make as many series. A histogram `NAME` is read as `NAME_bucket`, "
        "`NAME_sum` and `NAME_count`. `ops/` holds a Grafana dashboard and alert rules that use "
        "them.",
        _table(("Metric", "Type", "Labels", "Meaning"), sorted(rows)),
    )


def api() -> str:
    """Return the page of the control API, from its OpenAPI document."""
    from meshnode.http import openapi

    document: Any = openapi.document()
    rows = []
    for path, item in document["paths"].items():
        for method, operation in item.items():
            parameters = " ".join(
                f"`{each['name']}`{'' if each['required'] else '?'}"
                for each in operation["parameters"]
            )
            key = "always" if operation.get("security") == [{"key": []}] else "if one is set"
            codes = ", ".join(sorted(operation["responses"]))
            summary = _cell(operation["summary"])
            rows.append((f"`{method.upper()} {path}`", parameters or "–", key, codes, summary))
    shapes = []
    for name, schema in document["components"]["schemas"].items():
        fields = "\n".join(
            f"| `{key}` | {_cell(_kind(inner))} |" for key, inner in schema["properties"].items()
        )
        shapes.append(f"### {name}\n\n| Key | Type |\n|---|---|\n{fields}")
    return _page(
        "Control API",
        "On `127.0.0.1:4280` unless `--api` says otherwise; JSON with `schema_version` 1. The node "
        "itself serves the document this page is made from at `/openapi.json`. A key is sent as "
        "`Authorization: Bearer KEY`; [the security model](../security.md#the-control-api) says "
        'which ones there are. Errors are `{"error": {"message", "type", "code", '
        '"param"}}`.',
        _table(("Request", "Parameters", "Key", "Answers", "What it is"), rows)
        + "\n\n`?` marks what may be left out.\n\n## Shapes\n\n"
        + "\n\n".join(shapes),
    )


def _kind(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "allOf" in schema:
        return " and ".join(_kind(each) for each in schema["allOf"])
    if "enum" in schema:
        return ", ".join("null" if each is None else f"`{each}`" for each in schema["enum"])
    kind = schema.get("type", "object")
    if kind == "array":
        return f"list of {_kind(schema['items'])}"
    if kind == "object" and "properties" in schema:
        return "object with " + ", ".join(f"`{key}`" for key in schema["properties"])
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _page(title: str, opening: str, body: str) -> str:
    return f"# {title}\n\n{opening}\n\n{body}\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _cell(text: str) -> str:
    return textwrap.dedent(text).replace("\n", " ").replace("|", "\\|")
