"""The hub of a chaos run, in a process of its own so that it can be killed: orders as in players/lines.py.

Arguments: the folder of its data, that of its certificates, and its port (0: any). It says which one first.
"""

import sys
from typing import Any

from tests.players.lines import Order, play, tell
from twin_device.hub import Fault, LocalHub

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


class Hub:
    def __init__(self, data: str, certificates: str, port: int) -> None:
        self._hub = LocalHub(port, data=data, certificates=certificates)
        self._hub.start()
        self._faults: list[Fault] = []
        tell(event="ready", client="", port=self._hub.mqtts_port, ca=self._hub.ca_file)

    def perform(self, order: Order) -> Any:
        arguments = {name: value for name, value in order.items() if name not in ("id", "do")}
        return getattr(self, order["do"])(**arguments)

    def create(self, devices: list[str]) -> None:
        for name in devices:
            self._hub.create_device(name, KEY)

    def patch(self, device: str, patch: dict[str, Any]) -> int:
        return self._hub.device(device).patch_desired(patch)

    def replace(self, device: str, document: dict[str, Any]) -> int:
        return self._hub.device(device).replace_desired(document)

    def recreate(self, device: str) -> None:
        self._hub.device(device).recreate()

    def enable(self, device: str, enabled: bool) -> None:
        one = self._hub.device(device)
        if enabled:
            one.enable()
        else:
            one.disable()

    def fault(self, kind: str, **options: Any) -> None:
        self._faults.append(self._hub.fault(kind, **options))

    def away(self) -> None:
        self._hub.stop_listening()

    def back(self, forget: bool = False) -> None:
        """forget: sessions are gone, too."""
        self._hub.stop_listening()
        if forget:
            self._hub.forget_sessions()
        self._hub.listen_again()

    def hits(self) -> dict[str, int]:
        """How often each kind of fault has happened since the hub was started."""
        found: dict[str, int] = {}
        for fault in self._faults:
            found[fault.kind] = found.get(fault.kind, 0) + fault.hits
        return found

    def clear(self) -> None:
        self._hub.clear_faults()
        for device in self._hub.devices:
            device.enable()

    def look(self) -> dict[str, Any]:
        """Both sections of every twin, and desired's version."""
        return {
            device.id: {
                "desired": device.desired,
                "reported": device.reported,
                "version": device.desired_version,
                "connected": device.connected,
            }
            for device in self._hub.devices
        }


if __name__ == "__main__":
    play(Hub(sys.argv[1], sys.argv[2], int(sys.argv[3])).perform, in_order=True)
