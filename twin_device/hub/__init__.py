"""The local hub: an Azure IoT Hub for development and tests on this machine. It is no production hub.

with LocalHub() as hub:
    device = hub.create_device("sensor-temp-042", desired={"telemetryInterval": 30})
    ...  # connect something with device.connection_string and hub.ca_file
    device.patch_desired({"telemetryInterval": 15})
    device.wait_for({"telemetryInterval": 15})
"""

from .faults import Fault
from .local import Device, LocalHub
from .mqtt import Packet, Telemetry

__all__ = ["Device", "Fault", "LocalHub", "Packet", "Telemetry"]
