"""MQTT over WebSockets, for devices behind what lets only HTTPS through: `/$iothub/websocket`, sub-protocol
mqtt. Source: IoT Hub, "Communicate with an IoT hub using the MQTT protocol".
"""

import asyncio
from typing import Any, cast

from aiohttp import WSMsgType, web

from .guard import abort
from .mqtt import MAX_PACKET, Connection, Endpoint
from .problem import Problem

_PROTOCOLS = ("mqtt", "MQTT")


class _Transport:
    """What Connection knows of a transport, over a WebSocket."""

    def __init__(self, request: web.Request, socket: web.WebSocketResponse) -> None:
        self._raw = request.transport
        self._socket = socket
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._size = 0

    def get_extra_info(self, _name: str) -> None:
        """Nothing: aiohttp has set what there is to set."""

    def write(self, data: bytes) -> None:
        self._size += len(data)
        self._waiting.put_nowait(data)

    def get_write_buffer_size(self) -> int:
        return self._size

    def close(self) -> None:
        """End it after what was written has gone out."""
        self._waiting.put_nowait(None)

    def abort(self) -> None:
        if self._raw is not None:
            abort(self._raw)

    async def send(self) -> None:
        """Send what is written, until close()."""
        try:
            while (data := await self._waiting.get()) is not None:
                await self._socket.send_bytes(data)
                self._size -= len(data)
            await self._socket.close()
        except ConnectionError:
            pass  # the device has gone


class WebSockets:
    """The endpoint for devices that come this way."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Carry one device's connection."""
        if self._endpoint.is_away:
            raise Problem(503001, "The hub is away for its devices.")
        socket = web.WebSocketResponse(protocols=_PROTOCOLS, max_msg_size=MAX_PACKET + 5, autoping=True)
        ready = socket.can_prepare(request)
        if not ready or ready.protocol is None:
            raise Problem(400004, "This is for WebSockets with the sub-protocol mqtt.")
        await socket.prepare(request)
        transport = _Transport(request, socket)
        connection = Connection(self._endpoint)
        connection.connection_made(cast(Any, transport))
        sending = asyncio.get_running_loop().create_task(transport.send())
        try:
            async for message in socket:
                if message.type is not WSMsgType.BINARY:
                    break
                connection.data_received(message.data)
        finally:
            sending.cancel()
            connection.connection_lost(None)
        return socket
