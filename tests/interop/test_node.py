"""Microsoft's own SDKs for Node, unchanged, against the local hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.strangers import HERE, device_story, node, program, the_story_of
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
