"""Runs on MicroPython: the app whose heap is measured. It answers each desired patch with a report."""

import asyncio
import os
import sys


class Watched:
    """A file system that says which files the interpreter opens."""

    def __init__(self, folder):
        self.folder = folder

    def mount(self, readonly, make):
        pass

    def stat(self, path):
        return os.stat(self.folder + path)

    def open(self, path, mode):
        print("opened", path)
        return open(self.folder + path, mode)


if os.getenv("WATCH"):
    os.mount(Watched(os.getenv("WATCH")), "/watched")
    sys.path.insert(0, "/watched")

import twin_device as shell  # noqa: E402  # once it is known from where
from twin_device import TwinClient  # noqa: E402  # as above


class Chance:
    """Retries come at once."""

    def random(self):
        return 0.01

    def getrandbits(self, count):
        return 1


shell.random = Chance()
options = {}
if os.getenv("CA"):
    options["ca_file"] = os.getenv("CA")
else:
    options["tls"] = False
if os.getenv("KEEP") is not None:
    options["keep"] = tuple(os.getenv("KEEP").split())
handed = [0]


def hand(path, value):
    handed[0] += 1


if os.getenv("HAND_ON"):
    options["on_property"] = hand
client = TwinClient.from_connection_string(os.getenv("DEVICE"), timeout=20, **options)
options = None


@client.on_desired
async def changed(patch, desired):
    if "round" in patch:
        await client.report({"round": patch["round"], "handed": handed[0]})
        print("reported", patch["round"])


client.on_state(lambda old, new: print(new))
client.on_error(lambda error: print("failed:", error))
asyncio.run(client.run())
