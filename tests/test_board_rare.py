"""What the package of `make mpy` reads from the flash when it is wanted: where there is no memory for it the
first time, nothing is lost, and the next time it is there.

Every such module fails once here, when all but the last line of it has run.
"""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.app import App
from tests.board import BoardClient, der
from tests.test_faults import ROWS, TIMEOUT, Row, settle
from tests.vm import ROOT, run
from tests.waiting import PATIENCE, wait_until
from twin_device import ConnectRefused, PatchError, ReportRejected
from twin_device.hub import Device, LocalHub

TRAP = """
import os
os.rename({whole!r}, {path!r})
raise MemoryError
"""


@pytest.fixture(scope="module")
def builder() -> Any:
    spec = importlib.util.spec_from_file_location("build", ROOT / "micropython" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(builder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rare")
    builder.build(folder)
    return folder


@pytest.fixture
def trapped(builder: Any, built: Path, tmp_path: Path) -> Path:
    """A package of which every rare module fails at first."""
    folder = tmp_path / "package"
    shutil.copytree(built, folder)
    for name in builder.RARE:
        path = folder / "twin_device" / f"{name}.py"
        whole = path.with_suffix(".whole")
        path.rename(whole)
        path.write_text(whole.read_text("utf-8") + TRAP.format(whole=str(whole), path=str(path)))
    return folder


def left(folder: Path) -> set[str]:
    """The modules that were not wanted yet."""
    return {path.stem for path in folder.rglob("*.whole")}


class Patient(BoardClient):
    """Asks again for what there was no memory for."""

    def ask(self, call: str, **options: Any) -> Any:
        while True:
            try:
                return super().ask(call, **options)
            except MemoryError:
                continue


@pytest.fixture
def make_app(local_hub: LocalHub, trapped: Path, tmp_path: Path) -> Iterator[Callable[..., App]]:
    ca_file = der(local_hub.ca_file, tmp_path)
    clients: list[BoardClient] = []

    def make(device: Device, **options: Any) -> App:
        # The connection string is taken apart before anybody could be told of an error.
        (trapped / "twin_device" / "identity.whole").replace(trapped / "twin_device" / "identity.py")
        options = {"ca_file": ca_file, "timeout": TIMEOUT, "keep_reported": True, **options}
        client: Any = Patient(device.connection_string, trapped, **options)
        clients.append(client)
        return App(client)

    yield make
    for client in clients:
        client.close()
        assert client.end() == 0


KINDS = ("answer_status", "answer_lost", "notification_lost", "notification_reordered", "connack_refused")
CASES = [row for row in ROWS if row.fault["kind"] in KINDS]


@pytest.mark.parametrize("row", CASES, ids=str)
def test_what_goes_wrong_is_put_right(
    row: Row, local_hub: LocalHub, device: Device, trapped: Path, make_app: Callable[..., App]
) -> None:
    app = make_app(device)
    app.client.connect(timeout=PATIENCE)
    app.next_patch()
    before = left(trapped)
    fault = local_hub.fault(**row.fault)
    row.act(app, device)
    wait_until(lambda: fault.hits >= 1, "it has gone wrong")
    fault.clear()
    settle(app, device)
    assert before - left(trapped)


def test_a_refused_report_is_told(local_hub: LocalHub, device: Device, make_app: Callable[..., App]) -> None:
    app = make_app(device)
    app.client.connect(timeout=PATIENCE)
    local_hub.fault("answer_status", operation="report", status=400, times=3)
    with pytest.raises(ReportRejected):
        app.client.report({"bad": 1}, timeout=PATIENCE)
    settle(app, device)


def test_who_is_refused_is_told(local_hub: LocalHub, device: Device, make_app: Callable[..., App]) -> None:
    fault = local_hub.fault("connack_refused", code=5)
    app = make_app(device)
    with pytest.raises(ConnectRefused, match="credentials"):
        app.client.connect(timeout=PATIENCE)
    fault.clear()
    app.client.connect(timeout=PATIENCE)
    settle(app, device)


def test_an_invalid_patch_is_named(device: Device, make_app: Callable[..., App]) -> None:
    app = make_app(device)
    app.client.connect(timeout=PATIENCE)
    with pytest.raises(PatchError, match=r"a\.b c: a key has no"):
        app.client.report({"a": {"b c": 1}})
    settle(app, device)


PROGRAM = """
import sys
import twin_device
from twin_device import TwinClient

def attempt(call):
    try:
        print(call())
    except Exception as error:
        print(type(error).__name__, error)

text = "HostName=h;DeviceId=d+;SharedAccessKey=a2V5"
attempt(lambda: TwinClient.from_connection_string(text, tls=False).state)
attempt(lambda: TwinClient.from_connection_string(text, tls=False).state)
attempt(lambda: TwinClient.from_connection_string(text, tls=False).state)
for _ in range(3):
    attempt(lambda: TwinClient.from_connection_string(text[:-4], tls=False))
for _ in range(2):
    attempt(lambda: TwinClient.from_connection_string(text, tls=False, keep_alive=0))
print(hasattr(twin_device, "nothing"), hasattr(TwinClient, "nothing"))
client = TwinClient.from_connection_string(text, tls=False)
print(hasattr(client, "nothing"), client.statistics["connects"], client.desired)
class Mine(TwinClient):
    pass
class Own(Mine):
    pass
print(Mine.from_connection_string(text, tls=False).state, Own.from_connection_string(text, tls=False).state)
print(sorted(name for name in sys.modules if name.startswith("twin_device")))
from twin_device import *
print(ReportRejected is twin_device.ReportRejected, issubclass(PatchError, LocalError))
"""


def test_an_app_finds_it_the_next_time(trapped: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run(tmp_path / "program.py", trapped)
    assert done.stdout.splitlines() == [
        "MemoryError ",  # what reads an id with a plus
        "MemoryError ",  # what tells the state
        "offline",
        "MemoryError ",  # the errors
        *["LocalError SharedAccessKey is empty in the connection string"] * 2,
        "MemoryError ",  # the words
        "LocalError keep_alive is from 1 to 1177 seconds",
        "False False",
        "False 0 {}",
        "offline offline",
        "['twin_device', 'twin_device.errors', 'twin_device.face']",
        "True True",
    ], done.stderr


UNHEARD = """
import asyncio
import os
from twin_device import TwinClient

client = None
while client is None:
    try:
        client = TwinClient.from_connection_string(os.getenv("DEVICE"), ca_file=os.getenv("CA"))
    except MemoryError:
        pass

@client.on_state
def state(old, new):
    raise ValueError(new)

if os.getenv("BAD"):
    @client.on_error
    def bad(error):
        raise ValueError("bad")

async def attempt(call):
    while True:
        try:
            return await call()
        except MemoryError:
            pass

async def main():
    await attempt(client.connect)
    await attempt(client.close)

asyncio.run(main())
"""


@pytest.mark.parametrize("bad", ["", "1"])
def test_an_error_that_nobody_handles_is_printed_and_handlers_go_on(
    local_hub: LocalHub, device: Device, trapped: Path, tmp_path: Path, bad: str
) -> None:
    (tmp_path / "program.py").write_text(UNHEARD)
    environment = {"DEVICE": device.connection_string, "CA": der(local_hub.ca_file, tmp_path), "BAD": bad}
    done = run(tmp_path / "program.py", trapped, **environment)
    # For the first one there was no memory.
    said = [f"twin_device: {state}" for state in ("retrieving", "synchronised", "offline")]
    if bad:
        said = ["twin_device: an error handler raised ValueError('bad',)"] * 3
    assert done.stdout.splitlines() == said, done.stderr
