"""What works on this board: one line a check, for its owner.

    mpremote run selftest.py              after boot.py has brought up the network and the clock
    mpremote exec "import selftest; selftest.power_cut()"     pull the plug, then run it again

It asks for nothing and changes nothing but the reported property `selftest`, which it removes in the end,
and the file selftest.json. Everything is read from config.json, as main.py does.
"""

import asyncio
import gc
import json
import os
import socket
import sys
import time

from twin_device import ConnectRefused, TwinClient
from twin_device.store import FileStore

_STORE = "selftest.json"
_ME = "selftest"
_NOBODY = "nobody.der"  # a CA that has signed no hub's certificate

failed = []


def say(good, name, text):
    print("%-4s %-11s %s" % ("ok" if good else "FAIL", name, text))
    if not good:
        failed.append(name)


def memory():
    gc.collect()
    free = gc.mem_free()
    # Client, TLS and a small twin together; more is better.
    say(free >= 60000, "memory", "%d bytes of heap are free before anything is connected" % free)


def clock():
    now = time.gmtime()
    say(now[0] >= 2024, "clock", "%04d-%02d-%02d %02d:%02d:%02d UTC" % now[:6])


def address(host):
    try:
        found = socket.getaddrinfo(host, 8883, socket.AF_INET)[0][-1]
    except OSError as error:
        say(False, "DNS", "%s: %s" % (host, error))
        return None
    # MicroPython on a PC gives bytes.
    found = found[0] if type(found) is tuple else socket.inet_ntop(socket.AF_INET, found[4:8])
    say(True, "DNS", "%s is %s" % (host, found))
    return found


def client(config, **options):
    options = dict({"ca_file": config["caFile"], "timeout": 30, "keep_reported": True}, **options)
    return TwinClient.from_connection_string(config["connectionString"], **options)


async def refused(name, config, expected, **options):
    """A connection that must not come about."""
    one = client(config, **options)
    try:
        await one.connect()
    except ConnectRefused as error:
        say(expected in str(error), name, str(error))
    else:
        say(False, name, "was accepted: this firmware checks nothing, do not use it")
    await one.close()


async def hub(config):
    parts = dict([part.split("=", 1) for part in config["connectionString"].split(";") if part])
    host = parts["HostName"].split(":")[0]
    found = address(host)
    await refused("TLS, CA", config, "no CA in ca_file has signed it", ca_file=_NOBODY)
    if found is not None:
        # The same hub by its address, which its certificate does not name.
        port = parts["HostName"][len(host) :]
        other = dict(config, connectionString=config["connectionString"] + ";GatewayHostName=" + found + port)
        await refused("TLS, name", other, "another host")
    one = client(config)
    start = time.ticks_ms()
    try:
        await one.connect()
    except ConnectRefused as error:
        say(False, "connect", str(error))
        await one.close()
        return
    gc.collect()
    took = time.ticks_diff(time.ticks_ms(), start)
    say(True, "connect", "%d ms to the twin; %d bytes of heap are free" % (took, gc.mem_free()))
    await round_trip(one)
    start = time.ticks_ms()
    await one.disconnect()
    await one.connect()
    say(True, "reconnect", "%d ms" % time.ticks_diff(time.ticks_ms(), start))
    await one.report({"selftest": None})
    await one.close()


async def round_trip(one):
    number = time.ticks_ms()
    start = time.ticks_ms()
    version = await one.report({"selftest": {"number": number, "float": 21.5, "text": "21 °C"}})
    took = time.ticks_diff(time.ticks_ms(), start)
    twin = await one.retrieve()
    held = twin["reported"].get("selftest")
    good = held == {"number": number, "float": 21.5, "text": "21 °C"}
    say(
        good,
        "twin",
        "reported in %d ms, $version %s, %s" % (took, version, "read back" if good else repr(held)),
    )


def store():
    one = FileStore(_STORE, 0)
    found, error = one.load(_ME)
    if error is not None:
        say(False, "store", str(error))
    elif found[0] is not None:
        good = found[0]["text"] == "x" * (found[0]["number"] % 1000)
        say(good, "store", "write %d of an earlier run is there, whole" % found[0]["number"])
    else:
        one.keep({"number": 1, "text": "x"}, None, [], 0)
        found, error = FileStore(_STORE, 0).load(_ME)
        say(
            error is None and found[0]["number"] == 1, "store", "written and read; power_cut() tests the rest"
        )
    try:
        os.remove(_STORE)
    except OSError:
        pass


def nvs():
    try:
        import esp32
    except ImportError:
        return
    if hasattr(esp32, "NVS"):
        from twin_device.store import NvsStore

        NvsStore(_ME, 0).load(_ME)
        one = NvsStore(_ME, 0)
        one.load(_ME)
        one.keep({"number": time.ticks_ms()}, None, [], 0)
        found, error = NvsStore(_ME, 0).load(_ME)
        say(error is None and found[0] is not None, "NVS", "written and read")


def power_cut():
    """Write the store for ever. Pull the plug, then run this file again: it says what was left."""
    one = FileStore(_STORE, 0)
    found = one.load(_ME)[0]
    number = found[0]["number"] if found[0] else 0
    print("writing; pull the plug")
    while True:
        number += 1
        one.keep({"number": number, "text": "x" * (number % 1000)}, None, [], 0)
        if number % 100 == 0:
            print(number)


def run():
    """All checks; exit status 1 if one fails."""
    print("twin_device selftest on", sys.platform, sys.version)
    with open("config.json") as file:
        config = json.load(file)
    memory()
    clock()
    store()
    nvs()
    asyncio.run(hub(config))
    print("failed: " + ", ".join(failed) if failed else "everything works")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run()
