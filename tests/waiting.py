"""How a test waits: with a deadline, and for a condition."""

import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 10.0  # seconds that anything may take before a test gives up


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
