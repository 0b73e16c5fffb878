"""The commands `gateway run` and `gateway health`: a fleet from a file, shown and watched over."""

import asyncio
import csv
import importlib.util
import inspect
import io
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TextIO

from . import systemd
from .core.credentials import from_connection_string
from .core.errors import LocalError
from .gateway import DeviceStatus, GatewaySummary, TwinGateway

_COLUMN = "connection_string"
_CERTIFICATE = ("certificate", "certificate_key")
_MAX_TOLD = 20  # bad lines of a fleet's file that are told at once
_MAX_FLEET_FILE = 64 << 20

_TICK = 0.5  # seconds between two looks at the fleet
_PROGRESS = 5.0  # seconds between two lines about a fleet that is coming up
# A status file is written at a change, and at least so often; one that is older says that nobody writes it.
_STATUS_EVERY = 5.0
_STATUS_OLD = 15.0
_STATUS_DEFAULT = "/run/twin-gateway/status.json"
_STATUS_FORMAT = 1

_MAX_WAITING = 10000  # lines that wait for a reader
_RECENT = 5  # messages below the table
_BAR = 30


# ---------------------------------------------------------------------- the fleet's file


class FleetDevice(NamedTuple):
    """One line of a fleet's file. certificate: the files of its certificate and key, if it has no key."""

    connection_string: str
    certificate: tuple[str, str] | None = None

    def add_to(self, gateway: TwinGateway) -> None:
        options = {} if self.certificate is None else {"certificate": self.certificate}
        gateway.add(self.connection_string, **options)


def read_fleet(path: str) -> dict[str, FleetDevice]:
    """The devices in a CSV file, by id ("device" or "device/module").

    Its first line names the columns; one is `connection_string`. A device with x509=true there has the files
    of its certificate and key in `certificate` and `certificate_key`, from the file's folder on. Others are
    the reader's own. Empty lines, and those that begin with #, do not count. LocalError names every bad line
    by its number, and says what is wrong with it, but never what it holds: there are keys in it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FLEET_FILE + 1)
    except OSError as error:
        raise LocalError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_FLEET_FILE:
        raise LocalError(f"{path} is too large for a list of devices")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LocalError(f"{path}, line {line}: it is not UTF-8") from None
    fleet: dict[str, FleetDevice] = {}
    lines: dict[str, int] = {}
    wrong: list[tuple[int, str]] = []
    at: int | None = None
    columns = 0
    files: list[int] = []
    for number, fields in _rows(path, text):
        if at is None:
            names = [name.strip() for name in fields]
            if names.count(_COLUMN) != 1:
                raise LocalError(
                    f"{path}, line {number}: the first line names the columns, one of them {_COLUMN}"
                )
            at, columns = names.index(_COLUMN), len(names)
            files = [names.index(name) for name in _CERTIFICATE if name in names]
            continue
        try:
            if len(fields) != columns:
                raise LocalError(f"it has {len(fields)} fields, the first line has {columns}")
            credentials = from_connection_string(fields[at])
            device_id = credentials.client_id
            if device_id in fleet:
                raise LocalError(f"{device_id} is in line {lines[device_id]} already")
            pair = tuple(fields[index].strip() for index in files)
            certificate = _certificate(os.path.dirname(path), pair, credentials.key is None)
        except LocalError as error:
            wrong.append((number, str(error)))
        else:
            fleet[device_id] = FleetDevice(fields[at].strip(), certificate)
            lines[device_id] = number
    if at is None:
        raise LocalError(f"{path} is empty: its first line names the columns, one of them {_COLUMN}")
    if wrong:
        told = [f"{path}, line {number}: {why}" for number, why in wrong[:_MAX_TOLD]]
        if len(wrong) > _MAX_TOLD:
            told.append(f"and {len(wrong) - _MAX_TOLD} more bad lines")
        raise LocalError("\n".join(told))
    return fleet


def _certificate(folder: str, files: tuple[str, ...], is_wanted: bool) -> tuple[str, str] | None:
    """The files of a device's certificate and key, which are there."""
    named = [os.path.join(folder, name) for name in files if name]
    if not is_wanted:
        if named:
            raise LocalError("it has a SharedAccessKey and a certificate: only one of them can be right")
        return None
    if len(named) != len(_CERTIFICATE):
        raise LocalError(f"x509=true needs files in the columns {' and '.join(_CERTIFICATE)}")
    for name in named:
        if not os.path.isfile(name):
            raise LocalError(f"there is no file {name}")
    return named[0], named[1]


def _rows(path: str, text: str) -> list[tuple[int, list[str]]]:
    """The rows that count, each with the number of its line."""
    # A comment must not open a quotation; its line keeps its number.
    lines = ["\n" if line.lstrip().startswith("#") else line for line in io.StringIO(text, newline="")]
    reader = csv.reader(lines, strict=True)
    found = []
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                found.append((reader.line_num, fields))
    except csv.Error as error:
        raise LocalError(f"{path}, line {reader.line_num}: it is not CSV: {error}") from None
    return found


def _is_exposed(path: str) -> bool:
    """True if every user of this machine can read the file."""
    return os.name == "posix" and bool(os.stat(path).st_mode & 0o004)


def _load_app(path: str) -> Callable[[TwinGateway], object]:
    """The function setup(gateway) of a Python file."""
    if not os.path.isfile(path):
        raise LocalError(f"app {path}: there is no such file")
    spec = importlib.util.spec_from_file_location("twin_gateway_app", path)
    if spec is None or spec.loader is None:
        raise LocalError(f"app {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    setup: Callable[[TwinGateway], object] | None = getattr(module, "setup", None)
    if not callable(setup):
        raise LocalError(f"app {path} has no function setup(gateway)")
    return setup


# ---------------------------------------------------------------------- what is shown


class _Output(threading.Thread):
    """Writes in a thread of its own: a terminal that is stopped, or a pipe that nobody reads, must not hold
    up a fleet."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(name="twin-output", daemon=True)
        self._stream = stream
        self._journal = systemd.is_journal(stream)
        self._lines: deque[str] = deque()
        self._frame: str | None = None
        # What comes before all; a frame may be replaced before it is shown.
        self.first = ""
        self._lost = 0
        self._wanted = threading.Event()
        self._ending = False
        # The reader has gone.
        self.broken = False

    def line(self, text: str, priority: int = systemd.INFO) -> None:
        # The journal has the time itself.
        text = systemd.prefixed(text, priority) if self._journal else f"{_clock(time.time())} {text}"
        if len(self._lines) < _MAX_WAITING:
            self._lines.append(text)
        else:
            self._lost += 1
        self._wanted.set()

    def frame(self, text: str) -> None:
        """Show this in place of what was to be shown before."""
        self._frame = text
        self._wanted.set()

    def end(self) -> None:
        """Write what is left, as far as somebody reads it."""
        self._ending = True
        self._wanted.set()
        self.join(2.0)

    def run(self) -> None:
        try:
            if self.first:
                self._stream.write(self.first)
            while True:
                self._wanted.wait()
                self._wanted.clear()
                ending = self._ending
                while self._lines:
                    self._stream.write(self._lines.popleft() + "\n")
                if self._lost:
                    lost, self._lost = self._lost, 0
                    self._stream.write(f"({lost} lines were lost: nobody read them)\n")
                frame, self._frame = self._frame, None
                if frame is not None:
                    self._stream.write(frame)
                self._stream.flush()
                if ending:
                    return
        except (OSError, ValueError):
            self.broken = True


class _Records(logging.Handler):
    """Brings the log to where everything else is shown."""

    def __init__(self, tell: Callable[[str, int], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        try:
            priority = systemd.INFO
            if record.levelno >= logging.ERROR:
                priority = systemd.ERROR
            elif record.levelno >= logging.WARNING:
                priority = systemd.WARNING
            self._tell(self.format(record), priority)
        except Exception:  # noqa: BLE001  # as logging's own handlers do
            self.handleError(record)


def _clock(when: float | None) -> str:
    return "-" if when is None else time.strftime("%H:%M:%S", time.localtime(when))


def _in_words(summary: GatewaySummary) -> str:
    return (
        f"{summary.devices} devices, {summary.connected} connected, {summary.synchronised} synchronised, "
        f"{summary.rejected} rejected, last change {_clock(summary.last_change)}"
    )


def _order(row: DeviceStatus) -> tuple[int, float]:
    """What wants to be looked at first, then what changed last."""
    if row.rejected is not None:
        return 0, -row.since
    if not row.synchronised:
        return 1, -row.since
    return 2, -(row.last_change or 0.0)


def _table(
    summary: GatewaySummary,
    rows: list[DeviceStatus],
    progress: str | None,
    recent: "deque[str]",
    width: int,
    height: int,
) -> list[str]:
    """The fleet in at most `height` lines of at most `width` characters."""
    head = [_in_words(summary)]
    if progress is not None:
        head.append(progress)
    foot = ["", *recent] if recent else []
    room = max(1, height - len(head) - len(foot) - 2)
    shown = sorted(rows, key=_order)
    more = len(shown) - room
    if more > 0:
        foot = [f"... and {more + 1} more", *foot]
        shown = shown[: room - 1]
    cells = [("device", "state", "since", "last change", "why")]
    cells += [
        (
            row.device_id,
            "rejected" if row.rejected is not None else row.state,
            _clock(row.since),
            _clock(row.last_change),
            row.why or "",
        )
        for row in shown
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    body = [
        "  ".join(text.ljust(wide) for text, wide in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return [_plain(line)[:width] for line in [*head, "", *body, *foot]][:height]


def _plain(text: str) -> str:
    """Nothing in it may move a terminal's cursor."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


# ---------------------------------------------------------------------- running


class _Service:
    """One run: what is shown, told to systemd and written to the status file while the gateway works."""

    def __init__(self, gateway: TwinGateway, path: str, fleet: dict[str, FleetDevice], options: Any) -> None:
        self._gateway = gateway
        self._path = path
        self._fleet = fleet
        self._rate: float = options.connects_per_second
        self._status_file: str | None = options.status or _default_status_file(os.environ)
        self._status_failed = False
        self._written: tuple[float, object] = (-_STATUS_OLD, None)
        self._is_table = sys.stdout.isatty() and not options.plain and os.environ.get("TERM") != "dumb"
        self._output = _Output(sys.stdout)
        self._recent: deque[str] = deque(maxlen=_RECENT)
        self._started = time.monotonic()
        self._is_up = False
        self._last = gateway.summary
        self._told_progress = self._told_alive = -_PROGRESS
        self._told_status = ""
        self._reloading: asyncio.Task[None] | None = None

    def tell(self, text: str, priority: int = systemd.INFO) -> None:
        if self._is_table:
            self._recent.append(f"{_clock(time.time())} {text.partition(chr(10))[0]}")
        else:
            self._output.line(text, priority)

    # ------------------------------------------------------------------ what the gateway calls

    def _desired_changed(self, device_id: str, patch: dict[str, Any], desired: dict[str, Any]) -> None:
        # The names only: a log is no place for values that somebody else chose.
        self.tell(f"{device_id} desired: {', '.join(patch)}")

    def _state_changed(self, device_id: str, old: str, new: str) -> None:
        if new == "synchronised":
            self.tell(f"{device_id} synchronised")
        elif new == "offline" and not self._gateway.closed:
            # Removed meanwhile, it is offline for no other reason.
            with suppress(LocalError):
                why = self._gateway.client(device_id).statistics["last_error"]
                self.tell(f"{device_id} offline" + (f": {why}" if why else ""), systemd.WARNING)

    # ------------------------------------------------------------------ its life

    async def run(self, setup: Callable[[TwinGateway], object] | None) -> int:
        """Returns the exit status."""
        root = logging.getLogger()
        records = None
        if not root.handlers:
            records = _Records(self.tell)
            root.addHandler(records)
        if self._is_table:
            # The alternate screen, without a cursor.
            self._output.first = "\x1b[?1049h\x1b[?25l"
        else:
            self._gateway.on_desired(self._desired_changed)
            self._gateway.on_state(self._state_changed)
        self._output.start()
        try:
            if setup is not None:
                result = setup(self._gateway)
                if inspect.isawaitable(result):
                    await result
            for device in self._fleet.values():
                device.add_to(self._gateway)
            await self._gateway.start()
            return await self._serve()
        finally:
            await self._gateway.close()
            self._forget_status()
            if self._is_table:
                self._output.frame(f"\x1b[?25h\x1b[?1049lended with {_in_words(self._last)}\n")
            else:
                self._output.line("ended")
            self._output.end()
            if records is not None:
                root.removeHandler(records)

    async def _serve(self) -> int:
        loop = asyncio.get_running_loop()
        hang_up = getattr(signal, "SIGHUP", None)
        if hang_up is not None:
            loop.add_signal_handler(hang_up, self._reload_soon)
        ended = asyncio.ensure_future(self._gateway.run_forever())
        watching = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait((ended, watching), return_when=asyncio.FIRST_COMPLETED)
            for task in (ended, watching):
                if task.done():
                    task.result()
            return 1 if self._output.broken else 0
        finally:
            if hang_up is not None:
                loop.remove_signal_handler(hang_up)
            systemd.notify("STOPPING=1")
            left = [task for task in (ended, watching, self._reloading) if task is not None]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _watch(self) -> None:
        """Look at the fleet until nobody reads what is shown."""
        # Signals are caught by now: run_forever() was the first to have its turn.
        systemd.notify("READY=1")
        while not self._output.broken:
            self._look()
            await asyncio.sleep(_TICK)

    def _look(self) -> None:
        now = time.monotonic()
        summary = self._last = self._gateway.summary
        progress = self._progress(now, summary)
        if self._is_table:
            width, height = shutil.get_terminal_size()
            lines = _table(summary, self._gateway.status, progress, self._recent, width, height)
            self._output.frame(
                "\x1b[H" + "".join(line + "\x1b[K\n" for line in lines[:-1]) + lines[-1] + "\x1b[J"
            )
        elif progress is not None and now - self._told_progress >= _PROGRESS:
            self._told_progress = now
            self.tell(progress)
        self._tell_systemd(now, progress or _in_words(summary))
        self._keep_status(now, summary)

    def _progress(self, now: float, summary: GatewaySummary) -> str | None:
        """The line that tells how far the fleet has come up; None once it has."""
        if self._is_up:
            return None
        done = summary.synchronised + summary.rejected
        if done >= summary.devices:
            self._is_up = True
            took = now - self._started
            refused = f", {summary.rejected} rejected" if summary.rejected else ""
            self.tell(
                f"the fleet is up: {summary.synchronised} of {summary.devices} synchronised{refused}, "
                f"after {took:.1f} s"
            )
            return None
        # At best: each device that is missing needs one attempt.
        left = (summary.devices - max(done, summary.connected)) / self._rate
        filled = _BAR * done // summary.devices
        bar = f"[{'#' * filled}{'.' * (_BAR - filled)}] " if self._is_table else ""
        return f"bringing up the fleet: {bar}{done} of {summary.devices}, {left:.0f} s left at best"

    def _tell_systemd(self, now: float, status: str) -> None:
        said = []
        watchdog = systemd.watchdog_seconds()
        # Half the time at the latest, as sd_watchdog_enabled(3) has it.
        if watchdog is not None and now - self._told_alive >= min(watchdog / 2, _PROGRESS) - _TICK:
            self._told_alive = now
            said.append("WATCHDOG=1")
        if status != self._told_status:
            self._told_status = status
            said.append("STATUS=" + _plain(status))
        if said:
            systemd.notify("\n".join(said))

    # ------------------------------------------------------------------ the status file

    def _keep_status(self, now: float, summary: GatewaySummary) -> None:
        if self._status_file is None:
            return
        rows = self._gateway.status
        at, written = self._written
        if now - at < _STATUS_EVERY and written == (summary, rows):
            return
        self._written = (now, (summary, rows))
        document = {
            "twin_gateway": _STATUS_FORMAT,
            "pid": os.getpid(),
            # Both ends of a second are on one machine: this clock is the same for all, and never set.
            "monotonic": now,
            "time": time.time(),
            **summary._asdict(),
            "table": [row._asdict() for row in rows],
        }
        new = f"{self._status_file}.new"
        try:
            with open(new, "w", encoding="utf-8") as file:
                json.dump(document, file)
            os.replace(new, self._status_file)
        except OSError as error:
            if not self._status_failed:
                self._status_failed = True
                self.tell(f"status file {self._status_file}: {error.strerror}", systemd.WARNING)
        else:
            self._status_failed = False

    def _forget_status(self) -> None:
        if self._status_file is not None:
            with suppress(OSError):
                os.unlink(self._status_file)

    # ------------------------------------------------------------------ another fleet

    def _reload_soon(self) -> None:
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.ensure_future(self._reload())

    async def _reload(self) -> None:
        """Make the fleet what its file says now; nothing is changed if the file is bad."""
        try:
            wanted = read_fleet(self._path)
        except LocalError as error:
            self.tell(f"the fleet stays as it is: {error}", systemd.ERROR)
            return
        gone = [device_id for device_id, device in self._fleet.items() if wanted.get(device_id) != device]
        new = [device_id for device_id, device in wanted.items() if self._fleet.get(device_id) != device]
        self._fleet = wanted
        try:
            await asyncio.gather(*(self._gateway.remove(device_id) for device_id in gone))
            for device_id in new:
                wanted[device_id].add_to(self._gateway)
        except LocalError as error:
            # The app has added or removed devices, too.
            self.tell(f"{self._path} was not read again to its end: {error}", systemd.ERROR)
            return
        if new:
            self._started, self._is_up = time.monotonic(), False
        self.tell(f"{self._path} was read again: {len(new)} added or changed, {len(gone)} removed or changed")


def run(options: Any) -> int:
    """Do `twin-device gateway run`; gives its exit status. LocalError: a bad file or option."""
    fleet = read_fleet(options.fleet)
    if _is_exposed(options.fleet):
        print(
            f"twin-device: {options.fleet} holds keys, and everybody can read it: chmod o-r", file=sys.stderr
        )
    gateway = TwinGateway(
        connects_per_second=options.connects_per_second,
        ca_file=options.ca_file,
        tls=not options.plaintext,
        timeout=options.timeout,
        store=options.store or _folder_of_systemd(os.environ, "STATE_DIRECTORY"),
    )
    setup = None if options.app is None else _load_app(options.app)
    return asyncio.run(_Service(gateway, options.fleet, fleet, options).run(setup))


# ---------------------------------------------------------------------- health


def _folder_of_systemd(environment: Any, name: str) -> str | None:
    """The first folder that it made for the service, if any."""
    return environment.get(name, "").split(":")[0] or None


def _default_status_file(environment: Any) -> str | None:
    folder = _folder_of_systemd(environment, "RUNTIME_DIRECTORY")
    return folder and os.path.join(folder, "status.json")


def health(options: Any) -> int:
    """Do `twin-device gateway health`; gives its exit status: 0 all synchronised, 1 some are not, 2 not
    running."""
    path = options.status or _STATUS_DEFAULT
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        if document["twin_gateway"] != _STATUS_FORMAT:
            raise ValueError("format")
        age = time.monotonic() - document["monotonic"]
        rows = [DeviceStatus(**row) for row in document["table"]]
    except FileNotFoundError:
        return _not_running(f"there is no {path}", options.json)
    except OSError as error:
        return _not_running(f"{path} cannot be read: {error.strerror}", options.json)
    except (ValueError, KeyError, TypeError, RecursionError):
        return _not_running(f"{path} is no status file of this release", options.json)
    # Below 0: it is from before the last boot.
    if not 0 <= age < _STATUS_OLD:
        return _not_running(f"{path} was not written for {_STATUS_OLD:.0f} s", options.json)
    now = time.time()
    rejected = [row.device_id for row in rows if row.rejected is not None]
    missing = [
        row.device_id
        for row in rows
        if not row.synchronised and row.rejected is None and now - row.since >= options.grace
    ]
    status = 1 if rejected or missing else 0
    if options.json:
        print(json.dumps({"running": True, **document}))
        return status
    told = f"{document['synchronised']} of {document['devices']} synchronised"
    for names, what in ((rejected, "rejected"), (missing, "not synchronised")):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            told += f"; {len(names)} {what}: {shown}"
    print(told)
    return status


def _not_running(why: str, as_json: bool) -> int:
    print(json.dumps({"running": False, "why": why}) if as_json else f"not running: {why}")
    return 2
