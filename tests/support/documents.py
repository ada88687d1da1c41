"""Reading the documentation's commands, and running them as its reader would, on real processes.

A page is a session: its shell blocks run in order, in one folder that stands for the copying of
files between hosts. HTML comments before a block direct it:

    <!-- on laptop -->            from here on, on that machine; at first on "gpu1"
    <!-- file clients.toml -->    the block is that file
    <!-- exits 4 -->              the command ends with that code
    <!-- not run: why -->         only its flags and paths are checked
    <!-- sample: why -->          a text block that is not compared with what was printed

A text block behind a shell block is what the last command printed: each line must be among the
output, where words with a digit or an ellipsis stand for any word, and a line … for any lines.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from typer.exceptions import TyperException

from meshnode.cli import fill_in_proxy
from meshnode.cli.app import build_app
from meshnode.cli.up import up
from support.cluster import Cluster, Engine, Node, Process, eventually

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?P<directions>(?:^<!--[^\n]*-->\n+)*)^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
_DIRECTION = re.compile(r"<!-- (on|file|exits|not run:|sample:) *(.*?) -->")
# What stands for something that only the session knows.
_ADDRESS = "/ip4/10.0.0.1/tcp/4201/p2p/12D3KooW…"
_ENGINE = "127.0.0.1:11434"
_PROXY = "127.0.0.1:8080"
_API = "127.0.0.1:4280"
# Where no control API answers: that port is reserved, and nothing listens there.
_NOBODY = "127.0.0.1:1"
# These run until they are ended; top shows things once where there is no terminal.
_STAYING = re.compile(r"^meshnode (up|forward|peers .*--watch)\b")
_VRAM = {"gpu1": "24GiB", "gpu2": "48GiB"}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    kind: str
    text: str
    machine: str
    file: str | None = None
    exits: int = 0
    not_run: str | None = None
    sample: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its commands, continued lines joined, notes left off."""
        joined = self.text.replace("\\\n", " ")
        lines = (re.sub(r"\s+# .*$", "", line).strip() for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks_of(path: Path) -> list[Block]:
    """Return the fenced blocks of a page, each with its directions."""
    text, found, machine = path.read_text(), [], "gpu1"
    for match in _BLOCK.finditer(text):
        directions = dict(_DIRECTION.findall(match["directions"]))
        machine = directions.get("on", machine)
        found.append(
            Block(
                page=path.relative_to(ROOT).as_posix(),
                line=text.count("\n", 0, match.start("kind")) + 1,
                kind=match["kind"],
                text=match["text"],
                machine=machine,
                file=directions.get("file"),
                exits=int(directions.get("exits", 0)),
                not_run=directions.get("not run:"),
                sample=directions.get("sample:"),
            )
        )
    return found


# Checking what is not run


def check_command(command: str, *, is_whole: bool = True) -> list[str]:
    """Return what is wrong with the flags and paths of a shell command.

    Args:
        is_whole: nothing that the verb wants may be missing.
    """
    wrong = []
    for part in re.split(r"&&|\|\||[|;>]", command):
        words = [word for word in shlex.split(part, comments=True) if word != "sudo"]
        if words[:1] == ["meshnode"]:
            wrong += _flags_wrong(words[1:], is_whole)
        wrong += [
            f"there is no {word}"
            for word in words
            if re.match(r"(scripts|packaging|ops|protocols|docs|tests)/", word)
            and not (ROOT / word).exists()
        ]
    return wrong


def _flags_wrong(words: list[str], is_whole: bool) -> list[str]:
    words = fill_in_proxy(words)
    command: Any = typer.main.get_command(build_app(words))
    name = "meshnode"
    while (inner := getattr(command, "commands", None)) is not None:
        if words and words[0] in ("--version", "--help", "--install-completion"):
            return []
        if not words and not is_whole:
            return []
        if not words or words[0] not in inner:
            return [f"{name} has no verb {' '.join(words[:1])}"]
        name, command, words = f"{name} {words[0]}", inner[words[0]], words[1:]
    try:
        with command.make_context(name, list(words)) as context:
            rest = list(context.args)
        if rest:  # doctor and config take the flags of up
            app = typer.Typer(add_completion=False)
            app.command("up")(up)
            typer.main.get_command(app).make_context(name, rest).close()
    except TyperException as exc:
        if not is_whole and type(exc).__name__ == "MissingParameter":
            return []
        return [f"{name} {' '.join(words)}: {exc}"]
    return []


def spoken_of(page: Path) -> list[str]:
    """Return what stands between backticks in a page's prose."""
    prose = _BLOCK.sub("", page.read_text())
    return re.findall(r"`([^`\n]+)`", prose)


def all_flags() -> set[str]:
    """Return every flag of every verb."""
    flags: set[str] = set()
    for words in ([], ["token"], ["config"]):
        group: Any = typer.main.get_command(build_app(words or ["--help"]))
        flags |= {flag for option in group.params for flag in option.opts}
        for word in words:
            group = group.commands[word]
        for name in group.commands:
            verb: Any = typer.main.get_command(build_app([*words, name]))
            for word in (*words, name):
                verb = verb.commands[word]
            options = [option for option in verb.params if option.param_type_name == "option"]
            flags |= {f for option in options for f in (*option.opts, *option.secondary_opts)}
    return flags


# Running the rest


@dataclass
class Machine:
    """One host of a session."""

    name: str
    node: Node | None = None
    serves: bool = False  # whether its node exposes the engine
    env: dict[str, str] = field(default_factory=dict)
    key: str = ""  # of its control API, if it wants one

    def peers(self) -> list[dict[str, Any]]:
        """Return who its node knows."""
        url = f"http://{self.env['MESHNODE_API']}/api/peers"
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            rows: list[dict[str, Any]] = json.loads(answer.read())["peers"]
        return rows


class Session:
    """One page's commands, on machines that are processes with ports and folders of their own."""

    def __init__(self, cluster: Cluster, folder: Path, engine: Engine) -> None:
        self.cluster = cluster
        self.folder = folder
        self.engine = engine  # one for all, as starting it takes longer than what is asked of it
        self.machines: dict[str, Machine] = {}
        self.printed: list[str] = []
        # An HTTP error is an error, and nothing waits for ever.
        (folder / ".curlrc").write_text("fail-with-body\nmax-time = 90\n")

    def run(self, block: Block) -> None:
        """Do what a block says."""
        if block.file is not None:
            (self.folder / block.file).write_text(block.text)
        elif block.kind == "python":
            (self.folder / "block.py").write_text(block.text)
            self._finish(block, self._machine(block.machine), f"{sys.executable} block.py")
        elif block.kind == "sh":
            for command in block.commands:
                self._command(block, self._machine(block.machine), command)
        elif block.kind == "text" and block.sample is None:
            missing = missing_lines(block.text, self.printed)
            printed = "\n".join(self.printed)
            assert not missing, f"{block.where}: nothing printed is like {missing}:\n{printed}"

    def _command(self, block: Block, machine: Machine, command: str) -> None:
        command = self._fill_in(machine, command)
        if not _STAYING.match(command):
            self._finish(block, machine, command)
        elif command.startswith("meshnode up"):
            self._start_node(machine, command)
        else:
            self._look_on(block, machine, command)

    def _finish(self, block: Block, machine: Machine, command: str) -> None:
        env = machine.env
        if machine.node is None and not re.match(r"meshnode (doctor|config)", command):
            env = env | {"MESHNODE_API": _NOBODY}
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        self.printed = (done.stdout + done.stderr).splitlines()
        told = f"{block.where}: {command}\n{done.stdout}{done.stderr}"
        assert done.returncode == block.exits, f"ended with {done.returncode}: {told}"
        if machine.node is not None and re.match(r"meshnode drain", command):
            assert machine.node.wait(30) == 0
            machine.node = None

    def _look_on(self, block: Block, machine: Machine, command: str) -> None:
        """Start what shows something until it is ended, see that it does, and end it."""
        watching = self._process(machine, command)
        eventually(lambda: watching.out, within=60)
        watching.signal(signal.SIGINT)
        assert watching.wait(20) in (0, 130), "\n".join(watching.err)
        self.printed = list(watching.out)

    def _process(self, machine: Machine, command: str) -> Process:
        started = Process(["bash", "-c", f"cd {self.folder} && exec {command}"], machine.env)
        self.cluster.processes.append(started)
        return started

    def _start_node(self, machine: Machine, command: str) -> None:
        if machine.node is not None:  # a later block runs it with other flags
            machine.node.signal(signal.SIGTERM)
            assert machine.node.wait(30) == 0
        machine.env["MESHNODE_API"] = "127.0.0.1:0"
        node = Node(["bash", "-c", f"cd {self.folder} && exec {command}"], machine.env)
        self.cluster.processes.append(node)
        machine.node = node

        def is_up() -> bool:
            assert node.child.poll() is None, "\n".join(node.err)
            # The last of the lines for people.
            return any(line.startswith("  meshnode up ") for line in list(node.err))

        eventually(is_up, within=120)
        told = "\n".join(node.err)
        self.printed = told.splitlines()
        proxy = re.search(r"^  proxy +http://([^/\n]+)", told, re.M)
        api = re.search(r"^  api +http://(\S+)", told, re.M)
        assert api is not None, told
        node.ready = {
            "peer_id": re.findall(r"is up as (\S+)", told)[0],
            "addrs": re.findall(r"^  listens +(\S+)", told, re.M),
            "proxy": proxy[1] if proxy else None,
            "api": api[1],
        }
        machine.env["MESHNODE_API"] = api[1]
        named = re.search(r"--api-key-file (\S+)", command)
        machine.key = (self.folder / named[1]).read_text().strip() if named else ""
        self._wait_until_all_know_all()

    def _wait_until_all_know_all(self) -> None:
        running = {m.name: m for m in self.machines.values() if m.node is not None}
        hosts = {name for name, machine in running.items() if machine.serves}

        def stands() -> bool:
            for machine in running.values():
                rows = {row["name"]: row for row in machine.peers() if row["online"]}
                if set(rows) != set(running):
                    return False
                if not all(s["models"] for name in hosts for s in rows[name]["services"]):
                    return False
            return True

        eventually(stands, within=90)

    def _machine(self, name: str) -> Machine:
        if name not in self.machines:
            self.machines[name] = Machine(name, env=self._env(name))
        return self.machines[name]

    def _env(self, name: str) -> dict[str, str]:
        bin_folder = Path(sys.executable).parent
        env = self.cluster.env(
            PATH=f"{bin_folder}:{os.environ['PATH']}",
            HOME=str(self.folder),
            COLUMNS="160",
            MESHNODE_NAME=name,
            MESHNODE_API="127.0.0.1:0",
            MESHNODE_LISTEN="/ip4/127.0.0.1/tcp/0",
            MESHNODE_STATE_DIR=str(self.folder / f"state-{name}"),
            # Several tests share the LAN of this machine, and a container may have none.
            MESHNODE_MDNS="false",
        )
        if self.machines:
            env["MESHNODE_BOOTSTRAP"] = self._first_node().addr
        if name in _VRAM:
            env["MESHNODE_VRAM"] = _VRAM[name]
        return env

    def _first_node(self) -> Node:
        return next(m.node for m in self.machines.values() if m.node is not None)

    def _fill_in(self, machine: Machine, command: str) -> str:
        if command.startswith("meshnode up"):
            command = shlex.join(fill_in_proxy(shlex.split(command)))
            command = re.sub(r"(--(?:proxy|api)[= ]\S+):(?:8080|4280)\b", r"\1:0", command)
        if _ENGINE in command:
            machine.serves = machine.serves or command.startswith("meshnode up")
            command = command.replace(_ENGINE, self.engine.address)
        if machine.node is not None:
            command = command.replace(_PROXY, str(machine.node.ready["proxy"]))
            command = command.replace(_API, str(machine.node.ready["api"]))
        if _ADDRESS in command:
            command = command.replace(_ADDRESS, self._first_node().addr)
        return re.sub(r"(^|[\s/])scripts/", rf"\1{ROOT}/scripts/", command)


def missing_lines(shown: str, printed: list[str]) -> list[str]:
    """Return the lines of a sample that nothing printed is like."""
    return [line for line in shown.splitlines() if line.strip() and not _is_among(line, printed)]


def _is_among(line: str, printed: list[str]) -> bool:
    if line.strip() in ("…", "..."):
        return True
    # What is not known yet, like a round trip, is shown as a dash without its unit.
    words = re.sub(r"(?<=\d) (s|ms|GiB)\b", r"\0\1", line).split()
    pattern = r"\s+".join(_word(word) for word in words)
    return any(re.search(pattern, each) for each in printed)


def _word(word: str) -> str:
    number, _, unit = word.partition("\0")
    if not re.search(r"\d|…", number):
        return re.escape(word)
    return rf"\S+(?: {unit})?" if unit else r"\S+"


def run_page(page: Path, cluster: Cluster, folder: Path, engine: Engine) -> None:
    """Run all of a page's blocks that are to be run.

    Raises:
        AssertionError: one does something else than the page says.
    """
    session = Session(cluster, folder, engine)
    ran = False
    for block in blocks_of(page):
        if block.not_run is not None:
            ran = ran and block.kind != "sh"
            continue
        # What is shown after a block that was not run can't be compared either.
        if block.kind == "text" and block.file is None and not ran:
            assert block.sample is not None, f"{block.where} says not why it is not compared"
        session.run(block)
        ran = ran or block.kind in ("sh", "python")


def shell_blocks() -> Iterator[Block]:
    """Yield every shell block of every page."""
    for page in PAGES:
        yield from (block for block in blocks_of(page) if block.kind == "sh")
