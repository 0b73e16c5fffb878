"""MQTT over WebSockets: paho as it is, and what is none of it."""

import asyncio
import base64
import os
import queue
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import aiohttp
import paho.mqtt.client as paho
import pytest

from tests.hub_wire import KEY, RES, connect, publish, subscribe, token, user
from tests.waiting import PATIENCE, wait_until
from twin_device.hub import LocalHub

PATH = "/$iothub/websocket"


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(None, https_port=0, http_port=0) as hub:
        hub.create_device("dev", KEY, desired={"a": 1})
        yield hub


def client(hub: LocalHub, answers: "queue.SimpleQueue[Any]") -> paho.Client:
    made = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="dev", transport="websockets")
    made.ws_set_options(path=PATH)
    made.username_pw_set(user(), token())
    made.tls_set(hub.ca_file)
    made.on_connect = lambda client, *_: client.subscribe(RES)
    made.on_subscribe = lambda client, *_: client.publish("$iothub/twin/GET/?$rid=1")
    made.on_message = lambda _client, _data, message: answers.put((message.topic, message.payload))
    made.on_disconnect = lambda *_: answers.put("disconnected")
    return made


def test_paho_over_websockets(hub: LocalHub) -> None:
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    device = hub.device("dev")
    made = client(hub, answers)
    made.connect("localhost", hub.https_port or 0)
    made.loop_start()
    try:
        topic, payload = answers.get(timeout=PATIENCE)
        assert (topic, payload) == (
            "$iothub/twin/res/200/?$rid=1",
            b'{"desired":{"a":1,"$version":1},"reported":{"$version":1}}',
        )
        large = '{"text": "' + "x" * 4000 + '"}'
        made.publish("$iothub/twin/PATCH/properties/reported/?$rid=2", large, qos=1)
        assert answers.get(timeout=PATIENCE) == ("$iothub/twin/res/204/?$rid=2&$version=2", b"")
        assert len(device.reported["text"]) == 4000
        device.disconnect()
        assert answers.get(timeout=PATIENCE) == "disconnected"
        # paho comes back on its own.
        assert answers.get(timeout=PATIENCE)[0] == "$iothub/twin/res/200/?$rid=1"
    finally:
        made.disconnect()
        made.loop_stop()
    wait_until(lambda: not device.connected, "it is gone")


def test_away_is_away_for_websockets_too(hub: LocalHub) -> None:
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    made = client(hub, answers)
    made.connect("localhost", hub.https_port or 0)
    made.loop_start()
    try:
        answers.get(timeout=PATIENCE)
        hub.stop_listening()
        assert answers.get(timeout=PATIENCE) == "disconnected"
        assert asyncio.run(played(hub, connect("dev", user(), token()))) == (503, [])
        hub.listen_again()
        assert answers.get(timeout=PATIENCE)[0] == "$iothub/twin/res/200/?$rid=1"
    finally:
        made.disconnect()
        made.loop_stop()


async def played(hub: LocalHub, *messages: bytes | str, protocol: str = "mqtt") -> tuple[int, list[bytes]]:
    """What a WebSocket is told until it is closed: status of the handshake, messages."""
    seen: list[bytes] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as session:
        try:
            async with session.ws_connect(
                f"http://localhost:{hub.http_port}{PATH}", protocols=[protocol] if protocol else []
            ) as web_socket:
                for message in messages:
                    if isinstance(message, str):
                        await web_socket.send_str(message)
                    else:
                        await web_socket.send_bytes(message)
                async for got in web_socket:
                    seen.append(got.data)
        except aiohttp.WSServerHandshakeError as error:
            return error.status, seen
    return 101, seen


def test_packets_may_come_in_any_pieces(hub: LocalHub) -> None:
    packets = connect("dev", user(), token()) + subscribe((RES, 0)) + publish("$iothub/twin/GET/?$rid=7")
    pieces = [bytes((byte,)) for byte in packets]
    # DISCONNECT ends it; what was written before goes out.
    status, seen = asyncio.run(played(hub, *pieces, b"\xe0\0"))
    assert (status, seen[0], seen[1][:1]) == (101, b"\x20\x02\0\0", b"\x90")
    assert b"$rid=7" in seen[2]


def test_a_refused_device_is_told(hub: LocalHub) -> None:
    status, seen = asyncio.run(played(hub, connect("dev", user(), token(key="MDEy"))))
    assert (status, seen) == (101, [b"\x20\x02\0\5"])


@pytest.mark.parametrize("protocol", ["", "amqp"])
def test_without_the_sub_protocol_there_is_none(hub: LocalHub, protocol: str) -> None:
    assert asyncio.run(played(hub, protocol=protocol)) == (400, [])


def test_the_sub_protocol_in_capitals(hub: LocalHub) -> None:
    assert asyncio.run(played(hub, connect("dev", user(), token()), b"\xe0\0", protocol="MQTT"))[0] == 101


@pytest.mark.parametrize("message", ["text is no MQTT", b"\xff" * 20, b"\x30" + b"\0" * 300_000])
def test_what_is_no_mqtt_ends_it(hub: LocalHub, message: bytes | str) -> None:
    assert asyncio.run(played(hub, message)) == (101, [])
    wait_until(lambda: hub._endpoint.open == set(), "it is gone")


def test_a_request_that_is_no_websocket(hub: LocalHub) -> None:
    with closing(socket.create_connection(("127.0.0.1", hub.http_port or 0), PATIENCE)) as raw:
        raw.sendall(f"GET {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert raw.recv(12) == b"HTTP/1.1 400"


def test_who_does_not_read_is_ended(hub: LocalHub) -> None:
    """Answers pile up for a device that asks and does not read, but not without a bound."""
    hub.device("dev").patch_desired({f"k{number}": "x" * 4000 for number in range(8)})
    context = ssl.create_default_context(cafile=hub.ca_file)
    key = base64.b64encode(os.urandom(16)).decode()
    with (
        socket.create_connection(("127.0.0.1", hub.https_port or 0), PATIENCE) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as secure,
    ):
        secure.sendall(
            f"GET {PATH} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: mqtt\r\n"
            f"Sec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        assert secure.recv(12) == b"HTTP/1.1 101"

        def frame(data: bytes) -> bytes:
            # Masked with zeros, as clients have to mask.
            return b"\x82" + bytes((0xFE,)) + len(data).to_bytes(2, "big") + b"\0\0\0\0" + data

        secure.sendall(frame(connect("dev", user(), token()) + subscribe((RES, 0))))

        def ask_until(end: float) -> None:
            while time.monotonic() < end:
                secure.sendall(frame(publish("$iothub/twin/GET/?$rid=1") * 10))

        with pytest.raises((ConnectionError, ssl.SSLError)):
            ask_until(time.monotonic() + PATIENCE)
    wait_until(lambda: not hub.device("dev").connected, "it is gone")
