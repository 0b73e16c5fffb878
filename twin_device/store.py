"""What survives a reboot: one client's file, written atomically and only when it changed (rule 7).

The file is one line of JSON: format version, SHA-256 of the rest, and the rest: whose twin it is, the desired
properties that the app was last given, what the hub is known to hold of the reported ones, and the reports
that it has not answered. It holds no key and no token.

    NAME           the document; old or new, whenever the power goes
    NAME.new       the next one while it is written; meaningless at a start
    NAME.lock      locked while a client uses the store; the system unlocks it when the process ends, so it
                   is never stale and never deleted (who deletes it may take it from the next one)
    NAME.corrupt   what was found in place of a document, set aside; the newest only
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from .core.errors import LocalError, StoreError
from .core.patch import merge, same

Document = dict[str, Any]

_MARK = b'{"twin_device_store":'
_WHOLE = _MARK + b'1,"sha256":"%b","content":%b}\n'
_FOUND = re.compile(re.escape(_WHOLE).replace(b"%b", b"([0-9a-f]{64})", 1).replace(b"%b", b"(.*)"), re.DOTALL)
# Far more than the hub's limits let a twin and its queue become; what is larger is not read into memory.
_MAX_FILE = 64 << 20
# Seconds that a caller waits for a write of another one: a dying card can hold fsync() for ever.
_PATIENCE = 30.0


class Kept(NamedTuple):
    """What a store keeps; the documents are shared and never changed.

    desired: what the app was last given. reported: what the hub is known to hold, None before it told.
    reports: the core's `unanswered`.
    """

    desired: Document
    reported: Document | None
    reports: list[tuple[Document, int | None, bool]]


NOTHING = Kept({}, None, [])


class Store:
    """The file of one identity, this client's own until close().

    found: what the file holds, NOTHING without a file. error: a StoreError if it was damaged or no store's,
    and was set aside. LocalError, and nothing was changed: the folder is missing or not writable, another
    client uses the file, or it is the store of another identity.
    """

    def __init__(self, path: str | os.PathLike[str], host: str, client_id: str) -> None:
        try:
            # A link stays a link: what it leads to is replaced.
            self.path = os.path.realpath(os.fspath(path))
        except ValueError as error:
            raise LocalError(f"store: {os.fspath(path)!r} is no path: {error}") from None
        self.found = NOTHING
        self.error: StoreError | None = None
        self._identity = {"host": host, "device": client_id}
        self._written = NOTHING
        self._writing = threading.RLock()
        self._busy = self._again = self._closed = False
        descriptor = self._lock()
        self._unlock = weakref.finalize(self, os.close, descriptor)
        try:
            self._load()
        except BaseException:
            self._unlock()
            raise
        self._written = self.found

    def close(self) -> None:
        """Let another client use the file, once a write that is under way has ended."""
        self._closed = True
        # Too long: whoever writes lets go of the file.
        if self._writing.acquire(timeout=_PATIENCE):
            try:
                if not self._busy:
                    self._unlock()
            finally:
                self._writing.release()

    # ------------------------------------------------------------------ writing

    def keep(self, take: Callable[[], Kept]) -> None:
        """Bring what take() gives to the file, unless that would change nothing. Raises StoreError.

        When it returns, the file says what was true when it was called, or something newer: who calls while
        another thread writes waits, and finds its own change written by a third, or writes those of all who
        wait. Callers hold no lock that take() needs. Closed, it does nothing.
        """
        if not self._writing.acquire(timeout=_PATIENCE):
            raise StoreError(f"store {self.path}: a write has not ended for {_PATIENCE:g} s")
        try:
            if self._closed:
                return
            self._again = True
            # A signal's handler has interrupted this very thread in its write, which goes on after it.
            if self._busy:
                return
            self._busy = True
            try:
                while self._again:
                    self._again = False
                    kept = take()
                    if not _is_unchanged(self._written, kept):
                        self._write(self._encode(kept))
                        self._written = kept
            except OSError as error:
                raise StoreError(f"store {self.path} cannot be written: {error.strerror or error}") from error
            finally:
                self._busy = False
                if self._closed:
                    self._unlock()
        finally:
            self._writing.release()

    def _encode(self, kept: Kept) -> bytes:
        reports = [
            {"patch": patch, "version": version, "alone": alone} for patch, version, alone in kept.reports
        ]
        content: Document = {
            **self._identity,
            "desired": kept.desired,
            "reported": kept.reported,
            "reports": reports,
        }
        body = json.dumps(content, separators=(",", ":")).encode()
        return _WHOLE % (hashlib.sha256(body).hexdigest().encode(), body)

    def _write(self, data: bytes) -> None:
        new = self.path + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(new, flags, 0o600)
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(descriptor, left) :]
                # Before the rename, or after a power cut the new name may lead to an empty file.
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(new, self.path)
        except OSError:
            # A full disk needs the room.
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise
        self._sync_folder()

    def _sync_folder(self) -> None:
        """Make a rename last. Windows has nothing for it."""
        if os.name != "posix":
            return
        descriptor = os.open(os.path.dirname(self.path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some file systems know no fsync of a folder; their renames are as good as they get.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)

    # ------------------------------------------------------------------ at the start

    def _lock(self) -> int:
        """The descriptor that holds the lock. Closing it, or the end of the process, gives it back."""
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise LocalError(f"store {self.path}: there is no folder {folder}")
        # A device or a pipe could hold open() for ever.
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise LocalError(f"store {self.path} is no file")
        try:
            descriptor = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise LocalError(f"store {self.path} cannot be locked: {error.strerror}") from None
        try:
            if not os.access(folder, os.W_OK | os.X_OK):
                raise LocalError(f"store {self.path}: the folder cannot be written")
            _lock_file(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                why = "is used by another client, here or in another process; each needs a file of its own"
            else:
                why = f"cannot be locked: {error.strerror}"
            raise LocalError(f"store {self.path} {why}") from None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _load(self) -> None:
        try:
            with open(self.path, "rb") as file:
                data = file.read(_MAX_FILE + 1)
            identity, found = _decode(data)
        except FileNotFoundError:
            return
        except PermissionError as error:
            raise LocalError(f"store {self.path} cannot be read: {error.strerror}") from None
        except OSError as error:
            self._set_aside(f"cannot be read ({error.strerror})")
        except ValueError as error:
            self._set_aside(str(error))
        else:
            if identity != self._identity:
                theirs = f"{identity['device']} at {identity['host']}"
                ours = f"{self._identity['device']} at {self._identity['host']}"
                raise LocalError(f"store {self.path} belongs to {theirs}, not to {ours}")
            self.found = found

    def _set_aside(self, why: str) -> None:
        aside = self.path + ".corrupt"
        try:
            os.replace(self.path, aside)
            self._sync_folder()
        except OSError as error:
            raise LocalError(
                f"store {self.path} {why}, and cannot be renamed to {aside}: {error.strerror}"
            ) from None
        self.error = StoreError(f"store {self.path} {why}; it is now {aside}, and the client starts without")


def _decode(data: bytes) -> tuple[Document, Kept]:
    """Whose a file is, and what it keeps. ValueError says what is wrong with it."""
    if len(data) > _MAX_FILE:
        raise ValueError("is too large for a store")
    if not data.startswith(_MARK):
        raise ValueError("is no store of twin_device")
    whole = _FOUND.fullmatch(data)
    if whole is None:
        raise ValueError("is damaged, or in the format of another release")
    claimed, body = whole.groups()
    if hashlib.sha256(body).hexdigest().encode() != claimed:
        raise ValueError("is damaged: its checksum is wrong")
    try:
        content = json.loads(body)
        reports = [(report["patch"], report["version"], report["alone"]) for report in content["reports"]]
        kept = Kept(content["desired"], content["reported"], reports)
        identity = {"host": content["host"], "device": content["device"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError("is damaged: it is not what a store writes") from None
    if not _is_sound(kept):
        raise ValueError("is damaged: it is not what a store writes")
    return identity, kept


def _is_sound(kept: Kept) -> bool:
    return (
        isinstance(kept.desired, dict)
        and isinstance(kept.reported, (dict, type(None)))
        and all(
            isinstance(patch, dict) and type(version) in (int, type(None)) and type(alone) is bool
            for patch, version, alone in kept.reports
        )
    )


def _is_unchanged(old: Kept, new: Kept) -> bool:
    """True if a restart from either leads to the same: an answer moves a report into what the hub holds, and
    that is not worth a write."""
    if old.desired is not new.desired and not same(old.desired, new.desired):
        return False
    if old.reported is None or new.reported is None:
        return old.reported is new.reported and _are_same(old.reports, new.reports)
    if any(alone for _, _, alone in old.reports + new.reports) and not _are_same(old.reports, new.reports):
        # Where one stands in the queue says whether it may have been sent.
        return False
    return same(_target(old), _target(new))


def _are_same(
    old: list[tuple[Document, int | None, bool]], new: list[tuple[Document, int | None, bool]]
) -> bool:
    return len(old) == len(new) and all(
        one[1:] == other[1:] and (one[0] is other[0] or same(one[0], other[0]))
        for one, other in zip(old, new, strict=True)
    )


def _target(kept: Kept) -> Document:
    target = kept.reported or {}
    for patch, _, _ in kept.reports:
        target = merge(target, patch)
    return target


if sys.platform == "win32":
    import msvcrt

    def _lock_file(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock_file(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
