"""What survives a reboot, on a board's flash: written whole or not at all, only when it changed, and seldom.

The document is 8 hexadecimal digits (CRC-32 of the rest), a line feed, and a JSON array: format version,
whose twin it is, the desired properties that the app was last given, the reported ones that the hub is known
to hold (null if they are not kept), and the reports that it has not answered, each [patch, version, alone].
It holds no key.
"""

import binascii
import io
import json
import os

from .core.errors import StoreError

const = int  # MicroPython's compiler puts the numbers in place of the names

_FORMAT = const(1)
_HEAD = const(9)  # bytes before the JSON
_ENOSPC = const(28)  # MicroPython has no words for it
_NOTHING = (None, None, None)


class FileStore:
    """A store in a file; `path` is old or new whenever the power goes. `path`.new is only read where there is
    no `path`: FAT cannot replace a file, so the power may go when the old one is away.

    seconds: a change is written so long after the last write at the earliest, since flash wears: 60 is half
    a million writes a year at the most. What the app reports just before a power cut may be lost so; 0
    writes every change at once.
    """

    def __init__(self, path: str, seconds: float = 60) -> None:
        self._path = path
        self._pause = int(seconds * 1000)
        self._due = None  # milliseconds; None: at once
        self._kept = None
        self._sum = None  # of what is written
        self._failed = False

    def load(self, identity: str) -> "tuple[tuple[object, object, object], StoreError | None]":
        """(desired, reported, reports) of an earlier run, None for each that is not there; and an error if
        what was found is damaged or another identity's: it is set aside then."""
        self._identity = identity
        try:
            found = self._read()
        except (ValueError, OSError, IndexError) as error:
            return _NOTHING, self._set_aside(str(error) or "damaged")
        if found is None:
            return _NOTHING, None
        if not isinstance(found, list) or len(found) != 5 or found[0] != _FORMAT:
            return _NOTHING, self._set_aside("it is of another format")
        if found[1] != identity:
            return _NOTHING, self._set_aside("it is another identity's")
        return (found[2], found[3], [tuple(report) for report in found[4]]), None

    def keep(
        self, desired: object, reported: object, reports: "list[object]", now: int, at_once: bool = False
    ) -> "StoreError | None":
        """Bring this to the flash if it is new and its time has come. now: milliseconds that only go forward.

        Returns an error once when writing fails; it is tried again as often, without a further change, too.
        """
        kept = self._kept
        if (
            kept is not None
            and kept[0] is desired
            and kept[1] is reported
            and len(kept[2]) == len(reports)
            and not [1 for at, report in enumerate(reports) if kept[2][at][0] is not report[0]]
        ):
            return None
        if not at_once and self._due is not None and now < self._due:
            return None
        self._due = now + self._pause
        self._kept = desired, reported, reports
        document = [_FORMAT, self._identity, desired, reported, reports]
        try:
            # Nothing is written while the sum is made.
            total = _Sum(None)
            json.dump(document, total)
            if total.sum != self._sum:
                self._write(document, total.sum)
                self._sum = total.sum
            self._failed = False
        except (OSError, MemoryError) as error:
            # It is tried again without a change.
            self._kept = None
            if not self._failed:
                self._failed = True
                why = "no room is left" if getattr(error, "errno", 0) == _ENOSPC else str(error)
                return StoreError("store " + self._path + " cannot be written: " + why)
        return None

    def _write(self, document: object, total: int) -> None:
        new = self._path + ".new"
        try:
            with open(new, "wb") as file:
                file.write(b"%08x\n" % total)
                json.dump(document, _Sum(file))
                file.flush()
        except (OSError, MemoryError) as error:
            # A full flash needs the room, and load() must not find it where there is no document yet.
            try:
                os.remove(new)
            except OSError:
                pass
            raise error
        if hasattr(os, "sync"):
            os.sync()
        try:
            os.rename(new, self._path)
        except OSError:
            # FAT.
            os.remove(self._path)
            os.rename(new, self._path)

    def _read(self) -> object:
        path = self._path
        try:
            os.stat(path)
        except OSError:
            path += ".new"
            try:
                os.stat(path)
            except OSError:
                return None
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            total = 0
            while True:
                data = file.read(256)
                if not data:
                    break
                total = binascii.crc32(data, total)
            if head != b"%08x\n" % total:
                if path != self._path:
                    # The very first write was cut: nothing had been kept.
                    return None
                raise ValueError("it is damaged")
            self._sum = total
            file.seek(_HEAD)
            return json.load(file)

    def _set_aside(self, why: str) -> StoreError:
        self._sum = None
        for end in ("", ".new"):
            try:
                os.rename(self._path + end, self._path + ".corrupt")
                break
            except OSError:
                pass
        return StoreError("store " + self._path + " was set aside: " + why)


class NvsStore(FileStore):
    """A store in an ESP32's NVS, for twins of up to a few kilobytes. namespace: at most 15 characters."""

    def __init__(self, namespace: str = "twin", seconds: float = 60) -> None:
        super().__init__("nvs:" + namespace, seconds)
        import esp32

        self._nvs = esp32.NVS(namespace)

    def _write(self, document: object, total: int) -> None:
        data = b"%08x\n" % total + json.dumps(document).encode()
        if len(data) > self._size():
            # First: a cut between the two must not leave a blob that nobody has room for.
            self._nvs.set_i32("size", len(data))
        self._nvs.set_blob("twin", data)
        self._nvs.commit()

    def _size(self) -> int:
        try:
            return self._nvs.get_i32("size")
        except OSError:
            return 0

    def _read(self) -> object:
        data = bytearray(self._size())
        if not data:
            return None
        try:
            data = data[: self._nvs.get_blob("twin", data)]
        except OSError:
            return None
        total = binascii.crc32(data[_HEAD:])
        if data[:_HEAD] != b"%08x\n" % total:
            raise ValueError("it is damaged")
        self._sum = total
        return json.loads(data[_HEAD:])

    def _set_aside(self, why: str) -> StoreError:
        self._sum = None
        return StoreError("store " + self._path + " is not used: " + why)


class _Sum(io.IOBase):
    """Adds up what is written to it, and hands it on."""

    def __init__(self, file: object) -> None:
        self.sum = 0
        self._file = file

    def write(self, data: object) -> int:
        self.sum = binascii.crc32(data, self.sum)
        if self._file is not None:
            self._file.write(data)
        return len(data)
