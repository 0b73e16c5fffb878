"""The boards' programs on a real MicroPython, with a Wi-Fi, a clock and pins that are made up.

None of this has run on a board: hardware/*/README.md says what its owner can run there.
"""

import json
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.vm import ROOT, micropython, stage
from twin_device.hub import LocalHub

HARDWARE = ROOT / "hardware"
BOARDS = ("esp32", "pico_w")
CONFIGURATION = {"ssid": "home", "password": "secret", "connectionString": "HostName=localhost;..."}
# A board with an NVS, for programs that are not to have the other fakes.
NVS = f"""
import sys
sys.path.append({str(ROOT / "tests" / "fakes")!r})
import esp32
sys.path.pop()
"""
HEAD = "import time\nfrom time import slept\n"


def run(program: str, folder: Path, configuration: Any = CONFIGURATION) -> "subprocess.CompletedProcess[str]":
    """A program on MicroPython, with online.py and the made-up modules; the folder is its file system."""
    if configuration is not None:
        text = configuration if isinstance(configuration, str) else json.dumps(configuration)
        (folder / "config.json").write_text(text)
    fakes = ROOT / "tests" / "fakes"
    return run_with(program, folder, fakes, fakes / "app")


def run_with(program: str, folder: Path, *modules: Path) -> "subprocess.CompletedProcess[str]":
    """A program on MicroPython, with the modules of these folders and hardware/boards."""
    (folder / "program.py").write_text(program)
    return subprocess.run(
        [micropython(), "program.py"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={
            **os.environ,
            "MICROPYPATH": os.pathsep.join(map(str, (*modules, HARDWARE / "boards", ".frozen"))),
        },
    )


def played(program: str, folder: Path, **options: Any) -> list[str]:
    """The lines that a program prints, which ends well."""
    done = run(HEAD + program, folder, **options)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("board", BOARDS)
def test_boot_joins_and_sets_the_clock(tmp_path: Path, board: str) -> None:
    boot = (HARDWARE / board / "boot.py").read_text()
    lines = played(f"{boot}\nimport network\nprint(network.calls)", tmp_path)
    assert lines[0] == "Wi-Fi: home 192.0.2.7"
    assert lines[1].startswith("clock: 20")
    assert lines[2] == "['on', 'join home']"


@pytest.mark.parametrize("board", BOARDS)
def test_boot_without_a_network_restarts_in_the_end(tmp_path: Path, board: str) -> None:
    boot = (HARDWARE / board / "boot.py").read_text()
    # Ticks that go on by themselves: each try is over at once.
    program = f"""{HEAD}
import network
network.joins = [201]
ticks = [0]
def ticks_ms():
    ticks[0] += 8000
    return ticks[0]
time.ticks_ms = ticks_ms
{boot}"""
    done = run(program, tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == "Wi-Fi: no home yet, status 201"
    assert lines[-1] == "boot: no Wi-Fi home after 10 tries, status 201 - restarting"
    assert len(lines) == 11
    assert "secret" not in done.stdout + done.stderr


def test_wifi_comes_at_the_third_try(tmp_path: Path) -> None:
    lines = played(
        """
import network, online
network.joins = [201, 202, True]
ticks = [0]
def ticks_ms():
    ticks[0] += 8000
    return ticks[0]
time.ticks_ms = ticks_ms
online.up({"ssid": "home", "password": "secret", "country": "DE", "hostname": "thermometer"})
print(network.settings["country"], network.settings["hostname"])
print(network.calls)
print([pause for pause in slept if pause != 100])
print(online.is_online())
""",
        tmp_path,
    )
    assert lines[:2] == ["Wi-Fi: no home yet, status 201", "Wi-Fi: no home yet, status 202"]
    assert lines[4:] == [
        "DE thermometer",
        str(["on", "join home", "leave", "off"] * 2 + ["on", "join home"]),
        "[1000, 2000]",
        "True",
    ]


def test_ntp_is_asked_again(tmp_path: Path) -> None:
    lines = played(
        """
import ntptime, online
ntptime.lost = 2
online.set_clock("time.example")
print(ntptime.asked, slept)
""",
        tmp_path,
    )
    # The interpreter's own clock is set: one answer is enough.
    assert lines[0].startswith("clock: no answer from time.example yet: ")
    assert lines[-1] == "['time.example'] []"


def test_a_clock_that_is_never_set(tmp_path: Path) -> None:
    lines = played(
        """
import ntptime, online
ntptime.lost = 100
time.gmtime = lambda: (2021, 1, 1, 0, 0, 5, 4, 1)
try:
    online.set_clock()
except OSError as error:
    print(error)
print(slept)
""",
        tmp_path,
    )
    assert lines[-2] == "no time from pool.ntp.org after 10 tries"
    assert lines[-1] == str([1000, 2000, 4000, 8000, 16000, *[30000] * 4])


WRONG = [
    (None, "there is no config.json: copy config.example.json to config.json and fill it in"),
    ("{", "config.json is not JSON: look for a missing comma or quote"),
    ([], "ssid is missing in config.json: copy config.example.json to config.json and fill it in"),
    ({**CONFIGURATION, "password": 5}, "password is missing in config.json: copy config.example.json to"),
]


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize(("configuration", "message"), WRONG, ids=range(4))
def test_a_wrong_configuration_is_named_and_the_board_stays(
    tmp_path: Path, board: str, configuration: Any, message: str
) -> None:
    boot = (HARDWARE / board / "boot.py").read_text()
    lines = played(boot, tmp_path, configuration=configuration)
    assert len(lines) == 1
    assert lines[0].startswith(f"boot: {message}")


def test_a_lost_wifi_is_joined_again(tmp_path: Path) -> None:
    lines = played(
        """
import asyncio, network, online
online.join("home", "secret")
network.calls.clear()
pauses = []

async def sleep(seconds):
    # The network is lost during the second pause, and comes back at the second join.
    pauses.append(seconds)
    if len(pauses) == 2:
        network.joins[:] = [201, True]
        online.wlan.lose()
    if len(pauses) == 6:
        raise asyncio.CancelledError

async def sleep_ms(_milliseconds):
    pass

asyncio.sleep, asyncio.sleep_ms = sleep, sleep_ms
try:
    asyncio.run(online.keep({"ssid": "home", "password": "secret"}))
except asyncio.CancelledError:
    pass
print(pauses)
print(network.calls)
""",
        tmp_path,
    )
    assert lines[-2:] == [
        "[5, 5, 15, 15, 5, 5]",
        str(["leave", "off", "on", "join home"] * 2),
    ]


def test_a_watchdog_is_fed_while_the_loop_turns(tmp_path: Path) -> None:
    lines = played(
        """
import asyncio, machine, online

async def main():
    task = asyncio.create_task(online.feed(machine.WDT(timeout=8000), 1))
    while len(machine.feeds) < 4:
        await asyncio.sleep(0)
    task.cancel()

asyncio.run(main())
print(machine.feeds)
""",
        tmp_path,
    )
    assert lines == ["['made', 'fed', 'fed', 'fed']"]


# What the back end desires, step by step; what the thermometer reports, but for its temperature.
THERMOMETER: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({}, {"telemetryInterval": 60, "led": False, "problem": None}, False),
    (
        {"telemetryInterval": 15, "led": True},
        {"telemetryInterval": 15, "led": True, "problem": None},
        True,
    ),
    (
        {"telemetryInterval": 1, "led": True},
        {
            "telemetryInterval": 15,
            "led": True,
            "problem": "telemetryInterval is a whole number from 5 to 86400",
        },
        True,
    ),
    (
        {"telemetryInterval": 20, "led": "blink"},
        {"telemetryInterval": 20, "led": None, "problem": "led is true or false"},
        True,
    ),
    ({"led": False}, {"telemetryInterval": 60, "led": False, "problem": None}, False),
]


@pytest.mark.parametrize(("board", "pin", "tenths"), [("esp32", 2, 250), ("pico_w", "LED", 276)])
def test_the_thermometer_does_what_is_desired(tmp_path: Path, board: str, pin: Any, tenths: int) -> None:
    main = (HARDWARE / board / "main.py").read_text()
    steps = [desired for desired, _, _ in THERMOMETER]
    # The back end comes in at the end of the first report.
    program = f"""
import asyncio, json, machine, online
import twin_device
steps = {steps!r}

async def back_end(report, client, patch, wait):
    await report(client, patch, wait)
    if steps:
        desired = steps.pop(0)
        client.desire(desired, desired)
        leds.append(machine.pins[{pin!r}])
    else:
        raise asyncio.CancelledError

leds = []
report = twin_device.TwinClient.report
twin_device.TwinClient.report = lambda client, patch, wait=True: back_end(report, client, patch, wait)
try:
    exec({main!r})
except asyncio.CancelledError:
    pass
client = twin_device.made[0]
print(json.dumps([client.text, client.options["ca_file"], client.reports, leds, machine.feeds]))
print(client.options["is_online"] is online.is_online)
"""
    configuration = {**CONFIGURATION, "caFile": "root.der", "watchdog": True}
    *lines, online = played(program, tmp_path, configuration=configuration)
    text, ca_file, reports, leds, feeds = json.loads(lines[-1])
    assert (text, ca_file, online) == (CONFIGURATION["connectionString"], "root.der", "True")
    assert [report.pop("temperature") for report in reports] == [tenths] * (len(THERMOMETER) + 1)
    assert reports == [{}, *(reported for _, reported, _ in THERMOMETER)]
    assert leds == [lit for _, _, lit in THERMOMETER]
    assert feeds[0] == "made"


def test_the_roots_are_the_ones_in_the_table() -> None:
    import hashlib

    table = (HARDWARE / "boards" / "ROOTS.md").read_text()
    roots = sorted(path for path in (HARDWARE / "boards").glob("*.der") if path.stem != "nobody")
    assert len(roots) == 2
    for root in roots:
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {root.name} |"))
        digest = hashlib.sha256(root.read_bytes()).hexdigest().upper()
        assert ":".join(digest[at : at + 2] for at in range(0, 64, 2)) in row


def test_the_example_is_a_configuration_and_holds_no_key() -> None:
    example = json.loads((HARDWARE / "boards" / "config.example.json").read_text())
    assert CONFIGURATION.keys() <= example.keys()
    assert example["connectionString"].endswith("SharedAccessKey=...")
    assert [(HARDWARE / "boards" / name).exists() for name in example["caFile"]] == [True, True]


# What the self-test says of a board on which all is well, but for its figures.
SELFTEST = """\
ok memory NNN bytes of heap are free before anything is connected
ok clock NNN
ok store written and read; power_cut() tests the rest
ok NVS written and read
ok DNS localhost is NNN
ok TLS, CA the certificate of localhost is not to be trusted: no CA in ca_file has signed it
ok TLS, name the certificate of NNN is not to be trusted: it is another host's
ok connect NNN ms to the twin; NNN bytes of heap are free
ok twin reported in NNN ms, $version NNN, read back
ok reconnect NNN ms
everything works
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """A hub whose certificate names the host alone, and not its address."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    server = authority.issue_cert("localhost")
    server.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    with LocalHub(certificates=folder) as hub:
        yield hub


def self_test(hub: LocalHub, folder: Path, connection_string: str, program: str) -> tuple[int, list[str]]:
    """Its exit status and lines, without what differs from run to run."""
    package = folder / "package"
    if not package.exists():
        stage(package)
        shutil.copy(HARDWARE / "boards" / "nobody.der", folder)
        (folder / "root.der").write_bytes(ssl.PEM_cert_to_DER_cert(Path(hub.ca_file).read_text()))
    config = {"connectionString": connection_string, "caFile": ["root.der"]}
    (folder / "config.json").write_text(json.dumps(config))
    done = run_with(program, folder, package)
    assert done.stderr == ""
    lines = done.stdout.splitlines()[1:]
    return done.returncode, [
        re.sub(r" +", " ", re.sub(r"[0-9][0-9.:-]*( [0-9:]+ UTC)?", "NNN", line)) for line in lines
    ]


RUN = (HARDWARE / "boards" / "selftest.py").read_text()


def test_the_self_test_of_a_board_that_is_well(hub: LocalHub, tmp_path: Path) -> None:
    device = hub.create_device("dev", desired={"a": 1})
    status, lines = self_test(hub, tmp_path, device.connection_string, NVS + RUN)
    assert (status, "\n".join(lines) + "\n") == (0, SELFTEST)
    # The one report was taken back; nothing else was changed.
    assert device.reported == {}
    assert not (tmp_path / "selftest.json").exists()


def test_the_self_test_says_what_fails(hub: LocalHub, tmp_path: Path) -> None:
    device = hub.create_device("dev")
    wrong = device.connection_string.replace(device.keys[0], "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=")
    status, lines = self_test(hub, tmp_path, wrong, NVS + RUN)
    assert status == 1
    assert lines[-2].startswith("FAIL connect the hub refused the credentials")
    assert lines[-1] == "failed: connect"


def test_the_self_test_after_a_power_cut(hub: LocalHub, tmp_path: Path) -> None:
    device = hub.create_device("dev")
    package = stage(tmp_path / "package")
    path = os.pathsep.join(map(str, (package, HARDWARE / "boards", ".frozen")))
    with subprocess.Popen(
        [micropython(), "-c", "import selftest; selftest.power_cut()"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MICROPYPATH": path},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing; pull the plug\n"
        assert process.stdout.readline() == "100\n"
        process.kill()
    shutil.copy(HARDWARE / "boards" / "nobody.der", tmp_path)
    (tmp_path / "root.der").write_bytes(ssl.PEM_cert_to_DER_cert(Path(hub.ca_file).read_text()))
    status, lines = self_test(hub, tmp_path, device.connection_string, NVS + RUN)
    assert status == 0
    assert "ok store write NNN of an earlier run is there, whole" in lines
