"""How the client comes to a board: mip, a frozen manifest, a ROM file system; README's app runs on each."""

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm import BOARD, CORE, ROOT, micropython, stage
from tests.waiting import PATIENCE
from twin_device.hub import LocalHub

EXAMPLE = ROOT / "examples" / "board.py"


def modules() -> dict[str, Path]:
    """Every module of the package as a board has it, and where it comes from."""
    found = {f"twin_device/{path.name}": path for path in BOARD.glob("*.py")}
    return found | {f"twin_device/core/{path.name}": path for path in CORE.glob("*.py")}


@pytest.fixture
def repository() -> Iterator[str]:
    """The repository's files over HTTP, as mip gets them from GitHub."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(ROOT)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        yield hub


def plays(hub: LocalHub, folder: Path, program: str, path: Path) -> None:
    """README's app, as it stands: it is told a change, and reports it."""
    device = hub.create_device(folder.name, desired={"telemetryInterval": 30})
    ca_file = str(Path(hub.ca_file).with_suffix(".der"))
    config = {"connectionString": device.connection_string, "caFile": ca_file}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "main.py").write_text(program)
    with subprocess.Popen(
        [micropython(), "main.py"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MICROPYPATH": f"{path}:.frozen"},
    ) as process:
        try:
            device.wait_for({"telemetryInterval": 30}, PATIENCE)
            device.patch_desired({"telemetryInterval": 15})
            device.wait_for({"telemetryInterval": 15}, PATIENCE)
        finally:
            process.kill()
        assert process.stdout is not None
        assert process.stdout.read().splitlines() == [
            "changed: {'telemetryInterval': 30}",
            "changed: {'telemetryInterval': 15}",
        ]


def test_mip_installs_it_and_the_app_runs(repository: str, hub: LocalHub, tmp_path: Path) -> None:
    target = tmp_path / "lib"
    done = subprocess.run(
        [micropython(), "-m", "mip", "install", "--target", str(target), f"{repository}/package.json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    installed = {path.relative_to(target).as_posix(): path for path in target.rglob("*.py")}
    assert installed.keys() == modules().keys()
    for name, path in modules().items():
        assert installed[name].read_bytes() == path.read_bytes()
    plays(hub, tmp_path, EXAMPLE.read_text(), target)


def test_the_version_is_the_same_everywhere() -> None:
    version = json.loads((ROOT / "package.json").read_text())["version"]
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f'_VERSION = "{version}"' in (BOARD / "client.py").read_text()
    assert f'_PRODUCT = "twin-device-micropython/{version}"' in (BOARD / "client.py").read_text()


def test_the_manifest_freezes_every_module_once() -> None:
    """Read as MicroPython's makemanifest reads it: package() with the files of a package, below base_path."""
    manifest = ROOT / "micropython" / "manifest.py"
    frozen: list[str] = []

    def package(
        name: str, files: tuple[str, ...] | None = None, base_path: str = ".", opt: int | None = None
    ) -> None:
        assert opt == 3
        folder = (manifest.parent / base_path / name).resolve()
        found = files if files is not None else [path.name for path in folder.glob("*.py")]
        for file in found:
            path = folder / file
            assert path == modules()[f"{name}/{file}"]
            frozen.append(f"{name}/{file}")

    exec(compile(manifest.read_text(), str(manifest), "exec"), {"package": package})
    assert sorted(frozen) == sorted(modules())


def test_a_rom_file_system_is_built_and_runs(hub: LocalHub, tmp_path: Path) -> None:
    package = stage(tmp_path / "package")
    image = tmp_path / "romfs.img"
    done = subprocess.run(
        [sys.executable, "-m", "mpremote", "romfs", "--output", str(image), "build", str(package)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    mount = (
        "import sys, vfs\n"
        f"vfs.mount(vfs.VfsRom(open({str(image)!r}, 'rb').read()), '/rom')\n"
        "sys.path.insert(0, '/rom')\n"
    )
    plays(hub, tmp_path, mount + EXAMPLE.read_text(), Path("/nowhere"))


def test_readme_shows_the_app_that_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "micropython" / "README.md").read_text(), re.DOTALL)
    assert EXAMPLE.read_text() in blocks
