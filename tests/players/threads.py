"""The player of twin_device.TwinClient, the shell for threads. lines.py says what it does."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.players.lines import (
    Behaviour,
    HandlerFailed,
    Order,
    dials,
    looked_at,
    play,
    tell_event,
    watch_dials,
)
from tests.players.pace import hurry
from twin_device import TwinClient, TwinError


class Players:
    def __init__(self) -> None:
        self._clients: dict[str, TwinClient] = {}

    def perform(self, order: Order) -> Any:
        arguments = {name: value for name, value in order.items() if name not in ("id", "do")}
        return getattr(self, order["do"])(**arguments)

    def open(
        self, client: str, text: str, ca: str | None, behaviour: Order | None = None, **options: Any
    ) -> None:
        made = self._clients[client] = TwinClient.from_connection_string(text, ca_file=ca, **options)
        behaves = Behaviour(**(behaviour or {}))

        @made.on_desired
        def changed(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            connects, version = made.statistics["connects"], made.desired_version
            # A version is told only where it is known to which connection it belongs.
            where = connects if made.statistics["connects"] == connects else None
            seconds, raises = behaves.next()
            time.sleep(seconds)
            if raises:
                raise HandlerFailed
            tell_event("desired", client, patch=patch, desired=desired, version=version, connection=where)

        made.on_state(lambda _old, new: tell_event("state", client, state=new))
        made.on_error(lambda error: tell_event("error", client, text=f"{type(error).__name__}: {error}"))

    def connect(self, client: str, **options: Any) -> None:
        self._clients[client].connect(**options)

    def retrieve(self, client: str) -> Any:
        return self._clients[client].retrieve()

    def report(self, client: str, patch: dict[str, Any], **options: Any) -> Any:
        return self._clients[client].report(patch, **options)

    def post(self, client: str, patch: dict[str, Any], timeout: float) -> Callable[[], Any]:
        report = self._clients[client].report(patch, wait=False)
        return lambda: report.wait(timeout)

    def load(self, client: str, seconds: float) -> Any:
        end, sent, slowest, errors = time.monotonic() + seconds, 0, 0.0, []
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                self._clients[client].report({"load": sent + 1})
            except TwinError as error:
                errors.append(f"{type(error).__name__}: {error}")
            sent += 1
            slowest = max(slowest, time.monotonic() - began)
        return {"sent": sent, "slowest": slowest, "errors": errors}

    def look(self) -> dict[str, Any]:
        return {name: looked_at(one) for name, one in self._clients.items()}

    def count(self) -> list[float]:
        return dials()

    def close(self, client: str) -> None:
        self._clients.pop(client).close()


if __name__ == "__main__":
    if sys.argv[1:] == ["hurry"]:
        hurry()
    watch_dials()
    play(Players().perform)
    sys.stdout.flush()
    # Whatever still hangs ends with the process.
    os._exit(0)
