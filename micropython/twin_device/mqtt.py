"""MQTT 3.1.1 for boards: packets to bytes, and bytes to packets in chunks. No I/O.

Of the protocol there is what a client of an IoT hub sends and is sent: QoS 0 and 1, no will, no retained
messages. Section numbers are those of the OASIS standard.
"""

from .core.errors import RemoteError

const = int  # MicroPython's compiler puts the numbers in place of the names

CONNACK = const(2)
PUBACK = const(4)
SUBACK = const(9)
UNSUBACK = const(11)
PINGRESP = const(13)

PINGREQ = b"\xc0\0"
DISCONNECT = b"\xe0\0"

_PUBLISH = const(3)
# The first bytes of packets that a hub may send: the type, and flags, which only a PUBLISH has.
_FIRST = b"\x20\x30\x31\x32\x33\x38\x39\x3a\x3b\x40\x90\xb0\xd0"
_MAX_TOPIC = const(1024)  # bytes; a twin's topic has less than 200
_MAX_PAYLOAD = const(262144)  # bytes; no message of the hub is larger
_MAX_BODY = const(64)  # bytes of any other packet
_PIECE = const(128)  # bytes of a payload that are handed on at once


def connect(client_id: str, user_name: str, password: str, keep_alive: int) -> bytes:
    """CONNECT to a session that outlives the connection (3.1). keep_alive: seconds; password: "" for none."""
    flags = b"\x80"
    body = _text(client_id) + _text(user_name)
    if password:
        flags = b"\xc0"
        body += _text(password)
    return _packet(0x10, b"\0\4MQTT\4" + flags + _number(keep_alive) + body)


def subscribe(identifier: int, filters: "tuple[str, ...]", qos: int = 0) -> bytes:
    """One SUBSCRIBE with all filters (3.8)."""
    body = _number(identifier)
    for topic in filters:
        body += _text(topic) + bytes((qos,))
    return _packet(0x82, body)


def publish_once(topic: str, payload: bytes) -> "tuple[bytes, bytes]":
    """PUBLISH of QoS 0 in two parts, to be sent one after the other (3.3)."""
    return _packet(0x30, _text(topic), len(payload)), payload


def publish(
    topic: str, payload: bytes, identifier: "int | None" = None, again: bool = False
) -> "tuple[bytes, bytes]":
    """PUBLISH in two parts as above: QoS 1 with an identifier, else QoS 0.

    again: it may have been sent before in this session (DUP).
    """
    if identifier is None:
        return publish_once(topic, payload)
    return _packet(0x3A if again else 0x32, _text(topic) + _number(identifier), len(payload)), payload


def puback(identifier: int) -> bytes:
    """The answer to a PUBLISH of QoS 1 (3.4)."""
    return b"\x40\2" + _number(identifier)


def following(identifier: int) -> int:
    """The packet identifier after this one: 1 to 65535, and again (2.3.1)."""
    return identifier % 65535 + 1


class Receiver:
    """Takes what comes from the hub apart, however it is cut, in memory that does not grow.

    Read into `buffer` (memoryview), then call received() with the count. Each whole packet goes to
    packet(type, body): CONNACK, PUBACK, SUBACK, UNSUBACK or PINGRESP, and its body (bytes). A PUBLISH goes
    to began(topic, identifier) (identifier None: QoS 0), then in pieces to chunk(memoryview), which may not
    be kept, and in the end to ended(). These are methods of `owner`; what they raise passes through.

    RemoteError from received(): no hub sends this. The connection is worth nothing then.
    """

    def __init__(self, owner: object, size: int = 512) -> None:
        self.buffer = memoryview(bytearray(size))
        self._owner = owner
        self._head = b""
        self._packets = self._read()
        self._wanted = next(self._packets)  # the most bytes that it goes on with

    def received(self, count: int) -> None:
        """The first count bytes of the buffer are new."""
        at = 0
        while at < count:
            piece = self.buffer[at : min(count, at + self._wanted)]
            at += len(piece)
            self._wanted = self._packets.send(piece)

    def _read(self) -> object:
        """One packet after the other: yields how many bytes it wants at the most, and is sent some."""
        owner = self._owner
        while True:
            first = (yield 1)[0]
            left = shift = 0
            byte = 128
            while byte > 127 and shift < 28:
                byte = (yield 1)[0]
                left |= (byte & 127) << shift
                shift += 7
            kind = first >> 4
            wanted = left
            most = _MAX_BODY
            if kind == _PUBLISH:
                wanted = 2
                most = _MAX_PAYLOAD + _MAX_TOPIC
            if byte > 127 or first not in _FIRST or left < wanted or left > most:
                raise _unread(first, left, byte)
            head = yield from self._whole(wanted)
            if kind != _PUBLISH:
                owner.packet(kind, head)  # type: ignore[attr-defined]  # there is no Protocol here
                continue
            # Of QoS 1: two bytes of identifier come after the topic.
            numbered = first & 2
            size = head[0] << 8 | head[1]
            left -= 2 + size + numbered
            if size + numbered > _MAX_TOPIC or left < 0:
                raise RemoteError("a topic of " + str(size) + " bytes")
            head = yield from self._whole(size + numbered)
            try:
                topic = head[:size].decode()
            except ValueError:
                raise RemoteError("a topic that is no UTF-8") from None
            owner.began(topic, head[size] << 8 | head[size + 1] if numbered else None)  # type: ignore[attr-defined]  # as above
            while left:
                # In a heap that is nearly full there are but small gaps.
                piece = yield min(left, _PIECE)
                left -= len(piece)
                owner.chunk(piece)  # type: ignore[attr-defined]  # as above
            owner.ended()  # type: ignore[attr-defined]  # as above

    def _whole(self, size: int) -> object:
        """So many bytes, however they are cut: those before a payload, which are few."""
        self._head = b""
        while len(self._head) < size:
            self._head += bytes((yield size - len(self._head)))
        return self._head


def _unread(first: int, length: int, last: int) -> RemoteError:
    """Why no packet of a hub begins so. last: byte of the length."""
    is_publish = first >> 4 == _PUBLISH
    text = "a packet of the type " + hex(first)
    if last > 127:
        text = "a packet's length has more than four bytes"
    elif first in _FIRST:
        if is_publish and length > 2:
            text = "a PUBLISH of " + str(length) + " bytes; the hub's largest has 262144"
        else:
            text += " has " + str(length) + " bytes"
    elif is_publish:
        text = "a PUBLISH has QoS " + str((first & 6) >> 1)
    return RemoteError(text)


def _packet(first: int, body: bytes, more: int = 0) -> bytes:
    """A packet, of which so many bytes come afterwards."""
    count = len(body) + more
    head = [first]
    while count > 127:
        head.append(count & 127 | 128)
        count >>= 7
    head.append(count)
    return bytes(head) + body


def _number(number: int) -> bytes:
    return bytes((number >> 8, number & 255))


def _text(text: str) -> bytes:
    data = text.encode()
    return _number(len(data)) + data
