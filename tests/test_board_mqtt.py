"""The board's MQTT packets, on CPython: what is written, and what is read however it is cut."""

import tracemalloc
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vm import board_mqtt
from twin_device import RemoteError

mqtt = board_mqtt()
ANSWER = "$iothub/twin/res/200/?$rid=1"


class Owner:
    """Writes down what it is given. most: of the largest piece."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.payload = b""
        self.most = 0

    def packet(self, kind: int, body: bytes) -> None:
        self.seen.append((kind, body))

    def began(self, topic: str, identifier: int | None) -> None:
        self.seen.append((topic, identifier))

    def chunk(self, data: memoryview) -> None:
        self.payload += data
        self.most = max(self.most, len(data))

    def ended(self) -> None:
        self.seen.append(self.payload)
        self.payload = b""


def read(data: bytes, pieces: int = 512, size: int = 512) -> list[Any]:
    """What a receiver makes of these bytes, in pieces of so many."""
    owner = Owner()
    receiver = mqtt.Receiver(owner, size)
    for at in range(0, len(data), min(pieces, size)):
        piece = data[at : at + min(pieces, size)]
        receiver.buffer[: len(piece)] = piece
        receiver.received(len(piece))
    assert owner.most <= size
    return owner.seen


def published(topic: str, payload: bytes, identifier: int | None = None) -> bytes:
    return b"".join(mqtt.publish(topic, payload, identifier))


WRITTEN = [
    (
        mqtt.connect("dev", "host/dev/?api-version=1", "secret", 60),
        b"\x10\x30\0\4MQTT\4\xc0\0\x3c\0\3dev\0\x17host/dev/?api-version=1\0\6secret",
    ),
    # X.509: no password, and no flag of one.
    (mqtt.connect("d", "u", "", 1177), b"\x10\x10\0\4MQTT\4\x80\4\x99\0\1d\0\1u"),
    (mqtt.subscribe(1, ("a", "b/#")), b"\x82\x0c\0\1\0\1a\0\0\3b/#\0"),
    (mqtt.subscribe(65535, ("a",), 1), b"\x82\6\xff\xff\0\1a\1"),
    (published("a", b"xy"), b"\x30\5\0\1axy"),
    (published("a", b"xy", 7), b"\x32\7\0\1a\0\7xy"),
    (b"".join(mqtt.publish("a", b"xy", 7, again=True)), b"\x3a\7\0\1a\0\7xy"),
    (published("é", b""), b"\x30\4\0\2\xc3\xa9"),
    (mqtt.puback(513), b"\x40\2\2\1"),
    (mqtt.PINGREQ, b"\xc0\0"),
    (mqtt.DISCONNECT, b"\xe0\0"),
]


@pytest.mark.parametrize(("packet", "expected"), WRITTEN, ids=lambda packet: packet[:2].hex())
def test_packets_are_written_as_the_standard_has_them(packet: bytes, expected: bytes) -> None:
    assert packet == expected


@pytest.mark.parametrize(("count", "coded"), [(127, 1), (128, 2), (16383, 2), (16384, 3), (2097152, 4)])
def test_a_length_takes_one_to_four_bytes(count: int, coded: int) -> None:
    head, payload = mqtt.publish("a", bytes(count - 3))
    assert len(head) == 1 + coded + 3
    assert len(payload) == count - 3


def test_identifiers_start_over_and_are_never_zero() -> None:
    assert [mqtt.following(number) for number in (0, 1, 65534, 65535)] == [1, 2, 65535, 1]


def test_paho_reads_what_is_written(mocker: Any) -> None:
    """A second opinion on a PUBLISH: paho's own reader."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    client.on_message = mocker.Mock()
    client._in_packet["packet"] = bytearray(published("t", b"pay", 3)[2:])
    client._in_packet["command"] = 0x32
    client._in_packet["remaining_length"] = len(client._in_packet["packet"])
    mocker.patch.object(client, "_send_puback", return_value=0)
    client._handle_publish()
    message = client.on_message.call_args[0][2]
    assert (message.topic, message.payload, message.mid, message.qos) == ("t", b"pay", 3, 1)


SEVERAL = (
    b"\x20\2\1\0"
    + b"\x90\6\0\1\0\0\0\0"
    + published(ANSWER, b'{"a":1}')
    + b"\xd0\0"
    + published("t", b"", 513)
    + b"\x40\2\0\1"
    + published("long", b"x" * 3000)
)
SEEN = [
    (mqtt.CONNACK, b"\1\0"),
    (mqtt.SUBACK, b"\0\1\0\0\0\0"),
    (ANSWER, None),
    b'{"a":1}',
    (mqtt.PINGRESP, b""),
    ("t", 513),
    b"",
    (mqtt.PUBACK, b"\0\1"),
    ("long", None),
    b"x" * 3000,
]


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 100, 512])
@pytest.mark.parametrize("size", [16, 512])
def test_packets_are_read_however_they_are_cut(pieces: int, size: int) -> None:
    assert read(SEVERAL, pieces, size) == SEEN


REFUSED = [
    (b"\x10\0", "type 0x10"),  # CONNECT is a client's
    (b"\x00\0", "type 0x0"),
    (b"\xf0\0", "type 0xf0"),
    (b"\x21\2\0\0", "type 0x21"),  # reserved flags
    (b"\x36\5\0\1a\0\1", "QoS 3"),
    (b"\x34\5\0\1a\0\1", "QoS 2"),
    (b"\x20\xff\xff\xff\xff\1", "more than four bytes"),
    (b"\x30\xff\xff\xff\x7f", "268435455 bytes"),
    (b"\x30\x81\x88\x10", "263169 bytes"),
    (b"\x90\xff\1", "255 bytes"),
    (b"\x30\0", "0 bytes"),
    (b"\x30\1\0", "1 bytes"),
    (b"\x30\3\0\2a", "a topic of 2 bytes"),
    (b"\x32\3\0\1a", "a topic of 1 bytes"),
    (b"\x30\xff\x7f\x04\x01" + b"a" * 1025, "a topic of 1025 bytes"),
    (b"\x30\4\0\2\xff\xfe", "no UTF-8"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED, ids=lambda value: repr(value)[:30])
def test_what_no_hub_sends_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(RemoteError, match=message):
        read(data)
    with pytest.raises(RemoteError, match=message):
        read(data, 1)


def test_a_gigabyte_that_is_announced_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RemoteError):
            read(b"\x30\xff\xff\xff\x7f" + bytes(2000))
        # The largest payload that is let in goes through in pieces, and nothing of it stays.
        owner = Owner()
        owner.chunk = lambda data: None  # type: ignore[method-assign]  # it would keep it
        receiver = mqtt.Receiver(owner)
        data = published("t", bytes(262144))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for at in range(0, len(data), 512):
            piece = data[at : at + 512]
            receiver.buffer[: len(piece)] = piece
            receiver.received(len(piece))
        assert tracemalloc.get_traced_memory()[1] - before < 8192
    finally:
        tracemalloc.stop()
    assert owner.seen == [("t", None), b""]


@given(st.binary(max_size=400), st.integers(1, 50))
def test_any_bytes_are_read_or_refused_and_alike_in_any_pieces(data: bytes, pieces: int) -> None:
    def outcome(pieces: int) -> tuple[list[Any], str]:
        owner = Owner()
        receiver = mqtt.Receiver(owner, 64)
        try:
            for at in range(0, len(data), pieces):
                piece = data[at : at + pieces]
                receiver.buffer[: len(piece)] = piece
                receiver.received(len(piece))
        except RemoteError as error:
            return owner.seen, str(error)
        return owner.seen, ""

    assert outcome(pieces) == outcome(1)


TOPICS = st.text(st.characters(codec="utf-8"), min_size=0, max_size=100)


@given(
    st.lists(
        st.tuples(TOPICS, st.binary(max_size=300), st.none() | st.integers(1, 65535)), min_size=1, max_size=5
    ),
    st.integers(1, 64),
)
def test_what_is_written_is_read_back(messages: list[tuple[str, bytes, int | None]], pieces: int) -> None:
    data = b"".join(published(*message) for message in messages)
    seen = read(data, pieces, 64)
    assert seen == [
        part for topic, payload, identifier in messages for part in ((topic, identifier), payload)
    ]
