"""Fixtures that several test files need: a device on a local hub, and an app that is connected to it."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.app import App
from tests.hub_backend import KEY, Backend
from tests.leaks import leaks
from tests.waiting import PATIENCE
from twin_device import TwinClient
from twin_device.hub import Device, LocalHub


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, a file runs in one, and all that need the SDKs' ports in one."""
    for item in items:
        fixed = item.path.parent.name == "interop"
        item.add_marker(pytest.mark.xdist_group("interop" if fixed else item.path.name))


# ---------------------------------------------------------------------- no key in what is logged or printed


def pytest_configure(config: pytest.Config) -> None:
    # Who hands the tests out to other processes runs none itself.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        folder = tempfile.TemporaryDirectory(prefix="leaks-")
        config.add_cleanup(folder.cleanup)
        leaks.watch(folder.name)
        _read_what_tests_read()


def _read_what_tests_read() -> None:
    """What capsys and capfd give a test is in no report of it."""
    readouterr = pytest.CaptureFixture.readouterr

    def read(self: "pytest.CaptureFixture[Any]") -> Any:
        told = readouterr(self)
        for name, text in told._asdict().items():
            leaks.look(os.fsdecode(text), f"{name}, captured")
        return told

    pytest.CaptureFixture.readouterr = read  # type: ignore[method-assign]  # in place of it


@pytest.fixture(autouse=True)
def _no_secret_is_told() -> Iterator[None]:
    """No test may make anything log or print a key or a signature, here or in a process that it starts."""
    yield
    assert leaks.found() == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """What was printed here, and by processes that have inherited this one's output, is in the report."""
    report = yield
    for name, text in report.sections if report.when == "teardown" and report.passed else ():
        for line in filter(leaks.SECRET.search, text.splitlines()):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: {name}: {line[:500]}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process may have outlived its test."""
    if late := leaks.found():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        sys.stderr.write("\n".join(["told after the last test:", *late, ""]))


@pytest.fixture
def device(local_hub: LocalHub) -> Device:
    return local_hub.create_device("sensor-temp-042", desired={"telemetryInterval": 30})


@pytest.fixture
def make_app(local_hub: LocalHub) -> Iterator[Callable[..., App]]:
    """make_app(device, **options): an App whose client is not connected yet and is closed at the end."""
    made: list[App] = []

    def make(device: Device, **options: Any) -> App:
        options = {"ca_file": local_hub.ca_file, "timeout": PATIENCE, **options}
        made.append(App(TwinClient.from_connection_string(device.connection_string, **options)))
        return made[-1]

    yield make
    for app in made:
        app.client.close()


@pytest.fixture
def app(make_app: Callable[..., App], device: Device) -> App:
    """A connected app that was given its first document."""
    app = make_app(device)
    app.client.connect()
    app.next_patch()
    return app


@pytest.fixture
def backend() -> Iterator[Backend]:
    with LocalHub(https_port=0, owner_key=KEY) as hub:
        backend = Backend(hub)
        yield backend
        backend.connection.close()
