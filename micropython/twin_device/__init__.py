"""A correct device twin client for Azure IoT Hub, on MicroPython. See client.py."""

from .client import Report, TwinClient
from .core.errors import (
    ConnectRefused,
    LocalError,
    NotConnected,
    PatchError,
    RemoteError,
    ReportRejected,
    ReportTimeout,
    RetrieveRejected,
    RetrieveTimeout,
    StoreError,
    TwinError,
)
