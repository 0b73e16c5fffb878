"""twin_device.aio.TwinClient, for asyncio."""

import asyncio
import random
import time

from orders import Seen, Stopwatch, obey_in_loop, until_in_loop

from twin_device.aio import TwinClient


class Orders:
    def __init__(self):
        self.client = None
        self.clients = []
        self.neighbour = None
        self.seen = Seen()

    async def connect(self, string):
        """Connect one client; it is synchronised at the end of the time."""
        watch = Stopwatch()
        self.client = TwinClient.from_connection_string(string)
        self.client.on_desired(lambda patch, _desired: self.seen(patch))
        await self.client.connect()
        return watch.stop()

    async def close(self):
        await self.client.close()

    async def one_by_one(self, count, base):
        report = self.client.report
        watch = Stopwatch()
        for number in range(count):
            await report({"batteryLevel": number % 100, "uptime": base + number})
        return watch.stop()

    async def at_once(self, count, base):
        """Many reports before the first is answered."""
        sent = self.client.statistics["reports"]
        watch = Stopwatch()
        reports = [self.client.report({"uptime": base + number}, wait=False) for number in range(count)]
        for report in reports:
            await report.wait()
        found = watch.stop()
        return {**found, "patches": self.client.statistics["reports"] - sent}

    def listen(self):
        self.seen.clear()

    async def desired(self, count):
        await until_in_loop(lambda: len(self.seen) >= count, "desired patches")
        return self.seen.told()

    async def fleet(self, strings):
        watch = Stopwatch()
        made = [TwinClient.from_connection_string(string) for string in strings]
        for client in made:
            client.on_desired(lambda patch, desired: None)
            await client.connect(wait=False)
        self.clients += made
        await self.synchronised(1)
        return watch.stop()

    async def synchronised(self, connects):
        """Wait until every client is, after so many connections."""
        for client in self.clients:
            await until_in_loop(
                lambda client=client: (
                    client.state == "synchronised" and client.statistics["connects"] >= connects
                ),
                client,
            )
        return {"at": time.monotonic()}

    async def hang(self, string):
        """A neighbour whose hub never answers the TLS handshake."""
        self.neighbour = TwinClient.from_connection_string(string)
        await self.neighbour.connect(wait=False)

    async def hang_up(self):
        await self.neighbour.close()

    async def latencies(self, count):
        """Reports of clients drawn by chance, one after another: seconds of each."""
        times = []
        for number in range(count):
            client = random.choice(self.clients)
            began = time.perf_counter()
            await client.report({"uptime": number}, always=True)
            times.append(time.perf_counter() - began)
        return {"latencies": times}

    async def end(self):
        for client in self.clients:
            await client.disconnect()


asyncio.run(obey_in_loop(Orders()))
