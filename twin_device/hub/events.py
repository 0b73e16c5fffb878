"""What happens in the hub, told as events to whoever listens.

    source                       what                                    opType and body
    ---------------------------  --------------------------------------  -----------------------------------
    twinChangeEvents             a twin was updated or replaced          updateTwin: what changed;
                                                                         replaceTwin: the whole twin
    deviceLifecycleEvents        an identity was created or deleted      createDeviceIdentity,
                                                                         deleteDeviceIdentity: the twin
    deviceConnectionStateEvents  a device came or went                   deviceConnected,
                                                                         deviceDisconnected: a number
    Telemetry                    a device sent a message                 none; the message as text
    packets                      an MQTT packet came or went             ours: no real hub tells that
    faults                       a fault was set, cleared, or is over    ours, too

Source: IoT Hub, "Azure IoT Hub non-telemetry event schemas". A module's events are a device's with moduleId.
Nothing is kept: who listens hears what happens from then on.
"""

import itertools
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .twins import now

TWINS, LIFECYCLE, CONNECTIONS = "twinChangeEvents", "deviceLifecycleEvents", "deviceConnectionStateEvents"
TELEMETRY, PACKETS, FAULTS = "Telemetry", "packets", "faults"
SOURCES = (TWINS, LIFECYCLE, CONNECTIONS, TELEMETRY, PACKETS, FAULTS)

_SCHEMAS = {
    TWINS: "twinChangeNotification",
    LIFECYCLE: "deviceLifecycleNotification",
    CONNECTIONS: "deviceConnectionStateNotification",
}
# A listener that is this many events behind loses the oldest.
MAX_WAITING = 10_000


class Event(NamedTuple):
    """One thing that happened.

    sequence: rises by one with every event of a hub. source: see above. device: an identity's id, "" if it is
    about none. time: Unix seconds. properties: the application's properties. system: the system's. body: JSON
    as Python has it.
    """

    sequence: int
    source: str
    device: str
    time: float
    properties: dict[str, str]
    system: dict[str, str]
    body: Any

    def as_dict(self) -> dict[str, Any]:
        """As JSON, for the stream over HTTP."""
        return self._asdict()


class Subscription:
    """One listener. wake is called when there is something to take."""

    def __init__(self, sources: frozenset[str], device: str | None, wake: Callable[[], None]) -> None:
        self.sources = sources
        self._device = device
        self._wake = wake
        self._waiting: deque[Event] = deque()
        self._lost = 0

    def offer(self, event: Event) -> None:
        if event.source not in self.sources or self._device not in (None, event.device):
            return
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._wake()

    def take(self) -> Event | None:
        """The oldest event that waits; None if there is none."""
        return self._waiting.popleft() if self._waiting else None

    def take_lost(self) -> int:
        """How many events were lost since this was last asked, since the listener was too slow."""
        lost, self._lost = self._lost, 0
        return lost


class Publisher:
    """Hands events to subscriptions. Everything here runs in the hub's event loop."""

    def __init__(self, hub_name: str) -> None:
        self._hub_name = hub_name
        self._subscriptions: list[Subscription] = []
        self._wanted: frozenset[str] = frozenset()
        self._sequence = itertools.count(1)

    def subscribe(self, sources: Iterable[str], device: str | None, wake: Callable[[], None]) -> Subscription:
        """Listen from now on. sources: all but packets when empty. device: None for all.

        ValueError: there is no such source.
        """
        chosen = frozenset(sources) or frozenset(SOURCES) - {PACKETS}
        unknown = sorted(chosen - frozenset(SOURCES))
        if unknown:
            raise ValueError(f"there are no events {unknown[0]!r}; there are {', '.join(SOURCES)}")
        subscription = Subscription(chosen, device, wake)
        self._subscriptions.append(subscription)
        self._count()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
            self._count()

    def _count(self) -> None:
        self._wanted = frozenset().union(*(one.sources for one in self._subscriptions))

    def wants(self, source: str) -> bool:
        """False if nobody listens to this source: its events need not be made."""
        return source in self._wanted

    def notify(self, source: str, identity_id: str, operation: str, body: Any) -> None:
        """Tell of an operation (opType) as IoT Hub does; of a connection its sequence number is the body."""
        device, slash, module = identity_id.partition("/")
        timestamp = now()
        properties = {
            "hubName": self._hub_name,
            "deviceId": device,
            **({"moduleId": module} if slash else {}),
            "operationTimestamp": timestamp,
            "iothub-message-schema": _SCHEMAS[source],
            "opType": operation,
        }
        system = {
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "correlation-id": uuid.uuid4().hex,
            "user-id": self._hub_name,
            "iothub-connection-device-id": device,
            **({"iothub-connection-module-id": module} if slash else {}),
            "iothub-enqueuedtime": timestamp,
            "iothub-message-source": source,
        }
        if source == CONNECTIONS:
            # 256 bits in hexadecimal, to be compared as text.
            body = {"sequenceNumber": f"{time.time_ns():064X}"}
        self.publish(source, identity_id, properties, system, body)

    def publish(
        self, source: str, identity_id: str, properties: dict[str, str], system: dict[str, str], body: Any
    ) -> None:
        if source not in self._wanted:
            return
        event = Event(next(self._sequence), source, identity_id, time.time(), properties, system, body)
        for subscription in self._subscriptions:
            subscription.offer(event)
