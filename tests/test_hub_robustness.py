"""The hub among devices that misbehave, and what it leaves behind."""

import contextlib
import gc
import json
import logging
import os
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hub_wire import (
    DESIRED,
    DISCONNECT,
    GET,
    KEY,
    PINGREQ,
    REPORT,
    RES,
    Wire,
    connect,
    frame,
    online,
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
INBOX = "devices/dev/messages/devicebound/#"
OTHER_TWIN = b'{"desired":{"$version":1},"reported":{"$version":1}}'


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def hub(certificates: Path) -> Iterator[LocalHub]:
    with LocalHub(mqtt_port=0, certificates=certificates) as hub:
        for name in ("dev", "other", "dev/mod"):
            hub.create_device(name, KEY)
        yield hub


@pytest.fixture(scope="module")
def bystander(hub: LocalHub) -> Iterator[Wire]:
    """A connection of another device, which nobody's mistakes may end."""
    with online(hub.mqtt_port, "other") as wire:
        yield wire


def untouched(bystander: Wire) -> None:
    assert bystander.ask(GET + "b").payload == OTHER_TWIN


# ---------------------------------------------------------------------- bytes of any kind

BYTES = st.binary(max_size=200)
NAMES = st.sampled_from([RES, DESIRED, INBOX, EVENTS, GET + "1", REPORT + "1", "#", "$iothub/twin/"])
PACKETS = st.one_of(
    BYTES,
    st.builds(frame, st.integers(0, 255), BYTES),
    st.builds(publish, NAMES | st.text(max_size=40), BYTES, st.integers(0, 3), st.integers(0, 65535)),
    st.builds(
        lambda name, qos, number: subscribe((name, qos), packet_id=number),
        NAMES,
        st.integers(0, 255),
        st.integers(0, 3),
    ),
    st.builds(unsubscribe, NAMES),
    st.sampled_from([PINGREQ, DISCONNECT, connect("dev", user(), token())]),
)
HELLO = connect("dev", user(), token(), keep_alive=1000)


def mutated(packet: bytes, changes: list[tuple[int, int]]) -> bytes:
    data = bytearray(packet)
    for at, value in changes:
        data[at % len(data)] = value
    return bytes(data)


def play(hub: LocalHub, *packets: bytes) -> None:
    """Send it and go; the hub has seen it all when it has answered or ended it."""
    with Wire(hub.mqtt_port) as wire:
        wire.send(*packets)
        with contextlib.suppress(OSError):
            wire.socket.shutdown(socket.SHUT_WR)
        wire.rest()


@pytest.fixture(scope="module")
def no_errors() -> Iterator[None]:
    """The hub logs no error of its own, whatever devices do."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = found.append  # type: ignore[method-assign]  # all that is needed of a handler
    names = ("twin_device.hub", "asyncio")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield
    for name in names:
        logging.getLogger(name).removeHandler(handler)
    assert [record.getMessage() for record in found] == []


@settings(max_examples=150, deadline=None)
@given(data=BYTES | PACKETS)
def test_any_bytes_before_connect(hub: LocalHub, bystander: Wire, no_errors: None, data: bytes) -> None:
    play(hub, data)
    untouched(bystander)


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_damaged_connect(
    hub: LocalHub, bystander: Wire, no_errors: None, changes: list[tuple[int, int]]
) -> None:
    will = (EVENTS + "a=b", b"x")
    play(hub, mutated(connect("dev", user(), token(), will=will), changes))
    untouched(bystander)


@settings(max_examples=200, deadline=None)
@given(packets=st.lists(PACKETS, max_size=6))
def test_any_packets_behind_connect(
    hub: LocalHub, bystander: Wire, no_errors: None, packets: list[bytes]
) -> None:
    play(hub, HELLO, *packets)
    untouched(bystander)


DAMAGED = b"".join(
    (
        subscribe((RES, 1), (INBOX, 1)),
        publish(GET + "1", b" ", qos=1),
        publish(REPORT + "2", b'{"a":{"b":[1]}}'),
        publish(EVENTS + "%24.ct=a%2Fb", b"x"),
        unsubscribe(RES),
        PINGREQ,
    )
)


@settings(max_examples=200, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_packets_behind_connect(
    hub: LocalHub, bystander: Wire, no_errors: None, changes: list[tuple[int, int]]
) -> None:
    play(hub, HELLO, mutated(DAMAGED, changes))
    untouched(bystander)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None)
@given(document=JSON)
def test_any_json_is_stored_or_refused_by_both_sides_alike(
    hub: LocalHub, no_errors: None, document: Any
) -> None:
    device = hub.device("dev")
    device.recreate()
    device._hub._registry.identities["dev"].primary_key = KEY
    with online(hub.mqtt_port) as wire:
        answer = wire.ask(REPORT + "1", json.dumps(document).encode())
        try:
            device.patch_desired(document)
        except ValueError:
            assert answer.topic == "$iothub/twin/res/400/?$rid=1"
            assert (device.reported, device.desired) == ({}, {})
        else:
            assert answer.topic.startswith("$iothub/twin/res/204/")
            assert device.reported == device.desired
    if "dev/mod" not in [one.id for one in hub.devices]:
        hub.create_device("dev/mod", KEY)


# ---------------------------------------------------------------------- TLS


@pytest.mark.parametrize("said", [b"", b"\x16", HELLO, b"\x16\x03\x01\xff\xff" + b"x" * 500])
def test_who_speaks_no_tls_is_ended(hub: LocalHub, bystander: Wire, no_errors: None, said: bytes) -> None:
    with Wire(hub.mqtts_port) as wire:
        wire.send(said)
        wire.socket.shutdown(socket.SHUT_WR)
        assert HELLO[:2] not in wire.rest()  # an alert perhaps, no MQTT
    untouched(bystander)


def test_all_of_it_over_tls(hub: LocalHub) -> None:
    device = hub.device("dev")
    with Wire(hub.mqtts_port, hub.ca_file) as wire:
        assert wire.send(connect("dev", user(), "no token")).rest() == b"\x20\2\0\5"
    with online(hub.mqtts_port, ca_file=hub.ca_file) as wire:
        version = device.desired_version
        device.patch_desired({"a": "x" * 4000})
        assert f"$version={version + 1}" in wire.message().topic
        wire.send(publish(EVENTS, b"x" * 200_000, qos=1))
        assert wire.packet() == (0x40, b"\0\1")
        device.disconnect()
        assert wire.rest() == b""
    with online(hub.mqtts_port, ca_file=hub.ca_file) as wire:
        assert wire.send(DISCONNECT).rest() == b""
    with online(hub.mqtts_port, ca_file=hub.ca_file) as wire:
        assert wire.send(b"\0\0").rest() == b""


def test_the_certificate_is_one_that_python_verifies_strictly(hub: LocalHub) -> None:
    context = ssl.create_default_context(cafile=hub.ca_file)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # some clients offer no later one
    for name in ("localhost", "127.0.0.1", "::1"):
        with (
            socket.create_connection(("127.0.0.1", hub.mqtts_port or 0), PATIENCE) as raw,
            context.wrap_socket(raw, server_hostname=name) as secure,
        ):
            assert secure.version() == "TLSv1.2"
    with (
        socket.create_connection(("127.0.0.1", hub.mqtts_port or 0), PATIENCE) as raw,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(raw, server_hostname="example.com")


# ---------------------------------------------------------------------- many, and slow ones


def test_who_does_not_read_is_ended(hub: LocalHub, bystander: Wire) -> None:
    device = hub.device("dev")
    device.replace_desired({f"{number:02d}": "x" * 4000 for number in range(8)})
    for port, ca_file in ((hub.mqtt_port, None), (hub.mqtts_port, hub.ca_file)):
        with online(port, ca_file=ca_file) as wire:
            wire.socket.settimeout(PATIENCE)
            sent = 0
            while device.connected:
                # Each brings an answer of 32 KB that nobody reads.
                wire.send(b"".join(publish(GET + str(number)) for number in range(50)))
                sent += 50
                assert sent < 5000
                untouched(bystander)
    device.replace_desired({})


@pytest.mark.parametrize("secure", [False, True])
def test_two_hundred_who_say_nothing(certificates: Path, secure: bool) -> None:
    with LocalHub(mqtt_port=0, certificates=certificates) as hub:
        hub.create_device("dev", KEY)
        port = hub.mqtts_port if secure else hub.mqtt_port
        silent = [socket.create_connection(("127.0.0.1", port or 0), PATIENCE) for _ in range(200)]
        with online(hub.mqtts_port, ca_file=hub.ca_file) as wire:
            wire.nothing_waits()
        began = time.monotonic()
        hub.stop_listening()
        hub.listen_again()
        with online(hub.mqtt_port) as wire:
            wire.nothing_waits()
        assert time.monotonic() - began < 5
        for one in silent:
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
            one.close()


def test_a_crowd_at_once(hub: LocalHub) -> None:
    """Each gets its own data, and only that."""
    ids = [f"crowd-{number}" for number in range(40)]
    wires = {}
    try:
        for one in ids:
            hub.create_device(one, KEY)
            wires[one] = online(hub.mqtt_port, one)
        for one, wire in wires.items():
            wire.send(publish(REPORT + "1", b'{"me":"%s"}' % one.encode()))
        for one in ids:
            hub.device(one).patch_desired({"you": one})
        for one, wire in wires.items():
            got = {wire.message() for _ in range(2)}
            assert {message.payload for message in got} == {b"", b'{"you":"%s","$version":2}' % one.encode()}
            hub.device(one).send_c2d(one.encode())
            wire.subscribe(f"devices/{one}/messages/devicebound/#")
        for one, wire in wires.items():
            assert wire.message().payload == one.encode()
            assert one.encode() in wire.ask(GET + "2").payload
            wire.send(publish(f"devices/{one}/messages/events/", one.encode())).nothing_waits()
        for one in ids:
            assert hub.device(one).reported == {"me": one}
            assert [message.payload for message in hub.device(one).telemetry] == [one.encode()]
            others = set(ids) - {one}
            seen = b" ".join(packet.payload for packet in hub.device(one).packets)
            assert not any(b'"%s"' % other.encode() in seen for other in others)
    finally:
        for one, wire in wires.items():
            wire.close()
            hub.device(one).delete()


def test_a_flood_while_connack_is_slow(hub: LocalHub, bystander: Wire) -> None:
    fault = hub.fault("connack_slow", device="dev", seconds_late=60)
    with Wire(hub.mqtt_port) as wire:
        wire.send(HELLO)
        while not fault.hits:
            untouched(bystander)
        wire.send(publish(EVENTS, b"x" * 200_000), publish(EVENTS, b"x" * 200_000))
        assert wire.rest() == b""
    hub.clear_faults()
    untouched(bystander)


def test_back_end_calls_from_many_threads(hub: LocalHub) -> None:
    device = hub.create_device("busy", KEY)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for count in range(30):
                device.patch_desired({f"t{number}": count})
                hub.create_device(f"busy-{number}-{count}", KEY)
                assert len(hub.devices) > 1
                hub.device(f"busy-{number}-{count}").delete()
        except BaseException as error:  # noqa: BLE001  # for the test to raise
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert device.desired_version == 181
    assert device.desired == {f"t{number}": 29 for number in range(6)}
    device.delete()


# ---------------------------------------------------------------------- what is left behind


def open_sockets() -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


def temporary_folders() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("twin-device-hub-")}


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Other hubs on this machine come and go in the common one.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    gc.collect()
    before = threading.active_count(), temporary_folders()
    sockets = open_sockets() if os.path.isdir("/proc/self/fd") else None
    yield
    gc.collect()
    assert (threading.active_count(), temporary_folders()) == before
    if sockets is not None:
        assert open_sockets() == sockets


@pytest.mark.usefixtures("nothing_left")
def test_started_and_closed_many_times(certificates: Path) -> None:
    hub = LocalHub(mqtt_port=0, certificates=certificates)
    hub.create_device("dev", KEY)
    for number in range(20):
        hub.start()
        silent, half = Wire(hub.mqtts_port), Wire(hub.mqtt_port)
        half.send(HELLO[:20])
        with online(hub.mqtts_port, ca_file=hub.ca_file) as wire, silent, half:
            assert hub.device("dev").connections == number + 1
            hub.close()
            assert wire.rest() == b""
        hub.close()  # twice is no harm
        assert not hub.device("dev").connected


@pytest.mark.usefixtures("nothing_left")
def test_connections_that_come_and_go_while_it_closes(certificates: Path) -> None:
    hub = LocalHub(mqtt_port=0, certificates=certificates)
    for number in range(150):
        hub.start()
        made = [
            socket.create_connection(("127.0.0.1", port or 0), PATIENCE)
            for port in (hub.mqtts_port, hub.mqtt_port)
            for _ in range(number % 3 + 1)
        ]
        if number % 2:
            for one in made:
                one.close()
        hub.close()
        for one in made:
            one.close()


@pytest.mark.usefixtures("nothing_left")
def test_a_folder_of_its_own_goes_with_the_hub() -> None:
    before = temporary_folders()
    with LocalHub() as hub:
        folder = Path(hub.ca_file).parent
        assert temporary_folders() - before == {folder.name}
        assert sorted(path.name for path in folder.iterdir()) == ["ca.der", "ca.pem", "server.pem"]
    assert not folder.exists()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("taken", ["mqtts", "mqtt"])
def test_a_port_that_is_taken(taken: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = owner.getsockname()[1]
        ports = {"mqtts_port": 0, "mqtt_port": 0, f"{taken}_port": port}
        hub = LocalHub(certificates=tmp_path, **ports)
        with pytest.raises(OSError, match=f"cannot listen on port {port} for {taken}"):
            hub.start()
        with pytest.raises(RuntimeError, match="does not run"):
            hub.listen_again()
    with hub:  # free by now
        assert port in (hub.mqtts_port, hub.mqtt_port)


@pytest.mark.usefixtures("nothing_left")
def test_an_exception_inside_with_closes_the_hub() -> None:
    with pytest.raises(KeyError), LocalHub(mqtts_port=None, mqtt_port=0) as hub:
        hub.device("nobody")
    with pytest.raises(RuntimeError, match="does not run"):
        hub.stop_listening()


def test_it_listens_on_loopback_only(hub: LocalHub) -> None:
    for listener, _ in hub._listeners:
        assert listener.getsockname()[0] in ("127.0.0.1", "::1")


# ---------------------------------------------------------------------- secrets


def test_no_secret_is_ever_logged_or_shown(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    owner_key = "b3duZXItb3duZXItb3duZXItb3duZXI="
    caplog.set_level(logging.DEBUG)
    with LocalHub(mqtt_port=0, certificates=tmp_path, owner_key=owner_key) as hub:
        device = hub.create_device("dev", KEY)
        module = hub.create_device("dev/mod", KEY)
        identity = hub._registry.identities["dev"]
        tokens = [token(), token(expiry=1), token(key=owner_key), token(key=owner_key, policy="device")]
        for one in tokens:
            with Wire(hub.mqtt_port) as wire:
                wire.send(connect("dev", user(), one)).packet()
        with Wire(hub.mqtt_port) as wire:
            wire.send(connect("dev", "nonsense", tokens[0])).packet()
        with Wire(hub.mqtt_port) as wire:
            wire.send(connect("dev", user(), tokens[0], tail=b"x")).rest()
        with online(hub.mqtts_port, ca_file=hub.ca_file) as wire:
            wire.ask(REPORT + "1", b'{"a":1}')
            connection = hub._endpoint.connections["dev"]
            shown = [repr(connection), repr(connection._claim), repr(vars(connection))]
        shown += [repr(one) for one in (hub, device, module, identity, hub._registry, hub._endpoint)]
        shown += [repr(device.packets), repr(hub.faults), repr(device.twin)]
        for bad in ("kein Base64", "a==="):
            with pytest.raises(ValueError, match="base64") as caught:
                hub.create_device("new", bad)
            assert bad not in str(caught.value)
            assert caught.value.__context__ is None or bad not in str(caught.value.__context__)
        with pytest.raises(ValueError, match="base64"):
            LocalHub(owner_key="kein Base64")
    assert "CONNECT refused" in caplog.text
    assert "$iothub/twin/PATCH" in caplog.text
    secrets = [KEY, owner_key, identity.secondary_key, *tokens]
    secrets += [one.partition("sig=")[2].partition("&")[0] for one in tokens]
    everything = caplog.text + "".join(shown)
    assert [one for one in secrets if one in everything] == []


# ---------------------------------------------------------------------- a strange client


def test_paho_as_it_is(hub: LocalHub) -> None:
    device = hub.device("dev")
    device.replace_desired({})
    got: list[tuple[str, bytes]] = []
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, "dev", clean_session=False)
    client.username_pw_set(user(), token())
    client.tls_set(hub.ca_file)
    client.on_connect = lambda *_: client.subscribe([(RES, 1), (DESIRED, 1)])
    client.on_subscribe = lambda *_: client.publish(GET + "1", " ", qos=1)
    client.on_message = lambda _c, _u, message: got.append((message.topic, message.payload))
    client.connect("localhost", hub.mqtts_port or 0, 60)
    client.loop_start()
    try:
        wait_until(lambda: got, "the twin")
        assert got[0][0] == "$iothub/twin/res/200/?$rid=1"
        device.patch_desired({"a": 1})
        wait_until(lambda: len(got) == 2, "the notification")
        client.publish(REPORT + "2", b'{"by":"paho"}', qos=1).wait_for_publish(PATIENCE)
        device.wait_for({"by": "paho"})
        device.disconnect()
        wait_until(lambda: device.connected, "paho's reconnection")
    finally:
        client.disconnect()
        client.loop_stop()


def test_text_of_the_helper_is_that_of_mqtt() -> None:
    # The published frames, for this file's own tools.
    assert connect("dev-1", "u", None, clean=False, keep_alive=240)[2:].startswith(
        b"\0\4MQTT\4\x80\0\xf0" + text("dev-1")
    )
    assert publish(GET + "1").hex(" ") == (
        "30 1a 00 18 24 69 6f 74 68 75 62 2f 74 77 69 6e 2f 47 45 54 2f 3f 24 72 69 64 3d 31"
    )
    assert subscribe((RES, 0), (DESIRED, 0))[:6] == bytes.fromhex("82 41 00 01 00 12")
