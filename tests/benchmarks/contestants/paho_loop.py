"""Bare paho, many clients on one event loop: reading where the loop says so, one timer for all of them."""

import asyncio
import time

from byhand import Device, context
from orders import Stopwatch, obey_in_loop, until_in_loop


class Orders:
    def __init__(self):
        self.devices = []
        self.context = None
        self._looking_after = None

    async def fleet(self, strings):
        watch = Stopwatch()
        self.context = self.context or context()
        if self._looking_after is None:
            self._looking_after = asyncio.create_task(self._look_after())
        for string in strings:
            device = Device(string, self.context)
            device.mqtt.on_socket_open = lambda *args, device=device: self._opened(device, args[2])
            device.mqtt.on_socket_close = self._closed
            device.mqtt.on_socket_register_write = self._wants_to_write
            self.devices.append(device)
            device.connect()
            # Whoever is connected is served before the next one dials.
            await asyncio.sleep(0)
        await self.synchronised(1)
        return watch.stop()

    def _opened(self, device, raw):
        loop = asyncio.get_running_loop()
        loop.add_reader(raw, self._readable, device, raw)

    def _closed(self, _client, _userdata, raw):
        asyncio.get_running_loop().remove_reader(raw)

    def _wants_to_write(self, client, _userdata, _raw):
        asyncio.get_running_loop().call_soon(client.loop_write)

    def _readable(self, device, raw):
        while True:
            device.mqtt.loop_read()
            if device.mqtt.socket() is not raw:
                device.connect()
                return
            if not raw.pending():
                return

    async def _look_after(self):
        while True:
            await asyncio.sleep(15)
            for device in self.devices:
                device.mqtt.loop_misc()

    async def synchronised(self, connects):
        for device in self.devices:
            await until_in_loop(
                lambda device=device: device.synchronised and device.connects >= connects, device
            )
        return {"at": time.monotonic()}

    def end(self):
        self._looking_after.cancel()
        for device in self.devices:
            device.mqtt.disconnect()


asyncio.run(obey_in_loop(Orders()))
