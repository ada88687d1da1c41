"""Who said what: flags, environment and file, the strongest source last to be overruled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from meshnode.config.settings import field_names
from meshnode.errors import ConfigError

PREFIX = "MESHNODE_"

# Settings that name where other settings stand; they are no fields of Config.
_POINTERS = frozenset({"config"})


@dataclass(frozen=True, slots=True)
class Said:
    """One value as it was written, and where."""

    value: object
    source: str


def gather(
    flags: Mapping[str, object],
    env: Mapping[str, str],
    file: Mapping[str, object],
    file_path: str,
) -> dict[str, Said]:
    """Return what holds of each setting that anybody said, by its name in Config.

    ``token``, which stands in the environment alone, is among them; arguments are those of
    ``resolve``.

    Raises:
        ConfigError: a name is unknown, or says twice what can be said once.
    """
    known = field_names()
    said: dict[str, Said] = {}
    for key, value in file.items():
        if key == "token":
            raise ConfigError(
                f"token in file {file_path} is not read, as such files are seldom kept private; "
                "put it in a file of its own (mode 600) and set token_file to its path"
            )
        if key not in known:
            raise _unknown(key, f"file {file_path}", known, str)
        said[key] = Said(value, f"file {file_path}")
    from_environment = _from_environment(env, known)
    if "token" in from_environment:
        said.pop("token_file", None)
    said.update(from_environment)
    for key, value in flags.items():
        if key not in known:
            raise _unknown(key, "the command line", known, _flag)
        if value is not None and value != () and value != []:
            said[key] = Said(value, f"flag {_flag(key)}")
            if key == "token_file":
                said.pop("token", None)
    return said


def _from_environment(env: Mapping[str, str], known: Sequence[str]) -> dict[str, Said]:
    said: dict[str, Said] = {}
    for variable, text in env.items():
        if not variable.startswith(PREFIX):
            continue
        key = variable.removeprefix(PREFIX).lower()
        if key not in known and key != "token" and key not in _POINTERS:
            raise _unknown(variable, "the environment", (*known, "token", "config"), _variable)
        # An empty variable is how a unit file or a shell says "not set".
        if text.strip() and key not in _POINTERS:
            said[key] = Said(text, f"environment {variable}")
    if "token" in said and "token_file" in said:
        raise ConfigError(
            "MESHNODE_TOKEN and MESHNODE_TOKEN_FILE are both set in the environment, and only one "
            "can hold; unset one of them"
        )
    return said


def _unknown(
    name: str, source: str, known: Sequence[str], spell: Callable[[str], str]
) -> ConfigError:
    import difflib

    # By what differs: a prefix that all have in common makes any two of them look alike.
    asked = name.removeprefix(PREFIX).lower()
    near = difflib.get_close_matches(asked, known, n=1)
    advice = (
        f"; did you mean {spell(near[0])}?" if near else "; run meshnode up --help for the list"
    )
    return ConfigError(f"unknown setting {name} in {source}{advice}")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _variable(key: str) -> str:
    return PREFIX + key.upper()
