"""What a hub with a data folder keeps over a restart, a clean one and a kill."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.hub_wire import Wire, online
from tests.waiting import PATIENCE
from twin_device import TwinClient, TwinError
from twin_device.hub import LocalHub

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


def hub(folder: Path, **options: Any) -> LocalHub:
    return LocalHub(mqtts_port=None, mqtt_port=0, data=folder, **options)


def test_identities_twins_and_policy_key_come_back(tmp_path: Path) -> None:
    with hub(tmp_path, http_port=0) as first:
        device = first.create_device("dev", KEY, desired={"a": 1}, tags={"floor": 3})
        first.create_device("dev/mod")
        first.create_device("gone").delete()
        device.patch_desired({"b": {"c": [1, None][:1]}})
        with online(first.mqtt_port) as wire:
            wire.ask("$iothub/twin/PATCH/properties/reported/?$rid=1", b'{"r": 1}')
        device.patch_tags({"room": "x"})
        device.disable()
        kept = device.twin
        text = first.service_connection_string.rpartition("SharedAccessKeyName")[2]
        strings = {one.id: one.keys for one in first.devices}
    with hub(tmp_path, http_port=0) as second:
        assert {one.id: one.keys for one in second.devices} == strings
        after = second.device("dev").twin
        # What it was doing when the hub ended is not kept.
        unlike = dict.fromkeys(("connectionState", "deviceEtag", "lastActivityTime"))
        assert {**after, **unlike} == {**kept, **unlike}
        assert second.service_connection_string.rpartition("SharedAccessKeyName")[2] == text
        second.device("dev").enable()
        assert second.device("dev").patch_desired({"z": 1}) == kept["properties"]["desired"]["$version"] + 1


def test_a_session_and_its_subscriptions_come_back(tmp_path: Path) -> None:
    with hub(tmp_path) as first:
        first.create_device("dev", KEY)
        with online(first.mqtt_port, clean=False):
            pass
    with hub(tmp_path) as second, Wire(second.mqtt_port) as wire:
        assert wire.connect("dev", KEY, clean=False) == 1
        # Not subscribed to by this connection.
        second.device("dev").patch_desired({"a": 1})
        assert json.loads(wire.message().payload) == {"a": 1, "$version": 2}


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with LocalHub(mqtts_port=None, mqtt_port=0) as first:
        first.create_device("dev")
    assert os.listdir(tmp_path) == []


def test_nobody_else_may_read_the_keys(tmp_path: Path) -> None:
    with hub(tmp_path / "new" / "folder") as first:
        first.create_device("dev", KEY)
    assert (tmp_path / "new" / "folder" / "hub.db").stat().st_mode & 0o077 == 0


def test_another_hubs_folder_is_refused(tmp_path: Path) -> None:
    with hub(tmp_path) as first:
        first.create_device("dev", KEY)
        with pytest.raises(OSError, match="another hub"):
            hub(tmp_path).start()
        assert first.device("dev").patch_desired({"a": 1}) == 2


def test_a_foreign_or_newer_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    path.write_bytes(b"not a database at all, but long enough to be looked at" * 20)
    with pytest.raises(ValueError, match=r"hub\.db is no hub's data"):
        hub(tmp_path).start()
    path.unlink()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version=2")
    database.close()
    with pytest.raises(ValueError, match="newer release"):
        hub(tmp_path).start()


@contextmanager
def served(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A hub in a process of its own, and its device's connection string."""
    command = [
        sys.executable,
        "-m",
        "twin_device.cli",
        "hub",
        "run",
        "--mqtts-port",
        "0",
        "--mqtt-port",
        "auto",
    ]
    command += ["--https-port", "0", "--data", str(folder), "--device", f"dev:{KEY}", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())["devices"]["dev"]
        finally:
            process.kill()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX")
def test_a_kill_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    answered = 0
    with served(tmp_path) as (process, text):
        client = TwinClient.from_connection_string(text, tls=False, timeout=PATIENCE)
        client.connect()
        killer = threading.Timer(0.3, process.kill)
        killer.start()
        with suppress(TwinError):
            for number in range(1, 1_000_000):
                client.report({f"k{number % 100}": number}, timeout=1)
                answered = number
        killer.join()
        client.disconnect()
        client.close()
        process.wait(PATIENCE)
    assert answered > 100
    # Started again, with the device named that is there already.
    with served(tmp_path) as (process, text):
        with TwinClient.from_connection_string(text, tls=False, timeout=PATIENCE) as after:
            # The last report may have been written and not answered.
            last = after.reported_version - 1
            assert last in (answered, answered + 1)
            assert set(after.reported.values()) == set(range(last - 99, last + 1))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
