"""The app of both boards: a thermometer that reports, with an interval and an LED that the hub desires.

desired   telemetryInterval   seconds between two reports, 5 to 86400 (60 when nothing is desired)
          led                 true or false
reported  temperature         degrees Celsius in tenths: whole numbers survive a board's 32-bit floats
          telemetryInterval   what is in force; led as well
          problem             what of the desired properties is not possible, or absent
"""

import asyncio

import online

from twin_device import TwinClient

USUAL = 60
_LEAST, _MOST = 5, 86400


class Thermometer:
    """temperature: a function that returns degrees Celsius; led: one that takes True or False."""

    def __init__(self, client, temperature, led):
        self._client = client
        self._temperature = temperature
        self._led = led
        self._interval = USUAL
        self._changed = asyncio.Event()
        client.on_desired(self.desired)
        client.on_error(lambda error: print("twin:", error))
        client.on_state(lambda old, new: print("twin:", old, "->", new))

    def desired(self, patch, desired):
        """Do what is desired; what is not possible is said in `problem`."""
        interval, lit, problem = desired.get("telemetryInterval", USUAL), desired.get("led", False), None
        if type(interval) is int and _LEAST <= interval <= _MOST:
            self._interval = interval
        else:
            problem = "telemetryInterval is a whole number from %d to %d" % (_LEAST, _MOST)
        if type(lit) is bool:
            self._led(lit)
        else:
            lit, problem = None, "led is true or false"
        self._known = {"telemetryInterval": self._interval, "led": lit, "problem": problem}
        self._changed.set()

    async def run(self):
        """Report at every interval, and whenever something else is desired, for ever."""
        self._known = {}
        while True:
            self._changed.clear()
            await self._client.report(
                dict(self._known, temperature=round(self._temperature() * 10)), wait=False
            )
            try:
                await asyncio.wait_for(self._changed.wait(), self._interval)
            except asyncio.TimeoutError:
                pass


async def _main(temperature, led, watchdog):
    configuration = online.configuration()
    tasks = [asyncio.create_task(online.keep(configuration))]
    if watchdog is not None and configuration.get("watchdog"):
        tasks.append(asyncio.create_task(online.feed(watchdog())))
    client = TwinClient.from_connection_string(
        configuration["connectionString"],
        ca_file=configuration["caFile"],
        is_online=online.is_online,
    )
    try:
        async with client:
            await Thermometer(client, temperature, led).run()
    finally:
        for task in tasks:
            task.cancel()


def run(temperature, led, watchdog=None):
    """The whole program. watchdog: makes a machine.WDT, once everything else is there."""
    asyncio.run(_main(temperature, led, watchdog))
