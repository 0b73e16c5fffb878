"""The local hub: an Azure IoT Hub for development and tests on this machine. It is no production hub.

with LocalHub() as hub:
    device = hub.create_device("sensor-temp-042", desired={"telemetryInterval": 30})
    ...  # connect something with device.connection_string and hub.ca_file
    device.patch_desired({"telemetryInterval": 15})
    device.wait_for({"telemetryInterval": 15})
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .events import Event
    from .faults import Fault
    from .local import Device, Events, LocalHub
    from .mqtt import Packet, Telemetry

__all__ = ["Device", "Event", "Events", "Fault", "LocalHub", "Packet", "Telemetry"]


def __getattr__(name: str) -> Any:
    # pytest imports this package in every run, for the plugin; only who asks for a hub pays for asyncio.
    if name in __all__:
        from . import events, faults, local, mqtt

        for module in (events, faults, local, mqtt):
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
