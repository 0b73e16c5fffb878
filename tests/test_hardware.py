"""The boards' programs on a real MicroPython, with a Wi-Fi, a clock and pins that are made up.

None of this has run on a board: hardware/*/README.md says what its owner can run there.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.vm import ROOT, micropython

HARDWARE = ROOT / "hardware"
BOARDS = ("esp32", "pico_w")
CONFIGURATION = {"ssid": "home", "password": "secret", "connectionString": "HostName=localhost;..."}
HEAD = "import time\nfrom time import slept\n"


def run(program: str, folder: Path, configuration: Any = CONFIGURATION) -> "subprocess.CompletedProcess[str]":
    """A program on MicroPython, with online.py and the made-up modules; the folder is its file system."""
    if configuration is not None:
        text = configuration if isinstance(configuration, str) else json.dumps(configuration)
        (folder / "config.json").write_text(text)
    (folder / "program.py").write_text(program)
    fakes = ROOT / "tests" / "fakes"
    path = os.pathsep.join([str(fakes), str(fakes / "app"), str(HARDWARE / "boards"), ".frozen"])
    return subprocess.run(
        [micropython(), "program.py"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={**os.environ, "MICROPYPATH": path},
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
    roots = sorted((HARDWARE / "boards").glob("*.der"))
    assert len(roots) == 2
    for root in roots:
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {root.name} |"))
        digest = hashlib.sha256(root.read_bytes()).hexdigest().upper()
        assert ":".join(digest[at : at + 2] for at in range(0, 64, 2)) in row


def test_the_example_is_a_configuration_and_holds_no_key() -> None:
    example = json.loads((HARDWARE / "boards" / "config.example.json").read_text())
    assert CONFIGURATION.keys() <= example.keys()
    assert example["connectionString"].endswith("SharedAccessKey=...")
    assert (HARDWARE / "boards" / example["caFile"]).exists()
