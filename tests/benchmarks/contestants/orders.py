"""What the contestants have in common: they do as lines of JSON on stdin say, one answer a line.

A contestant's programs run with interpreters of their own and see nothing of this repository.
"""

import asyncio
import gc
import json
import sys
import time
import traceback

SOON = 60.0  # seconds: everything that is waited for comes within this, or the run has failed


def _parsed(line):
    order = json.loads(line)
    # A collection in the midst of a measurement would be chance; what was left behind is nobody's figure.
    gc.collect()
    order.pop("within", None)
    return order.pop("do"), order


def _tell(answer):
    print(json.dumps(answer), flush=True)


def _tell_failure():
    traceback.print_exc()
    _tell({"error": traceback.format_exc().strip().splitlines()[-1]})


def obey(orders):
    """Do what stdin says until it ends; orders: an object with a method for each."""
    for line in sys.stdin:
        do, order = _parsed(line)
        try:
            _tell(getattr(orders, do)(**order) or {})
        except Exception:  # noqa: BLE001  # whatever it is, the run has failed with it
            _tell_failure()


async def obey_in_loop(orders):
    """The same in an event loop, where the methods may be coroutine functions. It has one thread."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        do, order = _parsed(line)
        try:
            answer = getattr(orders, do)(**order)
            if asyncio.iscoroutine(answer):
                answer = await answer
            _tell(answer or {})
        except Exception:  # noqa: BLE001  # whatever it is, the run has failed with it
            _tell_failure()


class Stopwatch:
    """Seconds, by the clock and of the processor, since it was made."""

    def __init__(self):
        self._cpu = time.process_time()
        self._began = time.perf_counter()

    def stop(self, **more):
        seconds = time.perf_counter() - self._began
        return {"seconds": seconds, "cpu": time.process_time() - self._cpu, **more}


class Seen:
    """When the handler was called with which patch, on the machine's clock."""

    def __init__(self):
        self._times = {}
        self._cpu = time.process_time()

    def __call__(self, patch):
        number = patch.get("n")
        if number is not None:
            self._times[number] = time.monotonic()

    def clear(self):
        self._times.clear()
        self._cpu = time.process_time()

    def __len__(self):
        return len(self._times)

    def told(self):
        return {"times": list(self._times.items()), "cpu": time.process_time() - self._cpu}


class Listening:
    """The orders to tell which desired patches have come, for contestants with threads."""

    def __init__(self):
        self.seen = Seen()

    def listen(self):
        self.seen.clear()

    def desired(self, count):
        until(lambda: len(self.seen) >= count, "desired patches")
        return self.seen.told()


def until(condition, what):
    """Wait for a condition that other threads make true."""
    end = time.monotonic() + SOON
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.002)


async def until_in_loop(condition, what):
    end = time.monotonic() + SOON
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        await asyncio.sleep(0.002)
