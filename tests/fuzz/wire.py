"""The shells' read paths, over real sockets: a hub that sends random and mutated bytes at each stage.

paho's reader is the thread client's, the reader of twin_device.aio the asyncio client's. After the bytes the
hub ends its side; the client has to end its own and to dial again. Every so often it finds a hub that is
sound, and has to synchronise and report.
"""

import itertools
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from tests.aio_app import LoopThread
from tests.fuzz.targets import PACKETS, Target, mutated
from tests.hostile import HostileHub, answer, notification, resident
from twin_device import TwinClient, aio
from twin_device import client as client_module
from twin_device.core import twin

SHELLS = ("threads", "asyncio")
_PATIENCE = 20.0  # seconds until a wait counts as one without end
_SOUND_EVERY = 100
_MAX_GROWTH = 150 << 20  # bytes
_SEEDS = [
    *PACKETS,
    b"".join(notification(version, b'{"a":%d}' % version) for version in range(2, 9)),
    b"".join(notification(2, payload) for payload in (b"{", b"[]", b'{"a":' * 30, b"\xff")),
    answer("1", b"", 204) * 3 + answer("65537", b'{"errorCode":429001}', 429),
    notification(2, b"{" + b'"k":[' * 2000),
    b"\x30\xfc\xff\x0f\0\1t" + bytes(40_000),
]
_WORDS = [
    b"\x30",
    b"\x32",
    b"\x36",
    b"\x90\3\0\1\x80",
    b"\x20\2\0\5",
    b"\xd0\0",
    b"\xc0\0",
    b"\x62\2\0\1",
    b"\xff\xff\xff\x7f",
]
TARGET = Target(lambda data: None, _SEEDS, _WORDS)


class _Listening(logging.Handler):
    """Takes what the client logs as an error of its own: that is a crash that it has survived."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.texts.append(self.format(record))


# By a connection's number: the stage (0: at once, 1: after CONNACK, 2: after SUBACK, 3: after the document)
# and the bytes; None: the hub is sound.
Source = Callable[[int], "tuple[int, bytes] | None"]


def drawn(seed: int) -> Source:
    """Inputs that chance makes of the seeds."""

    def source(number: int) -> tuple[int, bytes] | None:
        chance = random.Random(f"{seed}:{number}")
        if number % _SOUND_EVERY == _SOUND_EVERY - 1:
            return None
        return chance.randrange(4), mutated(TARGET, chance, 1 << 17)

    return source


def given(data: bytes) -> Source:
    """One input at each stage, and then a sound hub."""
    return lambda number: (number % 5, data) if number % 5 < 4 else None


class FuzzingHub(HostileHub):
    """Gives each connection the source's next input."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._numbers = itertools.count()
        self.done = 0
        self.last: list[tuple[int, bytes]] = []
        self.hung: list[tuple[int, bytes]] = []
        self.sound = threading.Event()
        super().__init__()

    def inputs(self) -> bytes:
        """The last ones: which of them it was is for whoever replays to find out."""
        return b"".join(data for _, data in self.last)

    def _talk(self, connected: socket.socket) -> None:
        number = next(self._numbers)
        drawn = self._source(number)
        if drawn is None:
            self.over.clear()
            self.sound.set()
            super()._talk(connected)
            return
        stage, data = drawn
        self.last = [*self.last[-4:], (number, data)]
        connected.setblocking(True)
        connected.settimeout(_PATIENCE)
        received = bytearray()
        while stage:
            found = connected.recv(1 << 16)
            if not found:
                return
            received += found
            for reply in self._replies(received):
                connected.sendall(reply)
                stage = 0 if stage == 1 or reply[0] == (0x90, 0x30)[stage - 2] else stage
        for piece in (data[at : at + 997] for at in range(0, len(data), 997)):
            connected.sendall(piece)
        connected.shutdown(socket.SHUT_WR)
        try:
            while connected.recv(1 << 16):
                pass
        except TimeoutError:
            self.hung.append((number, data))
        self.done += 1


@contextmanager
def _quick(shell: str) -> Iterator[None]:
    """No backoff, not even after a CONNACK that says that the credentials are refused."""
    module: Any = client_module if shell == "threads" else aio
    core: Any = twin
    waits = {name: getattr(core, name) for name in ("_BACKOFF", "_SLOW")}
    before = module.random
    module.random = SimpleNamespace(random=lambda: 0.0, randrange=random.randrange)
    core._BACKOFF = core._SLOW = 0
    try:
        yield
    finally:
        module.random = before
        for name, value in waits.items():
            setattr(core, name, value)


class Result(dict[str, Any]):
    """What a run has found: executions, peak (bytes), broken (list of words and inputs)."""


def fuzz(shell: str, source: Source, seconds: float) -> Result:
    """Let one client of the shell meet the hub for so long, and until it was sound once."""
    listening = _Listening()
    logger = logging.getLogger("twin_device")
    logger.addHandler(listening)
    broken: list[tuple[str, bytes]] = []
    before, peak = resident(), 0
    loop = LoopThread() if shell == "asyncio" else None
    try:
        with _quick(shell), FuzzingHub(source) as hub:
            kind: Any = TwinClient if loop is None else aio.TwinClient
            client = kind(f"127.0.0.1:{hub.port}", "dev-1", key=b"key", tls=False, timeout=6)
            client.on_error(lambda error: None)

            def call(work: Any) -> Any:
                return work if loop is None else loop.call(work)

            call(client.connect(wait=False))
            ends = time.monotonic() + seconds
            while not broken:
                if not hub.sound.wait(_PATIENCE):
                    broken.append((f"no new connection within {_PATIENCE:g} s", hub.inputs()))
                    break
                hub.sound.clear()
                hub.reports.clear()
                inputs = hub.inputs()
                try:
                    call(client.report({"n": hub.done}, timeout=_PATIENCE, always=True))
                except Exception as error:  # noqa: BLE001  # whatever it is, it is the finding
                    broken.append((f"no report to a sound hub: {error!r}", inputs))
                peak = max(peak, resident() - before)
                if peak > _MAX_GROWTH:
                    broken.append((f"memory grew by {peak >> 20} MB", inputs))
                broken += [(text, inputs) for text in listening.texts[:1]]
                broken += [
                    (f"the connection was not ended within {_PATIENCE:g} s", data) for _, data in hub.hung
                ]
                # The sound connection ends: it was one of this hub's, too.
                hub.over.set()
                if time.monotonic() >= ends:
                    break
            call(client.close())
            done = hub.done
    finally:
        logger.removeHandler(listening)
        if loop is not None and loop.close():
            broken.append(("a task was left behind", b""))
    return Result(executions=done, peak=peak, broken=broken)
