"""Every fault, as it looks on the wire; tests/test_faults.py has what a client makes of them."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.hub_wire import (
    DESIRED,
    GET,
    KEY,
    PINGREQ,
    REPORT,
    RES,
    Closed,
    Publish,
    Wire,
    connect,
    online,
    publish,
    subscribe,
    token,
    user,
)
from tests.waiting import wait_until
from twin_device.hub import Device, Fault, LocalHub
from twin_device.hub.faults import KINDS

LATE = 0.15
EMPTY = b'{"desired":{"$version":1},"reported":{"$version":1}}'


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(mqtts_port=None, mqtt_port=0) as hub:
        for name in ("dev", "other"):
            hub.create_device(name, KEY)
        yield hub


@pytest.fixture
def device(hub: LocalHub) -> Device:
    return hub.device("dev")


def got_report(wire: Wire, version: int) -> None:
    assert wire.message() == Publish(f"$iothub/twin/res/204/?$rid=r&$version={version}", b"")


def got_twin(wire: Wire) -> None:
    assert wire.message() == Publish("$iothub/twin/res/200/?$rid=g", EMPTY)


def versions(wire: Wire, count: int) -> list[tuple[int, Any]]:
    """The notifications that come, as (version, patch)."""
    found = []
    for _ in range(count):
        body = json.loads(wire.message().payload)
        found.append((body.pop("$version"), body))
    return found


def patch(device: Device, *patches: Any) -> None:
    for one in patches:
        device.patch_desired(one)


TWIN, CHANGE = publish(GET + "g"), publish(REPORT + "r", b'{"a":1}')


# ---------------------------------------------------------------------- answers


@dataclass
class Row:
    """A fault that hits once, what is sent, and what comes; then the same again, without a fault."""

    fault: dict[str, Any]
    check: Callable[[Wire, Device], Any]
    hits: int = 1

    def __str__(self) -> str:
        return "-".join(str(value) for value in self.fault.values())


def lost(wire: Wire, device: Device) -> None:
    wire.send(CHANGE).nothing_waits()
    assert device.reported == {"a": 1}
    wire.send(CHANGE)
    got_report(wire, 3)


def lost_twin(wire: Wire, device: Device) -> None:
    wire.send(CHANGE.replace(b'{"a":1}', b'{"a":2}'))
    got_report(wire, 2)
    wire.send(TWIN).nothing_waits()
    assert wire.ask(GET + "g").topic == "$iothub/twin/res/200/?$rid=g"


def late(wire: Wire, device: Device) -> None:
    began = time.monotonic()
    wire.send(TWIN).nothing_waits()
    wire.send(CHANGE)
    got_report(wire, 2)  # overtakes
    got_twin(wire)  # as it was when it was asked for
    assert LATE - 0.05 < time.monotonic() - began < 5


def doubled(wire: Wire, device: Device) -> None:
    wire.send(CHANGE)
    got_report(wire, 2)
    got_report(wire, 2)
    wire.nothing_waits()
    wire.send(CHANGE)
    got_report(wire, 3)


def status(number: int, code: int | None, payload: bytes | None = None) -> Callable[[Wire, Device], None]:
    def check(wire: Wire, device: Device) -> None:
        answer = wire.send(CHANGE).message()
        assert answer.topic == f"$iothub/twin/res/{number}/?$rid=r"
        if payload is not None:
            assert answer.payload == payload
        else:
            body = json.loads(answer.payload)
            assert body["errorCode"] == code
            assert set(body) == {"errorCode", "trackingId", "message", "timestampUtc"}
        assert device.reported_version == 1
        wire.send(CHANGE)
        got_report(wire, 2)

    return check


def before_puback(wire: Wire, device: Device) -> None:
    packet = publish(REPORT + "r", b"{}", qos=1, packet_id=5)
    wire.send(packet)
    got_report(wire, 2)
    assert wire.packet() == (0x40, b"\0\5")
    wire.send(packet)
    assert wire.packet() == (0x40, b"\0\5")
    got_report(wire, 3)


def reordered(wire: Wire, device: Device) -> None:
    wire.send(publish(REPORT + "1", b'{"a":1,"first":true}')).nothing_waits()
    assert device.reported == {}
    wire.send(TWIN)
    got_twin(wire)  # a retrieve changes nothing
    wire.send(publish(REPORT + "2", b'{"a":2}'))
    assert wire.message().topic == "$iothub/twin/res/204/?$rid=2&$version=2"
    assert wire.message().topic == "$iothub/twin/res/204/?$rid=1&$version=3"
    assert device.reported == {"a": 1, "first": True}
    wire.send(CHANGE)
    got_report(wire, 4)


def cut(wire: Wire, device: Device) -> None:
    whole = b"$iothub/twin/res/204/?$rid=r&$version=2"
    data = wire.send(CHANGE, PINGREQ).rest()
    assert data[:1] == b"\x30"
    assert 4 < len(data) < len(whole)
    assert whole.startswith(data[4:])
    assert device.reported == {"a": 1}


def cut_off(wire: Wire, device: Device) -> None:
    assert wire.send(publish(REPORT + "r", b"{}", qos=1), PINGREQ).rest() == b""
    assert device.reported_version == 1


ANSWERS = [
    Row({"kind": "answer_lost", "operation": "report"}, lost),
    Row({"kind": "answer_lost", "operation": "retrieve"}, lost_twin),
    Row({"kind": "answer_late", "operation": "retrieve", "seconds_late": LATE}, late),
    Row({"kind": "answer_doubled"}, doubled),
    Row({"kind": "answer_status"}, status(429, 429001)),
    Row({"kind": "answer_status", "status": 503}, status(503, 503001)),
    Row({"kind": "answer_status", "status": 412, "error_code": 412002}, status(412, 412002)),
    Row({"kind": "answer_status", "status": 500, "body": "empty"}, status(500, None, b"")),
    Row({"kind": "answer_status", "status": 500, "body": "<ä>"}, status(500, None, "<ä>".encode())),
    Row({"kind": "quota"}, status(403, 403002)),
    Row({"kind": "answer_before_puback"}, before_puback),
    Row({"kind": "reports_reordered"}, reordered),
    Row({"kind": "cut_in_packet", "operation": "report"}, cut),
    Row({"kind": "disconnect", "operation": "report"}, cut_off),
]


# ---------------------------------------------------------------------- notifications


def notification_lost(wire: Wire, device: Device) -> None:
    patch(device, {"a": 1}, {"a": 2})
    assert versions(wire, 1) == [(3, {"a": 2})]


def notification_doubled(wire: Wire, device: Device) -> None:
    patch(device, {"a": 1}, {"a": 2})
    assert versions(wire, 3) == [(2, {"a": 1}), (2, {"a": 1}), (3, {"a": 2})]


def notification_stale(wire: Wire, device: Device) -> None:
    patch(device, {"a": 1}, {"a": 2}, {"a": 3})
    assert versions(wire, 4) == [(2, {"a": 1}), (3, {"a": 2}), (2, {"a": 1}), (4, {"a": 3})]


def notification_reordered(wire: Wire, device: Device) -> None:
    patch(device, {"a": 1})
    wire.nothing_waits()
    patch(device, {"a": 2}, {"a": 3})
    assert versions(wire, 3) == [(3, {"a": 2}), (2, {"a": 1}), (4, {"a": 3})]


def notification_late(wire: Wire, device: Device) -> None:
    began = time.monotonic()
    patch(device, {"a": 1})
    wire.nothing_waits()
    patch(device, {"a": 2})
    assert versions(wire, 2) == [(3, {"a": 2}), (2, {"a": 1})]
    assert LATE - 0.05 < time.monotonic() - began < 5


def notification_coalesced(wire: Wire, device: Device) -> None:
    patch(device, {"a": 1, "o": {"x": 1, "y": None}, "s": 1})
    wire.nothing_waits()
    patch(device, {"a": None, "o": {"y": 2}, "s": {"t": 1}}, {"a": 3})
    assert versions(wire, 2) == [
        (3, {"a": None, "o": {"x": 1, "y": 2}, "s": {"t": 1}}),
        (4, {"a": 3}),
    ]


NOTIFICATIONS = [
    Row({"kind": "notification_lost"}, notification_lost),
    Row({"kind": "notification_doubled"}, notification_doubled),
    Row({"kind": "notification_stale"}, notification_stale),
    Row({"kind": "notification_reordered"}, notification_reordered),
    Row({"kind": "notification_late", "seconds_late": LATE}, notification_late),
    Row({"kind": "notification_coalesced"}, notification_coalesced),
]


@pytest.mark.parametrize("row", ANSWERS + NOTIFICATIONS, ids=str)
def test_while_connected(hub: LocalHub, device: Device, row: Row) -> None:
    with online(hub.mqtt_port) as wire, online(hub.mqtt_port, "other") as other:
        fault = hub.fault(device=device, times=1, **row.fault)
        # It is this device's fault only.
        other.ask(REPORT + "r", b"{}")
        hub.device("other").patch_desired({"a": 1})
        assert versions(other, 1) == [(2, {"a": 1})]
        assert (fault.hits, fault.active, hub.faults) == (0, True, [fault])
        row.check(wire, device)
        assert (fault.hits, fault.active, hub.faults) == (1, False, [])
        other.nothing_waits()


def test_a_late_notification_ends_with_its_connection(hub: LocalHub, device: Device) -> None:
    """To the twin that was created anew it would look like the next version."""
    with online(hub.mqtt_port):
        hub.fault("notification_late", device=device, times=1, seconds_late=LATE)
        device.patch_desired({"a": 1})
        device.recreate()
    with online(hub.mqtt_port) as wire:
        # This one comes after the other would have come.
        hub.fault("notification_late", device=device, times=1, seconds_late=1.5 * LATE)
        device.patch_desired({"a": 2})
        assert versions(wire, 1) == [(2, {"a": 2})]


@pytest.mark.parametrize("kind", ["notification_coalesced", "notification_reordered"])
def test_a_notification_that_is_held_ends_with_its_connection(
    hub: LocalHub, device: Device, kind: str
) -> None:
    """Joined with one of a later connection, it would take back what was written in between."""
    hub.fault(kind, device=device, times=1)
    with online(hub.mqtt_port):
        device.patch_desired({"a": 1})
    wait_until(lambda: not device.connected, "it has gone")
    device.patch_desired({"a": 2})
    with online(hub.mqtt_port) as wire:
        device.patch_desired({"b": 1})
        device.patch_desired({"b": 2})
        assert versions(wire, 2) == [(4, {"b": 1}), (5, {"b": 2})]


@pytest.mark.parametrize("earlier", [{"o": None}, {"o": 5}])
def test_coalesced_patches_that_do_not_compose(hub: LocalHub, device: Device, earlier: Any) -> None:
    device.patch_desired({"o": {"x": 1}})
    hub.fault("notification_coalesced", times=1)
    with online(hub.mqtt_port) as wire:
        patch(device, earlier, {"o": {"y": 2}})
        # Without the null the device would keep "x", which the hub has not.
        assert versions(wire, 1) == [(4, {"o": {"x": None, "y": 2}})]
        assert device.desired == {"o": {"y": 2}}


def test_a_notification_that_nobody_would_get_is_no_hit(hub: LocalHub, device: Device) -> None:
    fault = hub.fault("notification_lost", times=1)
    device.patch_desired({"offline": 1})
    with online(hub.mqtt_port, "dev", KEY, RES) as wire:
        device.patch_desired({"deaf": 1})
        wire.subscribe(DESIRED)
        assert fault.hits == 0
        patch(device, {"a": 1}, {"a": 2})
        assert versions(wire, 1) == [(5, {"a": 2})]
        assert fault.hits == 1


# ---------------------------------------------------------------------- connecting


HELLO = connect("dev", user(), token())


def suback_refused(wire: Wire) -> None:
    wire.connect()
    assert wire.subscribe(RES, (DESIRED, 1)) == [0x80, 0x80]
    wire.send(TWIN).nothing_waits()
    assert wire.subscribe(RES, (DESIRED, 1)) == [0, 1]


def suback_late(wire: Wire) -> None:
    wire.connect()
    began = time.monotonic()
    wire.send(subscribe((RES, 1)), TWIN)
    got_twin(wire)
    assert wire.packet() == (0x90, b"\0\1\1")
    assert time.monotonic() - began > LATE - 0.05


def session_forgotten(wire: Wire) -> None:
    assert wire.connect(clean=False) == 0
    wire.send(TWIN).nothing_waits()


def connack_refused(code: int) -> Callable[[Wire], None]:
    def check(wire: Wire) -> None:
        assert wire.send(HELLO).rest() == bytes((0x20, 2, 0, code))

    return check


def connack_slow(wire: Wire) -> None:
    began = time.monotonic()
    wire.send(HELLO, subscribe((RES, 0)), TWIN)
    assert wire.packet() == (0x20, b"\0\0")
    assert time.monotonic() - began > LATE - 0.05
    assert wire.packet() == (0x90, b"\0\1\0")
    got_twin(wire)


def half_open(wire: Wire) -> None:
    wire.send(HELLO, PINGREQ)
    wire.socket.settimeout(LATE)
    with pytest.raises(TimeoutError):
        wire.packet()


def refused(wire: Wire) -> None:
    assert wire.send(HELLO).rest() == b"\x20\2\0\5"


CONNECTING = [
    Row({"kind": "suback_refused"}, lambda wire, _: suback_refused(wire)),
    Row({"kind": "suback_late", "seconds_late": LATE}, lambda wire, _: suback_late(wire)),
    Row({"kind": "session_forgotten"}, lambda wire, _: session_forgotten(wire)),
    Row({"kind": "connack_refused"}, lambda wire, _: connack_refused(5)(wire)),
    Row({"kind": "connack_refused", "code": 3}, lambda wire, _: connack_refused(3)(wire)),
    Row({"kind": "connack_slow", "seconds_late": LATE}, lambda wire, _: connack_slow(wire)),
    Row({"kind": "half_open"}, lambda wire, _: half_open(wire)),
    Row({"kind": "clock_skew", "offset": 3600}, lambda wire, _: refused(wire)),
]


@pytest.mark.parametrize("row", CONNECTING, ids=str)
@pytest.mark.parametrize("narrow", [True, False])
def test_while_connecting(hub: LocalHub, device: Device, row: Row, narrow: bool) -> None:
    with online(hub.mqtt_port, clean=False) as before:
        before.close()
    fault = hub.fault(device="dev" if narrow else None, times=1, **row.fault)
    if narrow:
        with online(hub.mqtt_port, "other") as other:
            other.nothing_waits()
        assert fault.hits == 0
    with Wire(hub.mqtt_port) as wire:
        row.check(wire, device)
        assert (fault.hits, hub.faults) == (1, [])
    with online(hub.mqtt_port) as again:
        again.send(TWIN)
        got_twin(again)


def test_a_clock_that_is_behind_accepts_what_has_expired(hub: LocalHub) -> None:
    old = token(expiry=int(time.time()) - 60)
    hub.fault("clock_skew", offset=-3600, times=1)
    with Wire(hub.mqtt_port) as wire:
        wire.connect(password=old)
        wire.nothing_waits()
    with Wire(hub.mqtt_port) as wire:
        assert wire.send(connect("dev", user(), old)).rest() == b"\x20\2\0\5"


def test_a_refusal_that_was_asked_for_has_its_code_whatever_the_token(hub: LocalHub) -> None:
    hub.fault("connack_refused", code=2)
    with Wire(hub.mqtt_port) as wire:
        assert wire.send(connect("dev", user(), "no token")).rest() == b"\x20\2\0\2"
    with Wire(hub.mqtt_port) as wire:
        assert wire.send(connect("nobody", user("nobody"), "no token")).rest() == b"\x20\2\0\2"


def test_a_handshake_that_hangs(tmp_path: Path) -> None:
    with LocalHub(certificates=tmp_path) as hub:
        hub.create_device("dev", KEY)
        fault = hub.fault("hanging_tls", times=1)
        assert hub.mqtts_port is not None
        with socket.create_connection(("127.0.0.1", hub.mqtts_port), 10) as hanging:
            with online(hub.mqtts_port, ca_file=hub.ca_file) as wire:  # the second one does not
                wire.send(TWIN)
                got_twin(wire)
            assert fault.hits == 1
            hanging.settimeout(LATE)
            with pytest.raises(TimeoutError):
                hanging.recv(1)
            hanging.settimeout(10)
            hub.clear_faults()
            assert hanging.recv(1) == b""


def test_a_handshake_that_hangs_ends_with_the_hub(tmp_path: Path) -> None:
    with LocalHub(certificates=tmp_path) as hub:
        fault = hub.fault("hanging_tls")
        assert hub.mqtts_port is not None
        hanging = socket.create_connection(("127.0.0.1", hub.mqtts_port), 10)
        while not fault.hits:
            assert hub.faults == [fault]
    with hanging:
        assert hanging.recv(1) == b""


# ---------------------------------------------------------------------- how often, how long, for whom


def test_times(hub: LocalHub) -> None:
    fault = hub.fault("answer_lost", times=2)
    with online(hub.mqtt_port) as wire:
        wire.send(TWIN, TWIN, TWIN)
        got_twin(wire)
        wire.nothing_waits()
    assert (fault.hits, hub.faults) == (2, [])
    assert not hub.fault("answer_lost", times=0).active


def test_seconds(hub: LocalHub) -> None:
    began = time.monotonic()
    fault = hub.fault("answer_lost", seconds=LATE)
    with online(hub.mqtt_port) as wire:
        wire.send(TWIN).nothing_waits()
        while hub.faults:
            assert time.monotonic() - began < 5
        assert time.monotonic() - began >= LATE
        wire.send(TWIN)
        got_twin(wire)
    assert fault.hits == 1


def test_until_cleared(hub: LocalHub) -> None:
    one, other = hub.fault("answer_lost"), hub.fault("notification_lost")
    with online(hub.mqtt_port) as wire:
        wire.send(TWIN, TWIN, TWIN).nothing_waits()
        assert hub.faults == [one, other]
        one.clear()
        assert (one.hits, hub.faults) == (3, [other])
        wire.send(TWIN)
        got_twin(wire)
        hub.fault("answer_lost")
        hub.clear_faults()
        assert (hub.faults, other.active) == ([], False)
        hub.device("dev").patch_desired({"a": 1})
        assert versions(wire, 1) == [(2, {"a": 1})]


def test_an_operation_narrows(hub: LocalHub) -> None:
    hub.fault("answer_lost", operation="retrieve")
    with online(hub.mqtt_port) as wire:
        wire.send(TWIN, CHANGE)
        got_report(wire, 2)
        wire.nothing_waits()


def test_the_oldest_of_two_alike_comes_first(hub: LocalHub) -> None:
    first = hub.fault("answer_status", status=500, times=1)
    second = hub.fault("answer_status", status=503, times=1)
    with online(hub.mqtt_port) as wire:
        topics = [wire.ask(GET + "g").topic.split("/")[3] for _ in range(3)]
    assert topics == ["500", "503", "200"]
    assert (first.hits, second.hits) == (1, 1)


@pytest.mark.parametrize("kind", ["notification_reordered", "notification_coalesced"])
def test_what_is_held_back_for_a_twin_that_is_gone_never_comes(
    hub: LocalHub, device: Device, kind: str
) -> None:
    hub.fault(kind, times=1)
    snapshot = hub.snapshot()
    with online(hub.mqtt_port, clean=False):
        device.patch_desired({"old": 1})
        hub.fail_over(snapshot)
    with Wire(hub.mqtt_port) as wire:
        wire.connect(clean=False)
        device.patch_desired({"new": 1})
        assert versions(wire, 1) == [(2, {"new": 1})]
        wire.nothing_waits()


def test_a_report_that_is_held_back_is_gone_with_its_connection(hub: LocalHub, device: Device) -> None:
    hub.fault("reports_reordered", times=1)
    with online(hub.mqtt_port) as wire:
        wire.send(publish(REPORT + "1", b'{"a":1}')).nothing_waits()
        device.disconnect()
        with pytest.raises(Closed):
            wire.packet()
    with online(hub.mqtt_port) as wire:
        assert wire.ask(REPORT + "2", b'{"a":2}').topic == "$iothub/twin/res/204/?$rid=2&$version=2"
        wire.nothing_waits()
    assert (device.reported, device.reported_version) == ({"a": 2}, 2)


# ---------------------------------------------------------------------- as data


def test_there_and_back(hub: LocalHub) -> None:
    for kind, (_, parameters, _) in KINDS.items():
        fault = Fault(kind, times=3, seconds=60.0, parameters=parameters)
        data = json.loads(json.dumps(fault.as_dict()))
        assert data == {
            "kind": kind,
            "device": None,
            "operation": None,
            "times": 3,
            "seconds": 60.0,
            "parameters": parameters,
            "hits": 0,
            "id": 0,
        }
        assert Fault.from_dict(data).as_dict() == data
        assert Fault.from_dict({"kind": kind}).parameters == parameters


def test_from_dict_is_fresh() -> None:
    used = Fault("answer_lost", times=1, hits=1)
    assert not used.active
    fresh = Fault.from_dict(used.as_dict())
    assert (fresh.hits, fresh.active) == (0, True)


@dataclass
class Wrong:
    arguments: dict[str, Any] = field(default_factory=dict)
    message: str = ""

    def __str__(self) -> str:
        return "-".join(f"{name}={value}" for name, value in self.arguments.items())


WRONG = [
    Wrong({"kind": "nonsense"}, "no fault 'nonsense'; there are answer_lost, "),
    Wrong({"kind": "answer_lost", "operation": "publish"}, "operation is 'retrieve' or 'report'"),
    Wrong({"kind": "notification_lost", "operation": "report"}, "nothing to do with an operation"),
    Wrong({"kind": "connack_slow", "operation": "retrieve"}, "nothing to do with an operation"),
    Wrong({"kind": "hanging_tls", "device": "dev"}, "which device"),
    Wrong({"kind": "answer_lost", "status": 500}, "answer_lost has no parameter 'status'; it has none"),
    Wrong({"kind": "connack_refused", "status": 3}, "no parameter 'status'; it has code"),
    Wrong({"kind": "answer_late", "seconds_late": -1}, "seconds_late is a number from 0 up, not -1"),
    Wrong({"kind": "answer_late", "seconds_late": "1"}, "seconds_late is a number"),
    Wrong({"kind": "answer_late", "seconds_late": True}, "seconds_late is a number"),
    Wrong({"kind": "answer_late", "seconds_late": float("nan")}, "seconds_late is a number"),
    Wrong({"kind": "clock_skew", "offset": None}, "offset is a number"),
    Wrong({"kind": "answer_status", "status": "500"}, "status is an integer"),
    Wrong({"kind": "answer_status", "status": 42}, "status is an integer"),
    Wrong({"kind": "answer_status", "error_code": "x"}, "error_code is an integer"),
    Wrong({"kind": "answer_status", "body": b"x"}, "body is a text"),
    Wrong({"kind": "connack_refused", "code": 0}, "code is an integer from 1 to 255"),
    Wrong({"kind": "connack_refused", "code": 256}, "code is an integer from 1 to 255"),
    Wrong({"kind": "answer_lost", "times": -1}, "times is a number from 0 up, not -1"),
    Wrong({"kind": "answer_lost", "times": "1"}, "times is a number"),
    Wrong({"kind": "answer_lost", "times": True}, "times is a number"),
    Wrong({"kind": "answer_lost", "seconds": -0.1}, "seconds is a number"),
    Wrong({"kind": "answer_lost", "seconds": float("nan")}, "seconds is a number"),
]


@pytest.mark.parametrize("row", WRONG, ids=str)
def test_what_is_no_fault(hub: LocalHub, row: Wrong) -> None:
    with pytest.raises(ValueError, match=row.message):
        hub.fault(**row.arguments)
    assert hub.faults == []


@pytest.mark.parametrize("data", [{}, {"times": 1}, {"kind": "quota", "hitz": 1}, {"kind": "nonsense"}])
def test_what_is_no_fault_as_data(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="fault"):
        Fault.from_dict(data)


def test_every_kind_has_its_row() -> None:
    rows = {row.fault["kind"] for row in ANSWERS + NOTIFICATIONS + CONNECTING} | {"hanging_tls"}
    assert rows == KINDS.keys()
