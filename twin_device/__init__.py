"""A correct device twin client for Azure IoT Hub over raw MQTT.

    from twin_device import TwinClient

    client = TwinClient.from_connection_string(text)

TwinClient is the client for threads, on paho-mqtt. The errors are those of every runtime.
"""

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

# What `typing` has, for less: to import it takes longer than all the rest here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .client import Report, TwinClient

__version__ = "0.1.0"

__all__ = [
    "ConnectRefused",
    "LocalError",
    "NotConnected",
    "PatchError",
    "RemoteError",
    "Report",
    "ReportRejected",
    "ReportTimeout",
    "RetrieveRejected",
    "RetrieveTimeout",
    "StoreError",
    "TwinClient",
    "TwinError",
]


def __getattr__(name: str) -> "Any":
    # paho-mqtt takes most of the import's time: a program that only needs another shell does not pay for it.
    if name in ("Report", "TwinClient"):
        from . import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
