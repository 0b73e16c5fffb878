"""Kill -9 during 1,000 reports with a store: what was answered or accepted is in the hub afterwards."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.merge_patch import merged
from tests.reporter import REPORTS, patch_of
from tests.waiting import PATIENCE
from twin_device import TwinClient
from twin_device.hub import Device, LocalHub

ROOT = Path(__file__).parents[1]


def answering(hub: LocalHub) -> None:
    pass


def throttling(hub: LocalHub) -> None:
    hub.fault("answer_status", operation="report", status=429)


def losing_answers(hub: LocalHub) -> None:
    hub.fault("answer_lost", operation="report")


def hanging_up(hub: LocalHub) -> None:
    hub.fault("disconnect", operation="report")


def away(hub: LocalHub) -> None:
    hub.stop_listening()


def after(reports: int) -> Any:
    """What the hub holds after so many reports."""
    document: Any = {}
    for number in range(reports):
        document = merged(document, patch_of(number))
    return document


def killed(
    device: Device, hub: LocalHub, store: Path, how: str, does: Callable[[LocalHub], None], at: int
) -> int:
    """How many reports had returned when it was killed."""
    command = [sys.executable, "-m", "tests.reporter", device.connection_string, hub.ca_file, str(store), how]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            does(hub)
            process.stdin.write("\n")
            process.stdin.flush()
            returned = 0
            for line in process.stdout:
                returned = int(line) + 1
                if returned == at:
                    process.kill()
        finally:
            process.kill()
    return returned


@pytest.mark.parametrize(
    ("how", "does", "at"),
    [
        ("answered", answering, 500),
        ("accepted", answering, 1),
        ("accepted", answering, 700),
        ("accepted", throttling, 100),
        ("accepted", losing_answers, 200),
        ("accepted", hanging_up, 100),
        ("accepted", away, REPORTS),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_nothing_is_lost(
    local_hub: LocalHub, tmp_path: Path, how: str, does: Callable[[LocalHub], None], at: int
) -> None:
    device = local_hub.create_device("dev")
    store = tmp_path / "twin.json"
    returned = killed(device, local_hub, store, how, does, at)
    assert returned >= at
    local_hub.clear_faults()
    local_hub.listen_again()
    options: dict[str, Any] = {"ca_file": local_hub.ca_file, "store": store, "timeout": PATIENCE}
    with TwinClient.from_connection_string(device.connection_string, **options) as client:
        # The reports of before go first.
        client.report({"last": True})
        reported = device.reported
        assert client.reported == reported
    assert reported.pop("last") is True
    # Killed in the middle of the next one, which may have been accepted or not.
    assert reported in (after(returned), after(returned + 1))
