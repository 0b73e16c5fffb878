"""A device by hand: MQTT 3.1.1 over a blocking socket, sharing no code with the hub or the client."""

import base64
import hashlib
import hmac
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import quote

from tests.waiting import PATIENCE

RES = "$iothub/twin/res/#"
DESIRED = "$iothub/twin/PATCH/properties/desired/#"
METHODS = "$iothub/methods/POST/#"
GET = "$iothub/twin/GET/?$rid="
REPORT = "$iothub/twin/PATCH/properties/reported/?$rid="
SOON = 600  # seconds that a test's tokens live
KEY = base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
OTHER_KEY = base64.b64encode(b"fedcba9876543210fedcba9876543210").decode()


class Closed(Exception):
    """The hub ended the connection."""


class Publish(NamedTuple):
    topic: str
    payload: bytes
    qos: int = 0
    dup: bool = False
    retain: bool = False
    packet_id: int = 0


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack(">H", len(data)) + data


def frame(first: int, body: bytes = b"") -> bytes:
    """A packet: its first byte as it is, the remaining length, the body."""
    length, digits = len(body), b""
    while True:
        length, digit = divmod(length, 128)
        digits += bytes((digit | (128 if length else 0),))
        if not length:
            return bytes((first,)) + digits + body


def connect(
    client_id: str | bytes = "dev",
    user_name: str | bytes | None = None,
    password: str | bytes | None = None,
    *,
    clean: bool = True,
    keep_alive: int = 60,
    will: tuple[str, bytes] | None = None,
    will_qos: int = 0,
    flags: int | None = None,
    protocol: str = "MQTT",
    level: int = 4,
    first: int = 0x10,
    tail: bytes = b"",
) -> bytes:
    """A CONNECT packet. flags: instead of those that follow from the rest."""
    bits = 2 if clean else 0
    fields = text(client_id)
    if will is not None:
        bits |= 4 | will_qos << 3
        fields += text(will[0]) + text(will[1])
    if user_name is not None:
        bits |= 128
        fields += text(user_name)
    if password is not None:
        bits |= 64
        fields += text(password)
    head = text(protocol) + bytes((level, bits if flags is None else flags)) + struct.pack(">H", keep_alive)
    return frame(first, head + fields + tail)


def publish(
    topic: str | bytes, payload: bytes = b"", qos: int = 0, packet_id: int = 1, flags: int = 0
) -> bytes:
    number = struct.pack(">H", packet_id) if qos else b""
    return frame(0x30 | qos << 1 | flags, text(topic) + number + payload)


def subscribe(*filters: tuple[str, int], packet_id: int = 1) -> bytes:
    body = b"".join(text(name) + bytes((qos,)) for name, qos in filters)
    return frame(0x82, struct.pack(">H", packet_id) + body)


def unsubscribe(*filters: str, packet_id: int = 1) -> bytes:
    return frame(0xA2, struct.pack(">H", packet_id) + b"".join(text(name) for name in filters))


def puback(packet_id: int) -> bytes:
    return frame(0x40, struct.pack(">H", packet_id))


PINGREQ, DISCONNECT = b"\xc0\0", b"\xe0\0"


def signature(resource: str, expiry: str, key: str) -> str:
    digest = hmac.new(base64.b64decode(key), f"{resource}\n{expiry}".encode(), hashlib.sha256).digest()
    return base64.b64encode(digest).decode()


def token(
    device_id: str = "dev",
    key: str = KEY,
    *,
    resource: str | None = None,
    expiry: int | str | None = None,
    policy: str | None = None,
    order: str = "sr sig se skn",
) -> str:
    """A shared access signature. resource: as it stands in the token, encoded."""
    if resource is None:
        device, _, module = device_id.partition("/")
        path = f"localhost/devices/{device}" + (f"/modules/{module}" if module else "")
        resource = quote(path, safe="")
    se = str(int(time.time()) + SOON if expiry is None else expiry)
    fields = {"sr": resource, "sig": quote(signature(resource, se, key), safe=""), "se": se}
    if policy is not None:
        fields["skn"] = policy
    pairs = [f"{name}={fields[name]}" for name in order.split() if name in fields]
    return "SharedAccessSignature " + "&".join(pairs)


def user(device_id: str = "dev", host: str = "localhost", tail: str = "/?api-version=2021-04-12") -> str:
    return f"{host}/{device_id}{tail}"


class Wire:
    """One connection. Every wait has a deadline; Closed is raised where the hub has ended it."""

    def __init__(self, port: int | None, ca_file: str | None = None) -> None:
        assert port is not None
        raw = socket.create_connection(("127.0.0.1", port), PATIENCE)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket: socket.socket = raw
        if ca_file is not None:
            context = ssl.create_default_context(cafile=ca_file)
            self.socket = context.wrap_socket(raw, server_hostname="localhost")
        self._buffer = b""
        self._packet_id = 0

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    # ------------------------------------------------------------------ bytes

    def send(self, *packets: bytes) -> "Wire":
        """What is sent into a connection that has ended is lost, as on any network."""
        with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):
            self.socket.sendall(b"".join(packets))
        return self

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(65536)
        except (ConnectionResetError, BrokenPipeError, ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    def packet(self) -> tuple[int, bytes]:
        """The next packet's first byte and its body."""
        while True:
            parsed = self._parse()
            if parsed is not None:
                return parsed
            data = self._receive()
            if not data:
                raise Closed(self._buffer)
            self._buffer += data

    def _parse(self) -> tuple[int, bytes] | None:
        length, at = 0, 1
        while True:
            if at >= len(self._buffer):
                return None
            byte = self._buffer[at]
            length += (byte & 127) << 7 * (at - 1)
            at += 1
            if byte < 128:
                break
        if len(self._buffer) < at + length:
            return None
        first, body = self._buffer[0], self._buffer[at : at + length]
        self._buffer = self._buffer[at + length :]
        return first, body

    def rest(self) -> bytes:
        """All that comes until the hub ends the connection; TimeoutError if it does not."""
        data = self._buffer
        self._buffer = b""
        while True:
            more = self._receive()
            if not more:
                return data
            data += more

    # ------------------------------------------------------------------ packets

    def connect(self, device_id: str = "dev", key: str = KEY, **options: Any) -> int:
        """Connect, accepted; returns SessionPresent."""
        password = options.pop("password", None) or token(device_id, key)
        first, body = self.send(connect(device_id, user(device_id), password, **options)).packet()
        assert (first, body[1:]) == (0x20, b"\0"), (first, body)
        return body[0]

    def subscribe(self, *filters: tuple[str, int] | str) -> list[int]:
        """Returns the granted codes."""
        self._packet_id += 1
        pairs = [(one, 0) if isinstance(one, str) else one for one in filters]
        first, body = self.send(subscribe(*pairs, packet_id=self._packet_id)).packet()
        assert (first, body[:2]) == (0x90, struct.pack(">H", self._packet_id))
        return list(body[2:])

    def unsubscribe(self, *filters: str) -> None:
        assert self.send(unsubscribe(*filters, packet_id=77)).packet() == (0xB0, b"\0M")

    def message(self) -> Publish:
        """The next packet, which has to be a PUBLISH."""
        first, body = self.packet()
        assert first >> 4 == 3, (hex(first), body)
        length = struct.unpack(">H", body[:2])[0]
        topic, body = body[2 : 2 + length].decode(), body[2 + length :]
        qos = first >> 1 & 3
        number = struct.unpack(">H", body[:2])[0] if qos else 0
        return Publish(topic, body[2:] if qos else body, qos, bool(first & 8), bool(first & 1), number)

    def nothing_waits(self) -> None:
        """The hub has sent nothing up to now: what comes next is the answer to a PINGREQ."""
        got = self.send(PINGREQ).packet()
        assert got == (0xD0, b""), got

    def ask(self, topic: str, payload: bytes = b"") -> Publish:
        """Publish at QoS 0 and take the next message."""
        return self.send(publish(topic, payload)).message()


def online(port: int | None, device_id: str = "dev", key: str = KEY, *filters: str, **options: Any) -> Wire:
    """A connected Wire that is subscribed to filters, by default to both of the twin's."""
    wire = Wire(port, options.pop("ca_file", None))
    try:
        wire.connect(device_id, key, **options)
        wire.subscribe(*(filters or (RES, DESIRED)))
    except BaseException:
        wire.close()
        raise
    return wire


@contextmanager
def tls_in_pieces(port: int, context: ssl.SSLContext, size: int) -> Iterator[Callable[..., bytes | None]]:
    """TLS by hand, in packets of so many bytes, so that its records are cut as well.

    Gives do(step, *arguments), which calls a method of ssl.SSLObject, and waits for what it needs.
    """
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def do(step: str, *arguments: Any) -> bytes | None:
            while True:
                try:
                    result: bytes | None = getattr(tls, step)(*arguments)
                except ssl.SSLWantReadError:
                    result = b""
                data = outgoing.read()
                for at in range(0, len(data), size):
                    raw.sendall(data[at : at + size])
                if result != b"":
                    return result
                incoming.write(raw.recv(65536))

        yield do
