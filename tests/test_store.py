"""The store by itself: old or new whenever the power goes, and nothing in its file stops a client."""

import contextlib
import errno
import itertools
import json
import os
import queue
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_mock import MockerFixture

from tests.waiting import PATIENCE
from twin_device import LocalError, TwinError
from twin_device import store as store_module
from twin_device.core.errors import StoreError
from twin_device.store import NOTHING, Kept, Store

HOST, CLIENT = "plant.azure-devices.net", "dev-1"
OLD = Kept({"interval": 30}, {"a": 1}, [])
NEW = Kept({"interval": 5, "é": "\u2028"}, {"a": 1}, [({"b": {"c": [1, 2.5]}, "gone": None}, 7, True)])


def opened(path: Path) -> Store:
    return Store(path, HOST, CLIENT)


def kept_in(path: Path) -> Kept:
    """What a client that starts with this file is given. It must not be damaged."""
    store = opened(path)
    store.close()
    assert store.error is None
    return store.found


def write(path: Path, kept: Kept) -> None:
    store = opened(path)
    store.keep(lambda: kept)
    store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "twin.json"


# ---------------------------------------------------------------------- the file


def test_without_a_file_there_is_nothing_and_none_is_made(path: Path) -> None:
    store = opened(path)
    assert (store.found, store.error) == (NOTHING, None)
    store.keep(lambda: NOTHING)
    assert not path.exists()


def test_what_is_kept_is_found_again(path: Path) -> None:
    write(path, NEW)
    assert kept_in(path) == NEW


def test_the_file_is_one_line_of_json_for_its_owner_only(path: Path) -> None:
    write(path, OLD)
    assert json.loads(path.read_text())["content"] == {
        "host": HOST,
        "device": CLIENT,
        "desired": {"interval": 30},
        "reported": {"a": 1},
        "reports": [],
    }
    assert path.read_bytes().count(b"\n") == 1
    assert sorted(os.listdir(path.parent)) == ["twin.json", "twin.json.lock"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    (tmp_path / "card").mkdir()
    path.symlink_to(tmp_path / "card" / "real.json")
    write(path, OLD)
    assert path.is_symlink()
    assert kept_in(tmp_path / "card" / "real.json") == OLD


QUEUED = Kept({}, {}, [({"a": 1}, None, False), ({"b": 1}, 3, True)])
FIRST = Kept({}, None, [({"a": 1}, None, False)])

# before, after, whether it is worth a write
CHANGES: list[tuple[str, Kept, Kept, bool]] = [
    ("nothing", OLD, Kept({"interval": 30}, {"a": 1}, []), False),
    ("given", OLD, Kept({"interval": 5}, {"a": 1}, []), True),
    ("true for 1", OLD, Kept({"interval": 30}, {"a": True}, []), True),
    ("reported", OLD, Kept({"interval": 30}, {"a": 1}, [({"b": 1}, None, False)]), True),
    ("no change", OLD, Kept({"interval": 30}, {"a": 1}, [({"a": 1}, None, False)]), False),
    ("answered", Kept({}, {"a": 1}, [({"b": 1}, None, False)]), Kept({}, {"a": 1, "b": 1}, []), False),
    ("refused", Kept({}, {"a": 1}, [({"b": 1}, None, False)]), Kept({}, {"a": 1}, []), True),
    ("bound to a version", Kept({}, {"b": 1}, []), Kept({}, {"b": 1}, [({"b": 1}, 3, True)]), True),
    ("answered before one that goes alone", QUEUED, Kept({}, {"a": 1}, [({"b": 1}, 3, True)]), True),
    ("hub not known yet", Kept({}, None, []), Kept({}, {}, []), True),
    ("null, hub not known", Kept({}, None, []), Kept({}, None, [({"a": None}, None, False)]), True),
    ("same, hub not known", FIRST, Kept({}, None, [({"a": 1}, None, False)]), False),
]  # fmt: skip  # a table reads better whole


@pytest.mark.parametrize(
    ("before", "after", "written"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES]
)
def test_only_what_makes_a_difference_after_a_restart_is_written(
    path: Path, before: Kept, after: Kept, written: bool
) -> None:
    write(path, before)
    store = opened(path)
    calls = Calls()
    with calls.watching():
        store.keep(lambda: after)
    store.close()
    assert bool(calls.log) is written


# ---------------------------------------------------------------------- cut at every call


class Cut(BaseException):
    """The power is gone: nothing that follows is performed, no clean-up either."""


class Calls:
    """os, as the store sees it: writes down every call that changes the disk, and fails as it is told."""

    NAMES = ("open", "write", "fsync", "close", "replace", "unlink")

    def __init__(self, fail: Callable[[int, str], None] = lambda number, name: None) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.count = 0
        self._fail = fail
        self._files: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return self._watched(name) if name in self.NAMES else getattr(os, name)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(store_module, "os", self)
            yield

    def _watched(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.count += 1
            self._fail(self.count, name)
            if name == "write":
                # Half of it, as a system may.
                arguments = (arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)])
            result = getattr(os, name)(*arguments)
            if name == "open":
                self._files[result] = str(arguments[0])
                self.log.append(("open", str(arguments[0]), bool(arguments[1] & os.O_CREAT)))
            elif name == "write":
                self.log.append(("write", self._files[arguments[0]], bytes(arguments[1])[:result]))
            elif name in ("fsync", "close"):
                self.log.append((name, self._files[arguments[0]]))
            else:
                self.log.append((name, *map(str, arguments)))
            return result

        return call


def disks_after(log: list[tuple[Any, ...]], before: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
    """Every state in which a power cut after these calls may leave the folder.

    A file's bytes are sure after its fsync, before it any prefix of them may be there. Names that were made,
    moved or removed are sure after the folder's fsync, before it each of them may have happened or not.
    """
    content = dict(enumerate(before.values()))
    sure = dict(content)
    names = {name: number for number, name in enumerate(before)}
    durable = dict(names)
    pending: list[Callable[[dict[str, int]], None]] = []

    def change(do: Callable[[dict[str, int]], None]) -> None:
        do(names)
        pending.append(do)

    def move(old: str, new: str, number: int | None) -> Callable[[dict[str, int]], None]:
        def do(found: dict[str, int]) -> None:
            found.pop(old, None)
            if number is not None:
                found[new] = number

        return do

    for operation, name, *more in log:
        if operation == "open" and more[0]:
            number = len(content)
            content[number] = sure[number] = b""
            change(move(name, name, number))
        elif operation == "write":
            content[names[name]] += more[0]
        elif operation == "fsync" and name in names:
            sure[names[name]] = content[names[name]]
        elif operation == "fsync":
            durable, pending = dict(names), []
        elif operation == "unlink":
            change(move(name, name, None))
        elif operation == "replace":
            change(move(name, more[0], names[name]))
    for happened in itertools.product((False, True), repeat=len(pending)):
        found = dict(durable)
        for do, wanted in zip(pending, happened, strict=True):
            if wanted:
                do(found)
        unsure = [number for number in found.values() if sure[number] != content[number]]
        for shares in itertools.product((0, 1, 2), repeat=len(unsure)):
            state = {name: content[number] for name, number in found.items()}
            for number, share in zip(unsure, shares, strict=True):
                extent = len(sure[number]) + (len(content[number]) - len(sure[number])) * share // 2
                for name in found:
                    if found[name] == number:
                        state[name] = content[number][:extent]
            yield state


@pytest.mark.skipif(os.name != "posix", reason="the calls of POSIX")
@pytest.mark.parametrize("remains", [False, True], ids=["clean", "after an earlier cut"])
def test_a_power_cut_after_any_call_leaves_the_old_or_the_new(
    path: Path, tmp_path: Path, remains: bool
) -> None:
    write(path, OLD)
    before = {str(path): path.read_bytes()}
    if remains:
        Path(f"{path}.new").write_bytes(b"half of som")
        before[f"{path}.new"] = b"half of som"
    store = opened(path)
    calls = Calls()
    with calls.watching():
        store.keep(lambda: NEW)
    store.close()
    folder = tmp_path / "after"
    folder.mkdir()
    seen = []
    for done in range(len(calls.log) + 1):
        for state in disks_after(calls.log[:done], before):
            for old in folder.iterdir():
                old.unlink()
            for name, data in state.items():
                (folder / Path(name).name).write_bytes(data)
            found = kept_in(folder / path.name)
            assert found in (OLD, NEW)
            seen.append((done, found))
    assert {found == OLD for done, found in seen if done == 0} == {True}
    # keep() has returned: only the new one will do.
    assert {found == NEW for done, found in seen if done == len(calls.log)} == {True}
    assert len(seen) > 2 * len(calls.log)


def calls_of_a_save(folder: Path) -> int:
    folder.mkdir()
    write(folder / "twin.json", OLD)
    store = opened(folder / "twin.json")
    calls = Calls()
    with calls.watching():
        store.keep(lambda: NEW)
    store.close()
    return calls.count


@pytest.mark.parametrize("gone", [True, False], ids=["power", "error"])
def test_a_failure_of_any_call_leaves_the_old_or_the_new(tmp_path: Path, gone: bool) -> None:
    total = calls_of_a_save(tmp_path / "counted")
    assert total >= 10
    for number in range(1, total + 1):

        def fail(count: int, name: str, number: int = number) -> None:
            if gone and count >= number:
                raise Cut
            if count == number and name != "close":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        path = tmp_path / str(number) / "twin.json"
        path.parent.mkdir()
        write(path, OLD)
        store = opened(path)
        with Calls(fail).watching():
            try:
                store.keep(lambda: NEW)
            except Cut:
                assert gone
            except StoreError as error:
                assert not gone
                assert f"{path} cannot be written: No space left on device" in str(error)  # noqa: PT017  # one of three outcomes
                assert not Path(f"{path}.new").exists()
        store.close()
        assert kept_in(path) in (OLD, NEW)
        # The next change is written as if nothing had been.
        write(path, Kept({"next": number}, None, []))
        assert kept_in(path) == Kept({"next": number}, None, [])


def test_the_next_call_writes_what_a_full_disk_refused(path: Path) -> None:
    store = opened(path)

    def full(_count: int, name: str) -> None:
        if name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Calls(full).watching(), pytest.raises(StoreError):
        store.keep(lambda: NEW)
    store.keep(lambda: NEW)
    store.close()
    assert kept_in(path) == NEW


PROGRAM = """
import itertools, sys
from twin_device.store import Kept, Store
store = Store(sys.argv[1], "h", "d")
for number in itertools.count(store.found.desired.get("n", 0) + 1):
    store.keep(lambda: Kept({"n": number, "filler": "x" * (number * 777 % 20000)}, None, []))
    print(number, flush=True)
"""


def test_kill_9_in_the_middle_of_many_saves_loses_at_most_the_one_under_way(path: Path) -> None:
    last = 0
    for saves in (1, 2, 3, 7, 20, 33, 60):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(saves):
                assert process.stdout.readline()
            process.kill()
            told = [int(line) for line in process.stdout.read().splitlines() if line]
        last = told[-1] if told else last + saves
        # The lock went with the process; what it had said was kept is there, or the one after it.
        store = Store(path, "h", "d")
        store.close()
        assert store.error is None
        assert last <= store.found.desired["n"] <= last + 1
        last = store.found.desired["n"]


# ---------------------------------------------------------------------- any document, any file

LEAVES = (
    st.integers(-(2**52), 2**52 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.text(max_size=20)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
)
DOCUMENTS = st.dictionaries(st.text(max_size=9), VALUES, max_size=5)
PATCHES = st.dictionaries(st.text(max_size=9), VALUES | st.none(), max_size=5)
KEPT = st.builds(
    Kept,
    DOCUMENTS,
    st.none() | DOCUMENTS,
    st.lists(st.tuples(PATCHES, st.none() | st.integers(1, 2**40), st.booleans()), max_size=4),
)


@settings(deadline=None, max_examples=150)
@given(kept=KEPT)
def test_any_document_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, kept: Kept) -> None:
    path = tmp_path_factory.mktemp("store") / "twin.json"
    store = opened(path)
    store.keep(lambda: kept)
    assert Path(path).exists() is not (kept == NOTHING)
    store.close()
    # repr tells 1 from 1.0 and True.
    assert repr(kept_in(path)) == repr(kept)


def encoded(kept: Kept) -> bytes:
    store = Store.__new__(Store)  # no file, no lock
    store._identity = {"host": HOST, "device": CLIENT}
    return store._encode(kept)


WHOLE = encoded(NEW)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(WHOLE)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "flip", "put", "zero"]))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "put":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        else:
            data[at:] = bytes(len(data) - at)
    return bytes(data)


@settings(deadline=None, max_examples=300)
@given(data=damaged() | st.binary(max_size=60))
def test_a_damaged_file_is_read_right_or_set_aside(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("store") / "twin.json"
    path.write_bytes(data)
    store = opened(path)
    if data == WHOLE:
        assert (store.found, store.error) == (NEW, None)
    else:
        assert store.found == NOTHING
        assert str(path) in str(store.error)
        assert Path(f"{path}.corrupt").read_bytes() == data
        assert not path.exists()
    store.keep(lambda: OLD)
    store.close()
    assert kept_in(path) == OLD


def signed(content: object) -> bytes:
    """A file whose checksum is right, whatever it says."""
    body = json.dumps(content).encode()
    return store_module._WHOLE % (store_module.hashlib.sha256(body).hexdigest().encode(), body)


SOUND: dict[str, Any] = {"host": HOST, "device": CLIENT, "desired": {}, "reported": None, "reports": []}

# what the file says, why it is set aside
UNSOUND: list[tuple[str, bytes, str]] = [
    ("empty", b"", "is no store of twin_device"),
    ("a picture", b"\x89PNG\r\n\x1a\n", "is no store of twin_device"),
    ("the app's own", b'{"interval": 30}', "is no store of twin_device"),
    ("a later format", WHOLE.replace(b"1,", b"2,", 1), "is damaged, or in the format of another release"),
    ("cut", WHOLE[:-1], "is damaged, or in the format of another release"),
    ("edited", WHOLE.replace(b"2.5", b"3.5"), "is damaged: its checksum is wrong"),
    ("a list", signed([]), "is damaged: it is not what a store writes"),
    ("a member missing", signed({"host": HOST}), "is damaged: it is not what a store writes"),
    ("desired no object", signed({**SOUND, "desired": []}), "is damaged: it is not what a store writes"),
    ("reported no object", signed({**SOUND, "reported": 1}), "is damaged: it is not what a store writes"),
    ("reports no list", signed({**SOUND, "reports": 1}), "is damaged: it is not what a store writes"),
    (
        "a report no patch",
        signed({**SOUND, "reports": [{"patch": 1, "version": None, "alone": False}]}),
        "is damaged: it is not what a store writes",
    ),
]


@pytest.mark.parametrize(("data", "why"), [row[1:] for row in UNSOUND], ids=[row[0] for row in UNSOUND])
def test_a_file_that_is_no_store_is_named_and_set_aside(path: Path, data: bytes, why: str) -> None:
    path.write_bytes(data)
    aside = Path(f"{path}.corrupt")
    aside.write_text("an earlier one")
    store = opened(path)
    assert str(store.error) == f"store {path} {why}; it is now {aside}, and the client starts without"
    assert isinstance(store.error, TwinError)
    assert store.found == NOTHING
    assert aside.read_bytes() == data
    store.close()
    # Told once: the next start finds no file.
    assert kept_in(path) == NOTHING


def test_a_file_without_end_is_not_read_into_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_MAX_FILE", 100)
    path.write_bytes(WHOLE)
    store = opened(path)
    store.close()
    assert "is too large for a store" in str(store.error)


def test_a_file_that_the_disk_no_longer_gives_is_set_aside(path: Path, mocker: MockerFixture) -> None:
    path.write_bytes(WHOLE)
    failing = mocker.patch("builtins.open", side_effect=OSError(errno.EIO, "Input/output error"))
    store = opened(path)
    mocker.stop(failing)
    store.close()
    assert "cannot be read (Input/output error)" in str(store.error)
    assert Path(f"{path}.corrupt").exists()


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(("host", "client"), [("other.azure-devices.net", CLIENT), (HOST, "dev-1/module")])
def test_the_store_of_another_identity_is_refused_and_left_alone(path: Path, host: str, client: str) -> None:
    write(path, OLD)
    data = path.read_bytes()
    with pytest.raises(
        LocalError, match=rf"twin\.json belongs to dev-1 at {HOST}, not to {client} at {host}"
    ):
        Store(path, host, client)
    assert path.read_bytes() == data
    # Whose it is can use it: the refusal has let go of it.
    assert kept_in(path) == OLD


def test_two_clients_cannot_use_one_file(path: Path) -> None:
    first = opened(path)
    with pytest.raises(LocalError, match=r"twin\.json is used by another client"):
        opened(path)
    first.keep(lambda: OLD)
    first.close()
    assert kept_in(path) == OLD


def test_another_process_cannot_use_it_either(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            with pytest.raises(LocalError, match="is used by another client"):
                Store(path, "h", "d")
        finally:
            process.kill()
            process.stdout.read()


def test_a_store_that_nobody_holds_any_more_is_free(path: Path) -> None:
    store = opened(path)
    del store
    assert kept_in(path) == NOTHING


def test_a_closed_store_writes_nothing(path: Path) -> None:
    store = opened(path)
    store.close()
    store.keep(lambda: OLD)
    assert not path.exists()


def place(tmp_path: Path, kind: str) -> str:
    (tmp_path / "file").write_text("")
    if kind == "a pipe":
        os.mkfifo(tmp_path / "pipe")
    return {
        "no folder": str(tmp_path / "nowhere" / "twin.json"),
        "under a file": str(tmp_path / "file" / "twin.json"),
        "a folder": str(tmp_path),
        "a pipe": str(tmp_path / "pipe"),
        "a null": "twin\0.json",
    }[kind]


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no folder", "there is no folder .*nowhere"),
        ("under a file", "there is no folder .*file"),
        ("a folder", "is no file"),
        ("a pipe", "is no file"),
        ("a null", "is no path"),
    ],
)
def test_a_place_where_no_file_can_be_is_refused_at_once(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(LocalError, match=message):
        Store(place(tmp_path, kind), HOST, CLIENT)
    assert not list(tmp_path.glob("*.lock"))


# the call that the system refuses, the error, what is said
REFUSED: list[tuple[str, Any, str]] = [
    ("open", OSError(errno.EROFS, "Read-only file system"), "cannot be locked: Read-only file system"),
    ("access", False, "the folder cannot be written"),
]


@pytest.mark.parametrize(("call", "refusal", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_folder_that_cannot_be_written_is_refused_at_once(
    path: Path, mocker: MockerFixture, call: str, refusal: Any, message: str
) -> None:
    how = {"side_effect": refusal} if isinstance(refusal, OSError) else {"return_value": refusal}
    refusing = mocker.patch.object(store_module.os, call, **how)
    with pytest.raises(LocalError, match=rf"{path}.* {message}"):
        opened(path)
    mocker.stop(refusing)
    opened(path).close()


def test_a_file_that_may_not_be_read_is_refused_not_set_aside(path: Path, mocker: MockerFixture) -> None:
    path.write_bytes(WHOLE)
    failing = mocker.patch("builtins.open", side_effect=PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(LocalError, match="cannot be read: Permission denied"):
        opened(path)
    mocker.stop(failing)
    assert kept_in(path) == NEW


def test_a_damaged_file_that_cannot_be_set_aside_is_refused(path: Path, mocker: MockerFixture) -> None:
    path.write_bytes(b"?")
    mocker.patch.object(store_module.os, "replace", side_effect=OSError(errno.EPERM, "not permitted"))
    with pytest.raises(
        LocalError, match=r"is no store of twin_device, and cannot be renamed .*: not permitted"
    ):
        opened(path)


def test_a_system_without_locks_is_told_apart_from_another_client(path: Path, mocker: MockerFixture) -> None:
    mocker.patch.object(store_module, "_lock_file", side_effect=OSError(errno.ENOLCK, "No locks available"))
    with pytest.raises(LocalError, match="cannot be locked: No locks available"):
        opened(path)


# ---------------------------------------------------------------------- several threads


class Gate:
    """A disk whose first fsync waits until it is let go."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.writes = 0

    def __call__(self, _count: int, name: str) -> None:
        if name == "replace":
            self.writes += 1
        if name == "fsync" and not self.reached.is_set():
            self.reached.set()
            assert self.open.wait(PATIENCE)


def test_callers_who_wait_for_a_write_share_the_next_one(path: Path) -> None:
    store = opened(path)
    gate = Gate()
    reported: dict[str, Any] = {"first": 1}
    errors: queue.SimpleQueue[object] = queue.SimpleQueue()
    arrived = threading.Semaphore(0)

    def caller(number: int) -> None:
        reported[f"k{number}"] = number
        arrived.release()
        store.keep(lambda: Kept({}, dict(reported), []))
        # The promise: on return the file has it.
        content = json.loads(path.read_bytes())["content"]
        errors.put(None if content["reported"].get(f"k{number}") == number else number)

    with Calls(gate).watching():
        first = threading.Thread(target=store.keep, args=(lambda: Kept({}, dict(reported), []),))
        first.start()
        assert gate.reached.wait(PATIENCE)
        callers = [threading.Thread(target=caller, args=(number,)) for number in range(50)]
        for thread in callers:
            thread.start()
        for _ in callers:
            assert arrived.acquire(timeout=PATIENCE)
        gate.open.set()
        for thread in [first, *callers]:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    assert [errors.get(timeout=PATIENCE) for _ in callers] == [None] * 50
    assert gate.writes == 2
    store.close()


def test_a_write_that_hangs_does_not_hold_the_others_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_PATIENCE", 0.05)
    store = opened(path)
    gate = Gate()
    with Calls(gate).watching():
        first = threading.Thread(target=store.keep, args=(lambda: OLD,))
        first.start()
        assert gate.reached.wait(PATIENCE)
        with pytest.raises(StoreError, match=r"a write has not ended for 0\.05 s"):
            store.keep(lambda: NEW)
        gate.open.set()
        first.join(PATIENCE)
    store.keep(lambda: NEW)
    store.close()
    assert kept_in(path) == NEW


def test_a_signals_handler_in_the_middle_of_a_write_is_written_after_it(path: Path) -> None:
    store = opened(path)
    now = [OLD]

    def interrupt(_count: int, name: str) -> None:
        if name == "fsync" and now[0] is OLD:
            now[0] = NEW
            store.keep(lambda: now[0])

    with Calls(interrupt).watching():
        store.keep(lambda: now[0])
    store.close()
    assert kept_in(path) == NEW


def test_a_signals_handler_may_close_the_store_too(path: Path) -> None:
    store = opened(path)
    now = [OLD]

    def interrupt(_count: int, name: str) -> None:
        if name == "fsync" and now[0] is OLD:
            now[0] = NEW
            store.keep(lambda: now[0])
            store.close()
            with pytest.raises(LocalError, match="is used by another client"):
                opened(path)

    with Calls(interrupt).watching():
        store.keep(lambda: now[0])
    assert kept_in(path) == NEW


@pytest.mark.parametrize("patience", [PATIENCE, 0.05])
def test_a_closed_store_is_free_once_its_last_write_has_ended(
    path: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    monkeypatch.setattr(store_module, "_PATIENCE", patience)
    store = opened(path)
    gate = Gate()
    with Calls(gate).watching():
        first = threading.Thread(target=store.keep, args=(lambda: OLD,))
        first.start()
        assert gate.reached.wait(PATIENCE)
        closing = threading.Thread(target=store.close)
        closing.start()
        if patience < 1:
            closing.join(PATIENCE)
        with pytest.raises(LocalError, match="is used by another client"):
            opened(path)
        gate.open.set()
        for thread in (first, closing):
            thread.join(PATIENCE)
            assert not thread.is_alive()
    assert kept_in(path) == OLD
