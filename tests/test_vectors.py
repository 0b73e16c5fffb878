"""The vectors, run by the same script on CPython and on a real MicroPython: the lines must be the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.strangers import node
from tests.vm import CORE, micropython

VECTORS = Path(__file__).parent / "vectors"
WASM = "@micropython/micropython-webassembly-pyscript@1.27.0"
WASM_RUNNER = Path(__file__).parent / "wasm.mjs"


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder whose package `core` is the core itself, file by file."""
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(CORE, folder / "core", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def lines(interpreter, variable, path):
    environment = {**os.environ, variable: path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [interpreter, str(VECTORS / "run.py"), str(VECTORS)],
        env=environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()[-2000:]
    return done.stdout.decode().splitlines()


@pytest.fixture(scope="module")
def on_cpython(packages):
    return lines(sys.executable, "PYTHONPATH", str(packages))


@pytest.fixture(scope="module")
def on_micropython(packages):
    return lines(micropython(), "MICROPYPATH", f"{packages}:.frozen")


@pytest.fixture(scope="module")
def on_wasm(packages, tmp_path_factory):
    """MicroPython's WebAssembly build: a machine of 32 bits."""
    with node(tmp_path_factory.mktemp("wasm") / "node", WASM) as modules:
        command = ["node", WASM_RUNNER, modules, VECTORS / "run.py", VECTORS, packages, VECTORS]
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=60, check=False
        )
    # An error shows the whole runtime, which is one line.
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def cases():
    return sum(
        len(case["steps"]) if name.stem == "sequences" else 1
        for name in VECTORS.glob("*.json")
        for case in json.loads(name.read_text("utf-8"))
    )


def test_every_vector_holds_on_cpython(on_cpython):
    assert [line for line in on_cpython if not line.endswith(" PASS")] == ["failed: 0"]


def test_every_vector_holds_on_micropython(on_micropython):
    assert [line for line in on_micropython if not line.endswith(" PASS")] == ["failed: 0"]


def test_every_vector_holds_on_wasm(on_wasm):
    assert [line for line in on_wasm if not line.endswith(" PASS")] == ["failed: 0"]


def test_all_print_the_same_lines(on_cpython, on_micropython):
    assert on_micropython == on_cpython


def test_a_machine_of_32_bits_prints_the_same_lines(on_cpython, on_wasm):
    assert on_wasm == on_cpython


def test_no_vector_is_left_out(on_cpython):
    assert len(on_cpython) == cases() + 1


def test_each_case_has_a_name_of_its_own():
    for file in VECTORS.glob("*.json"):
        names = [case["name"] for case in json.loads(file.read_text("utf-8"))]
        assert len(set(names)) == len(names), file.name
