"""What only boards have: their client on a real MicroPython, against the local hub. None ran on a board."""

import contextlib
import datetime
import functools
import itertools
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.app import App
from tests.board import BoardClient, der
from tests.hostile import KEY, HostileHub, publish
from tests.vm import ROOT, build, micropython, run, stage
from tests.waiting import PATIENCE, wait_until
from twin_device import ConnectRefused, LocalError, NotConnected, ReportRejected, ReportTimeout
from twin_device.hub import Device, LocalHub

Make = Callable[..., BoardClient]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage(tmp_path_factory.mktemp("board"))


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(mqtt_port=0) as hub:
        yield hub


@pytest.fixture
def device(hub: LocalHub) -> Device:
    return hub.create_device("dev", desired={"telemetryInterval": 30, "led": True, "deep": {"a": {"b": 1}}})


@pytest.fixture
def make(package: Path, tmp_path: Path, hub: LocalHub) -> Iterator[Make]:
    """make(text, **options): a client that is not connected yet, over TLS unless tls=False."""
    made: list[BoardClient] = []

    def make(text: str, **options: Any) -> BoardClient:
        if options.get("tls", True) and "ca_file" not in options:
            options["ca_file"] = der(hub.ca_file, tmp_path)
        made.append(BoardClient(text, package, **{"timeout": PATIENCE, **options}))
        return made[-1]

    yield make
    for client in made:
        client.end()
        assert [line for line in client.other if "Traceback" in line] == []


# ---------------------------------------------------------------------- TLS and the clock


def issued(authority: trustme.CA, folder: Path, name: str, **options: Any) -> Path:
    folder.mkdir()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    authority.issue_cert(name, **options).private_key_and_cert_chain_pem.write_to_path(
        str(folder / "server.pem")
    )
    return folder


UNTRUSTED = {
    "another CA": "no CA in ca_file has signed it",
    "another name": "it is another host's",
    "expired": "it has expired",
}


@pytest.mark.parametrize("why", UNTRUSTED)
def test_a_certificate_that_is_not_to_be_trusted(make: Make, tmp_path: Path, why: str) -> None:
    authority = trustme.CA()
    options: dict[str, Any] = {}
    if why == "expired":
        options = {"not_after": datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)}
    name = "elsewhere.example" if why == "another name" else "localhost"
    folder = issued(authority, tmp_path / "certificates", name, **options)
    with LocalHub(certificates=folder) as hub:
        device = hub.create_device("dev")
        if why == "another CA":
            trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
            ca_file = der(str(tmp_path / "other.pem"), tmp_path)
        else:
            ca_file = der(hub.ca_file, tmp_path)
        client = make(device.connection_string, ca_file=ca_file)
        app = App(client)  # type: ignore[arg-type]  # it has the same face
        with pytest.raises(ConnectRefused, match="certificate of localhost is not to be trusted: ") as raised:
            client.connect()
        assert str(raised.value).endswith(UNTRUSTED[why])
        assert not raised.value.can_retry
        # Once more, and not waited for: it is told, and tried again slowly, not hot.
        client.connect(wait=False)
        assert str(app.next_error()) == str(raised.value)
        with pytest.raises(ReportTimeout):
            client.report({"a": 1}, timeout=1.5)
        assert app.errors.empty()
        assert device.connections == 0


@pytest.mark.parametrize(("year", "epoch"), [(1970, 1970), (2000, 2000), (2021, 1970), (2025, 2000)])
def test_a_clock_that_is_unset_is_named(make: Make, device: Device, year: int, epoch: int) -> None:
    client = make(device.connection_string, clock={"year": year, "epoch": epoch})
    with pytest.raises(ConnectRefused, match=f"clock is not set, it says {year}, before") as raised:
        client.connect()
    assert not raised.value.can_retry
    assert device.connections == 0


@pytest.mark.parametrize("clock", [{"epoch": 1970}, {"epoch": 2000}, {"epoch": 2000, "ticks": 400}])
def test_both_epochs_and_ticks_that_start_over(make: Make, device: Device, clock: dict[str, int]) -> None:
    client = make(device.connection_string, clock=clock)
    with client:
        client.report({"a": 1})
        # ticks_ms has started over by the second one.
        device.disconnect()
        wait_until(lambda: device.connections == 2, "it is back")
        with pytest.raises(ReportTimeout):
            client.report({"a": 2}, timeout=0) if device.disconnect() is None else None
        device.wait_for({"a": 2}, PATIENCE)
    assert client.statistics["connects"] >= 2


@pytest.mark.parametrize(
    ("content", "message"), [(None, "ca.crt cannot be read"), (b"none", "holds no certificate")]
)
def test_a_bad_ca_file_is_named(
    make: Make, device: Device, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "ca.crt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LocalError, match=message):
        make(device.connection_string, ca_file=str(path)).connect()


def test_several_cas(make: Make, hub: LocalHub, device: Device, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    (tmp_path / "first").mkdir()
    first = der(str(tmp_path / "other.pem"), tmp_path / "first")
    with make(device.connection_string, ca_file=[first, der(hub.ca_file, tmp_path)]) as client:
        assert client.report({"a": 1}) == 2


def test_tls_without_a_ca_is_refused(package: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from twin_device import LocalError, TwinClient\n"
        "try:\n"
        "    TwinClient('localhost', 'dev', key='MDEy')\n"
        "except LocalError as error:\n"
        "    print(error)\n"
    )
    done = run(program, package)
    assert done.stdout == "ca_file is missing: a board has no trust store of its own\n"


# ---------------------------------------------------------------------- links that are bad


class Link:
    """Between a client and the hub; it can stop carrying anything, and ends nothing."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.carrying = threading.Event()
        self.carrying.set()
        self.calls = 0
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.calls += 1
            far = socket.create_connection(("127.0.0.1", self._port))
            self._open += [near, far]
            for source, target in ((near, far), (far, near)):
                thread = threading.Thread(target=self._carry, args=(source, target))
                self._threads.append(thread)
                thread.start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(4096):
                self.carrying.wait()
                target.sendall(data)
            self.carrying.wait()
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self.carrying.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            one.close() if one.fileno() < 0 else _end(one)
        for thread in self._threads:
            thread.join()


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@pytest.fixture
def link(hub: LocalHub) -> Iterator[Link]:
    link = Link(hub.mqtt_port or 0)
    yield link
    link.close()


def through(link: Link, device: Device) -> str:
    head, _, tail = device.plaintext_connection_string.partition(";")
    return f"{head.partition(':')[0]}:{link.port};{tail}"


def test_a_link_that_has_died_in_silence_is_noticed(make: Make, device: Device, link: Link) -> None:
    client = make(through(link, device), tls=False, keep_alive=1)
    app = App(client)  # type: ignore[arg-type]  # it has the same face
    client.connect()
    link.carrying.clear()
    app.await_state("offline")
    assert "silent" in client.statistics["last_error"]
    link.carrying.set()
    app.await_state("synchronised")


def test_a_quiet_link_is_kept_alive(make: Make, device: Device, link: Link) -> None:
    client = make(through(link, device), tls=False, keep_alive=1)
    client.connect()
    # The hub would end it after one and a half silent keep-alives.
    wait_until(lambda: sum(packet.kind == "PINGREQ" for packet in device.packets) >= 5, "it pings")
    assert device.connections == 1


def test_a_stalled_link_is_given_up_and_what_was_reported_arrives(
    make: Make, device: Device, link: Link
) -> None:
    client = make(through(link, device), tls=False, timeout=1.5)
    client.connect()
    link.carrying.clear()
    report = client.report({"a": 1}, wait=False)
    # Two answers in a row are lost: a new connection, which is stalled as well.
    wait_until(lambda: link.calls == 2, "it has dialled again")
    link.carrying.set()
    # What was sent before may have been merged as well.
    assert report.wait(PATIENCE) == device.reported_version
    assert device.reported == {"a": 1}


def test_nobody_there_is_told_in_time_and_can_be_tried_again(make: Make, device: Device) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    text = device.plaintext_connection_string.partition(";")[2]
    client = make(f"HostName=127.0.0.1:{port};{text}", tls=False)
    with pytest.raises(
        ConnectRefused, match=r"not synchronised with 127\.0\.0\.1 in time: cannot connect"
    ) as raised:
        client.connect(timeout=1)
    assert raised.value.can_retry


def test_a_handshake_that_hangs_does_not_hold_the_app(make: Make, hub: LocalHub, device: Device) -> None:
    hub.fault("hanging_tls")
    client = make(device.connection_string)
    with pytest.raises(ConnectRefused, match="not synchronised"):
        client.connect(timeout=0.5)
    hub.clear_faults()
    client.connect()


def test_what_is_no_hub_is_named(make: Make, device: Device) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            near, _ = listener.accept()
            with near:
                near.recv(4096)
                near.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        text = device.plaintext_connection_string.partition(";")[2]
        client = make(f"HostName=127.0.0.1:{listener.getsockname()[1]};{text}", tls=False, hurry=False)
        with pytest.raises(ConnectRefused, match="a packet of the type 0x48"):
            client.connect(timeout=0.3)
        thread.join()


def test_without_a_network_nothing_is_dialled(make: Make, device: Device) -> None:
    client = make(device.connection_string, online=False)
    app = App(client)  # type: ignore[arg-type]  # it has the same face
    client.connect(wait=False)
    with pytest.raises(ReportTimeout):
        client.report({"a": 1}, timeout=0.3)
    assert device.connections == 0
    client.ask("online", **{"is": True})
    app.await_state("synchronised")
    device.wait_for({"a": 1}, PATIENCE)
    client.ask("online", **{"is": False})
    app.await_state("offline")
    assert client.statistics["last_error"] == "the network is gone"
    client.ask("online", **{"is": True})
    app.await_state("synchronised")


def _has_had(device: Device, connections: int) -> bool:
    return device.connections == connections


def test_a_thousand_reconnects_leave_nothing_behind(make: Make, device: Device) -> None:
    client = make(device.plaintext_connection_string, tls=False, hurry="at once")
    client.connect()
    used = []
    for number in range(1, 1001):
        device.disconnect()
        wait_until(functools.partial(_has_had, device, number + 1), "it is back")
        if number % 250 == 0:
            client.retrieve()
            used.append(client.ask("memory"))
    assert client.statistics["connects"] == 1001
    assert max(used) - used[0] < 2048


# ---------------------------------------------------------------------- memory


def test_only_what_is_kept_is_kept(make: Make, device: Device) -> None:
    client = make(device.connection_string, keep=["led"])
    app = App(client)  # type: ignore[arg-type]  # it has the same face
    client.connect()
    assert app.next_patch() == {"led": True}
    device.patch_desired({"telemetryInterval": 15, "other": 1})
    device.patch_desired({"led": False, "deep": None})
    assert app.next_patch() == {"led": False}
    assert client.desired == {"led": False}
    assert client.desired_version == device.desired_version
    client = make(device.connection_string, keep=["led"])
    with pytest.raises(LocalError, match="telemetryInterval is not among"):
        client.setting("telemetryInterval")(lambda value: None)


def test_properties_are_handed_on_and_not_kept(make: Make, device: Device) -> None:
    client = make(device.connection_string, keep=[], hand_on=True)
    client.connect()
    seen = sorted(client.properties.get(timeout=PATIENCE) for _ in range(3))
    assert seen == [(["deep", "a", "b"], 1), (["led"], True), (["telemetryInterval"], 30)]
    device.patch_desired({"deep": {"a": {"b": None, "c": "x"}}})
    seen = sorted((client.properties.get(timeout=PATIENCE) for _ in range(2)), key=lambda one: one[0])
    assert seen == [(["deep", "a", "b"], None), (["deep", "a", "c"], "x")]
    assert client.desired == {}


@pytest.mark.parametrize("heap", [100, 140, 180])
def test_a_twin_that_does_not_fit_is_named(hub: LocalHub, tmp_path: Path, heap: int) -> None:
    # No two keys alike: the dearest that a twin can be.
    desired = {f"g{group}": {f"k{group}x{each}": True for each in range(20)} for group in range(100)}
    device = hub.create_device("large", desired=desired)
    build(tmp_path)
    little = ("-X", f"heapsize={heap}K")
    client = BoardClient(device.plaintext_connection_string, tmp_path, tls=False, interpreter=little)
    try:
        with pytest.raises(ConnectRefused, match=r"not synchronised.*: not enough memory"):
            client.connect(timeout=3)
        # It lives, and works as soon as there is less.
        device.replace_desired({"a": 1})
        client.connect()
        assert client.desired == {"a": 1}
    finally:
        assert client.end() == 0


def test_without_the_reported_properties_reports_still_arrive_in_order(make: Make, device: Device) -> None:
    client = make(device.connection_string)
    client.connect()
    device.disconnect()
    for patch in ({"a": {"b": 1}}, {"a": None}, {"a": {"c": 2}}, {"d": 1}):
        client.report(patch, wait=False)
    device.wait_for({"a": {"c": 2}, "d": 1}, PATIENCE)
    assert client.reported == {}


def test_settings_need_the_reported_properties(make: Make, device: Device) -> None:
    client = make(device.connection_string, keep_reported=False)
    with pytest.raises(LocalError, match="keep_reported"):
        client.setting("telemetryInterval")(lambda value: None)
    # Declared in time, they are kept by themselves.
    client = make(device.connection_string)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.setting("telemetryInterval")(done.put)
    client.connect()
    assert done.get(timeout=PATIENCE) == 30
    device.wait_for({"telemetryInterval": {"value": 30, "status": "Success"}}, PATIENCE)


def test_a_hub_that_tells_faster_than_handlers_take_gets_one_difference(
    make: Make, device: Device, hub: LocalHub
) -> None:
    client = make(device.connection_string, keep_reported=True)
    app = App(client)  # type: ignore[arg-type]  # it has the same face
    release = threading.Event()

    def slow(value: Any) -> None:
        release.wait(PATIENCE)

    client.setting("led")(slow)
    client.connect()
    device.wait_for({"led": {"status": "Pending"}}, PATIENCE)
    document = app.changes.get(timeout=PATIENCE)[1]
    for number in range(60):
        device.patch_desired({f"p{number % 50}": number, "telemetryInterval": number})
    wait_until(lambda: client.desired_version == device.desired_version, "all was told")
    release.set()
    count = 0
    while document != device.desired:
        patch, desired = app.changes.get(timeout=PATIENCE)
        count += 1
        for name, value in patch.items():
            document[name] = value
        assert document == desired
    assert count < 30


def test_what_comes_while_handlers_catch_up_is_told_once_and_in_order(package: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import asyncio
from twin_device import TwinClient
from twin_device.core.twin import DesiredChanged

client = TwinClient("localhost", "dev", key="MDEy", tls=False)
core = client._core()
seen = []

@client.on_desired
async def changed(patch, desired):
    seen.append((patch["n"], desired["n"]))
    await asyncio.sleep_ms(2)

async def main():
    client._watcher = True
    client._dispatcher = asyncio.create_task(client._dispatch())
    for number in range(300):
        core.desired = {"n": number}
        client._tell(DesiredChanged(core.desired, core.desired))
        if number % 2:
            await asyncio.sleep_ms(1)
    client._watcher = None
    await client._dispatcher
    numbers = [number for number, _ in seen]
    wrong = [one for one in seen if one[0] != one[1]]
    print(numbers == sorted(set(numbers)), numbers[-1], 20 < len(numbers) < 300, wrong)

asyncio.run(main())
"""
    )
    assert run(program, package).stdout == "True 299 True []\n"


# ---------------------------------------------------------------------- what survives a reboot


def test_a_store_survives_a_power_cut(make: Make, hub: LocalHub, device: Device, tmp_path: Path) -> None:
    store = str(tmp_path / "twin.json")
    client = make(device.connection_string, store=["file", store, 0])
    app = App(client)  # type: ignore[arg-type]  # it has the same face
    client.connect()
    app.next_patch()
    hub.stop_listening()
    app.await_state("offline")
    client.report({"a": 1}, wait=False)
    client.report({"b": {"c": 2}}, wait=False)
    client.ask("get", name="state")
    client.kill()
    device.patch_desired({"telemetryInterval": 15, "led": None})
    hub.listen_again()
    client = make(device.connection_string, store=["file", store, 0])
    app = App(client)  # type: ignore[arg-type]  # it has the same face
    assert client.desired == {"telemetryInterval": 30, "led": True, "deep": {"a": {"b": 1}}}
    client.connect()
    assert app.next_patch() == {"telemetryInterval": 15, "led": None}
    device.wait_for({"a": 1, "b": {"c": 2}}, PATIENCE)


@pytest.mark.parametrize("made", [stage, build], ids=["sources", "built"])
def test_a_hub_that_does_not_read_is_given_up(made: Callable[[Path], Path], tmp_path: Path) -> None:
    flood = publish("t", b"", 1) * 2000
    with HostileHub(lambda: itertools.repeat(flood), reads=False) as hub:
        text = f"HostName=localhost:{hub.port};DeviceId=d;SharedAccessKey={KEY}"
        client = BoardClient(text, made(tmp_path), tls=False, environment={"LITTLE_ROOM": "1"})
        try:
            client.connect()
            wait_until(
                lambda: "does not read" in str(client.statistics["last_error"]), "the answers are too many"
            )
            hub.attack = lambda: ()
            client.report({"a": 1})
            assert hub.reports == [{"a": 1}]
        finally:
            client.end()
        assert client.other == []


def test_flash_is_written_seldom_and_at_the_end(make: Make, device: Device, tmp_path: Path) -> None:
    path = tmp_path / "twin.json"
    client = make(device.connection_string, store=str(path))
    client.connect()
    for number in range(20):
        client.report({"a": number})
        device.patch_desired({"telemetryInterval": number})
    wait_until(lambda: client.desired == device.desired, "all was told")
    # Once, at the first change; a minute later it would be the second time.
    first = path.stat().st_mtime_ns
    assert "19" not in path.read_text()
    client.close()
    assert path.stat().st_mtime_ns != first
    kept = json.loads(path.read_text().splitlines()[1])
    assert kept == [1, "localhost/dev", device.desired, None, []]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "damaged"),
        (b"rubbish that is no store", "damaged"),
        (b"00000000\n[1, 2", "damaged"),
        ("other", "another identity's"),
        ("format", "another format"),
    ],
)
def test_a_store_that_is_none_is_set_aside(
    make: Make, device: Device, tmp_path: Path, content: Any, why: str
) -> None:
    import binascii

    path = tmp_path / "twin.json"
    if isinstance(content, str):
        kept = (
            [1, "localhost/other", {}, None, []] if content == "other" else [9, "localhost/dev", {}, None, []]
        )
        body = json.dumps(kept).encode()
        content = b"%08x\n" % binascii.crc32(body) + body
    path.write_bytes(content)
    client = make(device.connection_string, store=str(path))
    app = App(client)  # type: ignore[arg-type]  # it has the same face
    client.connect()
    assert why in str(app.next_error())
    assert (tmp_path / "twin.json.corrupt").read_bytes() == content
    client.close()
    assert path.exists()


def test_a_flash_that_cannot_be_written_is_named_once(make: Make, device: Device, tmp_path: Path) -> None:
    client = make(device.connection_string, store=["file", str(tmp_path / "missing" / "twin.json"), 0])
    app = App(client)  # type: ignore[arg-type]  # it has the same face
    client.connect()
    assert "missing/twin.json cannot be written" in str(app.next_error())
    client.report({"a": 1})
    client.report({"a": 2})
    assert app.errors.empty()


def test_a_power_cut_at_any_moment_leaves_the_old_or_the_new(package: Path, tmp_path: Path) -> None:
    """A program that writes for ever is killed again and again: what is found is what was written, whole."""
    import subprocess

    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from twin_device.store import FileStore\n"
        "store = FileStore('twin.json', 0)\n"
        "found, error = store.load('me')\n"
        "number = found[0]['n'] if found[0] else 0\n"
        "print(number, error)\n"
        "while True:\n"
        "    number += 1\n"
        "    store.keep({'n': number, 'x': 'y' * (number % 4000)}, None, [], 0)\n"
    )
    last = 0
    for cut in range(25):
        with subprocess.Popen(
            [micropython(), str(program)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            env={"MICROPYPATH": f"{package}:.frozen"},
        ) as process:
            assert process.stdout is not None
            try:
                number, error = process.stdout.readline().split()
                assert (error, int(number) >= last) == ("None", True)
                last = int(number)
                threading.Event().wait(0.003 * (cut % 10 + 1))
            finally:
                process.kill()
    assert last > 25


@pytest.mark.parametrize("made", [stage, build], ids=["sources", "built"])
def test_a_first_write_that_was_cut_has_kept_nothing_and_is_no_damage(
    made: Callable[[Path], Path], tmp_path: Path
) -> None:
    """There is no document yet: what is half is nothing, and what is whole counts, for FAT cannot replace."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "from twin_device.store import FileStore\n"
        "def put(data):\n"
        "    with open('twin.json.new', 'wb') as file:\n"
        "        file.write(data)\n"
        "store = FileStore('twin.json', 0)\n"
        "store.load('me')\n"
        "store.keep({'n': 1}, None, [], 0)\n"
        "with open('twin.json', 'rb') as file:\n"
        "    whole = file.read()\n"
        "os.remove('twin.json')\n"
        "for end in range(len(whole) + 1):\n"
        "    put(whole[:end])\n"
        "    store = FileStore('twin.json', 0)\n"
        "    found, error = store.load('me')\n"
        "    assert error is None, (end, error)\n"
        "    expected = (None, None, None) if end < len(whole) else ({'n': 1}, None, [])\n"
        "    assert found == expected, (end, found)\n"
        "    assert sorted(os.listdir()) == ['program.py', 'twin.json.new'], os.listdir()\n"
        "print(FileStore('twin.json', 0).load('other')[1], sorted(os.listdir()))\n"
        "put(whole[:20])\n"
        "store = FileStore('twin.json', 0)\n"
        "print(store.load('me'), store.keep({'n': 2}, None, [], 0))\n"
        "print(FileStore('twin.json', 0).load('me'), sorted(os.listdir()))\n"
    )
    done = run(program, made(tmp_path.parent / f"{tmp_path.name}-package"), cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "store twin.json was set aside: it is another identity's ['program.py', 'twin.json.corrupt']",
        "((None, None, None), None) None",
        "(({'n': 2}, None, []), None) ['program.py', 'twin.json', 'twin.json.corrupt']",
    ], done.stderr


def test_an_esp32_keeps_it_in_its_nvs(package: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from twin_device.store import NvsStore\n"
        "store = NvsStore('twin', 0)\n"
        "print(store.load('me'))\n"
        "store.keep({'a': 1}, {'b': [2.5]}, [({'c': None}, 3, True)], 0)\n"
        "store.keep({'a': 'x' * 300}, None, [], 0)\n"
        "store.keep({'a': 1}, {'b': [2.5]}, [({'c': None}, 3, True)], 0)\n"
        "print(NvsStore('twin').load('me'))\n"
        "print(NvsStore('twin').load('other')[1])\n"
        "import esp32\n"
        "esp32.kept['twin', 'twin'] = b'rubbish'\n"
        "print(NvsStore('twin').load('me')[1])\n"
    )
    fakes = ROOT / "tests" / "fakes"
    done = run(program, Path(f"{package}:{fakes}"))
    assert done.stdout.splitlines() == [
        "((None, None, None), None)",
        "(({'a': 1}, {'b': [2.5]}, [({'c': None}, 3, True)]), None)",
        "store nvs:twin is not used: it is another identity's",
        "store nvs:twin is not used: it is damaged",
    ], done.stderr


# ---------------------------------------------------------------------- the app


def test_handlers_may_be_coroutines_call_everything_and_raise(
    package: Path, device: Device, tmp_path: Path, hub: LocalHub
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import asyncio, os
from twin_device import TwinClient

client = TwinClient.from_connection_string(os.getenv("DEVICE"), ca_file=os.getenv("CA"))
ended = asyncio.Event()
told = asyncio.Event()

@client.on_desired
def first(patch, desired):
    raise ValueError("first")

@client.on_desired
async def second(patch, desired):
    print(await client.report({"interval": desired["telemetryInterval"]}))
    print(sorted(await client.retrieve()))
    await client.disconnect()
    await client.connect()
    ended.set()

@client.on_error
async def failed(error):
    print("failed", repr(error))
    told.set()
    raise TypeError("in the error handler")

async def main():
    async with client:
        await ended.wait()
        await told.wait()
        print(client.state)

asyncio.run(main())
print(client.state)
"""
    )
    done = run(program, package, DEVICE=device.connection_string, CA=der(hub.ca_file, tmp_path))
    assert done.stdout.splitlines() == [
        "2",
        "['desired', 'reported']",
        "failed ValueError('first',)",
        "twin_device: an error handler raised TypeError('in the error handler',)",
        "synchronised",
        "offline",
    ], done.stdout + done.stderr
    assert device.reported == {"interval": 30}


def test_a_closed_client_says_so(make: Make, device: Device) -> None:
    client = make(device.connection_string)
    client.connect()
    client.close()
    for call in (client.connect, client.retrieve, lambda: client.report({"a": 1})):
        with pytest.raises(NotConnected):
            call()
    assert client.ask("run") is None


def test_a_refused_report_names_what_the_hub_said(make: Make, hub: LocalHub, device: Device) -> None:
    client = make(device.connection_string)
    client.connect()
    hub.fault("answer_status", operation="report", status=400, error_code=400004, times=1)
    with pytest.raises(ReportRejected, match="errorCode 400004"):
        client.report({"a": 1})
