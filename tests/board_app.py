"""Runs on MicroPython: a TwinClient that does what lines on stdin say, and says on stdout what happens.

The first line has the connection string and the options. Every further one is {"id", "call", "with"}; its
answer {"id", "result"} or {"id", "error", ...}. Events: {"desired"}, {"state"}, {"failed"}, {"apply"}, the
latter to be answered by the call `applied`.
"""

import asyncio
import gc
import json
import os
import sys

from twin_device import TwinClient, TwinError

try:
    import twin_device.client as shell
except ImportError:
    import twin_device as shell  # as `make mpy` makes it, it is one module


opened = asyncio.open_connection


async def open_connection(*where):
    """With little room in the system for what the hub does not read: it would take long to fill."""
    streams = await opened(*where)
    streams[0].s.setsockopt(1, 7, 4096)  # SOL_SOCKET, SO_SNDBUF
    return streams


if os.getenv("LITTLE_ROOM"):
    asyncio.open_connection = open_connection


class Chance:
    """Spreads retries in time; in tests it keeps them short, or makes them at once."""

    def __init__(self, hurry):
        self.drawn = 0.0 if hurry == "at once" else 0.02

    def random(self):
        return self.drawn

    def getrandbits(self, count):
        return chance.getrandbits(count)


class Clock:
    """The time module as a board has it. year: that its clock says, None for the truth; epoch: 1970 or 2000.

    ticks: milliseconds before ticks_ms starts over.
    """

    def __init__(self, year=None, epoch=1970, ticks=None):
        self.year = year
        self.epoch = epoch
        self.ahead = 0 if ticks is None else _TICKS - ticks - clock.ticks_ms()

    def time(self):
        now = clock.time() if self.year is None else (self.year - 1970) * 31557600
        return now - (946684800 if self.epoch == 2000 else 0)

    def gmtime(self, seconds=None):
        if seconds == 0:
            return (self.epoch, 1, 1, 0, 0, 0, 3, 1)
        return clock.gmtime() if self.year is None else (self.year, 1, 1, 0, 0, 0, 3, 1)

    def ticks_ms(self):
        return (clock.ticks_ms() + self.ahead) % _TICKS

    def ticks_diff(self, late, early):
        return (late - early + _TICKS // 2) % _TICKS - _TICKS // 2


def say(**what):
    print(json.dumps(what))


def described(error):
    found = {"error": type(error).__name__, "text": str(error)}
    for name in ("status", "error_code", "tracking_id", "can_retry", "path", "limit", "size"):
        if hasattr(error, name):
            found[name] = getattr(error, name)
    return found


class Program:
    def __init__(self, text, options):
        for name in ("keep", "ca_file"):
            if isinstance(options.get(name), list):
                options[name] = tuple(options[name])
        if "online" in options:
            self.online = options.pop("online")
            options["is_online"] = lambda: self.online
        if isinstance(options.get("store"), list):
            from twin_device.store import FileStore

            _, path, seconds = options["store"]
            options["store"] = FileStore(path, seconds)
        if options.pop("hand_on", False):
            options["on_property"] = lambda path, value: say(property=path, value=value)
        self.client = client = TwinClient.from_connection_string(text, **options)
        client.on_desired(self.changed)
        client.on_state(lambda old, new: say(state=new))
        client.on_error(lambda error: say(failed=described(error)))
        self.reports = {}
        self.applying = {}

    def changed(self, patch, desired):
        # Of one moment: there is no other thread.
        client = self.client
        connection = client.statistics["connects"]
        say(desired=desired, patch=patch, version=client.desired_version, connection=connection)

    async def serve(self, command):
        number = command["id"]
        try:
            result = await self.call(command["call"], command["with"], number)
        except (TwinError, MemoryError) as error:
            say(id=number, **described(error))
        else:
            say(id=number, result=result)

    async def call(self, name, options, number):
        client = self.client
        if name == "get":
            return getattr(client, options["name"])
        if name == "report":
            result = await client.report(options.pop("patch"), **options)
            if options.get("wait", True):
                return result
            self.reports[number] = result
            return number
        if name == "await_report":
            return await self.reports[options.pop("number")].wait(**options)
        if name == "setting":
            self.declare(options["name"], options["shape"])
            return None
        if name == "applied":
            self.applying.pop(options["number"]).append(options["reason"])
            return None
        if name == "memory":
            gc.collect()
            return gc.mem_alloc()
        if name == "online":
            self.online = options["is"]
            return None
        return await getattr(client, name)(**options)

    def declare(self, name, shape):
        @self.client.setting(name, shape=shape)
        async def apply(value):
            ended = []
            number = len(self.applying) + 1
            self.applying[number] = ended
            say(apply=name, value=value, number=number)
            while not ended:
                await asyncio.sleep_ms(5)
            if ended[0] is not None:
                raise ValueError(ended[0])


async def main():
    first = json.loads(sys.stdin.readline())
    if first["hurry"]:
        shell.random = Chance(first["hurry"])
    if first["clock"] is not None:
        shell.time = Clock(**first["clock"])
    program = Program(first["text"], first["options"])
    lines = asyncio.StreamReader(sys.stdin)
    while True:
        line = await lines.readline()
        if not line:
            break
        asyncio.create_task(program.serve(json.loads(line)))  # noqa: RUF006  # MicroPython's loop keeps its tasks
    await program.client.close()


_TICKS = 1 << 30
chance, clock = shell.random, shell.time
asyncio.run(main())
