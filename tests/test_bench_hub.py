"""`make bench-hub` in short: every device is answered, and every figure is there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hub_wire import KEY
from twin_device.hub import LocalHub

ROOT = Path(__file__).parents[1]
LOADS = ("all_qos0", "all_qos1", "some_qos0", "paced")
OF_A_LOAD = {
    "requests",
    "seconds",
    "per_second",
    "p50_ms",
    "p99_ms",
    "max_ms",
    "cpu_us_a_report",
    "answerer_cpu",
    "load_cpu",
}
OF_A_COLUMN = {
    "resident_idle_mib",
    "connected",
    "connect_seconds",
    "answered",
    "resident_connected_mib",
    *LOADS,
    "desired_seconds",
    "resident_loaded_mib",
    "kib_a_device",
}


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.benchmarks.hub", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


posix = pytest.mark.skipif(
    sys.platform == "win32", reason="a process cannot wait for its stdin in asyncio there"
)


@posix
def test_every_device_is_answered_and_every_figure_is_there(tmp_path: Path) -> None:
    done = bench("--short", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert found["devices"] == 50
    wanted = {f"{name} {how}" for name in ("hub", found["broker"]) if name for how in ("plaintext", "TLS")}
    assert found["columns"].keys() == wanted
    for name, column in found["columns"].items():
        assert name in done.stdout
        assert column.keys() == OF_A_COLUMN
        assert (column["connected"], column["answered"]) == (50, 50)
        for load in LOADS:
            assert column[load].keys() == OF_A_LOAD
            assert column[load]["requests"] >= 50


def test_a_run_that_asks_for_nothing_is_refused() -> None:
    done = bench("--devices", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--devices" in done.stderr


@posix
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("answer_lost", "WrongAnswer: 1 devices were not answered within 0.5 s"),
        ("answer_status", "/res/429/"),
        ("answer_doubled", "came, "),
        ("cut_in_packet", "the connection ended"),
        ("disconnect", "the connection ended"),
    ],
)
def test_a_wrong_answer_fails_the_load(fault: str, complaint: str) -> None:
    with LocalHub(None, 0) as hub:
        for name in ("one", "two"):
            hub.create_device(name, KEY)
        hub.fault(fault, device="two", operation="report", times=1)
        orders: list[dict[str, Any]] = [
            {"do": "connect", "port": hub.mqtt_port, "ca": None, "devices": ["one", "two"]},
            {"do": "report", "seconds": 0.2, "devices": 2, "qos": 0, "patience": 0.5},
        ]
        lines = [json.dumps({"within": 10, "key": KEY, "of_hub": True, **order}) for order in orders]
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.fleet"],
            cwd=ROOT,
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    connected, reported = (json.loads(line) for line in done.stdout.splitlines())
    assert connected["connected"] == 2
    assert complaint in reported["error"]
