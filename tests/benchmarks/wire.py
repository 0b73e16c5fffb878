"""What the benchmark's own processes have in common: MQTT's packets off a stream, and orders on stdin."""

import asyncio
import json
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from tests.hub_wire import frame, text

Order = dict[str, Any]


class WrongAnswer(Exception):
    """What came is not what had to come; the run has failed."""


def publish(topic: bytes, payload: bytes) -> bytes:
    """A PUBLISH at QoS 0; shorter than the general one, since half of the load's work is this."""
    length = 2 + len(topic) + len(payload)
    if length < 128:
        return b"0%c%b%b%b" % (length, len(topic).to_bytes(2, "big"), topic, payload)
    return frame(0x30, text(topic) + payload)


class Packets(asyncio.Protocol, ABC):
    """A connection that takes what comes apart; take() is given each packet's first byte and its body."""

    transport: asyncio.Transport
    ended = False

    def __init__(self) -> None:
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a stream's transport
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        at = 0
        for first, begin, end in _split(data):
            self.take(first, data[begin:end])
            at = end
        self._rest = data[at:]

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = True
        self.lost(error)

    @abstractmethod
    def take(self, first: int, body: bytes) -> None:
        """A whole packet: its first byte, and what follows its length."""

    @abstractmethod
    def lost(self, error: Exception | None) -> None:
        """The connection has ended."""


def _split(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Of every whole packet its first byte, and where its body begins and ends."""
    at, size = 0, len(data)
    while at + 1 < size:
        begin, length, shift = at + 2, data[at + 1], 7
        if length > 127:
            length &= 127
            while True:
                if begin == size:
                    return
                digit = data[begin]
                length |= (digit & 127) << shift
                begin, shift = begin + 1, shift + 7
                if digit < 128:
                    break
        if begin + length > size:
            return
        yield data[at], begin, begin + length
        at = begin + length


def obey(orders: dict[str, Callable[[Order], Awaitable[Order]]]) -> None:
    """Be a process that does what lines of JSON on stdin say, one answer a line, until stdin ends."""

    async def read() -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=2**24)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            order = json.loads(line)
            try:
                answer = await asyncio.wait_for(orders[order["do"]](order), order["within"])
            except (WrongAnswer, OSError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            except asyncio.TimeoutError:
                answer = {"error": f"{order['do']} took longer than {order['within']:g} s"}
            print(json.dumps(answer), flush=True)

    asyncio.run(read())
