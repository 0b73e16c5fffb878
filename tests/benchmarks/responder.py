"""What a general broker needs beside it to answer reports: a client that keeps the twins.

It does the least that gives the devices the same answers: a dict a device, RFC 7396, a version. It checks no
patch, and has no metadata, no limits, no back end and no storage.
"""

import asyncio
import json
import time
from typing import Any

from tests.benchmarks.wire import Order, Packets, WrongAnswer, obey, publish
from tests.hub_wire import connect, subscribe

_FILTER = "twins/+/PATCH/properties/reported/#"


def merge(target: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            member = target.get(key)
            if not isinstance(member, dict):
                member = target[key] = {}
            merge(member, value)
        else:
            target[key] = value


class Responder(Packets):
    """The one connection to the broker."""

    def __init__(self, device_ids: list[str]) -> None:
        super().__init__()
        self._reported: dict[bytes, dict[str, Any]] = {name.encode(): {} for name in device_ids}
        self._versions = dict.fromkeys(self._reported, 1)
        self._desired: dict[bytes, dict[str, Any]] = {name: {} for name in self._reported}
        self._desired_version = 1
        self._answers: list[bytes] = []
        self.acknowledged: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()

    async def ask(self, packet: bytes, answer: tuple[int, bytes]) -> None:
        self.acknowledged = asyncio.get_running_loop().create_future()
        self.transport.write(packet)
        got = await self.acknowledged
        if got != answer:
            raise WrongAnswer(f"the broker answered with {got}, not {answer}")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # What came together is answered together.
        if self._answers:
            self.transport.write(b"".join(self._answers))
            self._answers.clear()

    def take(self, first: int, body: bytes) -> None:
        if first >> 4 != 3:
            self.acknowledged.set_result((first, body))
            return
        end = 2 + (body[0] << 8 | body[1])
        path, _, rid = body[2:end].partition(b"?$rid=")
        name = path.split(b"/", 2)[1]
        merge(self._reported[name], json.loads(body[end:]))
        version = self._versions[name] = self._versions[name] + 1
        self._answers.append(publish(b"twins/%b/res/204/?$rid=%b&$version=%d" % (name, rid, version), b""))

    def patch_desired(self, patch: dict[str, Any]) -> None:
        self._desired_version += 1
        version = self._desired_version
        payload = json.dumps({**patch, "$version": version}).encode()
        for name, document in self._desired.items():
            merge(document, patch)
            topic = b"twins/%b/PATCH/properties/desired/?$version=%d" % (name, version)
            self._answers.append(publish(topic, payload))
        self.transport.write(b"".join(self._answers))
        self._answers.clear()

    def lost(self, error: Exception | None) -> None:
        if not self.acknowledged.done():
            self.acknowledged.set_exception(WrongAnswer(f"the broker ended the connection: {error}"))


class Orders:
    """What the process can be told to do."""

    def __init__(self) -> None:
        self._responder: Responder | None = None

    async def start(self, order: Order) -> Order:
        """Listen for reports. order: port, devices."""
        loop = asyncio.get_running_loop()
        _, self._responder = await loop.create_connection(
            lambda: Responder(order["devices"]), "127.0.0.1", order["port"]
        )
        await self._responder.ask(connect("responder", keep_alive=0), (0x20, b"\0\0"))
        await self._responder.ask(subscribe((_FILTER, 0)), (0x90, b"\0\1\0"))
        return {}

    async def patch(self, order: Order) -> Order:
        """Change the desired properties of all devices. order: patch."""
        assert self._responder is not None
        began = time.time()
        self._responder.patch_desired(order["patch"])
        return {"at": began}


if __name__ == "__main__":
    process = Orders()
    obey({"start": process.start, "patch": process.patch})
