"""The package of `make mpy` does what its sources do: the vectors. Its client: see test_board_shared.py."""

import ast
import importlib.util
import subprocess
from pathlib import Path

import pytest

from tests.vm import ROOT, build, micropython, run

VECTORS = Path(__file__).parent / "vectors"
MODULES = ("credentials", "errors", "patch", "topics")


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build", ROOT / "micropython" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(interpreter, variable, folder):
    command = [interpreter, str(folder / "run.py"), str(VECTORS)]
    environment = {variable: f"{folder}:.frozen", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    return done.stdout.splitlines()


def test_every_vector_holds(builder, tmp_path):
    """The script of the vectors with the names that the package has; what it calls by name stays in it."""
    tree = ast.parse((VECTORS / "run.py").read_text("utf-8"))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    direct = {node for node in attributes if isinstance(node.value, ast.Name) and node.value.id in MODULES}
    names = {node.attr for node in direct}
    used = {
        node.value.id: {each.attr for each in direct if each.value.id == node.value.id} for node in direct
    }
    used.update(settings={"Settings"}, stream={"Reader"}, twin={"Twin"})
    package = builder.build(tmp_path, ("stop", "abandon", "Reader", "Twin", "on_property", *names))
    for node in set(attributes) - direct:
        node.attr = package.attributes.get(node.attr, node.attr)
    (tmp_path / "run.py").write_text(ast.unparse(tree))
    core = tmp_path / "core"
    core.mkdir()
    (core / "__init__.py").write_text("")
    for name, its in used.items():
        module = f"twin_device.{name}" if name in builder.APART else "twin_device"
        (core / f"{name}.py").write_text(f"from {module} import {', '.join(sorted(its))}\n")
    found = lines(micropython(), "MICROPYPATH", tmp_path)
    assert [line for line in found if not line.endswith(" PASS")] == ["failed: 0"]
    assert len(found) > 500


FORGETFUL = """
import os, sys
from twin_device import TwinClient

def make(host):
    text = "HostName=" + host + ";DeviceId=d;SharedAccessKey=a2V5"
    client = TwinClient.from_connection_string(text, tls=False)
    print(sorted(name for name in sys.modules if name.startswith("twin_device")))

make("h:1")
place = os.getenv("PLACE") + "/twin_device/identity.py"
with open(place, "w") as file:
    file.write("raise MemoryError")
try:
    make("h:1")
except MemoryError:
    print("no memory")
make("h")
os.remove(place)
make("h:1")
"""


def test_what_reads_unusual_identities_is_in_memory_only_while_it_is_used(tmp_path):
    build(tmp_path)
    (tmp_path / "program.py").write_text(FORGETFUL)
    done = run(tmp_path / "program.py", tmp_path, PLACE=str(tmp_path))
    alone = "['twin_device']"
    assert done.stdout.splitlines() == [alone, "no memory", alone, alone], done.stderr


STORED = """
import asyncio, os
from twin_device import TwinClient

text = "HostName=localhost;DeviceId=d;SharedAccessKey=a2V5"

def make():
    return TwinClient.from_connection_string(text, tls=False, store=os.getenv("PLACE"), keep_reported=True)

async def main():
    client = make()
    await client.report({"a": 1}, wait=False)
    await client.report({"b": {"c": 2}}, wait=False)
    await client.close()
    again = make()
    print(again.reported, sorted(again.CORE().SHOWN.items()))
    await again.close()

asyncio.run(main())
"""


def test_a_store_is_written_and_read(builder, tmp_path):
    package = builder.build(tmp_path)
    (tmp_path / "program.py").write_text(
        STORED.replace("SHOWN", package.attributes["target"]).replace("CORE", package.attributes["_core"])
    )
    done = run(tmp_path / "program.py", tmp_path, PLACE=str(tmp_path / "twin.json"))
    assert done.stdout == "{} [('a', 1), ('b', {'c': 2})]\n", done.stderr


def face(path, rare=None):
    """The public functions of TwinClient, and what their arguments are called. rare: the rest of them."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "TwinClient":
            nodes = node.body
    nodes += ast.parse(rare.read_text("utf-8")).body if rare else []
    functions = [each for each in nodes if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {
        node.name: [each.arg for each in (*node.args.args[1:], *node.args.kwonlyargs)]
        for node in functions
        if not node.name.startswith("_") or node.name == "__init__"
    }


def test_an_app_finds_every_name(builder, tmp_path):
    builder.build(tmp_path)
    made = face(tmp_path / "twin_device" / "__init__.py", tmp_path / "twin_device" / "face.py")
    source = face(ROOT / "micropython" / "twin_device" / "client.py")
    assert {name: made[name] for name in source} == source
