"""Somebody else's client under test: installed in an environment of its own, run in a process of its own.

Its program prints JSON lines, [what, value]: what it saw, and that it waits for the test to do something.
"""

import errno
import json
import os
import shutil
import subprocess
import threading
import venv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hub_wire import METHODS, online, publish
from tests.waiting import wait_until
from twin_device.hub import Device, LocalHub

HERE = Path(__file__).parent
KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
_INSTALLED_WITHIN = 300
_OVER_WITHIN = 60


def _install(what: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALLED_WITHIN)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{what} does not install here within {_INSTALLED_WITHIN} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        # What comes first has led to the others.
        why = next((line for line in lines if "error" in line.lower()), lines[-1])
        pytest.skip(f"{what} does not install here: {why.strip()}")


@contextmanager
def python(folder: Path, *packages: str) -> Iterator[str]:
    """A Python that has these packages; skips where they do not install (no network, no wheel)."""
    venv.create(folder, with_pip=True)
    interpreter = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    # uamqp, which azure-iot-hub needs, takes minutes to build.
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        _install(packages[0], [*pip, "--only-binary", "uamqp", *packages])
        yield interpreter
    finally:
        # pytest keeps the folders of three runs.
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def node(folder: Path, *packages: str) -> Iterator[Path]:
    """A node_modules with these packages; skips where they do not install."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not here")
    folder.mkdir()
    # Without it npm would look for a project further up.
    (folder / "package.json").write_text('{"private": true}')
    options = ["--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"]
    # By itself it waits a minute and more for a network that is not there.
    options += ["--fetch-retries", "1", "--fetch-retry-mintimeout", "1000"]
    try:
        _install(packages[0], [npm, "install", *options, *packages])
        yield folder / "node_modules"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def hub_on(**ports: int | None) -> Iterator[LocalHub]:
    """A hub on the ports that a client insists on; skips where it may not have them."""
    why: list[OSError] = []

    def started() -> LocalHub | None:
        hub = LocalHub(**ports)
        try:
            hub.start()
        except OSError as error:
            why.append(error)
            if error.errno == errno.EADDRINUSE:
                return None
            if error.errno == errno.EACCES:
                pytest.skip(f"the client dials this port and no other: {error}")
            raise
        return hub

    try:
        # Another test run on this machine may have it for a while.
        hub = wait_until(started, "the port is free")
    except TimeoutError:
        pytest.skip(f"the client dials this port and no other: {why[-1]}")
    with hub:
        yield hub


@contextmanager
def program(*command: str, **environment: str) -> Iterator[Iterator[tuple[str, Any]]]:
    """A client's program that runs, and the lines it prints. It has to end well, and in time."""
    everything = os.environ | environment
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=everything) as process:
        watchdog = threading.Timer(_OVER_WITHIN, process.kill)
        watchdog.start()
        assert process.stdout is not None
        try:
            yield ((what, value) for what, value in map(json.loads, process.stdout))
            process.wait(_OVER_WITHIN)
        finally:
            watchdog.cancel()
            process.kill()
    assert process.returncode == 0, f"{command[1]} failed; its standard error tells more"


# ---------------------------------------------------------------------- what is played with them


def device_story(said: Iterator[tuple[str, Any]], devices: dict[str, Device]) -> dict[str, Any]:
    """Play the back end for a device SDK's program; returns what its clients saw, and the back end of them.

    devices: by the names that the program calls its clients; new, with {"interval": 30} desired.
    """
    seen: dict[str, Any] = {}
    for what, value in said:
        seen[what] = value
        name, _, step = what.rpartition(" ")
        if step == "ready":
            # A key that is not there, to delete: it tells the patch from the whole document.
            devices[name].patch_desired({"interval": 15, "first": None})
        elif step == "refused":
            devices[name].disconnect()
            devices[name].wait_for(lambda one: one.connections == 2 and one.connected, 20)
            devices[name].patch_desired({"interval": 60, "second": None})
        elif step == "listens":
            # Node's does not say when it has subscribed: then the hub has to wait for it.
            seen[what] = devices[name].invoke_method("reboot", {"delay": 5}, timeout=20, connect_timeout=20)
        elif step == "over":
            seen[what] = devices[name].reported, [one.payload for one in devices[name].telemetry]
    return seen


def the_story_of(names: Iterable[str], refused: Any) -> dict[str, Any]:
    """What device_story returns if all went well. refused: what is told of a report that the hub refuses."""
    seen: dict[str, Any] = {}
    for name in names:
        seen |= {
            f"{name} twin": {"desired": {"interval": 30, "$version": 1}, "reported": {"$version": 1}},
            f"{name} reported": {"battery": 55, "nested": {}, "$version": 3},
            f"{name} ready": None,
            f"{name} patch": {"interval": 15, "first": None, "$version": 2},
            f"{name} refused": refused,
            f"{name} again": {"interval": 60, "second": None, "$version": 3},
            f"{name} listens": (202, {"seconds": 5}),
            f"{name} asked": ["reboot", {"delay": 5}],
            f"{name} over": ({"battery": 54, "nested": {}}, [b"hello"]),
        }
    return seen


def back_end_story(said: Iterator[tuple[str, Any]], hub: LocalHub) -> list[tuple[str, Any]]:
    """Play the device sensor-1, with the key KEY, for a service SDK's program; returns all that was told."""
    lines = []
    for what, value in said:
        lines.append((what, value))
        if what == "methods":
            with online(hub.mqtt_port, "sensor-1", KEY, METHODS) as wire:
                for _ in range(value):
                    asked = wire.message()
                    topic = asked.topic.replace("$iothub/methods/POST/reboot/", "$iothub/methods/res/202/")
                    wire.send(publish(topic, asked.payload))
    return lines
