"""`make bench` in short: every figure is there, and each bar can fall short."""

import copy
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.bars import bars
from tests.benchmarks.plot import draw

ROOT = Path(__file__).parents[1]
OURS, LOOP, PEER, PAHO, PAHO_LOOP = (
    "twin_device",
    "twin_device.aio",
    "azure-iot-device",
    "paho",
    "paho, one loop",
)
Figures = dict[str, Any]

linux = pytest.mark.skipif(sys.platform != "linux", reason="what a process costs is read from /proc")


@linux
def test_every_figure_is_there(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.clients",
        "--short",
        "--json",
        str(tmp_path / "figures"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "figures").read_text("utf-8"))
    assert found["import"].keys() == {"the bare interpreter", "import twin_device", OURS, LOOP, PAHO}
    assert found["first_twin"].keys() == found["single"].keys() == {OURS, LOOP, PAHO}
    assert found["fleets"].keys() == {OURS, LOOP, PAHO_LOOP}
    assert found["large"].keys() == {LOOP, PAHO_LOOP}
    for figures in found["first_twin"].values():
        assert figures["packets"] == 6
        assert figures["round_trips"] >= 4
    for figures in found["single"].values():
        assert len(figures["latencies"]) == 5
        # The clock of the machine is one for all of its processes.
        assert all(0 < seconds < 60 for seconds in figures["latencies"])
    assert found["single"][PAHO]["patches"] == [50]
    for name, threads in ((OURS, 11), (LOOP, 1), (PAHO_LOOP, 1)):
        assert found["fleets"][name]["sizes"]["5"]["threads"] == threads
    assert {figures["connected"] for figures in found["large"].values()} == {20}
    lines = done.stdout.splitlines()
    judged = {bar["name"]: bar for bar in found["bars"]}
    # Printed last, a line each.
    assert [line[12:].rpartition(": ")[0] for line in lines[-len(judged) :]] == list(judged)
    # What time has no part in holds even here, and without the peer nothing that is a ratio to it.
    for bar in bars(found):
        assert bar.holds or not bar.counts
        assert (judged[bar.name]["value"] is None) is bar.name.endswith("to azure-iot-device")
    picture = ElementTree.fromstring(draw(found))
    assert {"twin_device", PAHO} <= {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}


def seconds(*values: float) -> Figures:
    return {"seconds": list(values)}


def good() -> Figures:
    """Figures of a run that holds every bar, and just so."""

    def rest(kib: int, threads: int = 1) -> Figures:
        return {"sizes": {"1": {}, "200": {"resident_kib": kib, "threads": threads}}}

    return {
        "import": {
            "the bare interpreter": seconds(10, 10, 10),
            "import twin_device": seconds(15, 99, 15),
            OURS: seconds(55, 55, 1),
            PAHO: seconds(50, 50, 50),
            PEER: seconds(112, 112, 112),
        },
        "first_twin": {OURS: {"seconds": [7.0], "packets": 6}, PEER: {"seconds": [10.0]}},
        "single": {
            OURS: {"one_by_one": [1900, 950, 1900], "at_once": [20000] * 3, "patches": [1, 2, 2]},
            PAHO: {"one_by_one": [2000, 1000, 2000]},
            PEER: {"one_by_one": [1055, 100, 1055], "at_once": [2000, 1, 2000]},
        },
        "sizes": [1, 200],
        "fleets": {LOOP: rest(23_000), PAHO_LOOP: rest(20_000), PEER: rest(230_000, 602)},
        "large": {
            LOOP: {
                "clients": 1000,
                "connected": 1000,
                "kib_each": 80.0,
                "hang": {"without": [[1e-3] * 9] * 3, "with": [[1.1e-3] * 9] * 3},
            }
        },
    }


def test_figures_that_hold_every_bar_do() -> None:
    assert [str(bar) for bar in bars(good()) if not bar.holds] == []


def worse(*path: Any, value: Any) -> Callable[[Figures], None]:
    def change(found: Figures) -> None:
        for name in path[:-1]:
            found = found[name]
        found[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (worse("import", OURS, value=seconds(56, 56, 1)), "import and one client, to paho"),
        (
            worse("import", PEER, value=seconds(109, 109, 999)),
            "import and one client, to azure-iot-device",
        ),
        (
            worse("import", "import twin_device", value=seconds(16, 1, 16)),
            "import twin_device alone, to the bare interpreter",
        ),
        (
            worse("first_twin", OURS, "seconds", value=[7.1]),
            "first twin, 100 ms away, to azure-iot-device",
        ),
        (worse("first_twin", OURS, "packets", value=7), "packets of a first twin"),
        (
            worse("single", PAHO, "one_by_one", value=[2010, 1, 2010]),
            "reports one by one, to paho at QoS 0",
        ),
        (worse("single", PEER, "one_by_one", value=[1060] * 3), "reports one by one, to azure-iot-device"),
        (worse("single", OURS, "patches", value=[1, 1, 3]), "patches of 50 reports at once"),
        (worse("single", PEER, "at_once", value=[2010] * 3), "50 reports at once, to azure-iot-device"),
        (
            worse("fleets", PAHO_LOOP, "sizes", "200", "resident_kib", value=19_900),
            "memory of 200 clients, to paho on one loop",
        ),
        (worse("fleets", LOOP, "sizes", "200", "threads", value=2), "threads of 200 clients"),
        (
            worse("fleets", PEER, "sizes", "200", "resident_kib", value=229_000),
            "memory of 200 clients, to azure-iot-device",
        ),
        (worse("large", LOOP, "connected", value=999), "share of 1,000 clients synchronised"),
        (worse("large", LOOP, "kib_each", value=80.1), "KiB each of 1,000 clients"),
        (
            worse("large", LOOP, "hang", "with", value=[[1.2e-3] * 9] * 3),
            "p50 of a report among 1,000 clients beside one whose handshake hangs, to without it",
        ),
        (
            worse("large", LOOP, "hang", "with", value=[[1e-3] * 8 + [0.06]] * 3),
            "  ms that its p99 is later",
        ),
    ],
    ids=lambda value: value.strip() if isinstance(value, str) else "",
)
def test_each_bar_can_fall_short(change: Callable[[Figures], None], name: str) -> None:
    found = copy.deepcopy(good())
    change(found)
    assert [bar.name for bar in bars(found) if not bar.holds] == [name]


def test_what_was_not_measured_does_not_hold() -> None:
    found = good()
    for section in ("import", "first_twin", "single", "fleets"):
        del found[section][PEER]
    assert {bar.name.rpartition(" ")[2] for bar in bars(found) if not bar.holds} == {PEER}
    assert all(bar.value is None for bar in bars(found) if not bar.holds)
