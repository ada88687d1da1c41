"""``meshnode explain``: who would serve a request now, or a prompt, and why. It changes nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from meshnode.cli.api_client import ask, find_api, with_local_key
from meshnode.cli.output import plain, print_json, print_table
from meshnode.cli.queries import (
    CANDIDATE_COLUMNS,
    MODEL_COLUMNS,
    ApiOption,
    JsonOption,
    KeyOption,
    StateDirOption,
    candidate_rows,
    maps,
    model_rows,
    short_id,
    why,
)
from meshnode.errors import ConfigError, NoCandidate


def explain(
    service: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The service to ask for; default the proxy's, or the only one."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model to ask for, in whichever service has it."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file",
            metavar="FILE",
            allow_dash=True,
            help="A prompt: a request as JSON, or the text of a completion; - is standard input.",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="PEER", help="Ask for one peer, by peer ID or name.")
    ] = None,
    api: ApiOption = None,
    api_key_file: KeyOption = None,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who would serve a request now, and why; changes nothing.

    With --prompt-file also whose cache is warm for that prompt. It leaves this host as far as the
    node that is asked, and no log or other node is told of it.
    """
    found = find_api(api, api_key_file)
    asked = {"service": service, "model": model, "target": target}
    if prompt_file is None:
        body = ask(found, "/api/explain", asked)
    else:
        prompt = _read_prompt(prompt_file)
        prompt |= {name: value for name, value in asked.items() if value is not None}
        if "model" not in prompt:
            raise ConfigError(f"{prompt_file} names no model; say which: --model NAME")
        found = with_local_key(found, state_dir)
        body = ask(found, "/api/explain", method="POST", body=prompt)
    if as_json:
        print_json(body)
    else:
        by_model = body.get("model") is not None
        columns = MODEL_COLUMNS if by_model else CANDIDATE_COLUMNS
        rows = model_rows(body) if by_model else candidate_rows(body)
        print_table(columns, rows)
        print(why(body))
        if (more := _forced_off(body)) is not None:
            print(more)
    if body.get("picked") is None and body.get("tier") != "random":
        raise NoCandidate(f"nobody can serve {plain(body.get('service_id'))} now")


def _read_prompt(path: Path) -> dict[str, object]:
    """Return the fields of a body for the control API that make the prompt, and its model.

    Raises:
        ConfigError: the file can't be read, is too long, or holds no text.
    """
    from meshnode.core.explain_request import MAX_BYTES, PROMPT_FIELDS, PROMPTS

    name = "standard input" if str(path) == "-" else str(path)
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(
                f"prompt_file={name} has more than {MAX_BYTES:,} bytes; "
                "the first 16,384 of a prompt decide where it goes, so cut it"
            )
        text = data.decode()
    except OSError as exc:
        raise ConfigError(f"prompt_file={name} can't be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"prompt_file={name} is not UTF-8 (byte {exc.start}); encode it as UTF-8"
        ) from exc
    request = _as_request(text)
    if request is None or PROMPTS.isdisjoint(request):
        return {"prompt": text}
    wanted = PROMPT_FIELDS | {"model"}
    return {k: value for k, value in request.items() if k in wanted and value is not None}


def _as_request(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _forced_off(decision: Mapping[str, object]) -> str | None:
    """Return in one sentence whose cache is warm and who is too busy to serve, if anybody is."""
    peer = decision.get("forced_off")
    if peer is None:
        return None
    row = next((r for r in maps(decision.get("candidates")) if r["peer_id"] == peer), {})
    ratio = row.get("match_ratio")
    part = f" for {ratio:.0%} of it" if isinstance(ratio, float | int) else ""
    return plain(
        f"{row.get('name') or short_id(peer)} is warm{part}, but too busy; within the last minute "
        f"load drove {decision.get('pressure')} requests off their warm caches"
    )
