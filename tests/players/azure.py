"""The player of Microsoft's azure-iot-device, for its own interpreter. lines.py says what it does.

Argument: the port of the hub. The SDK dials 8883 and no other; its sockets are led there, and that is all
that is changed.
"""

import os
import socket
import sys
import time
from typing import Any

from azure.iot.device import IoTHubDeviceClient

from tests.players.lines import Behaviour, HandlerFailed, Logged, Order, dials, play, tell_event, watch_dials


class Players:
    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}

    def perform(self, order: Order) -> Any:
        arguments = {name: value for name, value in order.items() if name not in ("id", "do")}
        return getattr(self, order["do"])(**arguments)

    def open(
        self, client: str, text: str, ca: str, behaviour: Order | None = None, token_lifetime: int = 3600
    ) -> None:
        with open(ca) as file:
            certificate = file.read()
        made = self._clients[client] = IoTHubDeviceClient.create_from_connection_string(
            text, server_verification_cert=certificate, sastoken_ttl=token_lifetime
        )
        behaves = Behaviour(**(behaviour or {}))

        def changed(patch: dict[str, Any]) -> None:
            seconds, raises = behaves.next()
            time.sleep(seconds)
            if raises:
                raise HandlerFailed
            tell_event("desired", client, patch=patch)

        def state_changed() -> None:
            tell_event("state", client, state="connected" if made.connected else "offline")

        made.on_twin_desired_properties_patch_received = changed
        made.on_connection_state_change = state_changed
        made.on_background_exception = lambda error: tell_event("error", client, text=str(error))

    def connect(self, client: str) -> None:
        self._clients[client].connect()

    def retrieve(self, client: str) -> Any:
        return self._clients[client].get_twin()

    def report(self, client: str, patch: dict[str, Any]) -> None:
        self._clients[client].patch_twin_reported_properties(patch)

    def load(self, client: str, seconds: float) -> Any:
        end, sent, slowest, errors = time.monotonic() + seconds, 0, 0.0, []
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                self._clients[client].patch_twin_reported_properties({"load": sent + 1})
            except Exception as error:  # noqa: BLE001  # whatever the SDK raises is to be told
                errors.append(f"{type(error).__name__}: {error}")
            sent += 1
            slowest = max(slowest, time.monotonic() - began)
        return {"sent": sent, "slowest": slowest, "errors": errors}

    def count(self) -> list[float]:
        return dials()


def lead_to(port: int) -> None:
    dial = socket.create_connection

    def redirected(address: Any, *arguments: Any, **options: Any) -> socket.socket:
        return dial((address[0], port if address[1] == 8883 else address[1]), *arguments, **options)

    socket.create_connection = redirected


if __name__ == "__main__":
    lead_to(int(sys.argv[1]))
    watch_dials()
    Logged()
    play(Players().perform)
    sys.stdout.flush()
    # Whatever still hangs ends with the process.
    os._exit(0)
