"""The player of twin_device.aio.TwinClient: one loop, any number of clients. lines.py says what it does."""

import asyncio
import json
import os
import sys
import time
from typing import Any

from tests.players.lines import (
    Behaviour,
    HandlerFailed,
    Order,
    dials,
    looked_at,
    tell,
    tell_event,
    watch_dials,
)
from tests.players.pace import hurry
from twin_device import TwinError
from twin_device.aio import TwinClient


class Players:
    def __init__(self) -> None:
        self._clients: dict[str, TwinClient] = {}

    async def perform(self, order: Order) -> Any:
        arguments = {name: value for name, value in order.items() if name not in ("id", "do")}
        return await getattr(self, order["do"])(**arguments)

    async def open(
        self, client: str, text: str, ca: str | None, behaviour: Order | None = None, **options: Any
    ) -> None:
        made = self._clients[client] = TwinClient.from_connection_string(text, ca_file=ca, **options)
        behaves = Behaviour(**(behaviour or {}))

        @made.on_desired
        async def changed(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            connects, version = made.statistics["connects"], made.desired_version
            seconds, raises = behaves.next()
            await asyncio.sleep(seconds)
            if raises:
                raise HandlerFailed
            tell_event("desired", client, patch=patch, desired=desired, version=version, connection=connects)

        made.on_state(lambda _old, new: tell_event("state", client, state=new))
        made.on_error(lambda error: tell_event("error", client, text=f"{type(error).__name__}: {error}"))

    async def connect(self, client: str, **options: Any) -> None:
        await self._clients[client].connect(**options)

    async def retrieve(self, client: str) -> Any:
        return await self._clients[client].retrieve()

    async def report(self, client: str, patch: dict[str, Any], **options: Any) -> Any:
        return await self._clients[client].report(patch, **options)

    async def post(self, client: str, patch: dict[str, Any], timeout: float) -> Any:
        # Tasks begin in the order in which they were made.
        return await self._clients[client].report(patch, timeout=timeout)

    async def load(self, client: str, seconds: float) -> Any:
        end, sent, slowest, errors = time.monotonic() + seconds, 0, 0.0, []
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                await self._clients[client].report({"load": sent + 1})
            except TwinError as error:
                errors.append(f"{type(error).__name__}: {error}")
            sent += 1
            slowest = max(slowest, time.monotonic() - began)
        return {"sent": sent, "slowest": slowest, "errors": errors}

    async def look(self) -> dict[str, Any]:
        return {name: looked_at(one) for name, one in self._clients.items()}

    async def count(self) -> list[float]:
        return dials()

    async def close(self, client: str) -> None:
        await self._clients.pop(client).close()


async def main() -> None:
    players = Players()
    under_way: set[asyncio.Task[None]] = set()

    async def answer(order: Order) -> None:
        try:
            tell(id=order["id"], value=await players.perform(order))
        except Exception as error:  # noqa: BLE001  # whatever a client raises is to be told
            tell(id=order["id"], error=f"{type(error).__name__}: {error}")

    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader(limit=2**24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        task = loop.create_task(answer(json.loads(line)))
        under_way.add(task)
        task.add_done_callback(under_way.discard)


if __name__ == "__main__":
    if sys.argv[1:] == ["hurry"]:
        hurry()
    watch_dials()
    asyncio.run(main())
    sys.stdout.flush()
    # Whatever still hangs ends with the process.
    os._exit(0)
