"""Player: the other end of the lines that a player speaks (lines.py)."""

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]


class OrderFailed(Exception):
    """The order ended in an error: of which kind, and its text."""


class Player:
    """A player's process. Events are handed to on_event in their order, by a thread of its own."""

    def __init__(self, *command: str, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._on_event = on_event
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, do: str, client: str | None = None, **order: Any) -> "Future[Any]":
        """Have an order carried out; its future raises OrderFailed if that fails."""
        done: Future[Any] = Future()
        named = order if client is None else {"client": client, **order}
        with self._lock:
            number = next(self._ids)
            self._waiting[number] = done
            line = json.dumps({"id": number, "do": do, **named})
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        return done

    def __call__(self, do: str, client: str | None = None, *, within: float = 30.0, **order: Any) -> Any:
        """An order, and its value. TimeoutError: there is none within so many seconds."""
        try:
            return self.start(do, client, **order).result(within)
        except FutureTimeout:
            raise TimeoutError(f"{do} has not ended within {within:g} s") from None

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "event" in told:
                self._on_event(told)
                continue
            done = self._waiting.pop(told["id"])
            if "error" in told:
                done.set_exception(OrderFailed(told["error"]))
            else:
                done.set_result(told["value"])
        for done in self._waiting.values():
            done.set_exception(OrderFailed("the player has ended"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdin.close()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> "Player":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ours(module: str, *arguments: str) -> tuple[str, ...]:
    """The command of one of our own players: "threads" or "coroutines". hurry: with shorter patience."""
    return sys.executable, "-m", f"tests.players.{module}", *arguments
