"""Microsoft's own Python SDKs, unchanged, against the local hub."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.interop.strangers import (
    HERE,
    KEY,
    back_end_story,
    device_story,
    hub_on,
    program,
    python,
    the_story_of,
)
from twin_device.hub import LocalHub

# The newest release, and the newest that wants paho-mqtt 2: by their metadata 2.14.0 and both betas of 3.0.0,
# which are newer by number alone, want paho-mqtt 1.
DEVICE_SDKS = {"2.14.0": "1", "2.15.0rc1": "2"}


@pytest.mark.parametrize(("version", "paho"), DEVICE_SDKS.items())
def test_the_device_sdk_sync_and_asyncio_device_and_module(tmp_path: Path, version: str, paho: str) -> None:
    names = {
        "device": "sensor-1",
        "module": "sensor-1/m",
        "aio device": "sensor-2",
        "aio module": "sensor-2/m",
    }
    with (
        python(tmp_path / "venv", f"azure-iot-device=={version}") as interpreter,
        hub_on(mqtts_port=8883) as hub,
    ):
        # Those of asyncio come with certificates: one signed itself, the other has two CAs above it.
        own = hub.make_certificate("sensor-2", tmp_path, self_signed=True)
        signed = hub.make_certificate("sensor-2/m", tmp_path, intermediate=True)
        proofs: dict[str, dict[str, Any]] = {
            "aio device": {"certificate": own.certificate_file},
            "aio module": {"authority": True},
        }
        devices = {
            name: hub.create_device(id, desired={"interval": 30}, **proofs.get(name, {}))
            for name, id in names.items()
        }
        texts = [devices[name].connection_string for name in ("device", "module")]
        host = {"hostname": "localhost", "device_id": "sensor-2"}
        texts.append(json.dumps({"certificate": [own.certificate_file, own.key_file], **host}))
        files = [signed.certificate_file, signed.key_file]
        texts.append(json.dumps({"certificate": files, **host, "module_id": "m"}))
        with program(interpreter, str(HERE / "azure_device.py"), *texts, hub.ca_file) as said:
            seen = device_story(said, devices)
    assert seen == {"versions": [version, paho]} | the_story_of(names, refused="ClientError")


def test_the_device_sdk_over_websockets(tmp_path: Path) -> None:
    version = "2.15.0rc1"
    with (
        python(tmp_path / "venv", f"azure-iot-device=={version}") as interpreter,
        hub_on(mqtts_port=None, https_port=443) as hub,
    ):
        hub.create_device("sensor-1", KEY, desired={"interval": 30})
        text = f"HostName=localhost;DeviceId=sensor-1;SharedAccessKey={KEY}"
        with program(interpreter, str(HERE / "azure_device.py"), text, hub.ca_file) as said:
            seen = device_story(said, {"device": hub.device("sensor-1")})
    assert seen == {"versions": [version, DEVICE_SDKS[version]]} | the_story_of(
        ["device"], refused="ClientError"
    )


def test_the_service_sdk(tmp_path: Path) -> None:
    # azure-iot-hub imports six and does not declare it.
    with (
        python(tmp_path / "venv", "azure-iot-hub==2.7.0", "six") as interpreter,
        LocalHub(mqtts_port=None, mqtt_port=0, https_port=0) as hub,
        program(
            interpreter,
            str(HERE / "azure_backend.py"),
            hub.service_connection_string,
            REQUESTS_CA_BUNDLE=hub.ca_file,
        ) as said,
    ):
        assert back_end_story(said, hub) == [
            ("created", ["sensor-1", "enabled", KEY]),
            ("created twice", 409),
            ("new twin", ["AAAAAAAAAAE=", 2, 1]),
            ("updated", [15, 3]),
            ("stale", 412),
            ("replaced", [None, True]),
            ("module", ["m", "m"]),
            ("modules", ["m"]),
            ("devices", ["sensor-1"]),
            ("query", ["sensor-1"]),
            ("bulk", [True, []]),
            ("bulk again", [False, [["sensor-2", "DeviceAlreadyExists"]]]),
            ("devices", ["sensor-1", "sensor-2", "sensor-3"]),
            ("bulk deleted", True),
            ("devices", ["sensor-1", "sensor-3"]),
            ("not online", 404),
            ("methods", 2),
            ("answer", [202, {"delay": 5}]),
            ("job", ["queued", "completed", 1, 0]),
            ("twin job", ["completed", 2, 0]),
            ("twins", [60, 60]),
            ("scheduled", "scheduled"),
            ("cancelled", ["cancelled", "cancelled"]),
            ("jobs' devices", [["sensor-1", "DeviceJob"]]),
            ("disabled", ["disabled", "disabled"]),
            ("statistics", 1),
            ("deleted", 404),
        ]
