"""Microsoft's own SDKs for Node, unchanged, against the local hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.strangers import (
    HERE,
    KEY,
    back_end_story,
    device_story,
    hub_on,
    node,
    program,
    the_story_of,
)
from twin_device.hub import LocalHub

PACKAGES = ("azure-iot-device@1.18.4", "azure-iot-device-mqtt@1.16.4", "azure-iothub@1.16.6")


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for both SDKs: they share most of what they need, and it takes 10 s."""
    with node(tmp_path_factory.mktemp("node") / "project", *PACKAGES) as folder:
        yield folder


def test_the_device_sdk_device_and_module(modules: Path) -> None:
    names = {"device": "sensor-1", "module": "sensor-1/m"}
    # This SDK takes any port from the connection string.
    with LocalHub() as hub:
        devices = {name: hub.create_device(id, desired={"interval": 30}) for name, id in names.items()}
        with program(
            "node",
            str(HERE / "node_device.js"),
            *[device.connection_string for device in devices.values()],
            NODE_PATH=str(modules),
            NODE_EXTRA_CA_CERTS=hub.ca_file,
        ) as said:
            seen = device_story(said, devices)
    assert seen == the_story_of(names, refused=True)


def test_the_service_sdk(modules: Path) -> None:
    # It dials port 443 whatever its connection string says.
    with (
        hub_on(mqtts_port=None, mqtt_port=0, https_port=443) as hub,
        program(
            "node",
            str(HERE / "node_backend.js"),
            hub.service_connection_string,
            NODE_PATH=str(modules),
            NODE_EXTRA_CA_CERTS=hub.ca_file,
        ) as said,
    ):
        assert back_end_story(said, hub) == [
            ("made", True),
            ("created", ["sensor-1", "enabled", KEY]),
            ("created twice", "DeviceAlreadyExistsError"),
            ("unknown", "DeviceNotFoundError"),
            ("bad name", "ArgumentError"),
            ("other key", "UnauthorizedError"),
            ("disabled", "disabled"),
            ("statistics", 1),
            ("bulk", {"isSuccessful": True, "errors": [], "warnings": []}),
            ("bulk again", "ArgumentError"),
            ("bulk updated", "disabled"),
            ("devices", ["sensor-1", "sensor-2"]),
            ("new twin", ["AAAAAAAAAAE=", 2, 1]),
            ("updated", [15, 2]),
            ("stale", "InvalidEtagError"),
            ("forced", {"low": 5}),
            ("emptied", [None, 3]),
            ("invalid", "ArgumentError"),
            ("modules", ["m"]),
            ("module twin", 1),
            # This SDK has no name for it.
            ("removed", "Error"),
            ("pages", [["sensor-1"], ["sensor-2"]]),
            ("query", [{"id": "sensor-1"}]),
            ("no query", "ArgumentError"),
            ("not online", "Error"),
            ("methods", 2),
            ("answer", {"status": 202, "payload": {"delay": 5}}),
            ("job", ["queued", "completed", 1]),
            ("twin job", ["completed", 2]),
            ("twin", 60),
            ("scheduled", "scheduled"),
            ("cancelled", "cancelled"),
            ("jobs", ["twins"]),
        ]
