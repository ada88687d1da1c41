"""The command line: the only reader of argv, environment and files; exit codes; trio.run.

Every verb's module is light: what takes long to import is imported where it is used, so that
``--help`` answers at once.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from meshnode.errors import ConfigError, MeshnodeError

__all__ = ["main"]

_TOKEN = re.compile(r"mesh\d[A-Za-z0-9_-]{20,}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, and end the process with its exit code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run the command line and return its exit code (see ``meshnode.errors``)."""
    try:
        _refuse_tokens(argv)
        return _guard_command(fill_in_proxy(argv))
    except MeshnodeError as exc:
        _complain(str(exc), argv, exit_code=exc.exit_code)
        return exc.exit_code
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain again while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def fill_in_proxy(argv: Sequence[str]) -> list[str]:
    """Return ``argv`` with the address that ``--proxy`` alone stands for.

    Typer has no options whose value may be left off.
    """
    filled: list[str] = []
    for position, word in enumerate(argv):
        following = argv[position + 1] if position + 1 < len(argv) else "-"
        alone = word == "--proxy" and following.startswith("-")
        filled.append("--proxy=127.0.0.1:8080" if alone else word)
    return filled


def _guard_command(argv: Sequence[str]) -> int:
    """Turn what nobody foresaw into one line; the traceback is there for who asks."""
    from meshnode.cli.app import invoke

    try:
        return invoke(argv)
    except (MeshnodeError, BrokenPipeError):
        raise
    except Exception as exc:
        if _wants_traceback(argv):
            raise
        error = _leaf(exc)
        _complain(
            f"{type(error).__name__}: {error} (this is a bug in meshnode; "
            "run again with --log-level debug for the traceback)",
            argv,
            exit_code=1,
        )
        return 1


def _wants_traceback(argv: Sequence[str]) -> bool:
    return _asks_for(argv, "log-level", "debug")


def _asks_for(argv: Sequence[str], flag: str, value: str) -> bool:
    """Say whether a setting of the log was given, before or though it could not be resolved."""
    said = " ".join(argv).replace("=", " ")
    if f"--{flag} " in said:
        return f"--{flag} {value}" in said
    return os.environ.get("MESHNODE_" + flag.replace("-", "_").upper()) == value


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _refuse_tokens(argv: Sequence[str]) -> None:
    for word in argv:
        if word == "--token" or word.startswith("--token=") or _TOKEN.search(word):
            raise ConfigError(
                "a token on the command line can be read by every user of this machine; "
                "put it in a file and say --token-file FILE, or set MESHNODE_TOKEN"
            )


def _complain(message: str, argv: Sequence[str], *, exit_code: int) -> None:
    line = " ".join(message.split())
    if _asks_for(argv, "log-format", "json"):
        import json

        told = {"event": "stopped", "level": "error", "error": line, "exit_code": exit_code}
        print(json.dumps(told), file=sys.stderr, flush=True)
    else:
        print(f"error: {line}", file=sys.stderr, flush=True)
