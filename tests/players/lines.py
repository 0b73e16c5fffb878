"""The lines that a player speaks: it is an app with any number of clients in a process of its own.

It does as it is told on standard input and tells on standard output, in JSON, one object a line:

    in   {"id": 1, "do": "report", "client": "sensor-1", ...}    an order; most do not wait for each other
    out  {"id": 1, "value": ...} or {"id": 1, "error": "..."}    its end
    out  {"event": "desired", "client": "sensor-1", "at": ...}   what a handler was called with; at: monotonic

Orders: open (a connection string, the CA, options), connect, retrieve, report, post (report in the order of
the lines), load (report one by one for some seconds), look (what every client knows), count (when they
dialled), close. This module is for players on CPython and needs the standard library alone: it runs in
environments that have somebody else's client.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

Order = dict[str, Any]

_speaking = threading.Lock()
# When a socket was connected, or tried to be.
_dials: list[float] = []


def tell(**fields: Any) -> None:
    line = json.dumps(fields)
    with _speaking:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def tell_event(event: str, client: str, **fields: Any) -> None:
    tell(event=event, client=client, at=time.monotonic(), **fields)


def watch_dials() -> None:
    """Have `dials` know of every socket that this process connects."""

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        # One that tries both addresses of localhost, IPv6's (of four members) and this one, dials once.
        if event == "socket.connect" and len(arguments[1]) == 2:
            _dials.append(time.monotonic())

    sys.addaudithook(heard)


def dials() -> list[float]:
    return list(_dials)


class Behaviour:
    """What an app's handler does: takes some time, and raises.

    takes: seconds, call by call and then from the start again. raises: how many calls do, from the first on.
    """

    def __init__(self, takes: list[float] | None = None, raises: int = 0) -> None:
        self._takes = takes or [0]
        self._raises = raises
        self._calls = 0
        self._counting = threading.Lock()

    def next(self) -> tuple[float, bool]:
        """Seconds that this call takes, and whether it raises."""
        with self._counting:
            call = self._calls
            self._calls += 1
        return self._takes[call % len(self._takes)], call < self._raises


def looked_at(client: Any) -> dict[str, Any]:
    """What one of our clients knows."""
    return {
        "state": client.state,
        "desired": client.desired,
        "reported": client.reported,
        "statistics": client.statistics,
    }


class HandlerFailed(Exception):
    """What a handler raises that is told to."""

    def __init__(self) -> None:
        super().__init__("as it was told to")


class Logged(logging.Handler):
    """Tells what is logged, from WARNING up."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        tell_event("log", "", text=self.format(record))


def play(perform: Callable[[Order], Any], in_order: bool = False) -> None:
    """Perform the orders of standard input until it ends: one by one, or each in a thread of its own.

    One that gives a function has only begun: what the function gives is its end, in a thread of its own.
    """

    def answer(number: int, work: Callable[[], Any]) -> None:
        try:
            value = work()
            if not callable(value):
                tell(id=number, value=value)
                return
        except Exception as error:  # noqa: BLE001  # whatever a client raises is to be told
            tell(id=number, error=f"{type(error).__name__}: {error}")
            return
        threading.Thread(target=answer, args=(number, value), daemon=True).start()

    for line in sys.stdin:
        order = json.loads(line)
        if in_order or order["do"] == "post":
            answer(order["id"], lambda order=order: perform(order))  # type: ignore[misc]  # bound at once
        else:
            work = (order["id"], lambda order=order: perform(order))  # type: ignore[misc]  # as above
            threading.Thread(target=answer, args=work, daemon=True).start()
