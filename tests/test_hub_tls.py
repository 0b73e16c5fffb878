"""The hub's TLS for devices: what it costs, and how it begins and ends."""

import socket
import ssl
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.hub_wire import GET, KEY, REPORT, RES, Wire, connect, online, tls_in_pieces, token, user
from tests.waiting import PATIENCE, wait_until
from twin_device.hub import LocalHub


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(0) as hub:
        hub.create_device("dev", KEY)
        yield hub


def client(hub: LocalHub, *, version: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
    """Connected; an end without TLS's goodbye is an error."""
    context = ssl.create_default_context(cafile=hub.ca_file)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    raw = socket.create_connection(("127.0.0.1", hub.mqtts_port or 0), PATIENCE)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_hub_says_goodbye(hub: LocalHub, version: ssl.TLSVersion) -> None:
    with client(hub, version=version) as wire:
        assert wire.version() == version.name.replace("_", ".")
        wire.sendall(connect("dev", user(), "no token"))
        assert wire.recv(4) == b"\x20\2\0\5"
        assert wire.recv(1) == b""
    wait_until(lambda: not hub._endpoint.open, "the connection has ended")


def test_a_goodbye_of_the_device_ends_its_connection(hub: LocalHub) -> None:
    with client(hub) as wire:
        wire.sendall(connect("dev", user(), token()))
        assert wire.recv(4) == b"\x20\2\0\0"
        wire.unwrap().close()
    wait_until(lambda: not hub.device("dev").connected, "the connection has ended")


def test_bytes_may_come_one_by_one(hub: LocalHub) -> None:
    context = ssl.create_default_context(cafile=hub.ca_file)
    with tls_in_pieces(hub.mqtts_port or 0, context, 1) as do:
        do("do_handshake")
        do("write", connect("dev", user(), token()))
        assert do("read", 100) == b"\x20\2\0\0"


def test_large_packets_both_ways(hub: LocalHub) -> None:
    document = b'{"values":["%b"]}' % b'","'.join([b"x" * 4000] * 8)
    with online(hub.mqtts_port, "dev", KEY, RES, ca_file=hub.ca_file) as wire:
        assert wire.ask(f"{REPORT}1", document).topic.endswith("$version=2")
        assert document[:-1] in wire.ask(f"{GET}2").payload


def test_what_is_no_tls_ends_the_connection(hub: LocalHub) -> None:
    with socket.create_connection(("127.0.0.1", hub.mqtts_port or 0), PATIENCE) as raw:
        raw.sendall(connect("dev", user(), token()))
        assert raw.recv(100) == b""


def test_a_connection_costs_little_memory(hub: LocalHub) -> None:
    names = [f"dev{number}" for number in range(20)]
    for name in names:
        hub.create_device(name, KEY)
    packets = [connect(name, user(name), token(name)) for name in names]
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(hub.mqtts_port, hub.ca_file))]
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for packet in packets:
            wires.append(stack.enter_context(Wire(hub.mqtts_port, hub.ca_file)))
            assert wires[-1].send(packet).packet() == (0x20, b"\0\0")
        after, _ = tracemalloc.get_traced_memory()
    # Of Python's memory, the test's own side included; OpenSSL's is not seen.
    assert (after - before) / len(names) < 64 * 1024
