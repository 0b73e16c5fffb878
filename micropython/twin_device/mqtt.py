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
_MAX_TOPIC = const(1024)  # bytes; a twin's topic has less than 200
_MAX_PAYLOAD = const(262144)  # bytes; no message of the hub is larger
_MAX_BODY = const(64)  # bytes of any other packet
_TYPE = const(0)  # what the next byte is: a packet's first, one of its length, ...
_LENGTH = const(1)
_HEAD = const(2)
_PAYLOAD = const(3)


def connect(client_id: str, user_name: str, password: str, keep_alive: int) -> bytes:
    """CONNECT to a session that outlives the connection (3.1). keep_alive: seconds; password: "" for none."""
    body = _text(client_id) + _text(user_name)
    flags = 0x80
    if password:
        flags = 0xC0
        body += _text(password)
    return _packet(0x10, b"\0\4MQTT\4" + bytes((flags, keep_alive >> 8, keep_alive & 255)) + body)


def subscribe(identifier: int, filters: "tuple[str, ...]", qos: int = 0) -> bytes:
    """One SUBSCRIBE with all filters (3.8)."""
    body = _number(identifier)
    for topic in filters:
        body += _text(topic) + bytes((qos,))
    return _packet(0x82, body)


def publish(
    topic: str, payload: bytes, identifier: "int | None" = None, again: bool = False
) -> "tuple[bytes, bytes]":
    """PUBLISH in two parts, to be sent one after the other (3.3): QoS 1 with an identifier, else QoS 0.

    again: it may have been sent before in this session (DUP).
    """
    head = _text(topic)
    first = 0x30
    if identifier is not None:
        first = 0x3A if again else 0x32
        head += _number(identifier)
    return bytes((first,)) + _length(len(head) + len(payload)) + head, payload


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
        self._state = _TYPE
        self._first = 0
        self._left = 0  # bytes of the packet that are still to come
        self._shift = 0
        self._wanted = 0  # bytes of _head before it can be read
        self._head = b""

    def received(self, count: int) -> None:
        """The first count bytes of the buffer are new."""
        buffer = self.buffer
        at = 0
        while at < count:
            if self._state == _TYPE:
                self._first = buffer[at]
                at += 1
                self._left = self._shift = 0
                self._state = _LENGTH
            elif self._state == _LENGTH:
                byte = buffer[at]
                at += 1
                self._left |= (byte & 127) << self._shift
                self._shift += 7
                if byte < 128:
                    self._begin()
                elif self._shift == 28:
                    raise RemoteError("a packet's length has more than four bytes")
            else:
                piece = min(count - at, self._left)
                if self._state == _HEAD:
                    piece = min(piece, self._wanted - len(self._head))
                    # What is not a topic's is a few bytes.
                    self._head += bytes(buffer[at : at + piece])
                else:
                    self._owner.chunk(buffer[at : at + piece])  # type: ignore[attr-defined]  # there is no Protocol here
                at += piece
                self._left -= piece
            if self._state == _HEAD and len(self._head) == self._wanted:
                self._read_head()
            if self._state == _PAYLOAD and not self._left:
                self._state = _TYPE
                self._owner.ended()  # type: ignore[attr-defined]  # as above

    def _begin(self) -> None:
        kind, flags = self._first >> 4, self._first & 15
        self._head = b""
        self._state = _HEAD
        if kind == _PUBLISH:
            if flags & 6 > 2:
                raise RemoteError("a PUBLISH has QoS " + str((flags & 6) >> 1))
            if self._left > _MAX_PAYLOAD + _MAX_TOPIC:
                raise RemoteError("a PUBLISH of " + str(self._left) + " bytes; the hub's largest has 262144")
            self._wanted = 2
        else:
            if flags or kind not in (CONNACK, PUBACK, SUBACK, UNSUBACK, PINGRESP):
                raise RemoteError("a packet of the type " + hex(self._first))
            self._wanted = self._left
        if self._wanted > min(self._left, _MAX_BODY):
            raise RemoteError(
                "a packet of the type " + hex(self._first) + " has " + str(self._left) + " bytes"
            )

    def _read_head(self) -> None:
        head = self._head
        kind = self._first >> 4
        if kind != _PUBLISH:
            self._state = _TYPE
            self._owner.packet(kind, head)  # type: ignore[attr-defined]  # as above
            return
        topic_end = 2 + (head[0] << 8 | head[1])
        end = topic_end + (2 if self._first & 6 else 0)
        if end > 2 + _MAX_TOPIC or end - len(head) > self._left:
            raise RemoteError("a topic of " + str(topic_end - 2) + " bytes")
        if end > len(head):
            self._wanted = end
            return
        try:
            topic = head[2:topic_end].decode()
        except ValueError:
            raise RemoteError("a topic that is no UTF-8") from None
        self._state = _PAYLOAD
        self._head = b""
        identifier = None
        if end > topic_end:
            identifier = head[topic_end] << 8 | head[topic_end + 1]
        self._owner.began(topic, identifier)  # type: ignore[attr-defined]  # as above


def _packet(first: int, body: bytes) -> bytes:
    return bytes((first,)) + _length(len(body)) + body


def _length(count: int) -> bytes:
    coded = b""
    while count > 127:
        coded += bytes((count & 127 | 128,))
        count >>= 7
    return coded + bytes((count,))


def _number(number: int) -> bytes:
    return bytes((number >> 8, number & 255))


def _text(text: str) -> bytes:
    data = text.encode()
    return _number(len(data)) + data
