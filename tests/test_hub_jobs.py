"""Jobs: chosen devices, start times, cancelling, what became of each device, and over a restart."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.hub_backend import KEY, Answer, Backend
from tests.hub_wire import METHODS, Wire, online, publish
from tests.waiting import PATIENCE, wait_until
from twin_device import TwinClient
from twin_device.hub import LocalHub

UPDATE: dict[str, Any] = {
    "type": "scheduleUpdateTwin",
    "updateTwin": {"etag": "*", "properties": {"desired": {"interval": 60}}},
    "queryCondition": "*",
}
METHOD: dict[str, Any] = {
    "type": "scheduleDeviceMethod",
    "cloudToDeviceMethod": {"methodName": "reboot", "payload": None, "responseTimeoutInSeconds": 30},
    "queryCondition": "*",
}
STATISTICS = ("deviceCount", "succeededCount", "failedCount", "runningCount", "pendingCount")


def create(backend: Backend, body: Any, job: str = "j1") -> Answer:
    return backend.ask("PUT", f"/jobs/v2/{job}", body)


def done(backend: Backend, job: str = "j1", status: str = "completed") -> dict[str, Any]:
    """The job once it has this status."""

    def look() -> Any:
        found = backend.ask("GET", f"/jobs/v2/{job}").body
        return found if found["status"] == status else None

    found: dict[str, Any] = wait_until(look, f"job {job} is {status}")
    return found


def statistics(job: dict[str, Any]) -> tuple[int, ...]:
    return tuple(job["deviceJobStatistics"][name] for name in STATISTICS)


def outcomes(backend: Backend, job: str = "j1") -> dict[str, dict[str, Any]]:
    text = f"SELECT * FROM devices.jobs WHERE devices.jobs.jobId = '{job}'"
    answer = backend.ask("POST", "/devices/query", {"query": text})
    assert answer.headers["x-ms-item-type"] == "DeviceJob"
    return {row["deviceId"]: row for row in answer.body}


def later(seconds: float) -> str:
    return (datetime.now(timezone.utc) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def test_a_twin_update_reaches_every_device_that_the_condition_chooses(backend: Backend) -> None:
    hub = backend.hub
    for number in range(45):
        hub.create_device(f"d{number}", tags={"site": "A" if number % 3 else "B"})
    hub.create_device("d1/m", tags={"site": "A"})
    with TwinClient.from_connection_string(
        hub.device("d1").connection_string, ca_file=hub.ca_file, timeout=PATIENCE
    ) as client:
        answer = create(backend, {**UPDATE, "jobId": "j1", "queryCondition": "tags.site = 'A'"})
        assert (answer.status, answer.body["status"], answer.body["type"]) == (
            200,
            "queued",
            "scheduleUpdateTwin",
        )
        assert "deviceJobStatistics" not in answer.body
        job = done(backend)
        wait_until(lambda: client.desired == {"interval": 60}, "the device is told")
    assert statistics(job) == (30, 30, 0, 0, 0)
    assert job["queryCondition"] == "tags.site = 'A'"
    assert job["maxExecutionTimeInSeconds"] == 3600
    assert job["updateTwin"] == UPDATE["updateTwin"]
    assert job["createdTime"] <= job["endTime"]
    changed = {one.id for one in hub.devices if one.desired == {"interval": 60}}
    assert changed == {f"d{number}" for number in range(45) if number % 3}
    assert {hub.device(name).desired_version for name in changed} == {2}
    rows = outcomes(backend)
    assert rows.keys() == changed
    row = rows["d1"]
    assert (row["jobId"], row["jobType"], row["status"]) == ("j1", "scheduleUpdateTwin", "completed")
    assert row["startTimeUtc"] <= row["endTimeUtc"] == row["lastUpdatedDateTimeUtc"]
    assert (row["outcome"], row["error"]) == ({"deviceMethodResponse": None}, None)


def test_tags_and_desired_in_one_step(backend: Backend) -> None:
    device = backend.hub.create_device("a", desired={"old": 1, "b": 2}, tags={"floor": 1})
    work = {"tags": {"floor": 2}, "properties": {"desired": {"old": None}, "reported": {"x": 1}}}
    create(backend, {**UPDATE, "updateTwin": {"deviceId": "ignored", **work}})
    done(backend)
    twin = device.twin
    assert (device.desired, twin["tags"], device.reported) == ({"b": 2}, {"floor": 2}, {})
    assert (twin["etag"], twin["version"]) == ("AAAAAAAAAAI=", 3)


def test_a_device_that_refuses_fails_alone(backend: Backend) -> None:
    for name, size in (("big", 31_000), ("small", 0)):
        backend.hub.create_device(name, desired={f"k{n}": "x" * 3000 for n in range(size // 3000)})
    create(backend, {**UPDATE, "updateTwin": {"properties": {"desired": {"more": "y" * 4000}}}})
    assert statistics(done(backend)) == (2, 1, 1, 0, 0)
    row = outcomes(backend)["big"]
    assert row["status"] == "failed"
    assert row["error"]["code"] == "403100"
    assert backend.hub.device("big").desired_version == 1
    assert backend.hub.device("small").desired == {"more": "y" * 4000}


def test_no_device_is_no_failure(backend: Backend) -> None:
    create(backend, {**UPDATE, "queryCondition": "deviceId IN ['a', 'b']"})
    assert statistics(done(backend)) == (0, 0, 0, 0, 0)


# ---------------------------------------------------------------------- start time and cancelling


def test_a_job_waits_for_its_time(backend: Backend) -> None:
    device = backend.hub.create_device("a")
    answer = create(backend, {**UPDATE, "startTime": later(0.3)})
    assert answer.body["status"] == "scheduled"
    assert "deviceJobStatistics" not in answer.body
    assert device.desired_version == 1
    # Chosen when it starts, not when it was made.
    backend.hub.create_device("late")
    job = done(backend)
    assert statistics(job) == (2, 2, 0, 0, 0)
    assert job["endTime"] >= job["startTime"]


TIMES = [
    ("2020-01-01T00:00:00Z", True),
    ("2020-01-01T00:00:00.1234567Z", True),
    ("2020-01-01 00:00:00", True),
    ("2020-01-01T00:00", True),
    ("", True),
    (None, True),
    ("2999-01-01T00:00:00+02:00", False),
    ("2999-01-01T00:00:00-0230", False),
]


@pytest.mark.parametrize(("text", "over"), TIMES)
def test_times_in_many_forms(backend: Backend, text: Any, over: bool) -> None:
    answer = create(backend, {**UPDATE, "startTime": text})
    assert answer.body["status"] == ("queued" if over else "scheduled")
    if not over:
        assert answer.body["startTime"] == (
            "2998-12-31T22:00:00.000000Z" if "+" in text else "2999-01-01T02:30:00.000000Z"
        )


def test_cancelling_before_it_starts(backend: Backend) -> None:
    device = backend.hub.create_device("a")
    create(backend, {**UPDATE, "startTime": later(3600)})
    answer = backend.ask("POST", "/jobs/v2/j1/cancel")
    assert (answer.status, answer.body["status"]) == (200, "cancelled")
    assert device.desired_version == 1
    again = backend.ask("POST", "/jobs/v2/j1/cancel")
    assert (again.status, again.code) == (400, "InvalidOperation")
    assert backend.ask("GET", "/jobs/v2/j1").body["status"] == "cancelled"


def answering(wire: Wire, status: int = 200) -> None:
    message = wire.message()
    assert message.topic.startswith("$iothub/methods/POST/reboot/")
    request_id = message.topic.partition("$rid=")[2]
    wire.send(publish(f"$iothub/methods/res/{status}/?$rid={request_id}", b'{"done": true}'))


def test_cancelling_while_it_runs_keeps_what_is_done(backend: Backend) -> None:
    hub = backend.hub
    with ExitStack() as stack:
        wires = []
        for name in ("a", "b"):
            hub.create_device(name, KEY)
            wires.append(stack.enter_context(online(hub.mqtts_port, name, KEY, METHODS, ca_file=hub.ca_file)))
        create(backend, METHOD)
        answering(wires[0])
        wait_until(lambda: outcomes(backend).get("a", {}).get("status") == "completed", "a has answered")
        running = backend.ask("GET", "/jobs/v2/j1").body
        assert (running["status"], statistics(running)) == ("running", (2, 1, 0, 1, 0))
        backend.ask("POST", "/jobs/v2/j1/cancel")
        job = backend.ask("GET", "/jobs/v2/j1").body
        assert (job["status"], statistics(job)) == ("cancelled", (2, 1, 0, 0, 0))
        assert outcomes(backend)["b"]["status"] == "cancelled"


# ---------------------------------------------------------------------- direct methods


def test_a_method_is_asked_of_every_device(backend: Backend) -> None:
    hub = backend.hub
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        for name in ("a", "b"):
            hub.create_device(name, KEY)
            wire = stack.enter_context(online(hub.mqtts_port, name, KEY, METHODS, ca_file=hub.ca_file))
            pool.submit(answering, wire, 200 if name == "a" else 500)
        hub.create_device("offline")
        create(backend, METHOD)
        assert statistics(done(backend)) == (3, 2, 1, 0, 0)
    rows = outcomes(backend)
    assert rows["a"]["outcome"] == {"deviceMethodResponse": {"status": 200, "payload": {"done": True}}}
    assert rows["b"]["outcome"]["deviceMethodResponse"]["status"] == 500
    assert (rows["offline"]["status"], rows["offline"]["error"]["code"]) == ("failed", "404103")


def test_a_job_has_a_longest_time(backend: Backend) -> None:
    hub = backend.hub
    hub.create_device("a", KEY)
    with online(hub.mqtts_port, "a", KEY, METHODS, ca_file=hub.ca_file):
        create(backend, {**METHOD, "maxExecutionTimeInSeconds": 1})
        assert statistics(done(backend)) == (1, 0, 1, 0, 0)
    assert outcomes(backend)["a"]["error"]["code"] == "JobTimedOut"


# ---------------------------------------------------------------------- what is refused, and lists

BAD: list[tuple[str, Any, int, str]] = [
    ("no type", {**UPDATE, "type": None}, 400, "ArgumentInvalid"),
    ("an unknown type", {**UPDATE, "type": "export"}, 400, "ArgumentInvalid"),
    ("no condition", {**UPDATE, "queryCondition": None}, 400, "ArgumentInvalid"),
    ("a condition that is none", {**UPDATE, "queryCondition": "tags.site ="}, 400, "ArgumentInvalid"),
    ("no update", {**UPDATE, "updateTwin": None}, 400, "ArgumentInvalid"),
    ("an etag", {**UPDATE, "updateTwin": {"etag": "AAAA"}}, 400, "ArgumentInvalid"),
    ("a bad key", {**UPDATE, "updateTwin": {"tags": {"a b": 1}}}, 400, "ArgumentInvalid"),
    ("a bad section", {**UPDATE, "updateTwin": {"properties": {"desired": [1]}}}, 400, "ArgumentInvalid"),
    ("no properties", {**UPDATE, "updateTwin": {"properties": 5}}, 400, "ArgumentInvalid"),
    ("no method", {**METHOD, "cloudToDeviceMethod": {}}, 400, "ArgumentInvalid"),
    ("another id", {**UPDATE, "jobId": "j2"}, 400, "ArgumentInvalid"),
    ("a bad time", {**UPDATE, "startTime": "tomorrow"}, 400, "ArgumentInvalid"),
    ("a 13th month", {**UPDATE, "startTime": "2026-13-01T00:00:00Z"}, 400, "ArgumentInvalid"),
    ("year 1", {**UPDATE, "startTime": "0001-01-01T00:00:00+14:00"}, 400, "ArgumentInvalid"),
    ("a time as a number", {**UPDATE, "startTime": 5}, 400, "ArgumentInvalid"),
    ("no limit", {**UPDATE, "maxExecutionTimeInSeconds": -1}, 400, "ArgumentInvalid"),
    ("a limit as a text", {**UPDATE, "maxExecutionTimeInSeconds": "60"}, 400, "ArgumentInvalid"),
    ("no object", [UPDATE], 400, "IotHubFormatError"),
]


@pytest.mark.parametrize(("body", "status", "code"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_what_is_no_job(backend: Backend, body: Any, status: int, code: str) -> None:
    device = backend.hub.create_device("a")
    answer = create(backend, body)
    assert (answer.status, answer.code) == (status, code)
    assert backend.ask("GET", "/jobs/v2/query").body == []
    assert device.desired_version == 1


@pytest.mark.parametrize("name", ["a.b", "x" * 65, "a%20b", "é"])
def test_an_id_that_no_job_has(backend: Backend, name: str) -> None:
    answer = create(backend, UPDATE, quote(name, safe="%"))
    assert (answer.status, answer.code) == (400, "ArgumentInvalid")


def test_one_job_has_an_id_and_unknown_ones_are_unknown(backend: Backend) -> None:
    assert create(backend, UPDATE).status == 200
    again = create(backend, UPDATE)
    assert (again.status, again.code) == (409, "JobAlreadyExists")
    unknown = backend.ask("GET", "/jobs/v2/nobody")
    assert (unknown.status, unknown.body["type"], unknown.body["status"]) == (200, "unknown", "unknown")
    cancelled = backend.ask("POST", "/jobs/v2/nobody/cancel")
    assert (cancelled.status, cancelled.code) == (404, "JobNotFound")


def test_jobs_are_listed_by_type_and_status_in_pages(backend: Backend) -> None:
    for number in range(3):
        create(backend, UPDATE, f"u{number}")
    create(backend, METHOD, "m")
    create(backend, {**METHOD, "startTime": later(3600)}, "s")
    for job in ("u0", "u1", "u2", "m"):
        done(backend, job)

    def listed(query: str, **headers: str) -> Any:
        return backend.ask("GET", f"/jobs/v2/query{query}", **headers)

    def ids(answer: Answer) -> list[str]:
        return [job["jobId"] for job in answer.body]

    assert ids(listed("")) == ["u0", "u1", "u2", "m", "s"]
    assert ids(listed("?jobType=&jobStatus=")) == ["u0", "u1", "u2", "m", "s"]
    assert ids(listed("?jobType=scheduleDeviceMethod")) == ["m", "s"]
    assert ids(listed("?jobType=scheduleUpdateTwin&jobStatus=completed")) == ["u0", "u1", "u2"]
    assert ids(listed("?jobStatus=scheduled")) == ["s"]
    first = listed("?jobType=scheduleUpdateTwin", x_ms_max_item_count="2")
    assert ids(first) == ["u0", "u1"]
    token = first.headers["x-ms-continuation"]
    rest = listed("?jobType=scheduleUpdateTwin", x_ms_max_item_count="2", x_ms_continuation=token)
    assert (ids(rest), rest.headers["x-ms-continuation"]) == (["u2"], None)
    assert listed("", x_ms_continuation=token).status == 400


def test_finished_jobs_make_room(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twin_device.hub.jobs._MAX_JOBS", 2)
    create(backend, {**UPDATE, "startTime": later(3600)}, "s")
    create(backend, UPDATE, "j1")
    done(backend)
    assert create(backend, {**UPDATE, "startTime": later(3600)}, "t").status == 200
    assert backend.ask("GET", "/jobs/v2/j1").body["status"] == "unknown"
    full = create(backend, UPDATE, "u")
    assert (full.status, full.code) == (403, "JobQuotaExceeded")


# ---------------------------------------------------------------------- over a restart


@pytest.fixture
def restarted(tmp_path: Path) -> Callable[[], LocalHub]:
    return lambda: LocalHub(https_port=0, owner_key=KEY, data=tmp_path, certificates=tmp_path / "c")


def test_jobs_come_back_and_go_on(restarted: Callable[[], LocalHub]) -> None:
    with restarted() as hub:
        hub.create_device("a", KEY)
        backend = Backend(hub)
        create(backend, UPDATE, "done")
        finished = done(backend, "done")
        create(backend, {**UPDATE, "startTime": later(1)}, "waits")
        with online(hub.mqtts_port, "a", KEY, METHODS, ca_file=hub.ca_file) as wire:
            create(backend, METHOD, "runs")
            wire.message()
            assert backend.ask("GET", "/jobs/v2/runs").body["status"] == "running"
            backend.connection.close()
            hub.close()
    with restarted() as hub:
        backend = Backend(hub)
        assert backend.ask("GET", "/jobs/v2/done").body == finished
        assert outcomes(backend, "done")["a"]["status"] == "completed"
        # It had been asked and did not answer; now it is not there.
        assert statistics(done(backend, "runs")) == (1, 0, 1, 0, 0)
        assert statistics(done(backend, "waits")) == (1, 1, 0, 0, 0)
        assert hub.device("a").desired_version == 3
        backend.connection.close()


def test_a_kill_in_the_middle_does_no_device_twice(tmp_path: Path) -> None:
    """Killed while a job updates 1,000 twins: the rest is done after the restart, none is done twice."""
    program = (
        "import sys, threading\n"
        "from twin_device.hub import LocalHub\n"
        "folder, key = sys.argv[1:]\n"
        "hub = LocalHub(None, https_port=0, owner_key=key, data=folder, certificates=folder)\n"
        "for number in range(1000): hub.create_device(f'd{number}')\n"
        "hub.start()\n"
        "print(hub.https_port, flush=True)\n"
        "threading.Event().wait(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), KEY], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())

            class There:
                ca_file, https_port = str(tmp_path / "ca.pem"), port

            backend = Backend(There())  # type: ignore[arg-type]  # all that it looks at
            create(backend, UPDATE)
            wait_until(
                lambda: backend.ask("GET", "/twins/d10").body["properties"]["desired"].get("interval"),
                "the job is at work",
            )
        finally:
            os.kill(process.pid, signal.SIGKILL)
            backend.connection.close()
    with closing(sqlite3.connect(tmp_path / "hub.db")) as database:
        rows = database.execute("SELECT count(*) FROM outcomes WHERE outcome LIKE '%completed%'")
        assert 0 < rows.fetchone()[0] < 1000, "killed too early or too late to show anything"
    with LocalHub(None, https_port=0, owner_key=KEY, data=tmp_path, certificates=tmp_path) as hub:
        backend = Backend(hub)
        job = done(backend)
        backend.connection.close()
        assert statistics(job) == (1000, 1000, 0, 0, 0)
        assert {one.desired_version for one in hub.devices} == {2}


def test_a_job_ends_with_its_hub(backend: Backend) -> None:
    """Nothing of it goes on, and closing does not wait for it."""
    create(backend, {**UPDATE, "startTime": later(3600)})
    begun = time.monotonic()
    backend.hub.close()
    assert time.monotonic() - begun < PATIENCE
