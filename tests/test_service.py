"""twin-device gateway: the fleet's file, the table, what systemd is told, and what a monitor is answered."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.leaks import leaks
from tests.test_cli import COMMAND, finish, run
from tests.waiting import PATIENCE, wait_until
from twin_device import LocalError, service, systemd
from twin_device.gateway import DeviceStatus, GatewaySummary
from twin_device.hub import Device, LocalHub

# The table needs a terminal of the test's own, and signals are sent.
fcntl = pytest.importorskip("fcntl", reason="a POSIX system is needed")
pty = pytest.importorskip("pty", reason="a POSIX system is needed")
termios = pytest.importorskip("termios", reason="a POSIX system is needed")

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
WRONG_KEY = "d3Jvbmd3cm9uZ3dyb25nd3Jvbmd3cm9uZ3dyb25nISE="


def text(name: str, key: str = KEY) -> str:
    return f"HostName=localhost;DeviceId={name};SharedAccessKey={key}"


def wrong(connection_string: str) -> str:
    return connection_string.rpartition("SharedAccessKey=")[0] + f"SharedAccessKey={WRONG_KEY}"


# ---------------------------------------------------------------------- the fleet's file


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(content: str | bytes, mode: int = 0o600) -> str:
        path = tmp_path / "devices.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        return str(path)

    return write


@pytest.mark.parametrize(
    "content",
    [
        f"connection_string\n{text('a')}\n{text('b')}\n",
        f"connection_string\r\n{text('a')}\r\n{text('b')}",
        f"\ufeffconnection_string\n{text('a')}\n{text('b')}\n",
        f'# two rooms\nroom,connection_string\n\nleft,{text("a")}\n# "a note\n , \nright, {text("b")} \n',
        f'connection_string,"where, if known"\n"{text("a")}","in\na cellar"\n{text("b")},\n',
    ],
    ids=["plain", "CRLF", "BOM", "comments", "quotes"],
)
def test_a_fleets_file(write: Any, content: str) -> None:
    assert service.read_fleet(write(content)) == {name: service.FleetDevice(text(name)) for name in "ab"}


CERTIFIED = "HostName=localhost;DeviceId=c;x509=true"


def test_a_device_with_a_certificate_has_its_files(write: Any, tmp_path: Path) -> None:
    for name in ("c.pem", "c.key"):
        (tmp_path / name).touch()
    columns = "connection_string,certificate,certificate_key\n"
    path = write(f"{columns}{text('a')},,\n{CERTIFIED},c.pem, {tmp_path / 'c.key'}\n")
    files = (str(tmp_path / "c.pem"), str(tmp_path / "c.key"))
    assert service.read_fleet(path) == {
        "a": service.FleetDevice(text("a")),
        "c": service.FleetDevice(CERTIFIED, files),
    }


@pytest.mark.parametrize(
    ("columns", "line", "why"),
    [
        (
            "connection_string",
            CERTIFIED,
            "x509=true needs files in the columns certificate and certificate_key",
        ),
        ("connection_string,certificate", f"{CERTIFIED},c.pem", "x509=true needs files in the columns"),
        ("connection_string,certificate,certificate_key", f"{CERTIFIED},c.pem,", "x509=true needs files"),
        ("connection_string,certificate,certificate_key", f"{CERTIFIED},c.pem,no.key", "there is no file "),
        ("connection_string,certificate", f"{text('a')},c.pem", "it has a SharedAccessKey and a certificate"),
    ],
)
def test_a_certificate_that_is_not_there_is_named(
    write: Any, tmp_path: Path, columns: str, line: str, why: str
) -> None:
    (tmp_path / "c.pem").touch()
    with pytest.raises(LocalError, match=f"devices.csv, line 2: {why}"):
        service.read_fleet(write(f"{columns}\n{line}\n"))


def test_a_fleets_file_may_be_without_devices(write: Any) -> None:
    assert service.read_fleet(write("connection_string\n")) == {}


@pytest.mark.parametrize(
    ("content", "whys"),
    [
        ("", ["devices.csv is empty: its first line names the columns, one of them connection_string"]),
        ("# nothing\n", ["devices.csv is empty"]),
        (text("a"), ["devices.csv, line 1: the first line names the columns, one of them connection_string"]),
        ("connection_string,connection_string\n", ["line 1: the first line names the columns"]),
        (
            "\n".join(
                [
                    "connection_string",
                    text("a"),
                    text("b", "c2VjcmV0="),
                    "",
                    "nonsense",
                    text("a"),
                    text("a b"),
                ]
            ),
            [
                "devices.csv, line 3: SharedAccessKey is not base64",
                "devices.csv, line 5: part 1 of the connection string is not one of",
                "devices.csv, line 6: a is in line 2 already",
                "devices.csv, line 7: DeviceId has a character that IoT Hub does not allow: ' '",
            ],
        ),
        (
            f"connection_string,room\n{text('a')}\n{text('b')},1,2\n",
            [
                "devices.csv, line 2: it has 1 fields, the first line has 2",
                "devices.csv, line 3: it has 3 fields, the first line has 2",
            ],
        ),
        (f'connection_string\n{text("a")}\n"{text("b")}\n', ["devices.csv, line 3: it is not CSV"]),
        (b"connection_string\n\n\xff\n", ["devices.csv, line 3: it is not UTF-8"]),
        (
            "connection_string\n" + "x\n" * 25,
            [f"devices.csv, line {n}: part 1" for n in range(2, 22)] + ["and 5 more bad lines"],
        ),
    ],
)
def test_bad_lines_are_named_by_number_and_never_shown(write: Any, content: Any, whys: list[str]) -> None:
    with pytest.raises(LocalError) as caught:
        service.read_fleet(write(content))
    told = str(caught.value).split("\n")
    assert len(told) == len(whys)
    for line, why in zip(told, whys, strict=True):
        assert why in line
    for secret in (KEY, "c2VjcmV0", "nonsense"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize(("name", "why"), [("none.csv", "No such file"), (".", "directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, why: str) -> None:
    done = run("gateway", "run", str(tmp_path / name))
    assert done.returncode == 2
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_nothing_is_half_done_with_a_bad_line(local_hub: LocalHub, device: Device, write: Any) -> None:
    path = write(f"connection_string\n{device.connection_string}\nbad\n")
    done = run("gateway", "run", path, "--ca-file", local_hub.ca_file)
    assert done.returncode == 2
    assert f"twin-device: {path}, line 3: part 1" in done.stderr
    assert done.stdout == ""
    assert device.connections == 0


# ---------------------------------------------------------------------- running


@contextlib.contextmanager
def running(
    *arguments: str, environment: dict[str, str] | None = None, stdout: Any = subprocess.PIPE
) -> "Iterator[subprocess.Popen[str]]":
    inherited = {name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "TERM")}
    with subprocess.Popen(
        [*COMMAND, "gateway", "run", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**inherited, "PYTHONUNBUFFERED": "1", **(environment or {})},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_until(process: "subprocess.Popen[str]", *parts: str) -> list[str]:
    """Its lines, without the time, until each of these parts was in one."""
    watch = threading.Timer(2 * PATIENCE, process.kill)
    watch.start()
    lines, missing = [], set(parts)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n").partition(" ")[2])
            missing -= {part for part in missing if part in line}
            if not missing:
                return lines
    finally:
        watch.cancel()
    raise AssertionError(f"no {missing} in {lines}")


@pytest.fixture
def write_fleet(local_hub: LocalHub, write: Any) -> Callable[..., tuple[str, list[Device]]]:
    def make(count: int, refused: int = 0) -> tuple[str, list[Device]]:
        devices = [local_hub.create_device(f"dev-{n}", desired={"n": n}) for n in range(count)]
        texts = [device.connection_string for device in devices]
        texts[:refused] = map(wrong, texts[:refused])
        return write("connection_string\n" + "\n".join(texts) + "\n"), devices

    return make


@pytest.fixture
def options(local_hub: LocalHub, tmp_path: Path) -> list[str]:
    status = str(tmp_path / "status.json")
    return ["--ca-file", local_hub.ca_file, "--connects-per-second", "200", "--status", status]


def test_a_fleet_with_a_few_that_are_refused(
    local_hub: LocalHub, write_fleet: Any, options: list[str], tmp_path: Path
) -> None:
    path, devices = write_fleet(60, 2)
    status = str(tmp_path / "status.json")
    with running(path, *options) as process:
        told = [f"dev-{n} {what}" for n in range(2, 60) for what in ("synchronised", "desired: n")]
        lines = lines_until(process, "the fleet is up", "dev-0: ", "dev-1: ", *told)
        assert re.match(r"bringing up the fleet: \d+ of 60, 0 s left at best", lines[0])
        (up,) = [line for line in lines if line.startswith("the fleet is up")]
        assert re.fullmatch(r"the fleet is up: 58 of 60 synchronised, 2 rejected, after \d+\.\d s", up)
        assert (
            len([line for line in lines if re.match("dev-[01]: the hub refused the credentials", line)]) == 2
        )
        devices[7].patch_desired({"telemetryInterval": "a secret", "n": None})
        assert lines_until(process, "dev-7 desired: telemetryInterval, n")
        devices[8].disconnect()
        assert "dev-8 offline" in lines_until(process, "dev-8 offline")[-1]
        lines_until(process, "dev-8 synchronised")
        wait_until(lambda: '"synchronised": 58, "rejected": 2' in Path(status).read_text(), "the file")
        health = run("gateway", "health", "--status", status)
        assert health.stdout == "58 of 60 synchronised; 2 rejected: dev-0, dev-1\n"
        assert health.returncode == 1
        table = json.loads(run("gateway", "health", "--status", status, "--json").stdout)
        assert (table["running"], table["devices"], len(table["table"])) == (True, 60, 60)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert errors == ""
    assert output.splitlines()[-1].endswith(" ended")
    assert "offline" not in output
    shown = "\n".join(lines) + output
    assert not re.search("SharedAccess|a secret", shown)
    assert not any(key in shown for device in devices for key in device.keys)
    gone = run("gateway", "health", "--status", status)
    assert (gone.returncode, gone.stdout) == (2, f"not running: there is no {status}\n")


def test_a_fleet_with_keys_and_certificates(
    local_hub: LocalHub, write: Any, options: list[str], tmp_path: Path
) -> None:
    device = local_hub.create_device("dev-0")
    signed = [local_hub.create_device(f"door-{n}", authority=True) for n in range(3)]
    made = [local_hub.make_certificate(f"door-{n}", tmp_path) for n in range(2)]
    # The third has the second one's, in files of its own.
    files = [(Path(one.certificate_file).name, Path(one.key_file).name) for one in (*made, made[1])]
    lines = ["connection_string,certificate,certificate_key", f"{device.connection_string},,"]
    for one, (certificate, key) in zip(signed, files, strict=True):
        lines.append(f"{one.connection_string},{certificate},{key}")
    with running(write("\n".join(lines)), *options) as process:
        lines_until(process, "the fleet is up: 3 of 4 synchronised, 1 rejected", "door-2: ")
        assert [one.connected for one in (device, *signed)] == [True, True, True, False]
        assert finish(process, signal.SIGTERM) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_while_it_brings_up_the_fleet(
    write_fleet: Any, options: list[str], number: signal.Signals
) -> None:
    path, _ = write_fleet(5)
    with running(path, *options, "--connects-per-second", "0.01") as process:
        lines_until(process, "bringing up the fleet: 0 of 5", "dev-0 synchronised")
        assert finish(process, number) == 0


def test_a_hub_that_is_not_there_is_no_reason_to_end(write: Any, tmp_path: Path) -> None:
    status = str(tmp_path / "status.json")
    path = write("connection_string\n" + text("a").replace("localhost", "localhost:1") + "\n")
    with running(path, "--plaintext", "--status", status) as process:
        lines_until(process, "bringing up the fleet: 0 of 1")
        wait_until(lambda: os.path.exists(status) and "cannot connect" in Path(status).read_text(), "why")
        health = run("gateway", "health", "--status", status)
        assert (health.returncode, health.stdout) == (1, "0 of 1 synchronised; 1 not synchronised: a\n")
        assert run("gateway", "health", "--status", status, "--grace", "999").returncode == 0
        assert finish(process, signal.SIGTERM) == 0


def test_the_fleets_file_can_be_read_again(
    local_hub: LocalHub, write_fleet: Any, write: Any, options: list[str]
) -> None:
    path, devices = write_fleet(3, 1)
    with running(path, *options) as process:
        lines_until(process, "the fleet is up")
        connections = devices[1].connections
        # One is mended, one stays, one goes, one is new; then there is a bad line, and then it is as it was.
        new = local_hub.create_device("new")
        texts = [device.connection_string for device in (devices[0], devices[1], new)]
        write("connection_string\n" + "\n".join(texts))
        process.send_signal(signal.SIGHUP)
        assert lines_until(process, "read again")[-1].endswith("2 added or changed, 2 removed or changed")
        up = "the fleet is up: 3 of 3 synchronised, after"
        assert up in lines_until(process, "the fleet is up")[-1]
        assert (devices[0].connected, devices[2].connected, new.connected) == (True, False, True)
        assert devices[1].connections == connections
        write("connection_string\n" + "\n".join([*texts, "bad"]))
        process.send_signal(signal.SIGHUP)
        assert re.match(
            r"the fleet stays as it is: .*devices.csv, line 5: ", lines_until(process, "line 5")[-1]
        )
        assert devices[1].connections == connections
        assert finish(process, signal.SIGTERM) == 0


def test_everybodys_keys_are_warned_about(write_fleet: Any, options: list[str]) -> None:
    path, _ = write_fleet(1)
    os.chmod(path, 0o644)
    with running(path, *options) as process:
        lines_until(process, "the fleet is up")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    assert errors == f"twin-device: {path} holds keys, and everybody can read it: chmod o-r\n"


def test_it_ends_when_nobody_reads_its_lines_any_more(write_fleet: Any, options: list[str]) -> None:
    path, devices = write_fleet(1)
    with running(path, *options) as process:
        lines_until(process, "the fleet is up")
        assert process.stdout is not None
        process.stdout.close()
        devices[0].patch_desired({"a": 1})
        process.stdout = None
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 1


# ---------------------------------------------------------------------- the app


def test_an_app_declares_handlers_and_reports(write_fleet: Any, options: list[str], tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_text(
        "import logging\n"
        "async def setup(gateway):\n"
        "    @gateway.on_desired\n"
        "    async def changed(device_id, patch, desired):\n"
        "        await gateway.report(device_id, {'n': desired['n'] + 1})\n"
        "        logging.warning('%s was told', device_id)\n"
    )
    path, devices = write_fleet(2)
    with running(path, *options, "--app", str(app)) as process:
        lines_until(process, "dev-1 was told")
        assert devices[1].reported == {"n": 2}
        assert finish(process, signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("source", "status", "why"),
    [
        (None, 2, "there is no such file"),
        ("x = 1", 2, "has no function setup(gateway)"),
        ("def setup(gateway): raise ValueError('no sensor')", 1, "ValueError: no sensor"),
        ("raise ValueError('no sensor')", 1, "ValueError: no sensor"),
    ],
)
def test_an_app_that_does_not_work_is_named(
    write_fleet: Any, options: list[str], tmp_path: Path, source: str | None, status: int, why: str
) -> None:
    path, devices = write_fleet(1)
    app = tmp_path / "app.py"
    if source is not None:
        app.write_text(source)
    done = run("gateway", "run", path, *options, "--app", str(app))
    assert done.returncode == status
    assert why in done.stderr
    assert devices[0].connections == 0
    assert not (tmp_path / "status.json").exists()


# ---------------------------------------------------------------------- the table


def row(device_id: str, state: str = "synchronised", why: str | None = None, **more: Any) -> DeviceStatus:
    return DeviceStatus(
        device_id,
        state,
        state != "offline",
        state == "synchronised",
        **{"rejected": None, "since": 1.0, "last_change": None, **more, "why": why},
    )


def table(rows: list[DeviceStatus], width: int = 200, height: int = 50, recent: Any = ()) -> list[str]:
    summary = GatewaySummary(len(rows), 1, 2, 3, None)
    return service._table(summary, rows, None, deque(recent), width, height)


def test_what_wants_to_be_looked_at_comes_first() -> None:
    rows = [
        row("old", last_change=1.0),
        row("new", last_change=9.0),
        row("still", last_change=None),
        row("away", "offline", "cannot connect"),
        row("bad", "offline", "wrong key", rejected="wrong key"),
    ]
    lines = table(rows)
    assert lines[0] == "5 devices, 1 connected, 2 synchronised, 3 rejected, last change -"
    assert lines[2].split() == ["device", "state", "since", "last", "change", "why"]
    assert [line.split()[0] for line in lines[3:]] == ["bad", "away", "new", "old", "still"]
    assert lines[3].split()[1] == "rejected"
    assert lines[3].endswith("wrong key")
    assert lines[4].endswith("cannot connect")


def test_a_table_fits_its_screen() -> None:
    rows = [row(f"dev-{n}") for n in range(100)]
    for height in range(1, 30):
        lines = table(rows, 30, height, ["x" * 100, "y"])
        assert len(lines) <= height
        assert max(map(len, lines)) <= 30
    lines = table(rows, 200, 20, ["what happened"])
    assert lines[-3:] == ["... and 86 more", "", "what happened"]
    assert len([line for line in lines if line.startswith("dev-")]) == 14


def test_nothing_in_a_table_moves_the_cursor() -> None:
    lines = table([row("a", "offline", "\x1b[2Jgone\r\n")], recent=["\x1b]0;title\x07"])
    assert all(line.isprintable() for line in lines)


def test_the_table_on_a_terminal(write_fleet: Any, options: list[str]) -> None:
    path, devices = write_fleet(30, 1)
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 100, 0, 0))
    shown = b""

    def until(part: str) -> None:
        nonlocal shown
        deadline = time.monotonic() + PATIENCE
        while part.encode() not in shown:
            ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {part!r} in {shown[-3000:]!r}"
            shown += os.read(terminal, 65536)

    environment = {"TERM": "xterm", "LINES": "", "COLUMNS": ""}
    with running(path, *options, environment=environment, stdout=inner) as process:
        os.close(inner)
        until("bringing up the fleet: [")
        until("30 devices, 29 connected, 29 synchronised, 1 rejected, last change ")
        until("the fleet is up: 29 of 30 synchronised, 1 rejected, after ")
        devices[17].patch_desired({"a": 1})
        devices[18].disconnect()
        process.send_signal(signal.SIGINT)
        until("ended with")
        assert process.wait(PATIENCE) == 0
        with contextlib.suppress(OSError):
            # What is left; then nobody holds the other end.
            while part := os.read(terminal, 65536):
                shown += part
    os.close(terminal)
    # The whole screen is drawn each time, in twelve lines.
    screen, _, after = shown.decode().partition("\x1b[?25h\x1b[?1049l")
    assert re.fullmatch(r"ended with 30 devices, 29 connected, .*\r\n", after)
    frames = screen.split("\x1b[H")
    assert frames[0] == "\x1b[?1049h\x1b[?25l"
    assert {frame.count("\r\n") for frame in frames[1:]} <= set(range(12))
    assert re.search(r"\r\ndev-0 +rejected +[\d:]+ +- +the hub refused the credentials", frames[-1])
    assert not any(key in shown.decode() for device in devices for key in (*device.keys, WRONG_KEY))


class Stuck:
    """A stream that nobody reads until it is released."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.entered = threading.Event()
        self.written = ""

    def fileno(self) -> int:
        raise OSError

    def write(self, part: str) -> None:
        self.entered.set()
        assert self.released.wait(PATIENCE)
        self.written += part

    def flush(self) -> None:
        pass


def test_an_output_that_is_stuck_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_MAX_WAITING", 3)
    stream = Stuck()
    output = service._Output(stream)  # type: ignore[arg-type]  # all of a TextIO that is used
    output.start()
    output.line("first")
    assert stream.entered.wait(PATIENCE)
    for n in range(5):
        output.line(f"line {n}")
        output.frame(f"frame {n}")
    stream.released.set()
    output.end()
    assert not output.is_alive()
    told = [line.partition(" ")[2] for line in stream.written.splitlines()]
    assert told[:4] == ["first", "line 0", "line 1", "line 2"]
    assert stream.written.endswith("(2 lines were lost: nobody read them)\nframe 4")


def test_the_screen_is_prepared_before_the_first_frame_however_late_that_is() -> None:
    stream = Stuck()
    stream.released.set()
    output = service._Output(stream)  # type: ignore[arg-type]  # as above
    output.first = "prepared, "
    for n in range(3):
        output.frame(f"frame {n}")
    output.start()
    output.end()
    assert stream.written == "prepared, frame 2"


# ---------------------------------------------------------------------- systemd


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(PATIENCE)
        yield listening


def test_systemd_hears_that_it_is_ready_alive_and_ending(
    write_fleet: Any, options: list[str], manager: socket.socket
) -> None:
    path, _ = write_fleet(3)
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "2000000"}
    said: list[str] = []

    def until(part: str) -> None:
        while part not in said:
            said.extend(manager.recv(65536).decode().split("\n"))

    with running(path, *options, environment=environment) as process:
        until("READY=1")
        assert said[0] == "READY=1"
        until("WATCHDOG=1")
        lines_until(process, "the fleet is up")
        before = said.count("WATCHDOG=1")
        while said.count("WATCHDOG=1") < before + 2:
            said.extend(manager.recv(65536).decode().split("\n"))
        assert any(line.startswith("STATUS=3 devices, 3 connected, 3 synchronised") for line in said)
        process.send_signal(signal.SIGTERM)
        until("STOPPING=1")
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_a_loop_that_hangs_is_silent(
    write_fleet: Any, options: list[str], manager: socket.socket, tmp_path: Path
) -> None:
    app = tmp_path / "app.py"
    app.write_text(
        "import time\n"
        "def setup(gateway):\n"
        "    @gateway.on_desired\n"
        "    def changed(device_id, patch, desired):\n"
        "        if 'hang' in patch: time.sleep(3600)\n"
    )
    path, devices = write_fleet(1)
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "1000000"}
    with running(path, *options, "--app", str(app), environment=environment) as process:
        lines_until(process, "the fleet is up")
        devices[0].patch_desired({"hang": True})
        lines_until(process, "desired: hang")
        # Twice its time: systemd would have killed it by now.
        manager.settimeout(2.0)
        with contextlib.suppress(TimeoutError):
            for _ in range(100):
                manager.recv(65536)
            raise AssertionError("it goes on to say that it is alive")
        process.kill()


@pytest.mark.parametrize(
    ("address", "heard"),
    [("path", True), ("abstract", True), ("nobody", False), ("", False), ("relative", False)],
)
def test_notify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, heard: bool) -> None:
    names = {
        "path": str(tmp_path / "notify"),
        "abstract": f"\0twin-device-test-{os.getpid()}",
        "nobody": str(tmp_path / "nobody"),
    }
    name = names.get(address, "relative/notify")
    monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@") if address else "")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        if heard:
            listening.bind(name)
            listening.settimeout(PATIENCE)
        assert systemd.notify("READY=1") is heard
        if heard:
            assert listening.recv(100) == b"READY=1"


def test_notify_never_waits(monkeypatch: pytest.MonkeyPatch, manager: socket.socket) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    said = 0
    while systemd.notify("WATCHDOG=1"):
        said += 1
        assert said < 100_000
    assert said > 0


@pytest.mark.parametrize(
    ("microseconds", "pid", "seconds"),
    [
        ("30000000", None, 30.0),
        ("30000000", "own", 30.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("", None, None),
        ("soon", None, None),
        ("-5", None, None),
    ],
)
def test_the_watchdogs_time(
    monkeypatch: pytest.MonkeyPatch, microseconds: str, pid: str | None, seconds: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert systemd.watchdog_seconds() == seconds


def test_lines_in_the_journal_have_a_priority_and_no_time(write_fleet: Any, options: list[str]) -> None:
    path, _ = write_fleet(2, 1)
    reading, writing = os.pipe()
    found = os.fstat(writing)
    environment = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
    with running(path, *options, environment=environment, stdout=writing) as process, open(reading) as lines:
        os.close(writing)
        told = []
        for line in lines:
            told.append(line)
            if "the fleet is up" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert "<6>dev-1 synchronised\n" in told
    assert [line for line in told if line.startswith("<3>dev-0: the hub refused the credentials")]
    assert all(re.match("<[346]>", line) for line in told)
    # conftest.py reads only the pipes that it can see.
    leaks.look("".join(told), "the journal")


def test_each_line_of_a_text_has_its_priority() -> None:
    assert systemd.prefixed("one\ntwo", systemd.ERROR) == "<3>one\n<3>two"
    assert not systemd.is_journal(sys.stdout)


# ---------------------------------------------------------------------- health


def status_file(path: Path, **changes: Any) -> str:
    rows = changes.pop("rows", [row("a"), row("b")])
    document = {
        "twin_gateway": 1,
        "pid": 1,
        "monotonic": time.monotonic(),
        "time": time.time(),
        "devices": len(rows),
        "connected": 0,
        "synchronised": sum(one.synchronised for one in rows),
        "rejected": sum(one.rejected is not None for one in rows),
        "last_change": None,
        "table": [one._asdict() for one in rows],
        **changes,
    }
    path.write_text(json.dumps(document))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({}, 0, "2 of 2 synchronised"),
        ({"rows": []}, 0, "0 of 0 synchronised"),
        ({"rows": [row("a"), row("b", "offline")]}, 1, "1 of 2 synchronised; 1 not synchronised: b"),
        (
            {"rows": [row("a", "offline", rejected="no"), *(row(f"r{n}", "retrieving") for n in range(7))]},
            1,
            "0 of 8 synchronised; 1 rejected: a; 7 not synchronised: r0, r1, r2, r3, r4, ...",
        ),
        ({"monotonic": 0.0}, 2, "not running: {path} was not written for 15 s"),
        ({"monotonic": 1e12}, 2, "not running: {path} was not written for 15 s"),
        ({"twin_gateway": 2}, 2, "not running: {path} is no status file of this release"),
        ({"table": [{"a": 1}]}, 2, "not running: {path} is no status file of this release"),
        ({"monotonic": "now"}, 2, "not running: {path} is no status file of this release"),
    ],
)
def test_what_a_monitor_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], status: int, told: str
) -> None:
    from twin_device.cli import main

    path = status_file(tmp_path / "status.json", **changes)
    assert main(["gateway", "health", "--status", path]) == status
    assert capsys.readouterr().out == told.format(path=path) + "\n"
    assert main(["gateway", "health", "--status", path, "--json"]) == status
    assert json.loads(capsys.readouterr().out)["running"] is (status != 2)


def test_a_short_absence_may_be_forgiven(tmp_path: Path) -> None:
    from twin_device.cli import main

    rows = [row("a", "offline", since=time.time() - 20)]
    path = status_file(tmp_path / "status.json", rows=rows)
    assert main(["gateway", "health", "--status", path, "--grace", "60"]) == 0
    assert main(["gateway", "health", "--status", path, "--grace", "10"]) == 1
    refused = status_file(tmp_path / "status.json", rows=[row("a", "offline", rejected="no")])
    assert main(["gateway", "health", "--status", refused, "--grace", "999999999"]) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_status_file_is_no_gateway(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    from twin_device.cli import main

    path = tmp_path / "status.json"
    path.write_bytes(content)
    assert main(["gateway", "health", "--status", str(path)]) == 2
    assert capsys.readouterr().out.startswith("not running: ")


def test_the_default_place_is_systemds() -> None:
    assert service._default_status_file({}) is None
    place = service._default_status_file({"RUNTIME_DIRECTORY": "/run/twin-gateway:/run/other"})
    assert place == service._STATUS_DEFAULT


def test_a_status_file_that_cannot_be_written_is_told_once(
    write_fleet: Any, options: list[str], tmp_path: Path
) -> None:
    path, devices = write_fleet(1)
    with running(path, *options, "--status", str(tmp_path / "none" / "status.json")) as process:
        lines = lines_until(process, "the fleet is up")
        devices[0].patch_desired({"a": 1})
        lines += lines_until(process, "dev-0 desired: a")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
    told = [line for line in [*lines, *output.splitlines()] if "status file" in line]
    assert len(told) == 1
    assert told[0].endswith("status.json: No such file or directory")
    assert process.returncode == 0
