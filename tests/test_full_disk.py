"""A store on a disk that is full: what is accepted is kept in memory, told, and written once there is room.

Two disks: a small tmpfs, which root can mount (and anybody in a namespace of their own), and, everywhere on
Linux, the files of this process held to a length by its limit.
"""

import contextlib
import errno
import json
import os
import queue
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.aio_app import BlockingClient, LoopThread
from tests.app import App
from tests.board import BoardClient, der
from tests.vm import run, stage
from tests.waiting import PATIENCE, wait_until
from twin_device import TwinClient, aio
from twin_device.core.errors import StoreError
from twin_device.hub import Device, LocalHub
from twin_device.store import Kept, Store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tmpfs and prlimit() are Linux's")

_SIZE = 64 << 10  # bytes of the small disk
_MOUNTED = "TWIN_DEVICE_NAMESPACE"  # in the environment of the run in a namespace of its own


class SmallDisk:
    """A tmpfs of a few pages."""

    says = "No space left on device"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, *_processes: int) -> None:
        with self._filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1024)):
                pass
        assert shutil.disk_usage(self.folder).free == 0

    def make_room(self) -> None:
        self._filler.unlink()


class ShortFiles:
    """Any disk: no file may be longer than what is there already."""

    says = "File too large"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._limited: list[int] = []

    def fill(self, *processes: int) -> None:
        self._limited = [os.getpid(), *processes]
        for process in self._limited:
            resource.prlimit(process, resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))

    def make_room(self) -> None:
        for process in self._limited:
            # A board's may have ended.
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        self._limited = []


Disk = SmallDisk | ShortFiles


@pytest.fixture(params=["tmpfs", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "card"
    folder.mkdir()
    if request.param == "limit":
        limited = ShortFiles(folder)
        yield limited
        limited.make_room()
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=PATIENCE)
    except OSError as error:
        pytest.skip(f"nothing can be mounted: {error}")
    if done.returncode:
        pytest.skip(f"nothing can be mounted: {done.stderr.strip()}; see the test in a namespace")
    try:
        yield SmallDisk(folder)
    finally:
        # Lazily: whoever has a file open there does not hold it up.
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=PATIENCE)


def test_who_is_not_root_mounts_in_a_namespace() -> None:
    if os.geteuid() == 0 or os.environ.get(_MOUNTED):
        pytest.skip("root has mounted above")
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        done = subprocess.run([*inside, "true"], capture_output=True, text=True, timeout=PATIENCE)
    except OSError as error:
        pytest.skip(f"no namespaces: {error}")
    if done.returncode:
        pytest.skip(f"no namespaces: {done.stderr.strip()}")
    done = subprocess.run(
        [*inside, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "tmpfs"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, _MOUNTED: "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]


# ---------------------------------------------------------------------- the store by itself


def opened(path: Path) -> Store:
    return Store(path, "hub", "dev")


def test_the_old_file_is_intact_and_the_next_write_brings_all(disk: Disk) -> None:
    path = disk.folder / "twin.json"
    store = opened(path)
    store.keep(lambda: Kept({"n": 1}, {}, []))
    before = path.read_bytes()
    disk.fill()
    for size in (1, 5000, 20_000):
        with pytest.raises(StoreError, match=rf"store {path} cannot be written: {disk.says}"):
            store.keep(lambda size=size: Kept({"n": 2}, {}, [({"x": "y" * size}, None, False)]))  # type: ignore[misc]  # bound at once
        assert path.read_bytes() == before
        assert not Path(f"{path}.new").exists()
    disk.make_room()
    kept = Kept({"n": 2}, {}, [({"x": "y" * 5000}, None, False)])
    store.keep(lambda: kept)
    store.close()
    again = opened(path)
    again.close()
    assert (again.found, again.error) == (kept, None)


def test_what_is_damaged_is_set_aside_on_a_full_disk_too(disk: Disk) -> None:
    path = disk.folder / "twin.json"
    path.write_bytes(b"?")
    Path(f"{path}.lock").touch()
    disk.fill()
    store = opened(path)
    assert "is no store of twin_device; it is now" in str(store.error)
    with pytest.raises(StoreError, match=disk.says):
        store.keep(lambda: Kept({"n": 1}, {}, []))
    disk.make_room()
    store.keep(lambda: Kept({"n": 1}, {}, []))
    store.close()
    assert opened(path).found.desired == {"n": 1}


# ---------------------------------------------------------------------- the clients

MakeApp = Callable[..., App]


@pytest.fixture(params=["threads", "asyncio"])
def make(request: pytest.FixtureRequest, local_hub: LocalHub) -> Iterator[MakeApp]:
    loop = LoopThread() if request.param == "asyncio" else None
    clients: list[Any] = []

    def made(device: Device, store: Path) -> App:
        kind: Any = TwinClient if loop is None else aio.TwinClient
        client = kind.from_connection_string(
            device.connection_string, ca_file=local_hub.ca_file, timeout=PATIENCE, store=store
        )
        clients.append(client if loop is None else BlockingClient(loop, client))
        return App(clients[-1])

    yield made
    for client in clients:
        client.close()
    assert loop is None or loop.close() == set()


def kept(path: Path) -> Any:
    """What a start with this file brings: desired, and what is to be reported."""
    content = json.loads(path.read_bytes())["content"]
    target = dict(content["reported"] or {})
    for report in content["reports"]:
        target.update(report["patch"])
    return content["desired"], target


def told(errors: "queue.SimpleQueue[Exception]") -> list[str]:
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(str(errors.get_nowait()))
    return found


LONG = "x" * 3000  # a page is soon full


def test_what_is_accepted_while_the_disk_is_full_is_told_delivered_and_written_later(
    disk: Disk, make: MakeApp, local_hub: LocalHub, device: Device
) -> None:
    path = disk.folder / "twin.json"
    app = make(device, path)
    app.client.connect()
    app.next_patch()
    assert app.client.report({"a": 1}) == 2
    wait_until(lambda: kept(path) == ({"telemetryInterval": 30}, {"a": 1}), "the first report to be kept")
    before = path.read_bytes()
    local_hub.stop_listening()
    app.await_state("offline")
    disk.fill()
    for n in range(5):
        app.client.report({"a": n, f"k{n}": LONG}, wait=False)
    expected = {"a": 4, **{f"k{n}": LONG for n in range(5)}}
    error = app.next_error()
    assert isinstance(error, StoreError)
    assert str(error) == f"store {path} cannot be written: {disk.says}"
    assert path.read_bytes() == before
    assert not Path(f"{path}.new").exists()
    # The hub is back before there is room: it is told all the same, and so is the app.
    device.patch_desired({"telemetryInterval": 15})
    local_hub.listen_again()
    assert app.next_patch() == {"telemetryInterval": 15}
    device.wait_for(expected, PATIENCE)
    assert app.client.report({"b": 1}) is not None
    assert path.read_bytes() == before
    disk.make_room()
    assert app.client.report({"c": 1}) is not None
    wait_until(
        lambda: kept(path) == ({"telemetryInterval": 15}, {**expected, "b": 1, "c": 1}), "all to be kept"
    )
    # Told once.
    assert told(app.errors) == []
    disk.fill()
    app.client.report({"d": LONG})
    assert disk.says in str(app.next_error())


def test_the_last_write_at_the_end_heals_too(
    disk: Disk, make: MakeApp, local_hub: LocalHub, device: Device
) -> None:
    path = disk.folder / "twin.json"
    app = make(device, path)
    app.client.connect()
    app.next_patch()
    local_hub.stop_listening()
    app.await_state("offline")
    wait_until(path.exists, "the document to be kept")
    disk.fill()
    app.client.report({"a": LONG}, wait=False)
    assert disk.says in str(app.next_error())
    disk.make_room()
    app.client.close()
    assert kept(path) == ({"telemetryInterval": 30}, {"a": LONG})
    local_hub.listen_again()
    again = make(device, path)
    again.client.connect()
    device.wait_for({"a": LONG}, PATIENCE)
    assert told(again.errors) == []


# ---------------------------------------------------------------------- the board's


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage(tmp_path_factory.mktemp("board"))


def board_kept(path: Path) -> Any:
    _, desired, _, reports = json.loads(path.read_text().splitlines()[1])[1:]
    return desired, [report[0] for report in reports]


TOO_LONG = f"""
import os
from twin_device.store import FileStore
store = FileStore("twin.json", 0)
print(store.load("me"))
print(store.keep({{"x": "y" * {_SIZE}}}, None, [], 0))
print(store.keep({{"x": "y" * {_SIZE}}}, None, [], 0))
print(os.listdir())
print(FileStore("twin.json", 0).load("me"))
print(store.keep({{"x": 1}}, None, [], 0))
print(FileStore("twin.json", 0).load("me"))
"""


def test_a_boards_first_write_that_finds_no_room_leaves_nothing(
    disk: Disk, package: Path, tmp_path: Path
) -> None:
    if not isinstance(disk, SmallDisk):
        pytest.skip("a program that ends by itself needs a disk that is small from the start")
    program = tmp_path / "program.py"
    program.write_text(TOO_LONG)
    done = run(program, package, cwd=disk.folder)
    assert done.stdout.splitlines() == [
        "((None, None, None), None)",
        "store twin.json cannot be written: no room is left",
        "None",
        "[]",
        "((None, None, None), None)",
        "None",
        "(({'x': 1}, None, []), None)",
    ], done.stderr


def test_a_boards_flash_that_is_full(
    disk: Disk, local_hub: LocalHub, device: Device, package: Path, tmp_path: Path
) -> None:
    path = disk.folder / "twin.json"

    def start() -> tuple[Any, App]:
        client = BoardClient(
            device.connection_string,
            package,
            ca_file=der(local_hub.ca_file, tmp_path),
            timeout=PATIENCE,
            store=["file", str(path), 0],
        )
        return client, App(client)  # type: ignore[arg-type]  # it has the same face

    client, app = start()
    try:
        client.connect()
        app.next_patch()
        local_hub.stop_listening()
        app.await_state("offline")
        wait_until(path.exists, "the document to be kept")
        before = path.read_bytes()
        disk.fill(client.pid)
        for n in range(5):
            client.report({"a": n, f"k{n}": LONG}, wait=False)
        error = app.next_error()
        assert isinstance(error, StoreError)
        why = "no room is left" if isinstance(disk, SmallDisk) else str(errno.EFBIG)
        assert str(error) == f"store {path} cannot be written: {why}"
        assert path.read_bytes() == before
        assert not Path(f"{path}.new").exists()
        disk.make_room()
        # With no further change.
        wait_until(lambda: path.read_bytes() != before, "the flash to be written")
        assert board_kept(path)[0] == {"telemetryInterval": 30}
        assert told(app.errors) == []
    finally:
        client.kill()
        client.end()
    local_hub.listen_again()
    client, app = start()
    try:
        client.connect()
        device.wait_for({"a": 4, **{f"k{n}": LONG for n in range(5)}}, PATIENCE)
        assert told(app.errors) == []
    finally:
        assert client.end() == 0
