"""No key and no signature in any log or output: conftest.py reads what the whole suite logs and prints."""

import asyncio
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.leaks import leaks
from tests.vm import ROOT, micropython
from tests.waiting import PATIENCE
from twin_device import TwinClient
from twin_device.hub import Device, LocalHub

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
SECRETS = [
    f"the key is {KEY}",
    f"HostName=h;DeviceId=d;SharedAccessKey={KEY}",
    "SharedAccessKey=c2hvcnRrZXk=",
    "SharedAccessSignature sr=h&sig=Q24ahLH4tHeubVhDv5kUKA2xiVvnqPFhqSD%2FqI&se=1",
    "key=Q24ahLH4tHeubVhDv5kUKA2xiVvn1PFhqSD%2FqIqIqIq%3D",
    "b'0123456789abcdef0123456789abcdef'",
    "-----BEGIN EC PRIVATE KEY-----",
]


@pytest.mark.parametrize("text", SECRETS)
@pytest.mark.parametrize("name", ["twin_device.somewhere", "paho", "asyncio", None])
def test_what_is_logged_is_read(text: str, name: str | None) -> None:
    logging.getLogger(name).debug("connecting: %s", text)
    (found,) = leaks.found()
    assert text in found
    assert found.startswith(f"log {name or 'root'}, {__file__}:")


def test_what_a_loggers_level_and_a_filter_hide_is_read() -> None:
    logger = logging.getLogger("elsewhere")
    logger.setLevel(logging.CRITICAL)
    logger.propagate = False
    logger.info("%s", KEY)
    try:
        raise ValueError(KEY)
    except ValueError:
        logger.debug("it failed", exc_info=True)
    assert len(leaks.found()) == 2


def test_what_is_shown_does_not_change(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("another").debug("quiet")
    logging.getLogger("another").warning("aloud")
    assert [record.message for record in caplog.records] == ["aloud"]


def test_what_is_no_secret_may_be_told() -> None:
    logging.getLogger("twin_device").debug("sensor-temp-042 -> $iothub/twin/GET/?$rid=1 SharedAccessKey=...")
    logging.getLogger("twin_device").debug("%s%s", "a" * 20, KEY)
    assert leaks.found() == []


def test_a_device_and_its_hub_log_and_are_read(local_hub: LocalHub, device: Device) -> None:
    seen = leaks.seen()
    with TwinClient.from_connection_string(
        device.connection_string, ca_file=local_hub.ca_file, timeout=PATIENCE
    ) as client:
        client.report({"a": 1})
    assert leaks.seen() > seen + 4


# ---------------------------------------------------------------------- other processes

PRINTS = f"print('{KEY}', flush=True)"
FAILS = f"import sys; sys.stderr.write('{KEY}'); sys.exit(1)"
LOGS = f"import logging; logging.getLogger('deep.inside').debug('%s', '{KEY}')"
# What has no newline, comes in pieces, or is read by nobody.
PIECES = f"import os; [os.write(1, bytes([one])) for one in b'{KEY}']"


def command(program: str) -> list[str]:
    # The program's text is part of the command, which is told where something is found.
    return [sys.executable, "-c", "import os; exec(os.environ['PROGRAM'])", program.split("'")[0]]


def run(program: str, **options: Any) -> Any:
    environment = {**os.environ, "PROGRAM": program}
    return subprocess.run(command(program), env=environment, timeout=60, **options)


def inside(program: str, options: str) -> str:
    """A program that starts the program."""
    return f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}]{options})"


PIPE: dict[str, Any] = {"stdout": subprocess.PIPE}
# where it is found, what tells it, how it is started
READINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("stdout of", PRINTS, {"capture_output": True}),
    ("stdout of", PRINTS, {**PIPE, "text": True}),
    ("stdout of", PRINTS, {"stdout": subprocess.DEVNULL}),
    ("stdout of", PIECES, PIPE),
    ("stderr of", FAILS, {"capture_output": True, "encoding": "utf-8"}),
    ("stderr of", FAILS, {"stderr": subprocess.DEVNULL}),
    ("stdout of", FAILS, {**PIPE, "stderr": subprocess.STDOUT}),
    ("log deep.inside", LOGS, {}),
    ("stdout of", inside(PRINTS, ""), PIPE),
    ("stdout of", inside(PRINTS, ", stdout=subprocess.PIPE"), {}),
    ("log deep.inside", inside(LOGS, ", env={}"), {}),
]


@pytest.mark.parametrize(("where", "program", "options"), READINGS)
def test_what_a_process_tells_is_read(where: str, program: str, options: dict[str, Any]) -> None:
    done = run(program, **options)
    found = leaks.found()
    assert found
    assert all(KEY in one and one.startswith(where) for one in found), found
    if options.get("capture_output"):
        assert KEY in str(done.stdout or done.stderr)


@pytest.mark.parametrize("reads", ["a line", "nothing"])
def test_what_a_test_reads_as_it_comes_or_not_at_all_is_read(reads: str) -> None:
    environment = {**os.environ, "PROGRAM": f"print('first', flush=True); {PRINTS}"}
    with subprocess.Popen(command(PRINTS), stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        if reads == "a line":
            assert process.stdout.readline() == "first\n"
        process.wait(PATIENCE)
    assert KEY in leaks.found()[0]


def test_a_board_is_read(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import os, sys; print(os.getenv('KEY')); sys.stderr.write(os.getenv('KEY'))"
    environment = {**os.environ, "KEY": KEY}
    done = subprocess.run([micropython(), "-c", program], stdout=subprocess.PIPE, env=environment, text=True)
    assert done.stdout == KEY + "\n"
    assert capfd.readouterr().err == KEY
    assert {one.partition(" ")[0] for one in leaks.found()} == {"stdout", "err,"}


@pytest.mark.parametrize(("arguments", "ours"), [(["-m pip install x"], False), (["pipes"], True)])
def test_pip_is_left_alone(arguments: list[str], ours: bool) -> None:
    program = f"import os; print({leaks.FOLDER!r} in os.environ)"
    done = subprocess.run([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    assert done.stdout == f"{ours}\n"


def test_what_asyncio_starts_is_read() -> None:
    async def play() -> bytes:
        process = await asyncio.create_subprocess_exec(
            *command(PRINTS), stdout=asyncio.subprocess.PIPE, env={**os.environ, "PROGRAM": PRINTS}
        )
        told, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
        return told

    assert asyncio.run(play()).decode() == KEY + "\n"
    assert KEY in leaks.found()[0]


@pytest.mark.parametrize(
    ("command", "exempt"),
    [
        ("python -m twin_device.cli hub run --json", True),
        ("python -m twin_device.cli token", True),
        ("python -m twin_device.cli hub device create a", True),
        ("python -m twin_device.cli hub device list", False),
        ("python -m twin_device.cli get", False),
        ("micropython main.py", False),
    ],
)
def test_only_what_was_asked_for_secrets_may_print_them(command: str, exempt: bool) -> None:
    assert leaks.is_exempt(command) is exempt
    assert all(one.reason for one in leaks.EXEMPT)


PYTEST = f"""
import sys

def test_prints():
    print("{KEY}")

def test_prints_for_another_test():
    pass
"""


def test_a_test_that_tells_a_secret_fails(tmp_path: Any) -> None:
    """pytest itself, with this suite's conftest.py."""
    (tmp_path / "test_it.py").write_text(PYTEST)
    arguments = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-q", str(tmp_path)]
    done = subprocess.run(
        [*arguments, "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    leaks.found()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_prints: Captured stdout call" in done.stdout
    assert "2 passed, 1 error" in done.stdout
