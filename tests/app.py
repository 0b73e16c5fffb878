"""An app that writes down what it is shown."""

import queue
import time
from typing import Any

from tests.waiting import PATIENCE
from twin_device import TwinClient


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
