"""A board's client on a real MicroPython, behind the face of the thread client: one test runs on both."""

import builtins
import itertools
import json
import os
import queue
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vm import micropython
from tests.waiting import PATIENCE
from twin_device.core import errors

APP = Path(__file__).parent / "board_app.py"


def der(pem_file: str, folder: Path) -> str:
    """The certificate of a PEM file as a board wants it."""
    path = folder / "ca.der"
    path.write_bytes(ssl.PEM_cert_to_DER_cert(Path(pem_file).read_text()))
    return str(path)


def error_of(described: dict[str, Any]) -> Exception:
    """The error that the program has described, as ours of the same name."""
    name = described["error"]
    kind = getattr(builtins, name, None) or getattr(errors, name)
    error: Exception = kind.__new__(kind, described["text"])
    for name, value in described.items():
        if name not in ("id", "error", "text"):
            setattr(error, name, value)
    return error


class BoardReport:
    def __init__(self, client: "BoardClient", number: int) -> None:
        self._client, self._number = client, number

    def wait(self, timeout: float | None = None) -> Any:
        return self._client.ask("await_report", number=self._number, timeout=timeout)


class BoardClient:
    """options: the client's. hurry: retries are short, or "at once". clock: what board_app's Clock takes.
    interpreter: options of micropython."""

    def __init__(
        self,
        text: str,
        path: Path,
        *,
        hurry: bool | str = True,
        clock: dict[str, int] | None = None,
        interpreter: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        self._process = subprocess.Popen(
            [micropython(), *interpreter, str(APP)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # There it says that a task has ended with an error that nobody expected.
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "MICROPYPATH": f"{path}:.frozen", **(environment or {})},
        )
        self._numbers = itertools.count(1)
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._writing = threading.Lock()
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._handlers: dict[str, list[Callable[..., Any]]] = {"desired": [], "state": [], "failed": []}
        self._appliers: dict[str, Callable[[Any], Any]] = {}
        self.properties: queue.SimpleQueue[tuple[list[str], Any]] = queue.SimpleQueue()
        self.change: dict[str, Any] = {}  # the event that the handlers are being called with
        self.other: list[str] = []  # lines that are no JSON: what MicroPython itself says
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._dispatch)]
        for thread in self._threads:
            thread.start()
        self._write({"text": text, "options": options, "hurry": hurry, "clock": clock})

    def _write(self, message: dict[str, Any]) -> None:
        with self._writing:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                self.other.append(line)
                continue
            if "id" in message:
                self._answers[message["id"]].put(message)
            elif "property" in message:
                self.properties.put((message["property"], message["value"]))
            else:
                self._events.put(message)
        self._events.put(None)
        for waiting in list(self._answers.values()):
            waiting.put({"error": "RemoteError", "text": f"the program has ended: {self.other}"})

    def _dispatch(self) -> None:
        while (event := self._events.get()) is not None:
            if "desired" in event:
                self.change = event
                for handler in self._handlers["desired"]:
                    handler(event["patch"], event["desired"])
            elif "state" in event:
                for handler in self._handlers["state"]:
                    handler(None, event["state"])
            elif "failed" in event:
                for handler in self._handlers["failed"]:
                    handler(error_of(event["failed"]))
            else:
                reason = None
                try:
                    self._appliers[event["apply"]](event["value"])
                except Exception as error:  # noqa: BLE001  # whatever the test's function raises is its refusal
                    reason = str(error)
                self.ask("applied", number=event["number"], reason=reason)

    def ask(self, call: str, **options: Any) -> Any:
        """Have the program call something; its result, or the error that it raised."""
        return self.result(self.tell(call, **options))

    def tell(self, call: str, **options: Any) -> int:
        """Have the program call something; the number to ask for its result."""
        number = next(self._numbers)
        self._answers[number] = queue.SimpleQueue()
        self._write({"id": number, "call": call, "with": options})
        return number

    def result(self, number: int) -> Any:
        got = self._answers[number].get(timeout=6 * PATIENCE)
        del self._answers[number]
        if "error" in got:
            raise error_of(got)
        return got["result"]

    # ------------------------------------------------------------------ the face of TwinClient

    def __getattr__(self, name: str) -> Any:
        if name in ("state", "desired", "reported", "desired_version", "reported_version", "statistics"):
            return self.ask("get", name=name)
        raise AttributeError(name)

    def on_desired(self, handler: Any) -> None:
        self._handlers["desired"].append(handler)

    def on_state(self, handler: Any) -> None:
        self._handlers["state"].append(handler)

    def on_error(self, handler: Any) -> None:
        self._handlers["failed"].append(handler)

    def setting(self, name: str, *, shape: str = "document") -> Callable[[Any], Any]:
        def declare(apply: Any) -> Any:
            self._appliers[name] = apply
            self.ask("setting", name=name, shape=shape)
            return apply

        return declare

    def connect(self, **options: Any) -> None:
        self.ask("connect", **options)

    def disconnect(self) -> None:
        self.ask("disconnect")

    def report(self, patch: dict[str, Any], **options: Any) -> Any:
        result = self.ask("report", patch=patch, **options)
        return result if options.get("wait", True) else BoardReport(self, result)

    def retrieve(self, timeout: float | None = None) -> Any:
        return self.ask("retrieve", timeout=timeout)

    def close(self) -> None:
        self.ask("close")

    def __enter__(self) -> "BoardClient":
        self.connect()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def end(self) -> int:
        """Have the program end; gives its exit status."""
        assert self._process.stdin is not None
        with self._writing:
            self._process.stdin.close()
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        for thread in self._threads:
            thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """Cut its power."""
        self._process.kill()
