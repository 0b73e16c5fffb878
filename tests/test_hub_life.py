"""A hub's life: it starts, goes away and comes back, and leaves nothing behind."""

import gc
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.hub_wire import GET, KEY, Wire, connect, online, publish, token, user
from tests.waiting import PATIENCE, wait_until
from twin_device.hub import Device, LocalHub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates, made once."""
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture
def hub(folder: Path) -> Iterator[LocalHub]:
    with LocalHub(mqtt_port=0, certificates=folder) as hub:
        hub.create_device("dev", KEY)
        yield hub


@pytest.fixture
def device(hub: LocalHub) -> Device:
    return hub.device("dev")


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def sockets() -> set[str]:
    """What this process has open, where the system tells."""
    gc.collect()  # paho's clients of other tests go in a cycle, with their sockets
    found = set()
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found.add(target)
    return found


def refuses(port: int | None) -> bool:
    assert port is not None
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    except ConnectionRefusedError:
        return True
    return False


# ---------------------------------------------------------------------- what it leaves behind


def test_nothing_is_left_of_a_hub_with_every_kind_of_connection(folder: Path) -> None:
    before = threads(), sockets()
    with ExitStack() as ours:
        hub = LocalHub(mqtt_port=0, https_port=0, http_port=0, certificates=folder)
        hub.start()
        ports = hub.mqtts_port, hub.mqtt_port, hub.https_port, hub.http_port
        device = hub.create_device("dev", KEY)
        hub.create_device("half", KEY)
        hub.create_device("slow", KEY)
        connected = ours.enter_context(online(hub.mqtts_port, ca_file=hub.ca_file))
        silent = ours.enter_context(Wire(hub.mqtt_port))
        silent_tls = ours.enter_context(Wire(hub.mqtts_port, hub.ca_file))
        greeting = ours.enter_context(Wire(hub.mqtts_port))
        greeting_https = ours.enter_context(Wire(hub.https_port))
        for wire in (greeting, greeting_https):
            wire.socket.sendall(b"\x16\x03\x01")  # the beginning of a handshake
        idle = ours.enter_context(Wire(hub.http_port))
        idle_tls = ours.enter_context(Wire(hub.https_port, hub.ca_file))
        asking = ours.enter_context(Wire(hub.http_port)).send(b"GET /devices HTTP/1.1\r\nHost: x\r\n")
        hub.fault("half_open", device="half")
        half = ours.enter_context(Wire(hub.mqtt_port)).send(connect("half", user("half"), token("half")))
        hub.fault("connack_slow", device="slow", seconds_late=600)
        slow = ours.enter_context(Wire(hub.mqtt_port)).send(connect("slow", user("slow"), token("slow")))
        fault = hub.fault("hanging_tls", times=1)
        hanging = ours.enter_context(Wire(hub.mqtts_port))
        wait_until(lambda: fault.hits, "the handshake that hangs")
        hub.fault("answer_late", seconds_late=600)
        hub.fault("notification_late", seconds_late=600)
        connected.send(publish(GET + "1"))
        device.patch_desired({"a": 1})
        began = time.monotonic()
        hub.close()
        assert time.monotonic() - began < 5
        for wire in (
            connected,
            silent,
            silent_tls,
            greeting,
            half,
            slow,
            hanging,
            idle,
            idle_tls,
            asking,
            greeting_https,
        ):
            assert wire.rest() == b""
        assert all(refuses(port) for port in ports)
    assert (threads(), sockets()) == before


def test_what_is_no_tls_and_what_hangs_up_in_the_handshake_leaves_nothing(hub: LocalHub) -> None:
    first = online(hub.mqtts_port, ca_file=hub.ca_file)
    before = len(sockets())
    for said in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        connect("dev", user(), token()),
        b"\x16\x03\x01\x02\0\1",
        b"\0" * 99,
    ):
        with Wire(hub.mqtts_port) as wire:
            wire.send(said)
    with Wire(hub.mqtts_port) as wire:  # a client that does not trust the hub
        context = ssl.create_default_context()
        with pytest.raises(ssl.SSLCertVerificationError):
            context.wrap_socket(wire.socket, server_hostname="localhost")
    wait_until(lambda: len(sockets()) <= before, "the end of every connection")
    first.nothing_waits()
    first.close()


def test_a_thousand_connections_one_after_another_leave_nothing(hub: LocalHub, device: Device) -> None:
    before = len(sockets())
    packet = connect("dev", user(), token())
    for _ in range(1000):
        with Wire(hub.mqtt_port) as wire:
            assert wire.send(packet).packet() == (0x20, b"\0\0")
    assert device.connections == 1000
    wait_until(lambda: not device.connected and len(sockets()) <= before, "the end of every connection")
    assert not hub._endpoint.open


@pytest.mark.parametrize("end", ["close", "with"])
def test_a_hub_may_be_started_again(end: str) -> None:
    hub = LocalHub(mqtts_port=None, mqtt_port=0)
    for device_id in ("a", "b"):
        if end == "with":
            with hub:
                hub.create_device(device_id, KEY)
                with online(hub.mqtt_port, device_id):
                    pass
        else:
            hub.start()
            hub.create_device(device_id, KEY)
            with online(hub.mqtt_port, device_id):
                pass
            hub.close()
            hub.close()  # does nothing
    assert [device.id for device in hub.devices] == ["a", "b"]


def test_it_goes_away_and_comes_back_on_the_same_ports(hub: LocalHub, device: Device) -> None:
    ports = hub.mqtts_port, hub.mqtt_port
    with online(hub.mqtts_port, ca_file=hub.ca_file) as tls, Wire(hub.mqtt_port) as silent:
        hub.stop_listening()
        assert tls.rest() == silent.rest() == b""
    assert refuses(ports[0])
    assert refuses(ports[1])
    assert not device.connected
    device.patch_desired({"a": 1})  # the back end goes on
    hub.stop_listening()  # does nothing
    hub.listen_again()
    hub.listen_again()  # does nothing
    assert (hub.mqtts_port, hub.mqtt_port) == ports
    with online(hub.mqtts_port, ca_file=hub.ca_file) as tls, online(hub.mqtt_port, clean=False):
        assert tls.rest() == b""  # taken over


def test_ipv6(hub: LocalHub) -> None:
    if len(hub._listeners) < 4:
        pytest.skip("a machine without IPv6")
    context = ssl.create_default_context(cafile=hub.ca_file)
    with (
        socket.create_connection(("::1", hub.mqtts_port or 0), PATIENCE) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as secure,
    ):
        secure.sendall(connect("dev", user(), token()))
        assert secure.recv(4) == b"\x20\x02\0\0"


def test_who_is_not_there(hub: LocalHub, device: Device) -> None:
    with pytest.raises(KeyError):
        hub.device("nobody")
    device.delete()
    for use in (
        lambda: device.desired,
        lambda: device.twin,
        lambda: device.connections,
        lambda: device.connection_string,
        lambda: device.patch_desired({}),
        lambda: device.send_c2d(b""),
        device.disable,
        device.delete,
        device.recreate,
        device.clear_packets,
    ):
        with pytest.raises(KeyError):
            use()
    assert not device.connected
    device.disconnect()  # nothing to do


def test_who_asks_while_it_closes_is_answered() -> None:
    hub = LocalHub(mqtts_port=None, mqtt_port=0)
    device = hub.create_device("dev", KEY)
    ended = threading.Event()

    def ask() -> int:
        asked = 0
        while not ended.is_set():
            device.patch_desired({"a": asked})
            asked += 1
        return asked

    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for _ in range(20):
            hub.start()
            closing = [pool.submit(hub.close) for _ in range(4)]
            hub.close()
            for one in closing:
                one.result(PATIENCE)
        ended.set()
        asked = sum(one.result(PATIENCE) for one in asking)
    assert device.desired_version == 1 + asked
    assert time.monotonic() - began < 2 * PATIENCE


def test_who_asks_before_it_starts_is_answered_with_what_went_wrong() -> None:
    hub = LocalHub(mqtts_port=None, mqtt_port=0)
    device = hub.create_device("dev", KEY)
    for _ in range(2):
        with pytest.raises(ValueError, match="has a character"):
            device.patch_desired({"a.b": 1})
        with pytest.raises(RuntimeError, match="does not run"):
            hub.stop_listening()
        with hub, pytest.raises(ValueError, match="has a character"):
            device.patch_desired({"a.b": 1})


def test_wait_for_ends_in_time_however_much_happens(hub: LocalHub, device: Device) -> None:
    def never(_: Device) -> bool:
        hub._note_change()  # something happens all the time
        return False

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        device.wait_for(never, timeout=0.1)
    assert time.monotonic() - began < 5


def test_wait_for_ends_with_the_device(hub: LocalHub, device: Device) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(device.wait_for, {"a": 1}, PATIENCE)
        device.delete()
        with pytest.raises(KeyError):
            waiting.result(PATIENCE)
