"""What the hub keeps between connections, and who is connected: sessions, messages, wills, take-over."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.hub_wire import (
    DESIRED,
    DISCONNECT,
    GET,
    KEY,
    OTHER_KEY,
    REPORT,
    RES,
    Publish,
    Wire,
    connect,
    online,
    puback,
    publish,
    subscribe,
    token,
    user,
)
from tests.waiting import wait_until
from twin_device.hub import Device, LocalHub

EVENTS = "devices/dev/messages/events/"
INBOX = "devices/dev/messages/devicebound/#"
EMPTY = b'{"desired":{"$version":1},"reported":{"$version":1}}'


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[LocalHub]:
    with LocalHub(mqtts_port=None, mqtt_port=0, **getattr(request, "param", {})) as hub:
        for name in ("dev", "other", "dev/mod"):
            hub.create_device(name, KEY)
        yield hub


@pytest.fixture
def device(hub: LocalHub) -> Device:
    return hub.device("dev")


def session(hub: LocalHub, device_id: str = "dev") -> int:
    """SessionPresent of a connection that keeps the session."""
    with Wire(hub.mqtt_port) as wire:
        present = wire.connect(device_id, clean=False)
        leave(wire)
    return present


def leave(wire: Wire) -> None:
    assert wire.send(DISCONNECT).rest() == b""


def gone(device: Device) -> None:
    wait_until(lambda: not device.connected, f"the end of {device.id}'s connection")


# ---------------------------------------------------------------------- sessions


def by_disconnect(wire: Wire, device: Device) -> None:
    leave(wire)


def by_the_network(wire: Wire, device: Device) -> None:
    wire.close()
    gone(device)


def by_the_hub(wire: Wire, device: Device) -> None:
    device.disconnect()
    assert wire.rest() == b""


def by_a_violation(wire: Wire, device: Device) -> None:
    assert wire.send(b"\0\0").rest() == b""


ENDS = [by_disconnect, by_the_network, by_the_hub, by_a_violation]


@pytest.mark.parametrize("end", ENDS)
def test_a_session_outlives_its_connection(hub: LocalHub, device: Device, end: Any) -> None:
    assert session(hub) == 0
    with Wire(hub.mqtt_port) as wire:
        assert wire.connect(clean=False) == 1
        wire.subscribe(RES, DESIRED)
        end(wire, device)
    with Wire(hub.mqtt_port) as wire:
        assert wire.connect(clean=False) == 1
        assert wire.ask(GET + "1") == Publish("$iothub/twin/res/200/?$rid=1", EMPTY)
        device.patch_desired({"a": 1})
        assert wire.message().payload == b'{"a":1,"$version":2}'


@pytest.mark.parametrize("end", ENDS)
def test_a_clean_session_ends_with_its_connection(hub: LocalHub, device: Device, end: Any) -> None:
    with online(hub.mqtt_port, clean=True) as wire:
        end(wire, device)
    with Wire(hub.mqtt_port) as wire:
        assert wire.connect(clean=False) == 0
        wire.send(publish(GET + "1"), publish(REPORT + "2", b"{}"))
        device.patch_desired({"a": 1})
        wire.nothing_waits()


def test_a_clean_session_wipes_what_was_kept(hub: LocalHub) -> None:
    with online(hub.mqtt_port, clean=False) as wire:
        leave(wire)
    with Wire(hub.mqtt_port) as wire:
        assert wire.connect(clean=True) == 0
        wire.send(publish(GET + "1")).nothing_waits()
        leave(wire)
    assert session(hub) == 0


def test_notifications_come_from_connack_on_and_none_waits(hub: LocalHub, device: Device) -> None:
    with online(hub.mqtt_port, clean=False) as wire:
        leave(wire)
    device.patch_desired({"missed": True})
    with Wire(hub.mqtt_port) as wire:
        wire.send(connect("dev", user(), token(), clean=False))
        wait_until(lambda: device.connected, "the connection")
        device.patch_desired({"told": True})
        assert wire.packet() == (0x20, b"\1\0")
        assert wire.message() == Publish(
            "$iothub/twin/PATCH/properties/desired/?$version=3", b'{"told":true,"$version":3}'
        )


def test_the_granted_qos_is_kept(device: Device) -> None:
    with LocalHub(mqtts_port=None, mqtt_port=0, answer_qos="granted") as hub:
        device = hub.create_device("dev", KEY)
        with Wire(hub.mqtt_port) as wire:
            wire.connect(clean=False)
            wire.subscribe((RES, 1), (DESIRED, 2))
            wire.subscribe((DESIRED, 0))  # the newer one counts
            leave(wire)
        with Wire(hub.mqtt_port) as wire:
            wire.connect(clean=False)
            answer = wire.ask(GET + "1")
            assert (answer.qos, answer.dup, answer.retain) == (1, False, False)
            assert answer.packet_id > 0
            wire.send(puback(answer.packet_id))
            device.patch_desired({"a": 1})
            assert wire.message().qos == 0
            again = wire.ask(GET + "2")
            assert again.packet_id not in (0, answer.packet_id)
            wire.nothing_waits()
            # A PUBACK counts once.
            wire.send(puback(again.packet_id), puback(again.packet_id))
            assert wire.rest() == b""


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_twin_messages_are_qos_0_whatever_was_granted(hub: LocalHub, device: Device, qos: int) -> None:
    with Wire(hub.mqtt_port) as wire:
        wire.connect()
        wire.subscribe((RES, qos), (DESIRED, qos))
        device.patch_desired({"a": 1})
        got = [wire.message(), wire.ask(GET + "1"), wire.ask(REPORT + "2", b"{}"), wire.ask(REPORT + "3")]
        assert [(one.qos, one.dup, one.retain) for one in got] == [(0, False, False)] * 4


def test_unsubscribe_ends_what_it_names(hub: LocalHub, device: Device) -> None:
    with online(hub.mqtt_port, clean=False) as wire:
        wire.unsubscribe(DESIRED)
        device.patch_desired({"a": 1})
        assert wire.ask(GET + "1").topic == "$iothub/twin/res/200/?$rid=1"
        wire.unsubscribe(RES, "never/#")
        wire.send(publish(GET + "2")).nothing_waits()
        leave(wire)
    with Wire(hub.mqtt_port) as wire:
        wire.connect(clean=False)
        device.patch_desired({"a": 2})
        wire.send(publish(GET + "3")).nothing_waits()


def test_subscribing_again_changes_nothing(hub: LocalHub, device: Device) -> None:
    with online(hub.mqtt_port, clean=False) as wire:
        assert wire.subscribe(RES, DESIRED, DESIRED) == [0, 0, 0]
        device.patch_desired({"a": 1})
        wire.message()
        wire.nothing_waits()


def test_modules_have_sessions_of_their_own(hub: LocalHub) -> None:
    with online(hub.mqtt_port, clean=False) as wire:
        leave(wire)
    assert session(hub, "dev/mod") == 0
    assert session(hub) == 1


def test_forgotten_sessions(hub: LocalHub, device: Device) -> None:
    with online(hub.mqtt_port, "other", clean=False) as offline:
        leave(offline)
    with online(hub.mqtt_port, clean=False) as wire:
        device.send_c2d(b"forgotten as well")
        hub.forget_sessions()
        device.patch_desired({"a": 1})
        wire.send(publish(GET + "1")).nothing_waits()
        wire.subscribe((INBOX, 1))
        wire.nothing_waits()
        hub.forget_sessions()
        by_the_network(wire, device)
    assert session(hub, "other") == 0
    with Wire(hub.mqtt_port) as wire:
        assert wire.connect(clean=False) == 0


def test_sessions_may_have_a_lifetime() -> None:
    for lifetime, present in ((0, 0), (60, 1)):
        with LocalHub(mqtts_port=None, mqtt_port=0, session_lifetime=lifetime) as hub:
            device = hub.create_device("dev", KEY)
            with online(hub.mqtt_port, clean=False) as wire:
                device.patch_desired({"a": 1})  # it does not end while it is used
                assert wire.message().payload == b'{"a":1,"$version":2}'
                leave(wire)
            assert session(hub) == present
            # Taken over is not offline.
            with online(hub.mqtt_port, clean=False), Wire(hub.mqtt_port) as second:
                assert second.connect(clean=False) == present


def test_who_subscribes_again_is_remembered_again(hub: LocalHub, device: Device) -> None:
    with online(hub.mqtt_port, clean=False) as wire:
        hub.forget_sessions()
        wire.subscribe(DESIRED)
        leave(wire)
    with Wire(hub.mqtt_port) as wire:
        assert wire.connect(clean=False) == 1
        device.patch_desired({"a": 1})
        assert wire.message().payload == b'{"a":1,"$version":2}'


def test_sessions_outlive_a_pause_of_the_hub(hub: LocalHub, device: Device) -> None:
    port = hub.mqtt_port
    with online(port, clean=False) as wire:
        hub.stop_listening()
        assert wire.rest() == b""
        with pytest.raises(ConnectionRefusedError):
            Wire(port)
        device.patch_desired({"a": 1})
        hub.listen_again()
        hub.listen_again()  # no harm
    assert hub.mqtt_port == port
    with Wire(port) as wire:
        assert wire.connect(clean=False) == 1
        assert wire.ask(GET + "1").payload.startswith(b'{"desired":{"a":1,"$version":2}')


# ---------------------------------------------------------------------- one connection an identity


@pytest.mark.parametrize(("old", "new", "present"), [(0, 0, 1), (1, 1, 0), (0, 1, 0), (1, 0, 0)])
def test_the_newer_connection_wins(hub: LocalHub, device: Device, old: int, new: int, present: int) -> None:
    with online(hub.mqtt_port, clean=bool(old)) as first, Wire(hub.mqtt_port) as second:
        assert second.connect(clean=bool(new)) == present
        assert first.rest() == b""
        second.subscribe(RES, DESIRED)
        assert device.connected
        assert device.connections == 2
        device.patch_desired({"a": 1})
        assert second.message().payload == b'{"a":1,"$version":2}'
        leave(second)
    gone(device)
    assert session(hub) == (0 if new else 1)


def test_who_is_refused_ends_no_other_connection(hub: LocalHub, device: Device) -> None:
    with online(hub.mqtt_port) as wire:
        for password in (token(key=OTHER_KEY), "", token("other")):
            with Wire(hub.mqtt_port) as refused:
                assert refused.send(connect("dev", user(), password)).rest() == b"\x20\x02\x00\x05"
            wire.nothing_waits()
        assert device.connections == 1


def test_device_and_module_are_connected_side_by_side(hub: LocalHub, device: Device) -> None:
    module = hub.device("dev/mod")
    with online(hub.mqtt_port) as one, online(hub.mqtt_port, "dev/mod") as other:
        device.patch_desired({"for": "device"})
        module.patch_desired({"for": "module"})
        assert one.message().payload == b'{"for":"device","$version":2}'
        assert other.message().payload == b'{"for":"module","$version":2}'
        one.ask(REPORT + "1", b'{"by":"device"}')
        other.ask(REPORT + "1", b'{"by":"module"}')
        one.nothing_waits()
        other.nothing_waits()
    assert (device.reported, module.reported) == ({"by": "device"}, {"by": "module"})


@pytest.mark.parametrize("end", ["disable", "delete", "recreate"])
def test_the_back_end_ends_a_connection(hub: LocalHub, device: Device, end: str) -> None:
    with (
        online(hub.mqtt_port) as wire,
        online(hub.mqtt_port, "dev/mod") as module,
        online(hub.mqtt_port, "other") as stranger,
    ):
        getattr(device, end)()
        assert wire.rest() == b""
        assert module.rest() == b""
        stranger.nothing_waits()
    with Wire(hub.mqtt_port) as again:
        answer = again.send(connect("dev", user(), token())).packet()
        assert answer == (0x20, b"\0\0" if end == "recreate" else b"\0\5")
    if end == "disable":
        device.enable()
        assert session(hub) == 0


# ---------------------------------------------------------------------- cloud-to-device messages


def inbox(hub: LocalHub, qos: int = 1, clean: bool = False) -> Wire:
    wire = Wire(hub.mqtt_port)
    wire.connect(clean=clean)
    assert wire.subscribe((INBOX, qos)) == [min(qos, 1)]
    return wire


BAG = "devices/dev/messages/devicebound/%24.to=%2Fdevices%2Fdev%2Fmessages%2FdeviceBound"


def test_a_message_carries_its_properties(hub: LocalHub, device: Device) -> None:
    with inbox(hub) as wire:
        device.send_c2d(b"\0\xff", {"$.mid": "1/2", "a b": "c&d=e", "ä": "", "x": "$.to"})
        got = wire.message()
        assert got.topic == BAG + "&%24.mid=1%2F2&a%20b=c%26d%3De&%C3%A4=&x=%24.to"
        assert (got.payload, got.qos, got.dup, got.retain) == (b"\0\xff", 1, False, False)


def test_messages_wait_for_the_device(hub: LocalHub, device: Device) -> None:
    device.send_c2d(b"1")
    with Wire(hub.mqtt_port) as wire:
        wire.connect(clean=False)
        device.send_c2d(b"2")
        wire.nothing_waits()
        wire.send(subscribe((INBOX, 1)))
        assert wire.packet() == (0x90, b"\0\1\1")
        device.send_c2d(b"3")
        assert [wire.message().payload for _ in range(3)] == [b"1", b"2", b"3"]
        wire.nothing_waits()


def test_puback_completes_a_message(hub: LocalHub, device: Device) -> None:
    with inbox(hub) as wire:
        for payload in (b"1", b"2", b"3"):
            device.send_c2d(payload)
        got = [wire.message() for _ in range(3)]
        assert len({one.packet_id for one in got}) == 3
        wire.send(puback(got[1].packet_id)).nothing_waits()
        wire.subscribe((INBOX, 1))  # delivers nothing twice on one connection
        wire.nothing_waits()
        leave(wire)
    # Those that were not acknowledged come again, marked, without a new subscription.
    with Wire(hub.mqtt_port) as wire:
        assert wire.connect(clean=False) == 1
        again = [wire.message() for _ in range(2)]
        assert [(one.payload, one.dup, one.qos) for one in again] == [(b"1", True, 1), (b"3", True, 1)]
        device.send_c2d(b"4")
        assert wire.message()[1:4] == (b"4", 1, False)
        for one in again:
            wire.send(puback(one.packet_id))
        wire.nothing_waits()
        leave(wire)
    with Wire(hub.mqtt_port) as wire:
        wire.connect(clean=False)
        assert wire.message()[1:4] == (b"4", 1, True)
        wire.nothing_waits()


def test_at_qos_0_a_message_is_gone_when_it_is_sent(hub: LocalHub, device: Device) -> None:
    device.send_c2d(b"1")
    with inbox(hub, qos=0) as wire:
        assert wire.message()[1:3] == (b"1", 0)
        leave(wire)
    with Wire(hub.mqtt_port) as wire:
        wire.connect(clean=False)
        wire.nothing_waits()


def test_a_subscription_at_qos_2_is_served_at_qos_1(hub: LocalHub, device: Device) -> None:
    with inbox(hub, qos=2) as wire:
        device.send_c2d(b"1")
        assert wire.message().qos == 1


@pytest.mark.parametrize("qos", [0, 1])
def test_a_message_for_a_connection_that_just_ended_waits(hub: LocalHub, device: Device, qos: int) -> None:
    with inbox(hub, qos=qos) as wire:

        def end_and_send() -> None:
            # In one go inside the hub, before its loop has told anybody.
            hub._endpoint.connections["dev"].data_received(DISCONNECT)
            hub._endpoint.send_c2d("dev", b"late", "")

        hub._call(end_and_send)
        assert wire.rest() == b""
    with Wire(hub.mqtt_port) as wire:
        wire.connect(clean=False)
        assert wire.message()[1:4] == (b"late", qos, False)


def test_fifty_messages_wait_and_no_more(hub: LocalHub, device: Device) -> None:
    for number in range(50):
        device.send_c2d(b"%d" % number)
    with pytest.raises(ValueError, match="50"):
        device.send_c2d(b"one too many")
    with inbox(hub) as wire:
        got = [wire.message() for _ in range(50)]
        assert [int(one.payload) for one in got] == list(range(50))
        with pytest.raises(ValueError, match="50"):
            device.send_c2d(b"none is acknowledged")
        wire.send(puback(got[0].packet_id)).nothing_waits()
        device.send_c2d(b"there is room")
        assert wire.message().payload == b"there is room"


def test_a_clean_session_throws_messages_away(hub: LocalHub, device: Device) -> None:
    device.send_c2d(b"1")
    with inbox(hub, clean=True) as wire:
        wire.nothing_waits()
        device.send_c2d(b"2")
        assert wire.message().payload == b"2"


def test_messages_are_for_their_device(hub: LocalHub, device: Device) -> None:
    hub.device("other").send_c2d(b"for the other one")
    with inbox(hub) as wire:
        hub.device("other").send_c2d(b"again")
        wire.nothing_waits()
    with pytest.raises(ValueError, match="module"):
        hub.device("dev/mod").send_c2d(b"")


@pytest.mark.parametrize(
    ("payload", "properties"),
    [(b"x" * 65537, {}), (b"x" * 65000, {"a": "b" * 600}), (b"", {"a": "ä" * 30000})],
)
def test_a_message_that_is_too_large_is_the_back_ends_mistake(
    hub: LocalHub, device: Device, payload: bytes, properties: dict[str, str]
) -> None:
    with inbox(hub) as wire:
        with pytest.raises(ValueError, match="64 KB"):
            device.send_c2d(payload, properties)
        device.send_c2d(b"fits")
        assert wire.message().payload == b"fits"


# ---------------------------------------------------------------------- wills


WILL = (EVENTS + "%24.ct=text%2Fplain&alarm=true", b"gone")


@pytest.mark.parametrize("end", ENDS)
def test_the_will_comes_unless_the_device_says_goodbye(hub: LocalHub, device: Device, end: Any) -> None:
    with online(hub.mqtt_port, will=WILL) as wire:
        end(wire, device)
    if end is by_disconnect:
        session(hub)  # by now it would be there
        assert device.telemetry == ()
        return
    wait_until(lambda: device.telemetry, "the will")
    (will,) = device.telemetry
    assert will.payload == b"gone"
    assert will.properties == {"alarm": "true", "iothub-MessageType": "Will"}
    assert will.system == {"content-type": "text/plain"}


def test_the_will_comes_when_another_connection_takes_over(hub: LocalHub, device: Device) -> None:
    with online(hub.mqtt_port, will=(EVENTS, b"taken")), online(hub.mqtt_port, will=(EVENTS, b"second")):
        wait_until(lambda: device.telemetry, "the will")
    wait_until(lambda: len(device.telemetry) == 2, "the second will")
    assert [one.payload for one in device.telemetry] == [b"taken", b"second"]


def test_the_will_of_a_refused_connection_never_comes(hub: LocalHub, device: Device) -> None:
    with Wire(hub.mqtt_port) as wire:
        wire.send(connect("dev", user(), token(key=OTHER_KEY), will=WILL))
        assert wire.rest() == b"\x20\x02\x00\x05"
    session(hub)
    assert device.telemetry == ()


def test_the_will_of_who_was_before_does_not_reach_the_new_identity(hub: LocalHub, device: Device) -> None:
    with online(hub.mqtt_port, will=WILL) as wire:
        device.recreate()
        assert wire.rest() == b""
    session(hub)
    assert device.telemetry == ()


# ---------------------------------------------------------------------- telemetry and the log


def test_telemetry_is_taken_apart(hub: LocalHub, device: Device) -> None:
    bag = "%24.ct=application%2Fjson&$.ce=utf-8&$.mid=1&$.cid=2&%24.uid=3"
    bag += "&$.ctime=t&$.exp=e&$.on=o&$.ifid=i&$.sub=s"
    with online(hub.mqtt_port) as wire:
        wire.send(publish(EVENTS + bag + "&a%20b=c%26d&flag&empty=&plus=%2B", b"{}", flags=9))
        wire.send(publish(EVENTS[:-1], b"plain"))
        wire.nothing_waits()
    first, second = device.telemetry
    assert first.payload == b"{}"
    assert first.system == {
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "message-id": "1",
        "correlation-id": "2",
        "user-id": "3",
        "creation-time": "t",
        "expiry": "e",
        "output-name": "o",
        "interface-id": "i",
        "subject": "s",
    }
    assert first.properties == {
        "a b": "c&d",
        "flag": "",
        "empty": "",
        "plus": "+",
        "mqtt-retain": "true",
        "mqtt-dup": "true",
    }
    assert (second.payload, second.properties, second.system) == (b"plain", {}, {})
    assert hub.device("other").telemetry == hub.device("dev/mod").telemetry == ()


@pytest.mark.parametrize(
    ("hub", "name"),
    [({}, "mqtt-retain"), ({"retain_property": "x-opt-retain"}, "x-opt-retain")],
    indirect=["hub"],
    ids=["as documented", "as documented before"],
)
def test_telemetry_with_retain_says_so(hub: LocalHub, device: Device, name: str) -> None:
    with online(hub.mqtt_port) as wire:
        wire.send(publish(EVENTS, b"{}", flags=1)).nothing_waits()
    assert device.telemetry[-1].properties == {name: "true"}


def test_the_log_has_every_packet(hub: LocalHub, device: Device) -> None:
    with Wire(hub.mqtt_port) as wire:
        wire.connect()
        wire.subscribe((RES, 1))
        wire.send(publish(GET + "1", b" ", qos=1)).packet()
        wire.message()
        wire.nothing_waits()
        wire.unsubscribe(RES)
        leave(wire)
    assert [(one.direction, one.kind, one.topic, one.qos) for one in device.packets] == [
        ("in", "CONNECT", None, 0),
        ("out", "CONNACK", None, 0),
        ("in", "SUBSCRIBE", RES, 1),
        ("out", "SUBACK", None, 0),
        ("in", "PUBLISH", GET + "1", 1),
        ("out", "PUBACK", None, 0),
        ("out", "PUBLISH", "$iothub/twin/res/200/?$rid=1", 0),
        ("in", "PINGREQ", None, 0),
        ("out", "PINGRESP", None, 0),
        ("in", "UNSUBSCRIBE", None, 0),
        ("out", "UNSUBACK", None, 0),
        ("in", "DISCONNECT", None, 0),
    ]
    assert [one.payload for one in device.packets if one.kind == "PUBLISH"] == [b" ", EMPTY]
    times = [one.time for one in device.packets]
    assert times == sorted(times)
    assert hub.device("other").packets == ()
    device.clear_packets()
    assert device.packets == ()


def test_the_log_and_telemetry_keep_the_last(hub: LocalHub, device: Device) -> None:
    with Wire(hub.mqtt_port) as wire:
        wire.connect()
        wire.send(b"".join(publish(EVENTS, b"%d" % number) for number in range(2500)))
        wire.nothing_waits()
    assert len(device.packets) == 2000
    assert [int(one.payload) for one in device.telemetry] == list(range(1500, 2500))
