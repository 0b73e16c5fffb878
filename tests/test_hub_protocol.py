"""MQTT 3.1.1 as the hub speaks it: what ends a connection without a word, what is cut into pieces, timers."""

import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.hub_wire import (
    DESIRED,
    DISCONNECT,
    GET,
    KEY,
    METHODS,
    PINGREQ,
    REPORT,
    RES,
    Closed,
    Wire,
    connect,
    frame,
    online,
    puback,
    publish,
    subscribe,
    text,
    token,
    unsubscribe,
    user,
)
from tests.waiting import PATIENCE, wait_until
from twin_device.hub import LocalHub

EVENTS = "devices/dev/messages/events/"
MODULE_EVENTS = "devices/dev/modules/mod/messages/events/"
CONNECT = connect("dev", user(), token())


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with LocalHub(mqtts_port=None, mqtt_port=0, owner_key=KEY) as hub:
        for name in ("dev", "other", "dev/mod", "dev/mod2"):
            hub.create_device(name, KEY)
        yield hub


def remaining(length: bytes) -> bytes:
    return b"\x30" + length


# ---------------------------------------------------------------------- what ends the connection


BEFORE_CONNECT = {
    "PUBLISH": publish(EVENTS, b"{}"),
    "PUBACK": puback(1),
    "SUBSCRIBE": subscribe((RES, 0)),
    "UNSUBSCRIBE": unsubscribe(RES),
    "PINGREQ": PINGREQ,
    "DISCONNECT": DISCONNECT,
    "a reserved type 0": b"\0\0",
    "a reserved type 15": b"\xf0\0",
    "a request of HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"x" * 200,
    "a ClientHello": bytes.fromhex("160301") + b"\x02\0" + b"\x01" * 1024,
    "a remaining length of five bytes": b"\x10\xff\xff\xff\xff\x01",
    "a CONNECT that is too large": b"\x10" + b"\xff\xff\xff\x7f",
    "CONNECT with reserved flags": connect("dev", user(), token(), first=0x11),
    "CONNECT of another protocol": connect("dev", user(), token(), protocol="AMQP"),
    "CONNECT with bit 0 of its flags": connect("dev", user(), token(), flags=0xC3),
    "CONNECT with a will of QoS 3": connect("dev", user(), token(), will=(EVENTS, b""), flags=0xC6 | 3 << 3),
    "CONNECT with a will of QoS 2": connect("dev", user(), token(), will=(EVENTS, b""), will_qos=2),
    "CONNECT with a will's QoS and no will": connect("dev", user(), token(), flags=0xC2 | 8),
    "CONNECT with a will's retain and no will": connect("dev", user(), token(), flags=0xC2 | 32),
    "CONNECT with a password and no user name": connect("dev", None, token(), flags=0x42),
    "CONNECT with bytes behind": connect("dev", user(), token(), tail=b"x"),
    "CONNECT without its user name": connect("dev", flags=0xC2),
    "CONNECT that is empty": b"\x10\0",
    "CONNECT that ends early": frame(0x10, text("MQTT") + b"\x04"),
    "CONNECT with a client id that is not UTF-8": connect(b"\xff\xfe", user(), token()),
    "CONNECT with a surrogate in UTF-8": connect(b"\xed\xa0\x80", user(), token()),
    "CONNECT with U+0000 in the client id": connect("dev\0", user(), token()),
    "CONNECT with U+0000 in the user name": connect("dev", user() + "\0", token()),
    "CONNECT with a user name that is not UTF-8": connect("dev", b"\xff", token()),
}

AFTER_CONNECT = {
    "a second CONNECT": CONNECT,
    "CONNACK": frame(0x20, b"\0\0"),
    "PUBREC": frame(0x50, b"\0\1"),
    "PUBREL": frame(0x62, b"\0\1"),
    "PUBCOMP": frame(0x70, b"\0\1"),
    "SUBACK": frame(0x90, b"\0\1\0"),
    "UNSUBACK": frame(0xB0, b"\0\1"),
    "PINGRESP": frame(0xD0),
    "type 0": frame(0x00),
    "type 15": frame(0xF0),
    # ------------------------------------------------------------ flags and lengths
    "PINGREQ with flags": b"\xc1\0",
    "PINGREQ with a body": frame(0xC0, b"x"),
    "DISCONNECT with flags": b"\xe2\0",
    "SUBSCRIBE without its flag": b"\x80" + subscribe((RES, 0))[1:],
    "SUBSCRIBE with flags 3": b"\x83" + subscribe((RES, 0))[1:],
    "UNSUBSCRIBE without its flag": b"\xa0" + unsubscribe(RES)[1:],
    "PUBACK with flags": b"\x42" + puback(1)[1:],
    "a remaining length of five bytes": b"\x30\x80\x80\x80\x80\x01",
    "a remaining length of 256 KB and 1": remaining(b"\x81\x80\x10"),
    "the largest remaining length": remaining(b"\xff\xff\xff\x7f"),
    # ------------------------------------------------------------ PUBLISH
    "PUBLISH with QoS 2": publish(EVENTS, b"{}", qos=2),
    "PUBLISH with QoS 3": publish(EVENTS, b"{}", qos=3),
    "a report with QoS 2": publish(REPORT + "1", b"{}", qos=2),
    "PUBLISH with packet identifier 0": publish(EVENTS, b"{}", qos=1, packet_id=0),
    "PUBLISH with QoS 1 and no packet identifier": frame(0x32, text(EVENTS)),
    "PUBLISH that is empty": frame(0x30),
    "PUBLISH with a topic longer than the packet": frame(0x30, b"\0\x40" + EVENTS.encode()),
    "a topic that is not UTF-8": publish(EVENTS.encode() + b"a=\xff", b"{}"),
    "a topic with a surrogate in UTF-8": publish(EVENTS.encode() + b"a=\xed\xb0\x80", b"{}"),
    "a topic with U+0000": publish(EVENTS + "a=\0", b"{}"),
    "an empty topic": publish("", b"{}"),
    "a foreign topic": publish("hello", b"{}"),
    "an unknown $iothub topic": publish("$iothub/hello/?$rid=1", b"{}"),
    "a topic of the hub's own": publish("$iothub/twin/res/200/?$rid=1", b"{}"),
    "a desired notification from the device": publish(
        "$iothub/twin/PATCH/properties/desired/?$version=2", b'{"$version":2}'
    ),
    "another device's telemetry": publish("devices/other/messages/events/", b"{}"),
    "its module's telemetry": publish(MODULE_EVENTS, b"{}"),
    "telemetry without the device": publish("devices/messages/events/", b"{}"),
    "a topic that begins like telemetry": publish("devices/dev/messages/eventsful", b"{}"),
    "devicebound from the device": publish("devices/dev/messages/devicebound/", b"{}"),
    "a topic with a wildcard": publish(EVENTS + "#", b"{}"),
    "a topic with a single-level wildcard": publish(EVENTS + "a=+", b"{}"),
    # ------------------------------------------------------------ property bags
    "a bag with a blank": publish(EVENTS + "a=b c", b"{}"),
    "a bag with a colon": publish(EVENTS + "a=b:c", b"{}"),
    "a bag with a slash": publish(EVENTS + "$.ct=application/json", b"{}"),
    "a bag with a question mark": publish(EVENTS + "?a=b", b"{}"),
    "a bag whose bytes are no UTF-8": publish(EVENTS + "a=%ff", b"{}"),
    # ------------------------------------------------------------ twin requests
    "GET without a query": publish("$iothub/twin/GET/"),
    "GET without $rid": publish("$iothub/twin/GET/?"),
    "GET with another parameter only": publish("$iothub/twin/GET/?rid=1"),
    "GET with an empty $rid": publish("$iothub/twin/GET/?$rid="),
    "GET with a resource": publish("$iothub/twin/GET/foo/?$rid=1"),
    "GET with two slashes": publish("$iothub/twin/GET//?$rid=1"),
    "GET in lower case": publish("$iothub/twin/get/?$rid=1"),
    "a report with a resource": publish("$iothub/twin/PATCH/properties/reported/foo/?$rid=1", b"{}"),
    "a report of desired": publish("$iothub/twin/PATCH/properties/desired/?$rid=1", b"{}"),
    "a report in other case": publish("$iothub/twin/PATCH/properties/Reported/?$rid=1", b"{}"),
    "a report without a query": publish("$iothub/twin/PATCH/properties/reported/", b"{}"),
    "a version that is no number": publish(REPORT + "1&$version=x", b"{}"),
    "an empty version": publish(REPORT + "1&$version=", b"{}"),
    "a negative version": publish(REPORT + "1&$version=-1", b"{}"),
    "a version of a thousand digits": publish(REPORT + "1&$version=" + "9" * 6000, b"{}"),
    "a version in other digits": publish(REPORT + "1&$version=\u0661", b"{}"),
    "a $rid that no answer's topic holds": publish(GET + "x" * 65512),
    # ------------------------------------------------------------ SUBSCRIBE and UNSUBSCRIBE
    "SUBSCRIBE to #": subscribe(("#", 0)),
    "SUBSCRIBE to +": subscribe(("+/twin/res/#", 0)),
    "SUBSCRIBE to a foreign filter": subscribe(("hello/#", 0)),
    "SUBSCRIBE to a filter that is too wide": subscribe(("$iothub/twin/#", 0)),
    "SUBSCRIBE to a filter that is too narrow": subscribe(("$iothub/twin/res/200/#", 0)),
    "SUBSCRIBE to a filter without its wildcard": subscribe(("$iothub/twin/res/", 0)),
    "SUBSCRIBE in other case": subscribe(("$iothub/twin/RES/#", 0)),
    "SUBSCRIBE to telemetry": subscribe((EVENTS + "#", 0)),
    "SUBSCRIBE to another device's messages": subscribe(("devices/other/messages/devicebound/#", 0)),
    "SUBSCRIBE to a module's messages": subscribe(("devices/dev/modules/mod/#", 0)),
    "SUBSCRIBE to one good filter and a bad one": subscribe((RES, 0), ("hello", 0)),
    "SUBSCRIBE with QoS 3": subscribe((RES, 3)),
    "SUBSCRIBE with reserved bits in the QoS": subscribe((RES, 0x80)),
    "SUBSCRIBE without filters": subscribe(),
    "SUBSCRIBE with packet identifier 0": subscribe((RES, 0), packet_id=0),
    "SUBSCRIBE that is empty": frame(0x82),
    "SUBSCRIBE without a QoS": frame(0x82, b"\0\1" + text(RES)),
    "SUBSCRIBE with a filter that is not UTF-8": frame(0x82, b"\0\1" + text(b"\xff/#") + b"\0"),
    "UNSUBSCRIBE without filters": unsubscribe(),
    "UNSUBSCRIBE with packet identifier 0": unsubscribe(RES, packet_id=0),
    "UNSUBSCRIBE that ends early": frame(0xA2, b"\0\1\0\x20$io"),
    # ------------------------------------------------------------ PUBACK
    "PUBACK for nothing": puback(1),
    "PUBACK without a packet identifier": frame(0x40),
    "PUBACK with bytes behind": frame(0x40, b"\0\1\0"),
}


@pytest.mark.parametrize("packet", BEFORE_CONNECT.values(), ids=BEFORE_CONNECT.keys())
def test_ends_before_connect(hub: LocalHub, packet: bytes) -> None:
    with Wire(hub.mqtt_port) as wire:
        assert wire.send(packet).rest() == b""


@pytest.mark.parametrize("packet", AFTER_CONNECT.values(), ids=AFTER_CONNECT.keys())
def test_ends_after_connect(hub: LocalHub, packet: bytes, caplog: pytest.LogCaptureFixture) -> None:
    reported = hub.device("dev").reported_version
    with online(hub.mqtt_port) as wire:
        # What comes behind is not looked at any more.
        assert wire.send(packet, PINGREQ, publish(REPORT + "9", b"{}")).rest() == b""
    assert hub.device("dev").reported_version == reported
    assert [one for one in caplog.records if one.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    "filters", [(RES, "hello/#"), ("hello/#", RES)], ids=["bad one last", "bad one first"]
)
def test_a_subscribe_that_ends_the_connection_leaves_nothing(hub: LocalHub, filters: tuple[str, str]) -> None:
    with Wire(hub.mqtt_port) as wire:
        wire.connect("other", clean=False)
        assert wire.send(subscribe(*((name, 0) for name in filters))).rest() == b""
    with Wire(hub.mqtt_port) as wire:
        wire.connect("other", clean=False)
        wire.send(publish(GET + "1")).nothing_waits()
    with Wire(hub.mqtt_port) as wire:
        wire.connect("other", clean=True)


# ---------------------------------------------------------------------- what does not


MODULE_FILTERS = ("devices/dev/modules/mod/#", "devices/dev/modules/mod/inputs/#")
TOLERATED = {
    "telemetry": ("dev", publish(EVENTS, b"{}")),
    "telemetry without a slash behind": ("dev", publish(EVENTS[:-1], b"{}")),
    "telemetry with properties": ("dev", publish(EVENTS + "%24.ct=application%2Fjson&a=b%20c&d", b"{}")),
    "telemetry of a module": ("dev/mod", publish(MODULE_EVENTS, b"{}")),
    "an answer to a method": ("dev", publish("$iothub/methods/res/200/?$rid=1", b"{}")),
    "an empty payload": ("dev", publish(EVENTS)),
    "a payload that is no text": ("dev", publish(EVENTS, bytes(range(256)))),
    "telemetry with RETAIN": ("dev", publish(EVENTS, b"{}", flags=1)),
    "UNSUBSCRIBE of what was not subscribed": ("dev", unsubscribe("hello/#", packet_id=1)),
    "a report without $rid": ("dev", publish("$iothub/twin/PATCH/properties/reported/?", b"{}")),
}
ANSWERS = {"UNSUBSCRIBE of what was not subscribed": b"\xb0\x02\0\x01"}


@pytest.mark.parametrize("name", TOLERATED)
def test_goes_on(hub: LocalHub, name: str) -> None:
    device_id, packet = TOLERATED[name]
    with Wire(hub.mqtt_port) as wire:
        wire.connect(device_id)
        wire.send(packet)
        if name in ANSWERS:
            first, body = wire.packet()
            assert frame(first, body) == ANSWERS[name]
        wire.nothing_waits()


@pytest.mark.parametrize(
    ("device_id", "filters"),
    [
        ("dev", (RES, DESIRED, METHODS, "devices/dev/messages/devicebound/#")),
        ("dev/mod", (RES, DESIRED, METHODS, *MODULE_FILTERS)),
    ],
)
@pytest.mark.parametrize(("asked", "granted"), [(0, 0), (1, 1), (2, 1)])
def test_every_documented_filter_is_granted(
    hub: LocalHub, device_id: str, filters: tuple[str, ...], asked: int, granted: int
) -> None:
    with Wire(hub.mqtt_port) as wire:
        wire.connect(device_id)
        assert wire.subscribe(*((name, asked) for name in filters)) == [granted] * len(filters)
        for name in filters:  # and again, one by one
            assert wire.subscribe((name, asked)) == [granted]


@pytest.mark.parametrize("name", ["devices/dev/messages/devicebound/#", "devices/dev/modules/mod2/#"])
def test_a_module_is_not_granted_what_is_not_its_own(hub: LocalHub, name: str) -> None:
    with Wire(hub.mqtt_port) as wire:
        wire.connect("dev/mod")
        assert wire.send(subscribe((name, 0))).rest() == b""


def test_puback_carries_the_packet_identifier(hub: LocalHub) -> None:
    with online(hub.mqtt_port) as wire:
        for number in (1, 255, 256, 65535, 1):
            wire.send(publish(EVENTS, b"{}", qos=1, packet_id=number))
            assert wire.packet() == (0x40, struct.pack(">H", number))


@pytest.mark.parametrize("extra", [0, 1])
def test_256_kilobytes_are_the_most(hub: LocalHub, extra: int) -> None:
    device = hub.device("dev")
    payload = b"x" * (256 * 1024 - len(text(EVENTS)) + extra)
    with online(hub.mqtt_port) as wire:
        wire.send(publish(EVENTS, payload))
        if extra:
            assert wire.rest() == b""
        else:
            wire.nothing_waits()
            assert device.telemetry[-1].payload == payload


@pytest.mark.parametrize(
    ("protocol", "level"), [("MQIsdp", 3), ("MQTT", 5), ("MQTT", 3), ("MQTT", 0x84), ("MQTT", 0)]
)
def test_another_version_of_mqtt_is_told_so(hub: LocalHub, protocol: str, level: int) -> None:
    with Wire(hub.mqtt_port) as wire:
        # Version 5 has its properties behind the keep-alive.
        packet = connect("dev", user(), token(), protocol=protocol, level=level, tail=b"\0")
        assert wire.send(packet).rest() == b"\x20\x02\x00\x01"


def test_packets_may_come_in_any_pieces(hub: LocalHub) -> None:
    stream = b"".join(
        (
            connect("dev", user(), token()),
            subscribe((RES, 1), (DESIRED, 1)),
            publish(GET + "a", b" "),
            publish(EVENTS + "a=b", b"x" * 300, qos=1, packet_id=7),
            publish(REPORT + "b", b'{"pieces": 1}'),
            PINGREQ,
        )
    )

    def play(*pieces: bytes) -> list[tuple[int, bytes]]:
        hub.device("dev").recreate()
        hub._registry.identities["dev"].primary_key = KEY
        with Wire(hub.mqtt_port) as wire:
            for piece in pieces:
                wire.socket.sendall(piece)
            answers = [wire.packet() for _ in range(6)]
            assert wire.send(DISCONNECT).rest() == b""
        return answers

    whole = play(stream)
    assert [first >> 4 for first, _ in whole] == [2, 9, 3, 4, 3, 13]
    assert play(*(stream[at : at + 1] for at in range(len(stream)))) == whole
    assert play(stream[:1], stream[1:]) == whole
    assert play(stream[:-1], stream[-1:]) == whole


def test_nothing_is_done_behind_a_disconnect(hub: LocalHub) -> None:
    reported = hub.device("dev").reported_version
    with online(hub.mqtt_port) as wire:
        assert wire.send(DISCONNECT, PINGREQ, publish(GET + "1"), publish(REPORT + "2", b"{}")).rest() == b""
    assert hub.device("dev").reported_version == reported


def test_nothing_is_looked_at_behind_a_refusal(hub: LocalHub) -> None:
    connections = hub.device("dev").connections
    with Wire(hub.mqtt_port) as wire:
        assert wire.send(connect("dev", user(), "no token"), CONNECT, PINGREQ).rest() == b"\x20\x02\x00\x05"
    assert hub.device("dev").connections == connections


# ---------------------------------------------------------------------- time


@pytest.fixture
def impatient() -> Iterator[Any]:
    made = []

    def make(**settings: Any) -> LocalHub:
        hub = LocalHub(mqtts_port=None, mqtt_port=0, **settings)
        made.append(hub)
        hub.start()
        hub.create_device("dev", KEY)
        return hub

    yield make
    for hub in made:
        hub.close()


def lasts(wire: Wire) -> float:
    """How long it takes until the hub ends a connection, on which it says nothing more."""
    began = time.monotonic()
    assert wire.rest() == b""
    return time.monotonic() - began


@pytest.mark.parametrize("said", [b"", b"\x10", CONNECT[:-1]], ids=["nothing", "a byte", "all but a byte"])
def test_who_does_not_connect_in_time_is_ended(impatient: Any, said: bytes) -> None:
    hub = impatient(connect_within=0.2)
    with Wire(hub.mqtt_port) as wire:
        assert 0.1 < lasts(wire.send(said)) < 5


def test_who_connects_in_time_stays(impatient: Any) -> None:
    hub = impatient(connect_within=0.1)
    with online(hub.mqtt_port) as stays, Wire(hub.mqtt_port) as goes:
        lasts(goes)
        stays.nothing_waits()


def test_a_connack_that_the_hub_delays_is_not_the_devices_fault(impatient: Any) -> None:
    hub = impatient(connect_within=0.1)
    hub.fault("connack_slow", seconds_late=0.3)
    with online(hub.mqtt_port) as wire:
        wire.nothing_waits()


def test_silence_of_one_and_a_half_keep_alives_ends_it(impatient: Any) -> None:
    hub = impatient()
    with online(hub.mqtt_port, keep_alive=1) as wire:
        assert 1.3 < lasts(wire) < 5
    wait_until(lambda: not hub.device("dev").connected, "the end of the connection")


def test_any_packet_breaks_the_silence(impatient: Any) -> None:
    hub = impatient()
    with (
        online(hub.mqtt_port, keep_alive=1) as wire,
        Wire(hub.mqtt_port) as clock,
    ):
        clock.socket.settimeout(0.9)
        wire.socket.settimeout(PATIENCE)
        for packet in (PINGREQ, publish(EVENTS, b"{}", qos=1)):
            with pytest.raises(TimeoutError):
                clock.rest()  # 0.9 seconds pass
            wire.send(packet)
        assert wire.packet()[0] == 0xD0
        assert wire.packet()[0] == 0x40
        # What the hub sends does not count as the device's word.
        began = time.monotonic()
        with suppress(Closed):
            while time.monotonic() < began + 5:
                hub.device("dev").notify({}, 5)
                wire.packet()
        assert 1.0 < time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("keep_alive", "seconds"), [(0, 1767), (1, 1.5), (60, 90), (1177, 1765.5), (1178, 1767), (65535, 1767)]
)
def test_what_the_keep_alive_becomes(hub: LocalHub, keep_alive: int, seconds: float) -> None:
    with online(hub.mqtt_port, keep_alive=keep_alive):
        connection = hub._endpoint.connections["dev"]
        assert connection._silence == seconds


def test_a_token_that_expires_ends_the_connection(impatient: Any) -> None:
    hub = impatient()
    with Wire(hub.mqtt_port) as wire:
        wire.connect(password=token(expiry=int(time.time()) + 2))
        assert lasts(wire) < 5
        assert wire.send(connect("dev", user(), token())).rest() == b""


def test_a_grace_lets_a_connection_outlive_its_token(impatient: Any) -> None:
    hub = impatient(token_grace=1.0)
    expiry = int(time.time()) + 1
    with Wire(hub.mqtt_port) as wire:
        wire.connect(password=token(expiry=expiry + 1))
        lasts(wire)
        assert time.time() >= expiry + 2
        # The grace is for those who are connected.
        with Wire(hub.mqtt_port) as late:
            late.send(connect("dev", user(), token(expiry=expiry + 1)))
            assert late.rest() == b"\x20\x02\x00\x05"
