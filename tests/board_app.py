"""Runs on MicroPython: a TwinClient that does what lines on stdin say, and says on stdout what happens.

The first line has the connection string and the options. Every further one is {"id", "call", "with"}; its
answer {"id", "result"} or {"id", "error", ...}. Events: {"desired"}, {"state"}, {"failed"}, {"apply"}, the
latter to be answered by the call `applied`.
"""

import asyncio
import gc
import json
import sys

from twin_device import TwinClient, TwinError
from twin_device import client as shell


class Chance:
    """Spreads retries in time; in tests it keeps them short."""

    def random(self):
        return 0.02

    def getrandbits(self, count):
        return chance.getrandbits(count)


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
        if options.pop("hand_on", False):
            options["on_property"] = lambda path, value: say(property=path, value=value)
        self.client = client = TwinClient.from_connection_string(text, **options)
        client.on_desired(lambda patch, desired: say(desired=desired, patch=patch))
        client.on_state(lambda old, new: say(state=new))
        client.on_error(lambda error: say(failed=described(error)))
        self.reports = {}
        self.applying = {}

    async def serve(self, command):
        number = command["id"]
        try:
            result = await self.call(command["call"], command["with"], number)
        except TwinError as error:
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
    if first.pop("hurry", False):
        shell.random = Chance()
    program = Program(first["text"], first["options"])
    lines = asyncio.StreamReader(sys.stdin)
    while True:
        line = await lines.readline()
        if not line:
            break
        asyncio.create_task(program.serve(json.loads(line)))  # noqa: RUF006  # MicroPython's loop keeps its tasks
    await program.client.close()


chance = shell.random
asyncio.run(main())
