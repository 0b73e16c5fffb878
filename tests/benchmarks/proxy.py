"""A link that is far away: what it is given leaves it a while later, in both directions."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator


class Proxy:
    """port: of it. round_trips: of the newest connection: how often its client has said something since the
    server's last word, and was answered."""

    def __init__(self, to: int, delay: float) -> None:
        self._to = to
        self._delay = delay
        self.port = 0
        self.round_trips = 0
        self._asked = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        self.round_trips, self._asked = 0, False
        for one in (writer, far_writer):
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(
            self._pass_on(reader, far_writer, True), self._pass_on(far_reader, writer, False)
        )

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_client: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        data = b"."
        while data:
            try:
                data = await reader.read(65536)
            except ConnectionError:
                data = b""
            if is_client:
                self._asked = True
            elif self._asked and data:
                self._asked = False
                self.round_trips += 1
            loop.call_later(self._delay, self._write, writer, data)

    def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if data:
            writer.write(data)
        else:
            writer.close()


@contextlib.asynccontextmanager
async def proxy(to: int, delay: float) -> AsyncIterator[Proxy]:
    """A proxy before this port of this machine. delay: seconds in each direction."""
    one = Proxy(to, delay)
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.port = server.sockets[0].getsockname()[1]
    try:
        yield one
    finally:
        server.close()


@contextlib.contextmanager
def silence() -> Iterator[int]:
    """A port that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        yield port
