"""The load: devices that connect, report and check every answer, in a process of its own.

Orders on stdin, in this order: connect, begin, then report, pace, desired and cut as often as wanted, quit by
the end of stdin. Every device has one report on its way at most. A lost, wrong or unasked-for packet fails
the run.
"""

import asyncio
import gc
import json
import ssl
import time
from collections import deque
from typing import Any

from tests.benchmarks.wire import Order, Packets, WrongAnswer, obey, publish
from tests.hub_wire import connect, frame, subscribe, text, token, user

# What a gateway's twin looks like. A report changes two of its members.
DOCUMENT: dict[str, Any] = {
    "firmware": {"current": "2.4.1", "pending": None, "status": "idle"},
    "network": {"interface": "eth0", "address": "192.0.2.17", "signal": -61, "roaming": False},
    "telemetryConfig": {"interval": 30, "status": "success", "version": 4},
    "sensors": ["temperature", "humidity", "pressure"],
    "batteryLevel": 100,
    "uptime": 0,
}
_FIRST = json.dumps(DOCUMENT).encode()
# Seconds from the end of a load until its last answer is lost.
_LAST_ANSWER = 20.0
# Connections in the making: a hub may take those who have not said yet who they are for strangers.
_AT_ONCE = 64
# asyncio's timers fire up to a millisecond late; that is not the hub's.
_GRAIN = 0.002


class Names:
    """How a device's topics are called: as IoT Hub does, or so that a broker can tell devices apart."""

    def __init__(self, device_id: str, of_hub: bool) -> None:
        base = "$iothub/twin" if of_hub else f"twins/{device_id}"
        self.report = f"{base}/PATCH/properties/reported/?$rid=%d".encode()
        self.answer = f"{base}/res/204/?$rid=%d&$version=%d".encode()
        self.desired = f"{base}/PATCH/properties/desired/?$version=%d".encode()
        self.filters = f"{base}/res/#", f"{base}/PATCH/properties/desired/#"


class Fleet:
    """All devices, and what was measured since the last order."""

    def __init__(self) -> None:
        self.devices: list[Device] = []
        self.latencies: list[float] = []
        self.qos = 0
        # Until when an answered device reports again, and is the last one's answer the end; None: it is not.
        self.until: float | None = None
        self.waiting = 0
        self.told = 0
        self.closing = False
        # Set once, by the first that fails or the last that is done.
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def expect(self) -> None:
        """Begin to measure something new. What failed meanwhile, fails it."""
        for device in self.devices:
            if device.ended:
                raise WrongAnswer(f"{device.id}: its connection has ended")
        self.latencies = []
        if self.done.done():
            self.done.result()
        self.done = asyncio.get_running_loop().create_future()

    def fail(self, error: WrongAnswer) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    async def all_answered(self, order: Order, seconds: float = 0.0) -> None:
        """Wait for the end of a load of so many seconds and for its last answer. order: patience, if less."""
        patience = order.get("patience", _LAST_ANSWER)
        try:
            await asyncio.wait_for(asyncio.shield(self.done), seconds + patience)
        except asyncio.TimeoutError:
            raise WrongAnswer(f"{self.waiting} devices were not answered within {patience:g} s") from None


class Device(Packets):
    """One device."""

    def __init__(self, fleet: Fleet, device_id: str, of_hub: bool) -> None:
        super().__init__()
        self.id = device_id
        self._fleet = fleet
        self._names = Names(device_id, of_hub)
        self._rid = 0
        self._version = 1
        self._desired_version = 1
        self._due = 0.0
        # What its next packet from the hub must be; None while none is expected.
        self._answer: bytes | None = None
        self._unacknowledged = False
        # Reports that fell due while one was on its way.
        self._backlog: deque[float] = deque()
        self._opening: asyncio.Future[tuple[int, bytes]] | None = None

    async def open(self, key: str | None) -> None:
        """CONNECT and SUBSCRIBE."""
        password = None if key is None else token(self.id, key)
        name = None if key is None else user(self.id)
        got = await self._ask(connect(self.id, name, password, keep_alive=0))
        if got != (0x20, b"\0\0"):
            raise WrongAnswer(f"{self.id}: CONNECT was answered with {got}")
        got = await self._ask(subscribe(*((one, 0) for one in self._names.filters)))
        if got != (0x90, b"\0\1\0\0"):
            raise WrongAnswer(f"{self.id}: SUBSCRIBE was answered with {got}")

    async def _ask(self, packet: bytes) -> tuple[int, bytes]:
        self._opening = asyncio.get_running_loop().create_future()
        self.transport.write(packet)
        got = await self._opening
        self._opening = None
        return got

    def report(self, due: float, payload: bytes | None = None) -> None:
        """Report now what was due then; after the answer, if one is on its way."""
        if self._answer is not None or self._unacknowledged:
            self._backlog.append(due)
            return
        fleet = self._fleet
        fleet.waiting += 1
        self._rid += 1
        rid = self._rid
        self._due = due
        self._answer = self._names.answer % (rid, self._version + 1)
        if payload is None:
            payload = b'{"batteryLevel":%d,"uptime":%d}' % (rid % 100, rid)
        topic = self._names.report % rid
        if fleet.qos:
            self._unacknowledged = True
            number = (rid % 65535 + 1).to_bytes(2, "big")
            self.transport.write(frame(0x32, text(topic) + number + payload))
        else:
            self.transport.write(publish(topic, payload))

    def take(self, first: int, body: bytes) -> None:
        if first == 0x30:
            topic = body[2 : 2 + (body[0] << 8 | body[1])]
            if topic == self._answer and len(body) == 2 + len(topic):
                self._answer = None
                self._version += 1
                self._fleet.latencies.append(time.perf_counter() - self._due)
                if not self._unacknowledged:
                    self._answered()
                return
            if topic == self._names.desired % (self._desired_version + 1):
                self._desired_version += 1
                self._fleet.told += 1
                if self._fleet.told == len(self._fleet.devices):
                    self._fleet.finish()
                return
        elif first == 0x40 and self._unacknowledged and body == (self._rid % 65535 + 1).to_bytes(2, "big"):
            self._unacknowledged = False
            if self._answer is None:
                self._answered()
            return
        elif self._opening is not None and not self._opening.done():
            self._opening.set_result((first, body))
            return
        expected = "nothing" if self._answer is None else repr(self._answer)
        self._fleet.fail(WrongAnswer(f"{self.id}: {first:#x} {body[:200]!r} came, {expected} was expected"))

    def _answered(self) -> None:
        fleet = self._fleet
        fleet.waiting -= 1
        if self._backlog:
            self.report(self._backlog.popleft())
        elif fleet.until is not None:
            now = time.perf_counter()
            if now < fleet.until:
                self.report(now)
            elif not fleet.waiting:
                fleet.finish()

    def lost(self, error: Exception | None) -> None:
        problem = WrongAnswer(f"{self.id}: the connection ended: {error or 'by the other side'}")
        if self._opening is not None and not self._opening.done():
            self._opening.set_exception(problem)
        elif not self._fleet.closing:
            self._fleet.fail(problem)


class Orders:
    """What the process can be told to do."""

    def __init__(self) -> None:
        self._fleet: Fleet | None = None
        self._cpu = 0.0

    @property
    def fleet(self) -> Fleet:
        assert self._fleet is not None
        return self._fleet

    async def connect(self, order: Order) -> Order:
        """Connect and subscribe all. order: port, ca (None: plaintext), devices, key, of_hub."""
        fleet = self._fleet = Fleet()
        context = ssl.create_default_context(cafile=order["ca"]) if order["ca"] else None
        loop = asyncio.get_running_loop()
        names = iter(order["devices"])

        async def connect_some() -> None:
            for name in names:
                _, device = await loop.create_connection(
                    lambda name=name: Device(fleet, name, order["of_hub"]),
                    "127.0.0.1",
                    order["port"],
                    ssl=context,
                    server_hostname="localhost" if context else None,
                )
                await device.open(order["key"])
                fleet.devices.append(device)

        began = time.perf_counter()
        await asyncio.gather(*(connect_some() for _ in range(_AT_ONCE)))
        seconds = time.perf_counter() - began
        return {"connected": len(fleet.devices), "seconds": seconds}

    async def begin(self, order: Order) -> Order:
        """Every device reports its whole document, so that all twins are of their size before a load."""
        fleet = self.fleet
        fleet.expect()
        fleet.qos = 0
        fleet.until = 0.0
        for device in fleet.devices:
            device.report(time.perf_counter(), _FIRST)
        await fleet.all_answered(order)
        return {"answered": len(fleet.latencies)}

    async def report(self, order: Order) -> Order:
        """Closed loop: so many devices report as fast as they are answered. order: seconds, devices, qos."""
        fleet = self.fleet
        fleet.expect()
        fleet.qos = order["qos"]
        chosen = fleet.devices[: order["devices"]]
        self._cpu = time.process_time()
        began = time.perf_counter()
        fleet.until = began + order["seconds"]
        for device in chosen:
            device.report(time.perf_counter())
        await fleet.all_answered(order, order["seconds"])
        return self._measured(time.perf_counter() - began)

    async def pace(self, order: Order) -> Order:
        """Open loop: reports fall due at a fixed rate, whether or not earlier ones were answered.

        Latencies count from when a report was due. order: seconds, rate.
        """
        fleet = self.fleet
        fleet.expect()
        fleet.qos = 0
        fleet.until = None
        self._cpu = time.process_time()
        total, rate = int(order["seconds"] * order["rate"]), order["rate"]
        began = time.perf_counter()
        for number in range(total):
            due = began + number / rate
            left = due - time.perf_counter()
            if left > 0 or not number % 64:
                await asyncio.sleep(max(0.0, left))
            now = time.perf_counter()
            fleet.devices[number % len(fleet.devices)].report(now if now < due + _GRAIN else due)
            if fleet.done.done():
                break
        # From here on the last answer ends it.
        fleet.until = 0.0
        if not fleet.waiting:
            fleet.finish()
        await fleet.all_answered(order)
        if len(fleet.latencies) != total:
            raise WrongAnswer(f"{len(fleet.latencies)} of {total} reports were answered")
        return self._measured(time.perf_counter() - began)

    async def expect_desired(self, _order: Order) -> Order:
        """Every device is to be told of one change of its desired properties from now on."""
        self.fleet.expect()
        self.fleet.told = 0
        return {}

    async def desired(self, _order: Order) -> Order:
        """Wait until every device was told; when the last one was, on the machine's clock."""
        await asyncio.shield(self.fleet.done)
        return {"at": time.time()}

    async def close(self, _order: Order) -> Order:
        fleet = self.fleet
        fleet.expect()  # nothing went wrong since the last order
        fleet.closing = True
        for device in fleet.devices:
            device.transport.abort()
        while not all(device.ended for device in fleet.devices):
            await asyncio.sleep(0.01)
        self._fleet = None
        return {}

    def _measured(self, seconds: float) -> Order:
        times = sorted(self.fleet.latencies)
        return {
            "requests": len(times),
            "seconds": seconds,
            "per_second": len(times) / seconds,
            "p50_ms": 1000 * times[len(times) // 2],
            "p99_ms": 1000 * times[min(len(times) - 1, len(times) * 99 // 100)],
            "max_ms": 1000 * times[-1],
            "load_cpu_seconds": time.process_time() - self._cpu,
        }


def main() -> None:
    # A collection in the midst of a load would be measured as the hub's.
    gc.disable()
    orders = Orders()
    obey(
        {
            "connect": orders.connect,
            "begin": orders.begin,
            "report": orders.report,
            "pace": orders.pace,
            "expect_desired": orders.expect_desired,
            "desired": orders.desired,
            "close": orders.close,
        }
    )


if __name__ == "__main__":
    main()
