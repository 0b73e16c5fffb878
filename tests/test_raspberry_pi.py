"""The gateway as a service: its unit, its files, and how a release is put in place and taken back.

None of this has run on a Raspberry Pi, and here no systemd runs either: the unit is given to systemd-analyze,
its command is run as it stands with what systemd would set, and release.sh meets a systemctl that is made up.
"""

import configparser
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENCE
from twin_device import service
from twin_device.hub import LocalHub

FOLDER = Path(__file__).parents[1] / "hardware" / "raspberry_pi"
UNIT = FOLDER / "twin-gateway.service"
COMMAND = "/opt/twin-gateway/current/bin/twin-device"


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # as its documentation has it
    parser.read(UNIT)
    return parser


def systemd_analyze(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = shutil.which("systemd-analyze")
    if command is None:
        pytest.skip("systemd-analyze is not on PATH: apt-get install systemd")
    return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=60)


# ---------------------------------------------------------------------- the unit


def test_systemd_has_nothing_to_say_against_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text()
    # It looks for the command, which is not installed here.
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace(COMMAND, "/bin/true"))
    assert copy.read_text() != text
    done = systemd_analyze("verify", str(copy))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    copy.write_text(copy.read_text().replace("NoNewPrivileges", "NoNewPrivilege"))
    assert "NoNewPrivilege" in systemd_analyze("verify", str(copy)).stderr


def test_the_unit_is_hardened(tmp_path: Path) -> None:
    if "--threshold" not in systemd_analyze("--help").stdout:
        pytest.skip("this systemd-analyze does not judge units that are not loaded")
    done = systemd_analyze("security", "--offline=yes", "--threshold=20", str(UNIT))
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_unit_agrees_with_the_gateway() -> None:
    told = unit()["Service"]
    assert told["Type"] == "notify"
    # It speaks every few seconds at least, and often enough for half of this.
    assert int(told["WatchdogSec"]) >= 4 * service._PROGRESS
    assert f"/run/{told['RuntimeDirectory']}/status.json" == service._STATUS_DEFAULT
    assert told["ExecReload"] == "/bin/kill -HUP $MAINPID"
    # A bad file is exit status 2.
    assert told["RestartPreventExitStatus"] == "2"


def test_the_units_command_runs_as_it_stands(local_hub: LocalHub, tmp_path: Path) -> None:
    devices = [local_hub.create_device(f"room-{n}", desired={"telemetryInterval": 15 + n}) for n in range(3)]
    devices[2].patch_desired({"telemetryInterval": "often"})
    etc, runtime, state = tmp_path / "etc", tmp_path / "run", tmp_path / "lib"
    for folder in (etc, runtime, state):
        folder.mkdir()
    shutil.copy(FOLDER / "app.py", etc)
    fleet = etc / "devices.csv"
    fleet.write_text(
        "where,connection_string\n" + "".join(f"here,{one.connection_string}\n" for one in devices)
    )
    fleet.chmod(0o640)
    (given,) = [
        line.partition("=")[2]
        for line in (FOLDER / "gateway.env.example").read_text().splitlines()
        if line.startswith("OPTIONS=")
    ]
    given += f" --ca-file {local_hub.ca_file}"
    command = unit()["Service"]["ExecStart"].replace("$OPTIONS", given)
    command = command.replace(COMMAND, f"{sys.executable} -m twin_device.cli")
    command = command.replace("/etc/twin-gateway", str(etc))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(2 * PATIENCE)
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "30000000",
            "RUNTIME_DIRECTORY": str(runtime),
            "STATE_DIRECTORY": str(state),
        }
        with subprocess.Popen(
            shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                assert manager.recv(65536) == b"READY=1"
                for n, device in enumerate(devices[:2]):
                    device.wait_for({"telemetryInterval": 15 + n}, timeout=PATIENCE)
                while b"3 synchronised" not in manager.recv(65536):
                    pass
                assert (runtime / "status.json").exists()
                process.send_signal(signal.SIGTERM)
                output, errors = process.communicate(timeout=PATIENCE)
            finally:
                process.kill()
    assert (process.returncode, errors) == (0, "")
    assert "room-2: telemetryInterval 'often' is not from 1 to 86400" in output
    assert devices[2].reported == {}
    assert not (runtime / "status.json").exists()
    assert b'"reported":{"telemetryInterval":15}' in (state / "room-0.json").read_bytes()


def test_the_examples_are_what_they_show() -> None:
    fleet = service.read_fleet(str(FOLDER / "devices.example.csv"))
    assert list(fleet) == ["room-1", "room-2"]


# ---------------------------------------------------------------------- releases

# Stands in for python3: `-m venv FOLDER` makes a folder whose pip makes a twin-device that is as good as the
# requirement says.
PYTHON = r"""#!/bin/sh
[ "$1 $2" = "-m venv" ] || exit 9
mkdir -p "$3/bin"
cat > "$3/bin/pip" <<'PIP'
#!/bin/sh
for last; do :; done
case $last in missing) exit 1 ;; esac
case $last in sick) health=1 ;; dead) health=2 ;; *) health=0 ;; esac
cat > "${0%pip}twin-device" <<END
#!/bin/sh
[ "\$1" = --version ] && { echo "twin-device $last"; exit; }
exit $health
END
chmod +x "${0%pip}twin-device"
PIP
chmod +x "$3/bin/pip"
"""
# Notes what is asked of it. "dead" never comes up; the others do.
SYSTEMCTL = """#!/bin/sh
echo "$*" >> "$ROOT/systemctl"
case $1 in is-enabled) [ -e "$ROOT/enabled" ] || exit 1 ;; esac
"""
# Time is made up, too: each release has a second of its own.
DATE = """#!/bin/sh
count=$(cat "$ROOT/count" 2>/dev/null || echo 0)
echo $((count + 1)) > "$ROOT/count"
echo "T$count"
"""


class Machine:
    def __init__(self, folder: Path) -> None:
        self.root = folder / "opt"
        self.root.mkdir()
        commands = folder / "bin"
        commands.mkdir()
        for name, source in (
            ("python", PYTHON),
            ("systemctl", SYSTEMCTL),
            ("date", DATE),
            ("sleep", "#!/bin/sh\n"),
            ("sync", "#!/bin/sh\n"),
        ):
            (commands / name).write_text(source)
            (commands / name).chmod(0o755)
        self.environment = {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "ROOT": str(self.root),
            "PYTHON": str(commands / "python"),
            "PATIENCE": "3",
        }

    def release(self, *arguments: str) -> Any:
        return subprocess.run(
            ["sh", str(FOLDER / "release.sh"), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment,
        )

    def enable(self) -> None:
        (self.root / "enabled").touch()

    @property
    def restarts(self) -> int:
        noted = self.root / "systemctl"
        return noted.read_text().count("restart twin-gateway\n") if noted.exists() else 0

    def running(self, link: str = "current") -> str:
        """Which release a link leads to, as that names itself."""
        command = self.root / link / "bin" / "twin-device"
        if not command.exists():
            return ""
        done = subprocess.run([str(command), "--version"], capture_output=True, text=True, timeout=60)
        return done.stdout.strip().removeprefix("twin-device ")

    @property
    def releases(self) -> list[str]:
        return sorted(path.name for path in (self.root / "releases").glob("*"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    if shutil.which("flock") is None:
        pytest.skip("flock is not on PATH: it is part of Linux' util-linux")
    return Machine(tmp_path)


def test_the_first_release_waits_for_the_service_to_be_enabled(machine: Machine) -> None:
    done = machine.release("install", "one")
    assert done.returncode == 0, done.stderr
    assert "not enabled, so nothing was started" in done.stderr
    assert (machine.running(), machine.running("previous"), machine.restarts) == ("one", "", 0)


def test_an_update_is_a_switch_and_so_is_the_way_back(machine: Machine) -> None:
    machine.enable()
    for name in ("one", "two", "three"):
        done = machine.release("install", name)
        assert done.returncode == 0, done.stderr
    assert (machine.running(), machine.running("previous")) == ("three", "two")
    assert machine.restarts == 3
    # Two are enough for a card.
    assert machine.releases == ["T1", "T2"]
    assert machine.release("list").stdout == "T1 (previous)\nT2 (current)\n"
    done = machine.release("rollback")
    assert done.returncode == 0, done.stderr
    assert (machine.running(), machine.running("previous")) == ("two", "three")
    assert machine.release("rollback").returncode == 0
    assert machine.running() == "three"
    assert machine.restarts == 5


def test_a_release_with_devices_that_are_not_well_runs_all_the_same(machine: Machine) -> None:
    machine.enable()
    assert machine.release("install", "sick").returncode == 0
    assert machine.running() == "sick"


def test_a_release_that_does_not_come_up_is_taken_back(machine: Machine) -> None:
    machine.enable()
    for name in ("one", "two"):
        machine.release("install", name)
    done = machine.release("install", "dead")
    assert done.returncode == 1
    assert "releases/T2 does not come up" in done.stderr
    assert "releases/T1 runs again" in done.stderr
    assert (machine.running(), machine.running("previous")) == ("two", "one")
    assert machine.releases == ["T0", "T1"]
    assert machine.restarts == 4


def test_a_release_that_does_not_install_changes_nothing(machine: Machine) -> None:
    machine.enable()
    machine.release("install", "one")
    done = machine.release("install", "missing")
    assert done.returncode == 1
    assert "missing was not installed; nothing was changed" in done.stderr
    assert (machine.running(), machine.restarts, machine.releases) == ("one", 1, ["T0"])


def test_the_first_release_may_fail_as_well(machine: Machine) -> None:
    machine.enable()
    assert machine.release("install", "dead").returncode == 1
    assert not (machine.root / "current").is_symlink()
    assert machine.releases == []


def test_there_is_nothing_before_the_first(machine: Machine) -> None:
    machine.release("install", "one")
    done = machine.release("rollback")
    assert (done.returncode, done.stderr) == (1, "release.sh: there is no release before\n")
    assert machine.running() == "one"


@pytest.mark.parametrize(
    "arguments", [(), ("install",), ("install", "a", "b"), ("rollback", "x"), ("other",)]
)
def test_wrong_use_is_told(machine: Machine, arguments: tuple[str, ...]) -> None:
    done = machine.release(*arguments)
    assert (done.returncode, done.stderr) == (2, "release.sh: install REQUIREMENT, rollback, or list\n")


def test_one_at_a_time(machine: Machine) -> None:
    machine.release("install", "one")
    with subprocess.Popen(
        ["flock", str(machine.root / ".lock"), "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holding:
        assert holding.stdin is not None
        assert holding.stdout is not None
        # It echoes once it holds the lock.
        holding.stdin.write(b"x")
        holding.stdin.flush()
        assert holding.stdout.read(1) == b"x"
        done = machine.release("install", "two")
        holding.stdin.close()
    assert (done.returncode, done.stderr) == (1, "release.sh: another release.sh is at work\n")
    assert machine.running() == "one"
