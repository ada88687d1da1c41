"""Asks the control API of a running node, with the standard library alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from meshnode.config import DEFAULT_API
from meshnode.errors import (
    ConfigError,
    MeshnodeError,
    NoCandidate,
    NodeNotRunning,
    NoSuchPeer,
    PeerUnreachable,
)
from meshnode.values import ApiAddress, HostPort, UnixSocket, parse_api_address

if TYPE_CHECKING:
    from http.client import HTTPConnection

_TIME_LIMIT = 5.0  # seconds; a node answers within milliseconds, or hangs
# A node that is followed says something at least every 5 s.
_SILENCE = 16.0  # seconds
_MAX_LINE = 1024 * 1024
_MAX_ANSWER = 64 * 1024 * 1024  # ten thousand peers make about 10 MiB


@dataclass(frozen=True, slots=True)
class Api:
    """Where the node answers, and the key it wants."""

    address: ApiAddress
    key: str | None = None


def find_api(flag: str | None, key_file: str | None) -> Api:
    """Return where to ask: flag, then environment, then the default.

    Raises:
        ConfigError: it is no address, or the key file can't be read.
    """
    source, text = "flag --api", flag
    if text is None:
        source, text = "environment MESHNODE_API", os.environ.get("MESHNODE_API") or None
    key_path = key_file or os.environ.get("MESHNODE_API_KEY_FILE") or None
    key = _read_key(key_path) if key_path else None
    if text is None:
        return Api(DEFAULT_API, key)
    try:
        address = parse_api_address(text, listening=False)
    except ValueError as exc:
        raise ConfigError(f"api={text} from {source} {exc}") from exc
    if isinstance(address, UnixSocket):
        return Api(address, key)
    # What a node listens on may be "everywhere"; it is asked on loopback then.
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    return Api(HostPort(everywhere.get(address.host, address.host), address.port), key)


def ask(
    api: Api,
    path: str,
    params: Mapping[str, str | None] | None = None,
    *,
    method: Literal["GET", "POST"] = "GET",
    body: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return the JSON object at ``path``; ``body`` is sent as JSON.

    Raises:
        NodeNotRunning: nobody answers there.
        NoCandidate: the node says that nobody can serve.
        NoSuchPeer: it knows no peer, or no single one, of that peer ID or name.
        PeerUnreachable: it can't reach the peer.
        MeshnodeError: the node refuses, or something else than a node answers.
    """
    from urllib.parse import urlencode

    given = {key: value for key, value in (params or {}).items() if value is not None}
    target = f"{path}?{urlencode(given)}" if given else path
    status, data = _request(api, method, target, body)
    try:
        answer = json.loads(data)
    except ValueError as exc:
        raise _not_a_node(api, "its answer is no JSON") from exc
    if not isinstance(answer, dict):
        raise _not_a_node(api, "its answer is no JSON object")
    if status in (200, 202) and "schema_version" in answer:
        return answer
    raise _refusal(api, status, answer)


def with_local_key(api: Api, state_dir: str | None) -> Api:
    """Return ``api`` with the key that the node left in its state folder, if it has none yet.

    Args:
        state_dir: the node's state folder; by default where a node of this user keeps it.
    """
    if api.key is not None or not api.address.is_loopback:
        return api
    if state_dir is None:
        import platformdirs

        first = (os.environ.get("STATE_DIRECTORY") or "").split(":")[0]
        named = os.environ.get("MESHNODE_STATE_DIR") or first
        state_dir = named or platformdirs.user_state_dir("meshnode")
    path = os.path.join(state_dir, "api.key")
    return replace(api, key=_read_key(path)) if os.path.exists(path) else api


def follow(api: Api, path: str, params: Mapping[str, str]) -> Iterator[dict[str, object]]:
    """Post to ``path`` and yield each line of the answer as it comes, until it ends.

    Raises:
        NodeNotRunning: nobody answers, or nothing was heard for a while.
        MeshnodeError: the node refuses.
    """
    import http.client
    from urllib.parse import urlencode

    address = api.address
    connection = _connection(api, _SILENCE)
    headers = {"Authorization": f"Bearer {api.key}"} if api.key else {}
    try:
        connection.request("POST", f"{path}?{urlencode(params)}", headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            raise _refused(api, response.status, response.read(_MAX_ANSWER))
        while line := response.readline(_MAX_LINE):
            body = json.loads(line)
            if not isinstance(body, dict):
                raise _not_a_node(api, "its answer is no JSON object")
            yield body
    except (OSError, http.client.HTTPException) as exc:
        reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        raise NodeNotRunning(
            f"no node answers at {address} ({reason}); start one with: meshnode up, "
            "or say where it runs: --api HOST:PORT"
        ) from exc
    except ValueError as exc:
        raise _not_a_node(api, "its answer is no JSON") from exc
    finally:
        connection.close()


def _connection(api: Api, timeout: float) -> HTTPConnection:
    """Return a connection that is not open yet."""
    import http.client  # takes a third of what --help may take
    import socket

    address = api.address
    if isinstance(address, HostPort):
        return http.client.HTTPConnection(address.host, address.port, timeout=timeout)
    path = address.path

    class UnixConnection(http.client.HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(timeout)
            self.sock.connect(path)

    return UnixConnection("localhost", timeout=timeout)


def _refused(api: Api, status: int, data: bytes) -> MeshnodeError:
    try:
        body = json.loads(data)
    except ValueError:
        body = None
    return _refusal(api, status, body if isinstance(body, dict) else {})


def _request(
    api: Api, method: str, target: str, body: Mapping[str, object] | None
) -> tuple[int, bytes]:
    import http.client  # takes a third of what --help may take

    address = api.address
    connection = _connection(api, _TIME_LIMIT)
    headers = {"Accept": "application/json"}
    if api.key:
        headers["Authorization"] = f"Bearer {api.key}"
    if body is not None:
        headers["Content-Type"] = "application/json"
    data = None if body is None else json.dumps(body).encode()
    try:
        connection.request(method, target, data, headers)
        response = connection.getresponse()
        return response.status, response.read(_MAX_ANSWER)
    except TimeoutError as exc:
        raise NodeNotRunning(
            f"{address} accepts but does not answer within {_TIME_LIMIT:g} s; "
            "the node hangs, or something else listens there"
        ) from exc
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise NodeNotRunning(
            f"no node answers at {address} ({reason}); start one with: meshnode up, "
            "or say where it runs: --api HOST:PORT"
        ) from exc
    except http.client.HTTPException as exc:
        raise _not_a_node(api, f"it speaks no HTTP ({type(exc).__name__})") from exc
    finally:
        connection.close()


def _refusal(api: Api, status: int, body: Mapping[str, object]) -> MeshnodeError:
    error = body.get("error")
    message = str(error.get("message", "")) if isinstance(error, dict) else ""
    code = error.get("code") if isinstance(error, dict) else None
    if code == "no_candidate":
        return NoCandidate(message)
    if code == "no_such_peer":
        return NoSuchPeer(message)
    if code == "peer_unreachable":
        return PeerUnreachable(message)
    if code == "api_key_required":
        return ConfigError(
            f"the node at {api.address} wants its API key; say --api-key-file FILE, "
            "or set MESHNODE_API_KEY_FILE; on its own host api.key in its state folder holds one"
        )
    if not message:
        return _not_a_node(api, f"it answers {status}")
    return MeshnodeError(f"the node at {api.address} refuses: {message}")


def _not_a_node(api: Api, reason: str) -> MeshnodeError:
    return NodeNotRunning(
        f"what answers at {api.address} is no meshnode ({reason}); "
        "say where the node runs: --api HOST:PORT"
    )


def _read_key(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"api_key_file={path} can't be read: {exc}") from exc
