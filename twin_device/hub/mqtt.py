"""The device endpoint: MQTT 3.1.1 as IoT Hub speaks it.

No broker: an answer goes to the connection that asked. What IoT Hub does not know ends the connection, since
MQTT 3.1.1 has no way to say no. Source: IoT Hub, "Communicate with an IoT hub using the MQTT protocol".
"""

import asyncio
import copy
import json
import logging
import math
import re
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote

from . import events, twins
from .faults import Fault, Faults
from .log import Log
from .registry import Claim, Disabled, Identity, Refused, Registry

if TYPE_CHECKING:
    from .storage import Storage

_log = logging.getLogger("twin_device.hub")

MAX_PACKET = 256 * 1024
# A reader that is this far behind is not coming back.
_MAX_BACKLOG = 4 * 1024 * 1024
_CONNECT_WITHIN = 60.0
_MAX_KEEP_ALIVE = 1767.0
# Of one identity, and of the whole hub: packets, and bytes of their topics and payloads. A device's 2,000 are
# kept as long as no more than 50 devices have as many.
_LOGGED_PACKETS, _ALL_PACKETS = 2000, 100_000
_ALL_BYTES = 64 * 1024 * 1024
# What an event tells of a packet's payload, in bytes.
_TOLD_PAYLOAD = 4096
# Read at once. For a protocol without a buffer of its own asyncio allocates 256 KB for every read: four times
# as dear as the read itself.
_READ_SIZE = 16 * 1024
_MAX_TELEMETRY, _ALL_TELEMETRY = 1000, 50_000
_MAX_STRANGERS = 1000
_MAX_C2D = 50
# Also what a topic holds, where the properties are.
_MAX_C2D_SIZE = 64 * 1024 - 1
# What "$iothub/twin/res/{status}/?$rid={rid}&$version={version}" leaves of a topic's 65,535 bytes.
_MAX_RID = 65535 - 64
_TWIN_FILTERS = ("$iothub/twin/res/#", "$iothub/twin/PATCH/properties/desired/#", "$iothub/methods/POST/#")
_RESPONSE_FILTER, _DESIRED_FILTER, _METHOD_FILTER = _TWIN_FILTERS
_METHOD_ANSWER = re.compile(r"\$iothub/methods/res/(-?[0-9]{1,9})/?\Z")
_MAX_METHOD_PAYLOAD = 128 * 1024
_MAX_CALLS = 100
_RETRIEVE_PATH = "$iothub/twin/GET"
_REPORT_PATH = "$iothub/twin/PATCH/properties/reported"
_SYSTEM_PROPERTIES = {
    "$.mid": "message-id",
    "$.cid": "correlation-id",
    "$.uid": "user-id",
    "$.ct": "content-type",
    "$.ce": "content-encoding",
    "$.ctime": "creation-time",
    "$.exp": "expiry",
    "$.on": "output-name",
    "$.ifid": "interface-id",
    "$.sub": "subject",
}
_KINDS = {
    1: "CONNECT",
    2: "CONNACK",
    3: "PUBLISH",
    4: "PUBACK",
    8: "SUBSCRIBE",
    9: "SUBACK",
    10: "UNSUBSCRIBE",
    11: "UNSUBACK",
    12: "PINGREQ",
    13: "PINGRESP",
    14: "DISCONNECT",
}


class Packet(NamedTuple):
    """One MQTT packet of a device. direction: "in" is from the device. time: Unix seconds."""

    direction: str
    kind: str
    topic: str | None
    payload: bytes
    qos: int
    time: float


class Telemetry(NamedTuple):
    """One device-to-cloud message. properties: the app's; system: message-id, content-type and such."""

    payload: bytes
    properties: dict[str, str]
    system: dict[str, str]


class MethodFailed(Exception):
    """A direct method was not answered.

    code: IoT Hub's: 404103 not online, 404104 the connection ended, 504101 no answer in time, 403800 too many
    at once, 413001 too large.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Violation(Exception):
    """The device broke the protocol; IoT Hub ends the connection without a word."""


@dataclass
class Settings:
    """What sources do not agree on, or a test wants otherwise.

    answer_qos: "always-0" or "granted". error_body: "json" or "empty". size_code: errorCode of a section that
    is too large (403100, 400004 or 413001). size_rule: a section's size is that of its keys and "values", or
    of its "text" as JSON. hash_in_keys: True to take "#" in keys. disabled_code: CONNACK of a disabled device
    (5 or 3). retrieve_body: "sections", or "properties" around them. retain_property: what telemetry with
    RETAIN gets ("mqtt-retain" or "x-opt-retain").

    token_grace: seconds that a connection outlives its token. throttle: twin retrieves and reports a second,
    for the whole hub, as (100, 50); None for no limit. session_lifetime: seconds that the subscriptions of an
    offline device are kept; None for all the time. connect_within: seconds until a silent connection is
    ended. service_error: the shape of the REST API's error bodies: "code" ("ErrorCode:..."), "object", or
    "text" (the object as text).
    """

    answer_qos: str = "always-0"
    error_body: str = "json"
    size_code: int = 403100
    size_rule: str = "values"
    hash_in_keys: bool = False
    disabled_code: int = 5
    retrieve_body: str = "sections"
    retain_property: str = "mqtt-retain"
    token_grace: float = 0.0
    throttle: tuple[float, float] | None = None
    session_lifetime: float | None = None
    connect_within: float = _CONNECT_WITHIN
    service_error: str = "code"

    def __post_init__(self) -> None:
        if self.answer_qos not in ("always-0", "granted"):
            raise ValueError(f"answer_qos is 'always-0' or 'granted', not {self.answer_qos!r}")
        if self.service_error not in ("code", "object", "text"):
            raise ValueError(f"service_error is 'code', 'object' or 'text', not {self.service_error!r}")
        if self.error_body not in ("json", "empty"):
            raise ValueError(f"error_body is 'json' or 'empty', not {self.error_body!r}")
        if self.size_code not in (403100, 400004, 413001):
            raise ValueError(f"size_code is 403100, 400004 or 413001, not {self.size_code!r}")
        if self.size_rule not in ("values", "text"):
            raise ValueError(f"size_rule is 'values' or 'text', not {self.size_rule!r}")
        if not isinstance(self.hash_in_keys, bool):
            raise ValueError(f"hash_in_keys is True or False, not {self.hash_in_keys!r}")
        if self.disabled_code not in (5, 3):
            raise ValueError(f"disabled_code is 5 or 3, not {self.disabled_code!r}")
        if self.retrieve_body not in ("sections", "properties"):
            raise ValueError(f"retrieve_body is 'sections' or 'properties', not {self.retrieve_body!r}")
        if self.retain_property not in ("mqtt-retain", "x-opt-retain"):
            raise ValueError(
                f"retain_property is 'mqtt-retain' or 'x-opt-retain', not {self.retain_property!r}"
            )
        numbers = [("token_grace", self.token_grace), ("connect_within", self.connect_within)]
        if self.throttle is not None:
            if not isinstance(self.throttle, (tuple, list)) or len(self.throttle) != 2:
                raise ValueError(f"throttle is two numbers or None, not {self.throttle!r}")
            numbers += [("throttle", rate) for rate in self.throttle]
        if self.session_lifetime is not None:
            numbers.append(("session_lifetime", self.session_lifetime))
        for name, value in numbers:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"{name} is a number from 0 up, not {value!r}")

    @property
    def rules(self) -> twins.Rules:
        return twins.Rules(self.hash_in_keys, self.size_rule, self.size_code)


@dataclass
class Session:
    """What the hub keeps of an identity with clean session 0, also while it is offline."""

    subscriptions: dict[str, int] = field(default_factory=dict)
    persistent: bool = False
    # When its connection ended, in the loop's time.
    left: float = 0.0


@dataclass
class _Message:
    payload: bytes
    bag: str
    delivered: bool = False


class _Held(NamedTuple):
    """A notification that waits for the next one on its connection. before: the document it changed, if they
    become one."""

    connection: "Connection"
    patch: twins.Document
    version: int
    before: twins.Document | None = None


class Endpoint:
    """All devices of one hub, seen from MQTT. Everything here runs in the hub's event loop."""

    def __init__(
        self, registry: Registry, faults: Faults, settings: Settings, changed: Callable[[], None]
    ) -> None:
        self.registry = registry
        self.faults = faults
        faults.taken = self.tell_faults
        self.settings = settings
        self.changed = changed
        self.events = events.Publisher(registry.host_names[0])
        self.twins: dict[str, twins.Twin] = {}
        self.sessions: dict[str, Session] = {}
        self.storage: Storage | None = None
        self.connections: dict[str, Connection] = {}
        # Every connection, also those that have not said yet who they are.
        self.open: set[Connection] = set()
        # Those that have not said yet who they are, in the order in which they came.
        self.strangers: dict[Connection, None] = {}
        # True while no device may come.
        self.is_away = False
        self.connects: dict[str, int] = {}
        # When a connection was last made or lost, as the service prints it.
        self.state_times: dict[str, str] = {}
        # Connections whose TLS handshake is never answered, by a fault.
        self.hanging: list[socket.socket] = []
        self.packets: Log[Packet] = Log(_LOGGED_PACKETS, _ALL_PACKETS, _ALL_BYTES, _packet_size)
        self.telemetry: Log[Telemetry] = Log(_MAX_TELEMETRY, _ALL_TELEMETRY, _ALL_BYTES, _telemetry_size)
        # When an identity last sent or was sent a packet, in Unix seconds.
        self.activity: dict[str, float] = {}
        self.messages: dict[str, deque[_Message]] = {}
        # Direct methods that wait for their answer, by identity and $rid.
        self._calls: dict[str, dict[str, asyncio.Future[tuple[int, bytes]]]] = {}
        self._call_id = 0
        # Where all connections are read into: the loop fills it and has it emptied in one step.
        self.inbox = memoryview(bytearray(_READ_SIZE))
        # Those that wait for a device to come and subscribe.
        self._arrivals: dict[str, set[asyncio.Future[None]]] = {}
        self._held_reports: dict[str, Callable[[], None]] = {}
        self._held_notifications: dict[str, _Held] = {}
        self._sent_notifications: dict[str, tuple[twins.Document, int]] = {}
        self._buckets: dict[str, tuple[float, float]] = {}

    # ------------------------------------------------------------------ identities

    def create(self, identity: Identity, twin: twins.Twin | None = None) -> None:
        self.twins[identity.id] = twin or twins.Twin(rules=self.settings.rules)
        self.keep(identity.id)
        self.connects[identity.id] = 0
        self.packets.add(identity.id)
        self.telemetry.add(identity.id)
        self.messages[identity.id] = deque()
        self._tell_of_life(identity.id, "createDeviceIdentity")
        self.changed()

    def delete(self, identity_id: str) -> None:
        self.drop(identity_id)
        self._tell_of_life(identity_id, "deleteDeviceIdentity")
        self.packets.remove(identity_id)
        self.telemetry.remove(identity_id)
        for table in (self.twins, self.sessions, self.connects, self.activity, self.messages):
            table.pop(identity_id, None)
        self.state_times.pop(identity_id, None)
        for held in (self._sent_notifications, self._held_notifications, self._held_reports):
            held.pop(identity_id, None)
        if self.storage is not None:
            self.storage.remove(identity_id)
        self.changed()

    def _tell_of_life(self, identity_id: str, operation: str) -> None:
        if self.events.wants(events.LIFECYCLE):
            self.events.notify(events.LIFECYCLE, identity_id, operation, self._told_twin(identity_id))

    def _told_twin(self, identity_id: str) -> twins.Document:
        device, slash, module = identity_id.partition("/")
        head = {"deviceId": device, "moduleId": module} if slash else {"deviceId": device}
        return {**head, **self.twins[identity_id].service_view()}

    def keep(self, identity_id: str) -> None:
        """Take notice of the identity as it is now; the storage, if there is one, holds it."""
        self.registry.note(self.registry.identities[identity_id])
        if self.storage is not None:
            session = self.sessions.get(identity_id)
            kept = None if session is None or not session.persistent else session.subscriptions
            self.storage.save(self.registry.identities[identity_id], self.twins[identity_id], kept)

    def restore(self, older: dict[str, twins.Twin]) -> None:
        """Have these twins, new ones for identities that are younger, and end every connection."""
        rules = self.settings.rules
        self.twins = {name: older.get(name) or twins.Twin(rules=rules) for name in self.twins}
        for table in (self._sent_notifications, self._held_notifications, self._held_reports):
            table.clear()
        for name in self.twins:
            self.keep(name)
        self.drop_all()
        self.changed()

    def drop(self, identity_id: str) -> None:
        """End the identity's connection, like a network that is gone."""
        connection = self.connections.get(identity_id)
        if connection is not None:
            connection.abort()

    def drop_with_modules(self, device_id: str) -> None:
        """End the device's connection and those of its modules."""
        for name in list(self.connections):
            if name == device_id or name.startswith(device_id + "/"):
                self.drop(name)

    def twin_view(self, identity: Identity) -> twins.Document:
        """The whole twin document as the back end sees it, in a copy."""
        head: twins.Document = {"deviceId": identity.device_id}
        if identity.module_id is not None:
            head["moduleId"] = identity.module_id
        primary, secondary = identity.thumbprints
        return {
            **head,
            "deviceEtag": identity.etag,
            "status": "enabled" if identity.enabled else "disabled",
            "statusUpdateTime": twins.NEVER,
            "connectionState": "Connected" if identity.id in self.connections else "Disconnected",
            "lastActivityTime": self.last_activity(identity.id),
            "cloudToDeviceMessageCount": len(self.messages[identity.id]),
            "authenticationType": identity.authentication,
            "x509Thumbprint": {"primaryThumbprint": primary, "secondaryThumbprint": secondary},
            "modelId": identity.model_id,
            **self.twins[identity.id].service_view(),
            "capabilities": {"iotEdge": identity.is_edge},
        }

    def last_activity(self, identity_id: str) -> str:
        """When the identity was last heard of, as the service prints it."""
        at = self.activity.get(identity_id)
        return twins.NEVER if at is None else twins.printed(at)

    def drop_all(self) -> None:
        for connection in list(self.open):
            connection.abort()

    # ------------------------------------------------------------------ the back end's writes

    def update_twin(self, identity_id: str, body: twins.Document) -> None:
        """Merge {"tags": ..., "properties": {"desired": ...}} into a twin and tell the device.

        A section that is null is emptied. Invalid, and nothing changed, if the hub refuses it.
        """
        before = self.twins[identity_id]
        properties = _properties(body)
        twin = copy.deepcopy(before)
        change: twins.Document = {}
        notification = None
        if "tags" in body:
            tags = dict.fromkeys(before.tags) if body["tags"] is None else body["tags"]
            twin.patch_tags(tags)
            change["tags"] = tags
        if "desired" in properties:
            desired = properties["desired"]
            desired = dict.fromkeys(before.desired) if desired is None else desired
            notification = twin.patch_desired(desired)
            change["properties"] = {"desired": twin.desired_change(notification or {})}
        self._write(identity_id, twin, notification)
        if change and self.events.wants(events.TWINS):
            body = {"version": twin.version, **change}
            self.events.notify(events.TWINS, identity_id, "updateTwin", body)

    def replace_twin(self, identity_id: str, body: twins.Document) -> None:
        """Put {"tags": ..., "properties": {"desired": ...}} in the place of what is there; tell the device.

        A section that is missing is emptied. Invalid, and nothing changed, if the hub refuses it.
        """
        before = self.twins[identity_id]
        tags, properties = _section(body, "tags"), _properties(body)
        twin = copy.deepcopy(before)
        twins.check(tags, nulls=False, rules=twin.rules)
        twin.tags = {}
        twin.patch_tags(tags)
        notification = None
        if "desired" in properties or before.desired:
            notification = twin.replace_desired(_section(properties, "desired"))
        self._write(identity_id, twin, notification)
        if self.events.wants(events.TWINS):
            self.events.notify(events.TWINS, identity_id, "replaceTwin", self._told_twin(identity_id))

    def _write(self, identity_id: str, twin: twins.Twin, notification: twins.Document | None) -> None:
        # One request is one step of the etag, whatever it wrote.
        twin.etag_counter = self.twins[identity_id].etag_counter + 1
        self.twins[identity_id] = twin
        self._notify(identity_id, notification)

    # ------------------------------------------------------------------ desired notifications

    def _notify(self, identity_id: str, patch: twins.Document | None) -> None:
        """Tell the device of a change of its desired properties; patch None: there is nothing to tell."""
        self.keep(identity_id)
        self.changed()
        if patch is None:
            return
        version = self.twins[identity_id].desired_version
        older = self._sent_notifications.get(identity_id)
        self._sent_notifications[identity_id] = (patch, version)
        connection = self.connections.get(identity_id)
        if connection is None or connection.granted(_DESIRED_FILTER) is None:
            return  # nothing is sent that could go wrong
        take = self.faults.take
        held = self._held_notifications.pop(identity_id, None)
        if held is not None and held.connection is not connection:
            held = None  # what was on its way has ended with its connection
        if held is not None and held.before is not None:
            self.send_notification(identity_id, twins.joined(held.before, held.patch, patch), version)
            return
        if held is not None:
            self.send_notification(identity_id, patch, version)
            self.send_notification(identity_id, held.patch, held.version)
            return
        if take("notification_lost", identity_id):
            return
        if take("notification_reordered", identity_id):
            self._held_notifications[identity_id] = _Held(connection, patch, version)
            return
        if take("notification_coalesced", identity_id):
            before = self.twins[identity_id].former_desired
            self._held_notifications[identity_id] = _Held(connection, patch, version, before)
            return
        late = take("notification_late", identity_id)
        if late:

            def send_late() -> None:
                # A message that is on its way ends with its connection.
                if self.connections.get(identity_id) is connection:
                    self.send_notification(identity_id, patch, version)

            asyncio.get_running_loop().call_later(late["seconds_late"], send_late)
            return
        self.send_notification(identity_id, patch, version)
        if take("notification_doubled", identity_id):
            self.send_notification(identity_id, patch, version)
        if older is not None and take("notification_stale", identity_id):
            self.send_notification(identity_id, *older)

    def send_notification(
        self, identity_id: str, patch: twins.Document, version: int, topic_version: int | None = None
    ) -> None:
        """Send it to the connection that there is now; nothing is kept for later."""
        connection = self.connections.get(identity_id)
        if connection is not None:
            body = twins.encode({**patch, "$version": version})
            shown = version if topic_version is None else topic_version
            connection.deliver(
                _DESIRED_FILTER, f"$iothub/twin/PATCH/properties/desired/?$version={shown}", body
            )

    # ------------------------------------------------------------------ what goes wrong

    def add_fault(self, fault: Fault) -> Fault:
        self.faults.add(fault)
        self.tell_faults()
        return fault

    def clear_faults(self, chosen: Fault | None = None) -> None:
        """Have this fault, or none at all, happen any more. Handshakes that hang end."""
        for fault in [chosen] if chosen is not None else self.faults.active():
            fault.clear()
        if not any(fault.kind == "hanging_tls" for fault in self.faults.active()):
            for raw in self.hanging:
                raw.close()
            self.hanging = []
        self.tell_faults()

    def tell_faults(self) -> None:
        """Tell whoever listens which faults are active now."""
        if self.events.wants(events.FAULTS):
            body = [fault.as_dict() for fault in self.faults.active()]
            self.events.publish(events.FAULTS, "", {}, {}, body)

    def forget_sessions(self) -> None:
        """Forget what devices subscribed to and which messages wait for them; connected ones go deaf."""
        self.sessions.clear()
        for connection in self.connections.values():
            connection.forget()
        for name in self.registry.identities:
            self.keep(name)
        for waiting in self.messages.values():
            waiting.clear()

    # ------------------------------------------------------------------ cloud-to-device messages

    def send_c2d(self, identity_id: str, payload: bytes, bag: str) -> None:
        if len(_devicebound(identity_id) + bag) + len(payload) > _MAX_C2D_SIZE:
            raise ValueError("a cloud-to-device message has 64 KB at most, its properties included")
        waiting = self.messages[identity_id]
        if len(waiting) >= _MAX_C2D:
            raise ValueError(f"{_MAX_C2D} messages wait for {identity_id!r} already")
        waiting.append(_Message(payload, bag))
        connection = self.connections.get(identity_id)
        if connection is not None:
            connection.deliver_messages()

    # ------------------------------------------------------------------ direct methods

    async def invoke(
        self, identity_id: str, name: str, payload: bytes, connect_within: float, respond_within: float
    ) -> tuple[int, bytes]:
        """Have a device perform a direct method: its status and payload, which is JSON or empty.

        connect_within: seconds to wait for a device that is not there. respond_within: seconds for its
        answer. MethodFailed: there is none.
        """
        if len(payload) > _MAX_METHOD_PAYLOAD:
            raise MethodFailed(413001, "A direct method's payload has 128 KB at most.")
        calls = self._calls.setdefault(identity_id, {})
        if len(calls) >= _MAX_CALLS:
            raise MethodFailed(403800, f"{_MAX_CALLS} direct methods wait for the device already.")
        loop = asyncio.get_running_loop()
        self._call_id += 1
        request_id = f"{self._call_id:x}"
        answer = calls[request_id] = loop.create_future()
        try:
            if not self._takes_methods(identity_id) and connect_within:
                await self._arrival(identity_id, connect_within)
            if not self._takes_methods(identity_id):
                raise MethodFailed(404103, "The operation failed because the requested device isn't online.")
            topic = f"$iothub/methods/POST/{quote(name, safe='')}/?$rid={request_id}"
            self.connections[identity_id].deliver(_METHOD_FILTER, topic, payload)
            return await asyncio.wait_for(answer, respond_within)
        except asyncio.TimeoutError:
            raise MethodFailed(504101, "Timed out waiting for the response from device.") from None
        finally:
            if answer.done() and not answer.cancelled():
                answer.exception()  # seen, also when nobody waits for it any more
            calls.pop(request_id, None)
            if not calls:
                self._calls.pop(identity_id, None)

    def _takes_methods(self, identity_id: str) -> bool:
        connection = self.connections.get(identity_id)
        return connection is not None and connection.granted(_METHOD_FILTER) is not None

    async def _arrival(self, identity_id: str, within: float) -> None:
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals.setdefault(identity_id, set()).add(arrived)
        try:
            await asyncio.wait({arrived}, timeout=within)
        finally:
            waiting = self._arrivals.get(identity_id, set())
            waiting.discard(arrived)
            if not waiting:
                self._arrivals.pop(identity_id, None)

    def arrived(self, identity_id: str) -> None:
        """The device is connected or has subscribed: methods that waited for it may go."""
        if identity_id in self._arrivals and self._takes_methods(identity_id):
            for arrived in self._arrivals.pop(identity_id):
                if not arrived.done():
                    arrived.set_result(None)

    def left(self, identity_id: str) -> None:
        """The device's connection has ended: nobody will answer."""
        for answer in self._calls.get(identity_id, {}).values():
            if not answer.done():
                answer.set_exception(
                    MethodFailed(404104, "The device closed its connection before it answered.")
                )

    def method_answered(self, identity_id: str, request_id: str, status: int, payload: bytes) -> None:
        """Take a device's answer; one that nobody waits for any more is dropped."""
        answer = self._calls.get(identity_id, {}).get(request_id)
        if answer is not None and not answer.done():
            answer.set_result((status, payload))

    # ------------------------------------------------------------------ twin operations

    def throttled(self, operation: str) -> bool:
        """Take one from the operation's token bucket; True if it is empty."""
        if self.settings.throttle is None:
            return False
        rate = self.settings.throttle[0 if operation == "retrieve" else 1]
        # The bucket holds a second's worth, and one at least: less than one a second is not none.
        most = max(rate, 1.0) if rate else 0.0
        now = time.monotonic()
        level, at = self._buckets.get(operation, (most, now))
        level = min(most, level + (now - at) * rate)
        enough = level >= 1
        self._buckets[operation] = (level - 1 if enough else level, now)
        return not enough

    def hold_report(self, identity_id: str, apply: Callable[[], None]) -> None:
        self._held_reports[identity_id] = apply

    def release_report(self, identity_id: str) -> None:
        apply = self._held_reports.pop(identity_id, None)
        if apply is not None:
            apply()


class Connection(asyncio.BufferedProtocol):
    """One TCP connection of a device."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._faults = endpoint.faults
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._claim: Claim | None = None
        self._id = ""
        self._session = Session()
        self._will: tuple[str, bytes] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._silence = 0.0
        self._heard = 0.0
        self._deaf = False
        # True between CONNECT and a slow CONNACK: what comes meanwhile waits.
        self._paused = False
        self._packet_id = 0
        self._unacked: dict[int, _Message | None] = {}
        self._early: list[Packet] = []

    # ------------------------------------------------------------------ asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's transport
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        strangers = self._endpoint.strangers
        if len(strangers) >= _MAX_STRANGERS:
            # Who has kept silent longest makes room.
            next(iter(strangers)).abort()
        self._endpoint.open.add(self)
        strangers[self] = None
        self._later(self._endpoint.settings.connect_within, self._check_connected)

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._endpoint.inbox

    def buffer_updated(self, count: int) -> None:
        self.data_received(self._endpoint.inbox[:count])

    def data_received(self, data: bytes | memoryview) -> None:
        if self._deaf or self._transport is None:
            return
        self._buffer += data
        if self._paused and len(self._buffer) > MAX_PACKET:
            self.abort()
            return
        try:
            while self._transport is not None and not self._deaf and not self._paused and self._take_packet():
                pass
        except Violation as error:
            _log.info("%s: connection ended: %s", self._id or "unknown device", error)
            self.abort()
        except Exception:  # noqa: BLE001  # no device may take the hub down
            _log.exception("%s: connection ended by an error of the hub", self._id or "unknown device")
            self.abort()
        self._endpoint.changed()

    def connection_lost(self, _error: Exception | None) -> None:
        if self._transport is not None:
            # Python 3.10 takes a TLS transport that the peer has closed for one that leaks.
            self._transport.abort()
        self._transport = None
        for timer in self._timers:
            timer.cancel()
        self._endpoint.open.discard(self)
        identities = self._endpoint.registry.identities
        if self._will is not None and identities.get(self._id) is self._identity():
            topic, payload = self._will
            self._will = None
            self._telemetry(topic, payload, {"iothub-MessageType": "Will"})
        self._leave()
        self._endpoint.changed()

    def abort(self) -> None:
        """End it now, without a DISCONNECT, which MQTT 3.1.1 does not have for servers."""
        self._leave()
        if self._transport is not None:
            self._transport.abort()

    def _end(self) -> None:
        """End it after what was written has gone out."""
        self._leave()
        if self._transport is not None:
            self._transport.close()

    def _leave(self) -> None:
        # The loop tells connection_lost only later; until then nothing more may happen here.
        self._deaf = True
        endpoint = self._endpoint
        endpoint.strangers.pop(self, None)
        if endpoint.connections.get(self._id) is self:
            del endpoint.connections[self._id]
            self._session.left = self._loop.time()
            endpoint.state_times[self._id] = twins.now()
            endpoint.left(self._id)
            if endpoint.events.wants(events.CONNECTIONS):
                endpoint.events.notify(events.CONNECTIONS, self._id, "deviceDisconnected", None)
        if not self._session.persistent and endpoint.sessions.get(self._id) is self._session:
            del endpoint.sessions[self._id]

    def _later(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        self._timers = [
            timer for timer in self._timers if not timer.cancelled() and timer.when() > self._loop.time()
        ]
        self._timers.append(self._loop.call_later(max(0.0, seconds), call, *arguments))

    def _check_connected(self) -> None:
        if self._claim is None and not self._paused:
            self.abort()

    def _check_silence(self) -> None:
        left = self._heard + self._silence - self._loop.time()
        if left <= 0:
            _log.info("%s: connection ended: silent for 1.5 times its keep-alive", self._id)
            self.abort()
        else:
            self._later(left, self._check_silence)

    # ------------------------------------------------------------------ packets in

    def _take_packet(self) -> bool:
        """Handle the packet at the head of the buffer; False if it is not whole yet."""
        buffer = self._buffer
        length = shift = 0
        at = 1
        while True:
            if at >= len(buffer):
                return False
            byte = buffer[at]
            length |= (byte & 127) << shift
            at += 1
            if byte < 128:
                break
            shift += 7
            if shift > 21:
                raise Violation("a remaining length of more than four bytes")
        if length > MAX_PACKET:
            raise Violation(f"a packet of {length} bytes; {MAX_PACKET} are the most")
        if len(buffer) < at + length:
            return False
        first = buffer[0]
        body = bytes(buffer[at : at + length])
        del buffer[: at + length]
        self._heard = self._loop.time()
        self._handle(first >> 4, first & 15, body)
        return True

    def _handle(self, kind: int, flags: int, body: bytes) -> None:
        if (kind == 1) is (self._claim is not None):
            raise Violation("a second CONNECT" if kind == 1 else "a packet before CONNECT")
        if kind == 3:
            self._publish(flags, body)
            return
        if kind == 1:
            self._connect(flags, body)
            return
        if flags != (2 if kind in (8, 10) else 0):
            raise Violation("reserved flags")
        if kind != 8:
            self._log_packet("in", kind)
        if kind == 4:
            self._puback(body)
        elif kind == 8:
            self._subscribe(body)
        elif kind == 10:
            self._unsubscribe(body)
        elif body:
            raise Violation("a packet that is longer than its fields")
        elif kind == 12:
            self._send(13, 0, b"")
        elif kind == 14:
            self._will = None
            self._end()
        else:
            raise Violation(f"packet type {kind}")

    def _log_packet(
        self, direction: str, kind: int, topic: str | None = None, payload: bytes = b"", qos: int = 0
    ) -> None:
        now = time.time()
        packet = Packet(direction, _KINDS.get(kind, str(kind)), topic, payload, qos, now)
        if self._id not in self._endpoint.packets:
            # Before CONNECT is believed: handed over if it is.
            self._early.append(packet)
        else:
            self._endpoint.packets.append(self._id, packet)
            self._endpoint.activity[self._id] = now
            if self._endpoint.events.wants(events.PACKETS):
                self._endpoint.events.publish(events.PACKETS, self._id, {}, {}, told(packet))
            if _log.isEnabledFor(logging.DEBUG):
                _log.debug("%s %s %s %s %r", self._id, direction, packet.kind, topic or "", payload[:200])

    # ------------------------------------------------------------------ CONNECT

    def _connect(self, flags: int, body: bytes) -> None:
        reader = _Reader(body)
        protocol, level, connect_flags, keep_alive = (
            reader.text(),
            reader.byte(),
            reader.byte(),
            reader.number(),
        )
        if flags or protocol not in ("MQTT", "MQIsdp"):
            raise Violation("no CONNECT of MQTT 3.1.1")
        if protocol != "MQTT" or level != 4:
            self._send(2, 0, b"\0\1")
            self._end()
            return
        client_id = reader.text()
        will = None
        if connect_flags & 4:
            will = (reader.text(), reader.data())
        user_name = reader.text() if connect_flags & 128 else ""
        # Binary data to MQTT. What is not UTF-8 is no token, and refused as such.
        password = reader.data().decode(errors="replace") if connect_flags & 64 else ""
        reader.end()
        if connect_flags & 1 or (not connect_flags & 4 and connect_flags & 56):
            raise Violation("reserved CONNECT flags")
        if connect_flags & 16:
            raise Violation("a will with QoS 2")
        if connect_flags & 192 == 64:
            raise Violation("a password without a user name")
        self._log_packet("in", 1)
        self._silence = min(keep_alive * 1.5, _MAX_KEEP_ALIVE) if keep_alive else _MAX_KEEP_ALIVE
        clean = bool(connect_flags & 2)
        known = client_id if client_id in self._endpoint.twins else None
        if self._faults.take("half_open", known):
            self._deaf = True
            return
        slow = self._faults.take("connack_slow", known)
        if slow:
            self._paused = True
            self._later(slow["seconds_late"], self._authenticate, client_id, user_name, password, will, clean)
            return
        self._authenticate(client_id, user_name, password, will, clean)

    def _authenticate(
        self, client_id: str, user_name: str, password: str, will: tuple[str, bytes] | None, clean: bool
    ) -> None:
        self._paused = False
        if self._transport is None:
            return
        known = client_id if client_id in self._endpoint.twins else None
        refusal = self._faults.take("connack_refused", known)
        skew = self._faults.take("clock_skew", known)
        now = time.time() + (skew["offset"] if skew else 0.0)
        try:
            shown = self._transport.get_extra_info("client_certificate")
            claim = self._endpoint.registry.authenticate(client_id, user_name, password, now, shown)
            if will is not None and _telemetry_properties(claim.identity, will[0]) is None:
                raise Refused("the will is not for the telemetry topic")
        except (Refused, Violation) as error:
            _log.info("CONNECT refused: %s", error)
            code = self._endpoint.settings.disabled_code if isinstance(error, Disabled) else 5
        else:
            code = 0
        if refusal:
            code = refusal["code"]
        if code:
            self._send(2, 0, bytes((0, code)))
            self._end()
            return
        self._accept(claim, will, clean, now)

    def _accept(self, claim: Claim, will: tuple[str, bytes] | None, clean: bool, now: float) -> None:
        endpoint = self._endpoint
        self._claim, self._will = claim, will
        self._id = claim.identity.id
        # One connection an identity: the newer one wins.
        endpoint.drop(self._id)
        endpoint.strangers.pop(self, None)
        endpoint.connections[self._id] = self
        endpoint.connects[self._id] += 1
        endpoint.state_times[self._id] = twins.now()
        endpoint.packets.extend(self._id, self._early)
        if endpoint.events.wants(events.PACKETS):
            for packet in self._early:
                self._endpoint.events.publish(events.PACKETS, self._id, {}, {}, told(packet))
        if clean or self._faults.take("session_forgotten", self._id):
            endpoint.sessions.pop(self._id, None)
        if clean:
            endpoint.messages[self._id].clear()
        kept, lifetime = endpoint.sessions.get(self._id), endpoint.settings.session_lifetime
        if kept is not None and lifetime is not None and self._loop.time() > kept.left + lifetime:
            del endpoint.sessions[self._id]
        present = self._id in endpoint.sessions
        self._session = endpoint.sessions.setdefault(self._id, Session())
        self._session.persistent = not clean
        endpoint.keep(self._id)
        self._heard = self._loop.time()
        self._check_silence()
        if claim.expiry != math.inf:
            self._later(claim.expiry + endpoint.settings.token_grace - now, self._expire)
        if endpoint.events.wants(events.CONNECTIONS):
            endpoint.events.notify(events.CONNECTIONS, self._id, "deviceConnected", None)
        self._send(2, 0, bytes((1 if present else 0, 0)))
        self.deliver_messages()
        endpoint.arrived(self._id)
        endpoint.changed()
        if self._buffer:
            # What came in while CONNACK was slow.
            self._loop.call_soon(self.data_received, b"")

    def _expire(self) -> None:
        _log.info("%s: connection ended: its token has expired", self._id)
        self.abort()

    # ------------------------------------------------------------------ SUBSCRIBE

    def _subscribe(self, body: bytes) -> None:
        reader = _Reader(body)
        packet_id = reader.number()
        wanted = []
        while reader.left:
            wanted.append((reader.text(), reader.byte()))
        if not wanted or packet_id == 0:
            raise Violation("a SUBSCRIBE without filters or packet identifier")
        self._log_packet("in", 8, " ".join(name for name, _ in wanted), qos=max(qos for _, qos in wanted))
        if self._faults.take("suback_refused", self._id):
            codes = b"\x80" * len(wanted)
        else:
            for name, qos in wanted:
                if qos > 2:
                    raise Violation("a subscription with a QoS that there is not")
                if name not in self._filters():
                    raise Violation(f"a subscription to {name!r}, which IoT Hub does not know")
            self._session.subscriptions.update((name, min(qos, 1)) for name, qos in wanted)
            # Here again, if it was forgotten under the open connection.
            self._endpoint.sessions.setdefault(self._id, self._session)
            self._endpoint.keep(self._id)
            codes = bytes(min(qos, 1) for _, qos in wanted)
        answer = packet_id.to_bytes(2, "big") + codes
        late = self._faults.take("suback_late", self._id)
        if late:
            self._later(late["seconds_late"], self._send, 9, 0, answer)
        else:
            self._send(9, 0, answer)
        self.deliver_messages()
        self._endpoint.arrived(self._id)

    def _filters(self) -> tuple[str, ...]:
        identity = self._identity()
        if identity.module_id is None:
            return (*_TWIN_FILTERS, _devicebound(identity.device_id) + "#")
        base = f"devices/{identity.device_id}/modules/{identity.module_id}"
        return (*_TWIN_FILTERS, f"{base}/#", f"{base}/inputs/#")

    def _unsubscribe(self, body: bytes) -> None:
        reader = _Reader(body)
        packet_id = reader.number()
        names = []
        while reader.left:
            names.append(reader.text())
        if not names or packet_id == 0:
            raise Violation("an UNSUBSCRIBE without filters or packet identifier")
        for name in names:
            self._session.subscriptions.pop(name, None)
        self._endpoint.keep(self._id)
        self._send(11, 0, packet_id.to_bytes(2, "big"))

    # ------------------------------------------------------------------ PUBLISH in

    def _publish(self, flags: int, body: bytes) -> None:
        reader = _Reader(body)
        topic = reader.text()
        qos = (flags >> 1) & 3
        if qos > 1:
            raise Violation("a PUBLISH with QoS 2")
        packet_id = reader.number() if qos else 0
        if qos and not packet_id:
            raise Violation("a PUBLISH without packet identifier")
        if "#" in topic or "+" in topic:
            raise Violation("a PUBLISH to a topic with wildcards")  # MQTT 3.1.1, 3.3.2.1
        payload = reader.rest()
        self._log_packet("in", 3, topic, payload, qos)

        def acknowledge() -> None:
            if qos:
                self._send(4, 0, packet_id.to_bytes(2, "big"))

        path, mark, query = topic.partition("?")
        path = path.removesuffix("/")
        if path == _RETRIEVE_PATH and mark:
            self._operation("retrieve", query, payload, acknowledge)
        elif path == _REPORT_PATH and mark:
            self._operation("report", query, payload, acknowledge)
        elif topic.startswith("$iothub/methods/res/"):
            self._method_answer(path, query, payload)
            acknowledge()
        else:
            extra = {}
            if flags & 1:
                extra[self._endpoint.settings.retain_property] = "true"
            if flags & 8:
                extra["mqtt-dup"] = "true"
            self._telemetry(topic, payload, extra)
            acknowledge()

    def _method_answer(self, path: str, query: str, payload: bytes) -> None:
        match = _METHOD_ANSWER.match(path)
        if match is None:
            raise Violation("an answer to a direct method without a status")
        if len(payload) > _MAX_METHOD_PAYLOAD:
            raise Violation("an answer to a direct method of more than 128 KB")
        request_id = _parameters(query).get("$rid", "")
        self._endpoint.method_answered(self._id, request_id, int(match[1]), payload)

    def _telemetry(self, topic: str, payload: bytes, extra: dict[str, str]) -> None:
        found = _telemetry_properties(self._identity(), topic)
        if found is None:
            raise Violation(f"a PUBLISH to {topic!r}, which IoT Hub does not know")
        properties, system = found
        properties = {**properties, **extra}
        self._endpoint.telemetry.append(self._id, Telemetry(payload, properties, system))
        if self._endpoint.events.wants(events.TELEMETRY):
            body = payload.decode(errors="replace")
            self._endpoint.events.publish(events.TELEMETRY, self._id, properties, system, body)

    # ------------------------------------------------------------------ twin operations

    def _operation(self, operation: str, query: str, payload: bytes, acknowledge: Callable[[], None]) -> None:
        parameters = _parameters(query)
        request_id = parameters.get("$rid", "")
        if operation == "retrieve" and not request_id:
            raise Violation("a retrieve without $rid")
        if len(request_id.encode()) > _MAX_RID:
            raise Violation("a $rid that is too long for the topic of the answer")
        take = self._faults.take
        if take("disconnect", self._id, operation):
            raise Violation("a fault that was asked for")
        version_text = parameters.get("$version")
        if version_text is not None and not re.fullmatch("[0-9]{1,19}", version_text):
            raise Violation("a $version that is no number")
        early = take("answer_before_puback", self._id, operation)
        if not early:
            acknowledge()

        def finish() -> None:
            if self._transport is None:
                # Held back, and gone with its connection.
                return
            self._perform(operation, request_id, payload, None if version_text is None else int(version_text))

        if operation == "report" and take("reports_reordered", self._id, operation):
            self._endpoint.hold_report(self._id, finish)
        else:
            finish()
            if operation == "report":
                self._endpoint.release_report(self._id)
        if early:
            acknowledge()

    def _perform(self, operation: str, request_id: str, payload: bytes, version: int | None) -> None:
        status, body, new_version = self._outcome(operation, payload, version)
        if not request_id:
            return
        topic = f"$iothub/twin/res/{status}/?$rid={request_id}"
        if new_version is not None:
            topic += f"&$version={new_version}"
        take = self._faults.take
        if take("answer_lost", self._id, operation):
            return
        if take("cut_in_packet", self._id, operation):
            packet = _packet(3, 0, _text(topic) + body)
            if self._transport is not None:
                self._transport.write(packet[: len(packet) // 2])
            self._end()
            return
        late = take("answer_late", self._id, operation)
        if late:
            self._later(late["seconds_late"], self.deliver, _RESPONSE_FILTER, topic, body)
            return
        # Counted before the client can act on the first of the two.
        doubled = take("answer_doubled", self._id, operation)
        self.deliver(_RESPONSE_FILTER, topic, body)
        if doubled:
            self.deliver(_RESPONSE_FILTER, topic, body)

    def _outcome(self, operation: str, payload: bytes, version: int | None) -> tuple[int, bytes, int | None]:
        """Do it: status, body, and the version that the topic tells."""
        endpoint = self._endpoint
        if self._faults.take("quota", self._id, operation):
            return (
                403,
                self._error(403002, "Total number of messages on IotHub exceeded the allocated quota."),
                None,
            )
        asked = self._faults.take("answer_status", self._id, operation)
        if asked:
            status = asked["status"]
            if asked["body"] is not None:
                return status, b"" if asked["body"] == "empty" else asked["body"].encode(), None
            return (
                status,
                self._error(asked["error_code"] or status * 1000 + 1, "A fault that was asked for."),
                None,
            )
        if endpoint.throttled(operation):
            return 429, self._error(429001, "Throttled."), None
        twin = endpoint.twins[self._id]
        if operation == "retrieve":
            wrapped = endpoint.settings.retrieve_body == "properties"
            return 200, b'{"properties":%b}' % twin.device_view() if wrapped else twin.device_view(), None
        try:
            if self._claim is not None and self._claim.api_version is None:
                raise twins.Invalid(400004, "The user name has no api-version.")
            patch = twin.patch_reported(payload, version)
            endpoint.keep(self._id)
        except twins.Invalid as error:
            return error.status, self._error(error.code, error.message), None
        if endpoint.events.wants(events.TWINS):
            change = {"version": twin.version, "properties": {"reported": twin.reported_change(patch)}}
            endpoint.events.notify(events.TWINS, self._id, "updateTwin", change)
        return 204, b"", twin.reported_version

    def _error(self, code: int, message: str) -> bytes:
        if self._endpoint.settings.error_body == "empty":
            return b""
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        body = {
            "errorCode": code,
            "trackingId": f"{uuid.uuid4().hex}-G:0-TimeStamp:{now}",
            "message": message,
            "timestampUtc": now,
        }
        return json.dumps(body).encode()

    # ------------------------------------------------------------------ packets out

    def granted(self, subscription: str) -> int | None:
        """The QoS of a subscription; None if there is none."""
        return self._session.subscriptions.get(subscription)

    def deliver(self, subscription: str, topic: str, payload: bytes) -> None:
        """Send a twin message, if the device subscribed to it; else it is dropped."""
        granted = self.granted(subscription)
        if granted is None:
            return
        qos = granted if self._endpoint.settings.answer_qos == "granted" else 0
        self._deliver(topic, payload, qos, None)

    def send_raw(self, topic: str, payload: bytes) -> None:
        """Send any PUBLISH, as it is."""
        self._deliver(topic, payload, 0, None)

    def forget(self) -> None:
        """Lose the session under the open connection."""
        self._session.subscriptions.clear()

    def deliver_messages(self) -> None:
        """Send the cloud-to-device messages that wait, if the device subscribed to them."""
        topic = _devicebound(self._identity().device_id)
        qos = self._session.subscriptions.get(topic + "#")
        if qos is None:
            return
        waiting = self._endpoint.messages[self._id]
        in_flight = [message for message in self._unacked.values() if message is not None]
        for message in list(waiting):
            if not any(message is one for one in in_flight):
                self._deliver(topic + message.bag, message.payload, qos, message)
                if not qos:
                    waiting.remove(message)

    def _deliver(self, topic: str, payload: bytes, qos: int, message: _Message | None) -> None:
        head = _text(topic)
        flags = qos << 1
        if qos:
            self._packet_id = self._packet_id % 65535 + 1
            self._unacked[self._packet_id] = message
            head += self._packet_id.to_bytes(2, "big")
            if message is not None:
                flags |= 8 if message.delivered else 0
                message.delivered = True
        self._send(3, flags, head + payload, topic, payload, qos)

    def _puback(self, body: bytes) -> None:
        reader = _Reader(body)
        packet_id = reader.number()
        reader.end()
        if packet_id not in self._unacked:
            raise Violation("a PUBACK for nothing that was sent at QoS 1")
        message = self._unacked.pop(packet_id)
        waiting = self._endpoint.messages[self._id]
        for one in waiting:
            if one is message:
                waiting.remove(one)
                break

    def _send(
        self, kind: int, flags: int, body: bytes, topic: str | None = None, payload: bytes = b"", qos: int = 0
    ) -> None:
        transport = self._transport
        if transport is None or self._deaf:
            return
        self._log_packet("out", kind, topic, payload, qos)
        transport.write(_packet(kind, flags, body))
        if transport.get_write_buffer_size() > _MAX_BACKLOG:
            _log.info("%s: connection ended: it does not read", self._id)
            self.abort()

    def _identity(self) -> Identity:
        if self._claim is None:
            raise Violation("a packet before CONNECT")
        return self._claim.identity


class _Reader:
    """Takes the fields of a packet apart; Violation where it is too short or not UTF-8."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._body) - self._at

    def _take(self, count: int) -> bytes:
        if self.left < count:
            raise Violation("a packet that is shorter than its fields")
        self._at += count
        return self._body[self._at - count : self._at]

    def byte(self) -> int:
        return self._take(1)[0]

    def number(self) -> int:
        return int.from_bytes(self._take(2), "big")

    def data(self) -> bytes:
        return self._take(self.number())

    def text(self) -> str:
        try:
            text = self.data().decode()
        except UnicodeDecodeError:
            raise Violation("a text that is not UTF-8") from None
        if "\0" in text:
            raise Violation("a text with U+0000")
        return text

    def rest(self) -> bytes:
        return self._take(self.left)

    def end(self) -> None:
        if self.left:
            raise Violation("a packet that is longer than its fields")


def told(packet: Packet) -> dict[str, Any]:
    """A packet as JSON, its payload as text and cut short."""
    return {
        "direction": packet.direction,
        "kind": packet.kind,
        "topic": packet.topic,
        "qos": packet.qos,
        "size": len(packet.payload),
        "payload": packet.payload[:_TOLD_PAYLOAD].decode(errors="replace"),
    }


def _packet_size(packet: Packet) -> int:
    return len(packet.topic or "") + len(packet.payload)


def _telemetry_size(message: Telemetry) -> int:
    properties = (*message.properties.items(), *message.system.items())
    return len(message.payload) + sum(len(name) + len(value) for name, value in properties)


def _packet(kind: int, flags: int, body: bytes) -> bytes:
    head = bytearray((kind << 4 | flags,))
    length = len(body)
    while True:
        length, digit = length >> 7, length & 127
        head.append(digit | (128 if length else 0))
        if not length:
            return bytes(head) + body


def _text(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


def _parameters(query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        parameters.setdefault(unquote(name), value)
    return parameters


def _properties(body: twins.Document) -> twins.Document:
    properties = _section(body, "properties")
    if not isinstance(properties, dict):
        raise twins.Invalid(400004, "properties is no object.")
    return properties


def _section(body: twins.Document, name: str) -> Any:
    """A member of a back end's body; what is missing or null is empty."""
    return {} if body.get(name) is None else body[name]


def _devicebound(device_id: str) -> str:
    return f"devices/{device_id}/messages/devicebound/"


def _telemetry_properties(identity: Identity, topic: str) -> tuple[dict[str, str], dict[str, str]] | None:
    """The app's and the system's properties in a telemetry topic; None if it is none of this identity's."""
    module = "" if identity.module_id is None else f"/modules/{identity.module_id}"
    base = f"devices/{identity.device_id}{module}/messages/events"
    if topic != base and not topic.startswith(base + "/"):
        return None
    properties: dict[str, str] = {}
    system: dict[str, str] = {}
    bag = topic[len(base) + 1 :].rstrip("/")
    for pair in bag.split("&") if bag else ():
        name, _, value = pair.partition("=")
        name = _decoded(name)
        if name in _SYSTEM_PROPERTIES:
            system[_SYSTEM_PROPERTIES[name]] = _decoded(value)
        else:
            properties[name] = _decoded(value)
    return properties, system


def _decoded(text: str) -> str:
    """Percent-decoded; Violation for what should have been encoded."""
    if any(c in " :/?#" for c in text):
        raise Violation("a property bag with characters that must be percent-encoded")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise Violation("a property bag that is not UTF-8") from None
