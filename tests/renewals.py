"""`make renewals`: 1,000 tokens are replaced under load, and nothing may be lost, doubled or told to the app.

Half of the clients are on threads, half on asyncio, all over TLS to a local hub that ends a connection in the
second in which its token expires. Every app reports without a pause longer than PAUSE, and the back end
patches. At the end: no report was refused or given up, no error handler was called, no connection ended but
by the client's own plan, the hub holds all that was reported, and the patches that each handler was given,
replayed from nothing, are the hub's desired properties.
"""

import argparse
import asyncio
import itertools
import sys
import threading
import time
from typing import Any

from tests.waiting import PATIENCE
from twin_device import TwinClient as ThreadClient
from twin_device.aio import TwinClient as AsyncClient
from twin_device.hub import Device, LocalHub

PAUSE = 0.05  # seconds between a report's answer and an app's next report
KEYS = 8  # each report and patch sets one of so many, in turn


class Side:
    """One client, and what its app has seen and done."""

    def __init__(self, device: Device, client: Any) -> None:
        self.device = device
        self.client = client
        self.sent: dict[str, Any] = {}
        self.seen: dict[str, Any] = {}
        self.answered = 0
        self.slowest = 0.0
        self.broken: list[str] = []
        client.on_desired(self.changed)
        client.on_error(lambda error: self.broken.append(f"on_error: {error}"))

    @property
    def renewals(self) -> int:
        return int(max(0, self.client.statistics["connects"] - 1))

    def changed(self, patch: dict[str, Any], desired: dict[str, Any]) -> None:
        for key, value in patch.items():
            if value is None:
                self.seen.pop(key, None)
            elif value <= self.seen.get(key, -1):
                self.broken.append(f"{key} went from {self.seen[key]} to {value}")
            else:
                self.seen[key] = value
        if self.seen != desired:
            self.broken.append(f"the handler's patches give {self.seen}, but desired is {desired}")

    def next_report(self, number: int) -> dict[str, Any]:
        patch = {f"key{number % KEYS}": number}
        self.sent.update(patch)
        return patch

    def note(self, started: float, error: Exception | None) -> None:
        self.answered += error is None
        self.slowest = max(self.slowest, time.monotonic() - started)
        if error is not None:
            self.broken.append(f"a report: {error}")

    def judge(self) -> list[str]:
        """What is not as promised, once all is quiet."""
        found = list(self.broken)
        if self.client.statistics["last_error"] is not None:
            found.append(f"a connection ended unplanned: {self.client.statistics['last_error']}")
        if self.device.reported != self.sent:
            found.append(f"reported is {self.device.reported}, not {self.sent}")
        if self.seen != self.device.desired:
            found.append(f"the handler's patches give {self.seen}, not {self.device.desired}")
        return [f"{self.device.id}: {one}" for one in found]

    @property
    def quiet(self) -> bool:
        return self.device.reported == self.sent and self.device.desired == self.seen


class Run:
    """So many renewals by so many clients whose tokens live lifetime seconds."""

    def __init__(self, renewals: int, clients: int, lifetime: float) -> None:
        self._wanted, self._clients, self._lifetime = renewals, clients, lifetime
        self._stop = threading.Event()
        # Each client makes its share; a renewal comes after at most 0.85 of a lifetime.
        self._within = 60 + 2 * lifetime * (renewals / clients + 1)
        self.sides: list[Side] = []
        self.patches = 0
        self.seconds = 0.0

    @property
    def renewals(self) -> int:
        return sum(side.renewals for side in self.sides)

    def run(self) -> list[str]:
        """Play it; returns what was broken."""
        started = time.monotonic()
        with LocalHub() as hub:
            self._make(hub)
            threads = [threading.Thread(target=self._threaded, args=(side,)) for side in self.sides[::2]]
            threads.append(threading.Thread(target=lambda: asyncio.run(self._coroutines())))
            for thread in threads:
                thread.start()
            try:
                self._patch_until(started + self._within)
            finally:
                self._stop.set()
                for thread in threads:
                    thread.join(self._within)
            broken = [one for side in self.sides for one in side.judge()]
        self.seconds = time.monotonic() - started
        if self.renewals < self._wanted:
            broken.append(f"{self.renewals} renewals within {self._within:.0f} s, not {self._wanted}")
        return broken

    def _make(self, hub: LocalHub) -> None:
        options = {"ca_file": hub.ca_file, "token_lifetime": self._lifetime, "timeout": 60}
        for number in range(self._clients):
            device = hub.create_device(f"renewal-{number}")
            made = (ThreadClient, AsyncClient)[number % 2]
            text = device.connection_string
            self.sides.append(Side(device, made.from_connection_string(text, **options)))

    def _patch_until(self, deadline: float) -> None:
        pause = threading.Event()
        for number in itertools.count():
            if self.renewals >= self._wanted or time.monotonic() > deadline:
                return
            side = self.sides[number % self._clients]
            side.device.patch_desired({f"key{number // self._clients % KEYS}": number})
            self.patches += 1
            pause.wait(PAUSE / 10)

    def _threaded(self, side: Side) -> None:
        try:
            with side.client:
                for number in itertools.count():
                    began = time.monotonic()
                    try:
                        side.client.report(side.next_report(number))
                    except Exception as error:  # noqa: BLE001  # whatever it is, it is told
                        side.note(began, error)
                    else:
                        side.note(began, None)
                    if self._stop.wait(PAUSE):
                        break
                deadline = time.monotonic() + PATIENCE
                while not side.quiet and time.monotonic() < deadline:
                    threading.Event().wait(PAUSE)
        except Exception as error:  # noqa: BLE001  # as above
            side.broken.append(f"{type(error).__name__}: {error}")

    async def _coroutines(self) -> None:
        await asyncio.gather(*(self._coroutine(side) for side in self.sides[1::2]))

    async def _coroutine(self, side: Side) -> None:
        try:
            async with side.client:
                for number in itertools.count():
                    began = time.monotonic()
                    try:
                        await side.client.report(side.next_report(number))
                    except Exception as error:  # noqa: BLE001  # as above
                        side.note(began, error)
                    else:
                        side.note(began, None)
                    if self._stop.is_set():
                        break
                    await asyncio.sleep(PAUSE)
                deadline = time.monotonic() + PATIENCE
                # The hub answers questions from a thread of its own.
                while not await asyncio.to_thread(lambda: side.quiet) and time.monotonic() < deadline:
                    await asyncio.sleep(PAUSE)
        except Exception as error:  # noqa: BLE001  # as above
            side.broken.append(f"{type(error).__name__}: {error}")

    def table(self) -> str:
        answered = sum(side.answered for side in self.sides)
        slowest = max(side.slowest for side in self.sides)
        return (
            f"{self.renewals:,} renewals by {self._clients} clients in {self.seconds:.0f} s: {answered:,} "
            f"reports answered, the slowest after {slowest:.2f} s; {self.patches:,} desired patches"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="renewals", description="Tokens are replaced under load.")
    parser.add_argument("--renewals", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--lifetime", type=float, default=8.0, help="seconds that a token lives")
    options = parser.parse_args()
    run = Run(options.renewals, options.clients, options.lifetime)
    broken = run.run()
    for text in broken[:20]:
        print(text)
    print(run.table())
    print(f"{len(broken)} promises broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
