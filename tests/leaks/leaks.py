"""Reads what the whole suite logs and prints, for keys and signatures: conftest.py makes a test fail for one.

watch() makes this process read

    every record of every logger, at DEBUG     whatever their levels are: what is shown does not change
    stdout and stderr of every process         that it starts, as far as they are pipes or thrown away

and has every Python that it starts do the same, so that what a program's own programs say is read, too. What
is found is left in a folder, a file each. Whatever a process inherits of pytest's output is read by
conftest.py. This module runs in every process, those of other projects too: it needs the standard library
alone.
"""

import io
import itertools
import logging
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

_FOUND = ".found"
FOLDER = "TWIN_DEVICE_LEAKS"  # in the environment: where a process leaves what it finds

# What looks like a key (32 bytes in base64, as it is or as in a URL), the bytes of the key that most tests
# have, a private key, a token's signature, or a connection string's key.
SECRET = re.compile(
    r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{43}="
    r"|(?<![A-Za-z0-9+/%])(?:[A-Za-z0-9]|%2[BF]){43}%3D"
    r"|0123456789abcdef0123456789abcdef"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|sig=[A-Za-z0-9%+/]{16}"
    r"|SharedAccessKey=[^;\s.{]{8}",
    re.IGNORECASE,
)


class Exemption(NamedTuple):
    """Whose stdout may hold secrets. command: a pattern of its arguments, joined by spaces."""

    command: str
    reason: str


EXEMPT = (
    Exemption(r"twin_device\.cli hub run\b", "it was asked for the connection strings of its devices"),
    Exemption(r"twin_device\.cli hub device (create|connection-string)\b", "it was asked for one"),
    Exemption(r"twin_device\.cli token\b", "it was asked for one"),
    Exemption(
        r"tests/vectors/run\.py|/run\.py \S*tests/vectors$|tests/wasm\.mjs", "signatures are vectors, too"
    ),
    Exemption(r"-m tests\.soak --hub ", "the clients are in the process that it tells what to connect with"),
    Exemption(
        r"tests/interop/(azure_backend\.py|node_backend\.js) ", "whether the SDK was given the device's key"
    ),
    Exemption(r"playwright/driver/", "it brings what a browser on the hub's page sends, its token included"),
)


# It parts what it builds from all else by a sitecustomize of its own, which ours would hide.
_PIP = re.compile(r"-m pip\b")


def is_exempt(command: str) -> bool:
    """Whether this command's stdout may hold secrets. Its stderr and its logs never may."""
    return any(re.search(one.command, command) for one in EXEMPT)


class _State:
    """folder: where what is found goes; None: nothing is read. seen: how many records were."""

    folder: str | None = None
    seen = 0
    reads_asyncio = False


_numbers = itertools.count()
_thrown_away: "list[tuple[int, Reader, _Popen]]" = []


def look(text: str, where: str) -> None:
    """Leave a file for each line of the text that has a secret in it."""
    if _State.folder is None or not SECRET.search(text):
        return
    for line in text.splitlines():
        if SECRET.search(line):
            path = os.path.join(_State.folder, f"{os.getpid()}-{next(_numbers)}{_FOUND}")
            with open(path, "w", encoding="utf-8", errors="replace") as file:
                file.write(f"{where}: {line[:500]}")


def found() -> list[str]:
    """What was found since the last call, here and in the processes that this one has started."""
    for one in list(_thrown_away):
        descriptor, reader, process = one
        has_ended = process.poll() is not None
        reader.feed(os.pread(descriptor, 1 << 24, reader.read))
        if has_ended:
            reader.end()
            os.close(descriptor)
            _thrown_away.remove(one)
    texts = []
    for name in os.listdir(_State.folder) if _State.folder is not None else ():
        path = os.path.join(str(_State.folder), name)
        if name.endswith(_FOUND):
            with open(path, encoding="utf-8") as file:
                texts.append(file.read())
            os.unlink(path)
    return texts


def seen() -> int:
    """How many log records this process has read."""
    return _State.seen


# ---------------------------------------------------------------------- logs

_is_enabled = logging.Logger.isEnabledFor
_handle = logging.Logger.handle
_formatter = logging.Formatter()


def _is_always_enabled(self: logging.Logger, level: int) -> bool:
    return True


def _read_record(self: logging.Logger, record: logging.LogRecord) -> None:
    _State.seen += 1
    where = f"log {record.name}, {record.pathname}:{record.lineno}"
    # All of it in one line: a secret is shown with what it was said with.
    look(_formatter.format(record).replace("\n", "\\n"), where)
    if _is_enabled(self, record.levelno):
        _handle(self, record)


# ---------------------------------------------------------------------- what processes print


class Reader:
    """Reads a process's output, however it is cut."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._rest = b""
        self.read = 0  # bytes

    def feed(self, data: bytes) -> None:
        self.read += len(data)
        lines, line_feed, rest = data.rpartition(b"\n")
        if line_feed:
            look((self._rest + lines).decode("utf-8", "replace"), self._where)
            self._rest = rest
        else:
            self._rest += rest

    def end(self) -> None:
        look(self._rest.decode("utf-8", "replace"), self._where)
        self._rest = b""


class _Pipe(io.FileIO):
    """A pipe's end, read twice: here, and by whoever reads."""

    reader: Reader

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self.reader.feed(bytes(memoryview(buffer)[: count or 0]))
        return count

    def read(self, size: int | None = -1) -> bytes | None:  # type: ignore[override]  # None where nothing is there yet
        data = super().read(-1 if size is None else size)
        self.reader.feed(data or b"")
        return data

    def readall(self) -> bytes | None:  # type: ignore[override]  # as above
        data = super().readall()
        self.reader.feed(data or b"")
        return data

    def close(self) -> None:
        if not self.closed:
            # What nobody has read, as far as it is there.
            os.set_blocking(self.fileno(), False)
            self.readall()
            self.reader.end()
        super().close()


class _Popen(subprocess.Popen[Any]):
    """A process whose output is read, and which reads what it logs itself if it is a Python."""

    def __init__(self, args: Any, *more: Any, **options: Any) -> None:
        command = args if isinstance(args, (str, bytes)) else " ".join(map(os.fsdecode, args))
        self._command = os.fsdecode(command)
        if not _PIP.search(self._command):
            environment = dict(os.environ if options.get("env") is None else options["env"])
            path = [os.path.dirname(os.path.abspath(__file__)), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
            environment[FOLDER] = str(_State.folder)
            options["env"] = environment
        if "asyncio.subprocess" in sys.modules and not _State.reads_asyncio:
            # Not imported for this: programs differ in whether they have it.
            _State.reads_asyncio = True
            _read_what_asyncio_reads()
        for name in ("stdout", "stderr"):
            if options.get(name) == subprocess.DEVNULL and self._is_read(name):
                options[name] = self._without_a_name()
                _thrown_away.append((options[name], Reader(self._where(name)), self))
        super().__init__(args, *more, **options)
        for name in ("stdout", "stderr"):
            stream = getattr(self, name)
            if stream is not None and self._is_read(name):
                setattr(self, name, self._watched(stream, self._where(name)))

    def _is_read(self, name: str) -> bool:
        return name == "stderr" or not is_exempt(self._command)

    def _where(self, name: str) -> str:
        return f"{name} of {self._command[:300]}"

    def _without_a_name(self) -> int:
        """A file in place of /dev/null."""
        path = os.path.join(str(_State.folder), f"{os.getpid()}-{next(_numbers)}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        os.unlink(path)
        return descriptor

    def _watched(self, stream: Any, where: str) -> Any:
        """The same pipe and the same layers, over a _Pipe."""
        pipe = _Pipe(os.dup(stream.fileno()))
        pipe.reader = Reader(where)
        watched: Any = pipe if isinstance(stream, io.FileIO) else io.BufferedReader(pipe)
        if isinstance(stream, io.TextIOWrapper):
            watched = io.TextIOWrapper(watched, encoding=stream.encoding, errors=stream.errors)
        stream.close()
        return watched

    def communicate(self, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        # It reads the descriptors themselves.
        told = super().communicate(*arguments, **options)
        for name, text in zip(("stdout", "stderr"), told, strict=True):
            if text and self._is_read(name):
                look(text if isinstance(text, str) else text.decode("utf-8", "replace"), self._where(name))
        return told


def _read_what_asyncio_reads() -> None:
    """Its loop reads the descriptors itself, too: what comes at once is read by itself."""
    protocol = sys.modules["asyncio.subprocess"].SubprocessStreamProtocol
    received = protocol.pipe_data_received

    def pipe_data_received(self: Any, descriptor: int, data: bytes) -> None:
        process = self._transport.get_extra_info("subprocess")
        if process._is_read("stdout" if descriptor == 1 else "stderr"):
            look(data.decode("utf-8", "replace"), process._where(f"descriptor {descriptor}"))
        received(self, descriptor, data)

    protocol.pipe_data_received = pipe_data_received


def watch(folder: str) -> None:
    """Read all from now on, and leave what is found in this folder."""
    if _State.folder is None:
        subprocess.Popen = _Popen  # type: ignore[misc]  # in place of it
        logging.Logger.isEnabledFor = _is_always_enabled  # type: ignore[method-assign]  # as above
        logging.Logger.handle = _read_record  # type: ignore[method-assign]  # as above
    _State.folder = folder
