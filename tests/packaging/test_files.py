"""The unit, the image's recipe, the compose file and the plist hold what they promise."""

from __future__ import annotations

import plistlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from meshnode.config import field_names, resolve

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"
UNIT = PACKAGING / "systemd" / "meshnode.service"
DRAIN_GRACE = 30  # seconds, the default


def unit_with_a_command_that_is_there(folder: Path) -> Path:
    """The unit, but for where meshnode is installed."""
    text = UNIT.read_text().replace("/usr/local/bin/meshnode", sys.executable)
    copy = folder / UNIT.name
    copy.write_text(text)
    return copy


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine"
)


@needs_systemd
def test_systemd_finds_no_fault_in_the_unit(tmp_path):
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit_with_a_command_that_is_there(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    ours = [line for line in done.stderr.splitlines() if "meshnode.service" in line]
    assert (ours, done.returncode) == ([], 0)


@needs_systemd
def test_the_units_exposure_is_low(tmp_path):
    unit = unit_with_a_command_that_is_there(tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", unit],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout[-200:]


@pytest.mark.parametrize("name", ["systemd/meshnode.service", "docker/compose.yaml"])
def test_stopping_gives_requests_longer_than_the_drain_takes(name):
    text = (PACKAGING / name).read_text()
    found = re.search(r"(?:TimeoutStopSec=|stop_grace_period: )(\d+)", text)
    assert found is not None and int(found[1]) > DRAIN_GRACE


def test_hadolint_finds_no_fault_in_the_dockerfile():
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), PACKAGING / "docker" / "Dockerfile"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("", 0)


def test_what_the_dockerfile_copies_is_there():
    text = (PACKAGING / "docker" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert "meshnode" in names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_image_builds():
    if shutil.which("docker") is None:
        pytest.skip("docker is not on this machine")
    info = subprocess.run(["docker", "info"], capture_output=True, timeout=60)
    if info.returncode != 0:
        pytest.skip("no docker engine runs on this machine")
    subprocess.run(
        ["docker", "build", "-q", "-f", PACKAGING / "docker" / "Dockerfile", ROOT],
        check=True,
        timeout=900,
    )


def test_the_compose_file_sets_nothing_that_meshnode_does_not_know():
    services = yaml.safe_load((PACKAGING / "docker" / "compose.yaml").read_text())["services"]
    node = services["meshnode"]
    ours = {key: value for key, value in node["environment"].items() if key.startswith("MESHNODE_")}
    settings = resolve({}, ours, read_text=lambda _: "mesh1x", must_hold=False)
    assert [str(service) for service in settings.expose] == ["ollama=127.0.0.1:11434"]
    assert node["build"]["dockerfile"] == "packaging/docker/Dockerfile"
    assert node["cap_drop"] == ["ALL"] and node["read_only"] is True


def test_the_units_settings_are_known_and_hold():
    settings = tomllib.loads((PACKAGING / "systemd" / "meshnode.toml").read_text())
    assert set(settings) <= set(field_names())
    made = resolve({"open": "true"}, {}, settings, file_path="meshnode.toml")
    assert [str(service) for service in made.expose] == ["ollama=127.0.0.1:11434"]
    # What is written there as an example is true as well.
    text = (PACKAGING / "systemd" / "meshnode.toml").read_text()
    shown = re.findall(r"^# (\w+) = ", text, flags=re.MULTILINE)
    assert shown and set(shown) <= set(field_names())


def test_the_plist_is_one_and_runs_meshnode_with_a_file():
    made = plistlib.loads((PACKAGING / "launchd" / "meshnode.plist").read_bytes())
    assert made["ProgramArguments"][:2] == ["/bin/sh", "-c"]
    assert re.search(r'meshnode" up --config "\S+meshnode.toml"$', made["ProgramArguments"][2])
    assert made["ExitTimeOut"] > DRAIN_GRACE
