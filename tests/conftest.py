"""Fixtures that several test files need: a device on a local hub, and an app that is connected to it."""

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.app import App
from tests.hub_backend import KEY, Backend
from tests.waiting import PATIENCE
from twin_device import TwinClient
from twin_device.hub import Device, LocalHub


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, a file runs in one, and all that need the SDKs' ports in one."""
    for item in items:
        fixed = item.path.parent.name == "interop"
        item.add_marker(pytest.mark.xdist_group("interop" if fixed else item.path.name))


# What looks like a key (32 bytes in base64), a token's signature, or a connection string's key.
_SECRET = re.compile(
    r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{43}=|sig=[A-Za-z0-9%+/]{16}|SharedAccessKey=[^;\s.]{8}", re.IGNORECASE
)


class _Watch(logging.Handler):
    """Reads everything that the package logs, at DEBUG."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen = 0
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += 1
        text = self.format(record)
        if _SECRET.search(text):
            self.found.append(f"{record.name}, {record.pathname}:{record.lineno}: {text[:500]}")


@pytest.fixture(scope="session")
def watch() -> Iterator[_Watch]:
    logger, watch = logging.getLogger("twin_device"), _Watch()
    logger.addHandler(watch)
    logger.setLevel(logging.DEBUG)
    yield watch
    logger.removeHandler(watch)


@pytest.fixture(autouse=True)
def _no_secret_is_logged(watch: _Watch) -> Iterator[None]:
    """No test may make the package log a key or a signature."""
    yield
    found, watch.found = watch.found, []
    assert found == []


@pytest.fixture
def device(local_hub: LocalHub) -> Device:
    return local_hub.create_device("sensor-temp-042", desired={"telemetryInterval": 30})


@pytest.fixture
def make_app(local_hub: LocalHub) -> Iterator[Callable[..., App]]:
    """make_app(device, **options): an App whose client is not connected yet and is closed at the end."""
    made: list[App] = []

    def make(device: Device, **options: Any) -> App:
        options = {"ca_file": local_hub.ca_file, "timeout": PATIENCE, **options}
        made.append(App(TwinClient.from_connection_string(device.connection_string, **options)))
        return made[-1]

    yield make
    for app in made:
        app.client.close()


@pytest.fixture
def app(make_app: Callable[..., App], device: Device) -> App:
    """A connected app that was given its first document."""
    app = make_app(device)
    app.client.connect()
    app.next_patch()
    return app


@pytest.fixture
def backend() -> Iterator[Backend]:
    with LocalHub(https_port=0, owner_key=KEY) as hub:
        backend = Backend(hub)
        yield backend
        backend.connection.close()
