"""Microsoft's own Python SDKs, unchanged, against the local hub, in an environment of their own."""

import json
import os
import socket
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from twin_device.hub import LocalHub

HERE = Path(__file__).parent
KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
# azure-iot-hub imports six and does not declare it; its uamqp takes minutes to build.
PACKAGES = {
    "azure_device.py": ["azure-iot-device==2.14.0"],
    "azure_backend.py": ["azure-iot-hub==2.7.0", "six"],
}


def interpreter(folder: Path, script: str) -> str:
    """A Python that has the SDK a script needs; skips where it does not install (no network, no wheel)."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", "uamqp", *PACKAGES[script]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"{PACKAGES[script][0]} does not install here: {done.stderr.strip().splitlines()[-1]}")
    return str(python)


def told(process: "subprocess.Popen[str]") -> Iterator[tuple[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        what, value = json.loads(line)
        yield what, value


def test_the_device_sdk_sync_module_and_asyncio(tmp_path: Path) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8883)) == 0:
            pytest.skip("the SDK dials port 8883 and no other, and something listens there")
    python = interpreter(tmp_path / "venv", "azure_device.py")
    with LocalHub(mqtts_port=8883) as hub:
        device = hub.create_device("sensor-1", desired={"interval": 30})
        module = hub.create_device("sensor-1/m", desired={"interval": 30})
        arguments = [device.connection_string, module.connection_string, hub.ca_file]
        with subprocess.Popen(
            [python, str(HERE / "azure_device.py"), *arguments], stdout=subprocess.PIPE, text=True
        ) as process:
            seen: dict[str, Any] = {}
            for what, value in told(process):
                seen[what] = value
                name, _, step = what.partition(" ")
                if step == "ready":
                    (module if name == "module" else device).patch_desired(
                        {"interval": len(seen), "old": None}
                    )
        assert process.returncode == 0
    for name in ("device", "module"):
        assert seen[f"{name} twin"] == {
            "desired": {"interval": 30, "$version": 1},
            "reported": {"$version": 1},
        }
        assert seen[f"{name} reported"] == {"battery": 55, "nested": {}, "$version": 3}
        assert seen[f"{name} patch"] == {
            "interval": seen[f"{name} patch"]["interval"],
            "old": None,
            "$version": 2,
        }
        assert seen[f"{name} refused"] == "ClientError"
    assert seen["aio twin"]["reported"] == {"battery": 55, "nested": {}, "$version": 3}
    assert seen["aio patch"]["$version"] == 3


def test_the_service_sdk(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "venv", "azure_backend.py")
    with LocalHub(mqtts_port=None, https_port=0) as hub:
        done = subprocess.run(
            [python, str(HERE / "azure_backend.py"), hub.service_connection_string],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "REQUESTS_CA_BUNDLE": hub.ca_file},
        )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        ["created", ["sensor-1", "enabled", KEY]],
        ["created twice", 409],
        ["new twin", ["AAAAAAAAAAE=", 2, 1]],
        ["updated", [15, 3]],
        ["stale", 412],
        ["replaced", [None, True]],
        ["module", ["m", "m"]],
        ["modules", ["m"]],
        ["devices", ["sensor-1"]],
        ["query", ["sensor-1"]],
        ["disabled", ["disabled", "disabled"]],
        ["statistics", 1],
        ["deleted", 404],
    ]
