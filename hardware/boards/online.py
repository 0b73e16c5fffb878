"""From power-up to a network and a right clock: Wi-Fi and NTP with retries, and an end to every wait.

Runs on ESP32 and Pico W; both boot.py call up(). The twin client itself never touches Wi-Fi: it asks
is_online(), and keep() brings the network back while the program runs.
"""

import json
import time

import network

_JOIN_WITHIN = 15000  # milliseconds for one try
_TRIES = 10
_LONGEST_PAUSE = 30000
_CHECK_EVERY = 5  # seconds
_CLOCK_IS_SET = 2024  # boards begin in 2000 or 2021
_EXAMPLE = "copy config.example.json to config.json and fill it in"

wlan = network.WLAN(network.STA_IF)


def configuration(path="config.json"):
    """The board's configuration, a dict; ValueError says what is wrong with the file, never what is in it."""
    try:
        with open(path) as file:
            found = json.load(file)
    except OSError:
        raise ValueError("there is no " + path + ": " + _EXAMPLE)
    except ValueError:
        raise ValueError(path + " is not JSON: look for a missing comma or quote")
    for name in ("ssid", "password", "connectionString"):
        if not isinstance(found, dict) or not isinstance(found.get(name), str):
            raise ValueError(name + " is missing in " + path + ": " + _EXAMPLE)
    return found


def is_online():
    """True while there is a network; for TwinClient(is_online=...)."""
    return wlan.isconnected()


def up(configuration):
    """Join the Wi-Fi and set the clock. OSError after all tries says which of them failed."""
    if "country" in configuration:
        # Which channels are allowed is a country's law.
        network.country(configuration["country"])
    if "hostname" in configuration:
        network.hostname(configuration["hostname"])
    join(configuration["ssid"], configuration["password"])
    set_clock(configuration.get("ntpHost"))


def join(ssid, password, tries=_TRIES):
    """Join a Wi-Fi; OSError after so many tries, each of 15 s and a pause that grows to 30 s."""
    for attempt in range(tries):
        wlan.active(True)
        if not wlan.isconnected():
            wlan.connect(ssid, password)
            _wait(wlan.isconnected, _JOIN_WITHIN)
        if wlan.isconnected():
            print("Wi-Fi:", ssid, wlan.ifconfig()[0])
            return
        status = wlan.status()
        # Off and on again: some access points answer no second try of the same radio.
        wlan.disconnect()
        wlan.active(False)
        print("Wi-Fi: no", ssid, "yet, status", status)
        if attempt + 1 < tries:
            time.sleep_ms(min(1000 << attempt, _LONGEST_PAUSE))
    raise OSError("no Wi-Fi " + ssid + " after " + str(tries) + " tries, status " + str(status))


def set_clock(host=None, tries=_TRIES):
    """Ask NTP for the time: without it no certificate can be checked. OSError after so many tries."""
    import ntptime

    if host:
        ntptime.host = host
    for attempt in range(tries):
        try:
            ntptime.settime()
        except OSError as error:
            # One lost packet of UDP is enough.
            print("clock: no answer from", ntptime.host, "yet:", error)
        if time.gmtime()[0] >= _CLOCK_IS_SET:
            print("clock: %04d-%02d-%02d %02d:%02d:%02d UTC" % time.gmtime()[:6])
            return
        if attempt + 1 < tries:
            time.sleep_ms(min(1000 << attempt, _LONGEST_PAUSE))
    raise OSError("no time from " + ntptime.host + " after " + str(tries) + " tries")


def _wait(condition, milliseconds):
    begun = time.ticks_ms()
    while not condition() and time.ticks_diff(time.ticks_ms(), begun) < milliseconds:
        time.sleep_ms(100)


async def keep(configuration):
    """Bring the Wi-Fi back whenever it is lost, for as long as the program runs; never blocks for long."""
    import asyncio

    pause = _CHECK_EVERY
    while True:
        await asyncio.sleep(pause)
        if wlan.isconnected():
            pause = _CHECK_EVERY
            continue
        print("Wi-Fi: lost")
        wlan.disconnect()
        wlan.active(False)
        await asyncio.sleep_ms(500)
        wlan.active(True)
        wlan.connect(configuration["ssid"], configuration["password"])
        # A radio that is busy joining is left alone for a while.
        pause = _JOIN_WITHIN // 1000


async def feed(watchdog, milliseconds=2000):
    """Feed a machine.WDT for as long as the event loop turns: a program that hangs restarts the board."""
    import asyncio

    while True:
        watchdog.feed()
        await asyncio.sleep_ms(milliseconds)
