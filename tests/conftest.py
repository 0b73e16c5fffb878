"""What several test files need: a device on a local hub, and a recorder of what an app is shown."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from twin_device import TwinClient
from twin_device.hub import Device, LocalHub

PATIENCE = 10.0  # seconds that anything may take before a test gives up


class App:
    """An app that writes down what its handlers are given."""

    def __init__(self, client: TwinClient) -> None:
        self.client = client
        self.changes: queue.SimpleQueue[tuple[dict[str, Any], dict[str, Any]]] = queue.SimpleQueue()
        self.states: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.errors: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        client.on_desired(lambda patch, desired: self.changes.put((patch, desired)))
        client.on_state(lambda _old, new: self.states.put(new))
        client.on_error(self.errors.put)

    def next_patch(self) -> dict[str, Any]:
        return self.changes.get(timeout=PATIENCE)[0]

    def next_error(self) -> Exception:
        return self.errors.get(timeout=PATIENCE)

    def await_state(self, wanted: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.states.get(timeout=max(0.01, deadline - time.monotonic())) != wanted:
            pass


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """For what no event tells: look again and again, with a deadline."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in time: {what}")
        pause.wait(0.005)


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
