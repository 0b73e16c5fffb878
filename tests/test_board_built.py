"""The package of `make mpy` does what its sources do: the vectors. Its client: see test_board_shared.py."""

import ast
import importlib
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from tests.interop import strangers
from tests.test_vectors import WASM, WASM_RUNNER
from tests.vm import ROOT, build, micropython, run
from twin_device.core.credentials import Credentials

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


@pytest.fixture(scope="module")
def vectors(builder, tmp_path_factory):
    """The script of the vectors with the names that the package has; what it calls by name stays in it."""
    tmp_path = tmp_path_factory.mktemp("vectors")
    tree = ast.parse((VECTORS / "run.py").read_text("utf-8"))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    direct = {node for node in attributes if isinstance(node.value, ast.Name) and node.value.id in MODULES}
    names = {node.attr for node in direct}
    used = {
        node.value.id: {each.attr for each in direct if each.value.id == node.value.id} for node in direct
    }
    used.update(settings={"Settings"}, stream={"reader"}, twin={"Twin"})
    package = builder.build(tmp_path, ("stop", "abandon", "reader", "Twin", "on_property", *names))
    for node in set(attributes) - direct:
        node.attr = package.attributes.get(node.attr, node.attr)
    (tmp_path / "run.py").write_text(ast.unparse(tree))
    core = tmp_path / "core"
    core.mkdir()
    (core / "__init__.py").write_text("")
    for name, its in used.items():
        module = f"twin_device.{name}" if name in builder.APART else "twin_device"
        (core / f"{name}.py").write_text(f"from {module} import {', '.join(sorted(its))}\n")
    builder.compiled(tmp_path)
    return tmp_path


def hold(found):
    return [line for line in found if not line.endswith(" PASS")] == ["failed: 0"] and len(found) > 500


def test_every_vector_holds(vectors):
    assert hold(lines(micropython(), "MICROPYPATH", vectors))


def test_every_vector_holds_on_a_machine_of_32_bits(vectors, tmp_path_factory):
    with strangers.node(tmp_path_factory.mktemp("wasm") / "node", WASM) as modules:
        command = ["node", WASM_RUNNER, modules, vectors / "run.py", VECTORS, vectors, VECTORS]
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert hold(done.stdout.splitlines())


FORGETFUL = """
import os, sys
from twin_device import TwinClient

def make(host):
    text = "HostName=" + host + ";DeviceId=d;SharedAccessKey=a2V5"
    client = TwinClient.from_connection_string(text, tls=False)
    print(sorted(name for name in sys.modules if name.startswith("twin_device")))

make("[::1]")
place = os.getenv("PLACE") + "/twin_device/identity.py"
with open(place, "w") as file:
    file.write("raise MemoryError")
try:
    make("[::1]")
except MemoryError:
    print("no memory")
make("h:2")
os.remove(place)
make("[::1]")
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


USER_NAMES = """
from twin_device import TwinClient

for options in ROWS:
    text = "HostName=h;DeviceId=d;SharedAccessKey=a2V5"
    print(TwinClient.from_connection_string(text, tls=False, **options).USER_NAME)
"""


def test_the_user_name_is_that_of_the_core(builder, tmp_path):
    rows = [{}, {"product_info": "a b"}, {"model_id": "dtmi:a;1"}, {"product_info": "x/2", "model_id": "m"}]
    package = builder.build(tmp_path)
    program = USER_NAMES.replace("ROWS", repr(rows)).replace("USER_NAME", package.attributes["_user_name"])
    (tmp_path / "program.py").write_text(program)
    version = json.loads((ROOT / "package.json").read_text())["version"]
    product = {"product_info": "twin-device-micropython/" + version}
    expected = [Credentials("h", "d").user_name(**{**product, **row}) for row in rows]
    done = run(tmp_path / "program.py", tmp_path)
    assert done.stdout.splitlines() == expected, done.stderr


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


def test_what_no_board_calls_is_left_out(builder, tmp_path):
    builder.build(tmp_path)
    # The repr of a class that only CPython's clients make.
    assert not [path for path in (tmp_path / "twin_device").iterdir() if "Credentials(" in path.read_text()]


def test_an_app_finds_every_name(builder, tmp_path):
    builder.build(tmp_path)
    made = face(tmp_path / "twin_device" / "__init__.py", tmp_path / "twin_device" / "face.py")
    source = face(ROOT / "micropython" / "twin_device" / "client.py")
    assert {name: made[name] for name in source} == source


# What numbers of names and locals stand in: names beyond 128, locals beyond 16, jumps over more than 64 and
# 128 bytes both ways, and all that jumps out of somewhere.
INTRICATE = """
{names}
def many(first, *rest, key=3, **others):
    {locals}
    total = 0
    for number in range(40):
        if number % 2:
            total += l0 + l29
            continue
        {long}
        if total > 100000:
            break
    else:
        total = -total
    return first, rest, key, sorted(others), total, l17

def distant(a):
    total = 0
    {distances}
    return total

def closing(a, b):
    c = a + b
    e = c + c
    e += e
    def inner(d):
        nonlocal c
        c += d
        return c, a
    return inner, e, [lambda: c, lambda: c + a, lambda: c - a, lambda: c * a][e % 4]()

def leaving(how):
    told = []
    for outer in range(3):
        try:
            for inner in range(3):
                with Context(told):
                    try:
                        if how == inner:
                            return told
                        if how == 10 + inner:
                            raise KeyError(how)
                        if how == 20 + inner:
                            break
                        if how == 30 + inner:
                            continue
                        {long}
                    finally:
                        told.append((outer, inner))
        except KeyError as error:
            told.append(error.args)
        else:
            told.append("else")
    return told

def ending(how, told):
    for number in (1, 2, 3):
        if how == number:
            told.append(number)
            told.append(how)
            continue
        if how == number + 10:
            told.append(number)
            told.append(how)
            break
        if how == number + 20:
            told.append(number)
            told.append(how)
            return len(told)
        try:
            if how == number + 30:
                told.append(number)
                raise KeyError(how)
            if how == number + 40:
                told.append(number)
                continue
        except KeyError:
            if how > 32:
                told.append(number)
                raise KeyError(how)
            told.append(number)
            continue
        finally:
            if how > 42:
                told.append(number)
        told.append(number)
        told.append(how)
    else:
        told.append("else")
        return len(told)
    while how:
        while how > 5:
            if how > 8:
                break
            how -= 1
        else:
            how -= 1
            continue
        break
    return len(told)

def chosen(how):
    if how == 1:
        told = n1 if n5 > how else n2
        return told + 1 if n3 else n4
    if how == 2:
        told = n1 if n6 > how else n2
        return told + 1 if n3 else n4
    for number in (1, 2):
        if how == number + 2:
            told = n1 if n7 > how else n2
            continue
        if how == number + 3:
            told = n1 if n8 < how else n2
            continue
        told = 9
    if how == 5:
        for _ in ():
            told = 4
    else:
        pass
    if how == 6:
        return told > 7 or n4
    if told > 3:
        return how or n4
    return told > 2 or n4

def caught(how):
    told = []
    try:
        return ending(how, told), told
    except KeyError as error:
        return error.args, told

class Context:
    def __init__(self, told):
        self.told = told

    def __enter__(self):
        self.told.append("in")

    def __exit__(self, kind, value, trace):
        self.told.append(kind)

def generated():
    total = 0
    for number in range(5):
        got = yield number
        total += got or 0
    return total

def delegating():
    result = yield from generated()
    yield "done", result

print(many(1, 2, 3, key=4, z=5, y=6), distant(0), distant(1))
print([closing(1, 2)[0](number) for number in (3, 4)], closing(1, 2)[1:])
for how in (0, 2, 10, 12, 20, 21, 30, 99):
    print(how, leaving(how))
print([caught(how) for how in range(50)], [chosen(how) for how in range(9)])
print(list(delegating()), [x * y for x in range(3) for y in range(x)], dict(a=1))
print((lambda *a, **b: (a, b))(1, c=2), 0 < len("a" * 20) < 30 or None, n0, n149)
"""

# A way forward and one back, over each of so many steps, and the ones that only go forward.
DISTANT = """if a: {steps}
    k = a
    while k < 3: k += 1; {steps}
    for _ in (1, 2): {steps}
    total = total or a and n5
    try: {steps}
    except ValueError: pass\
"""


@pytest.fixture
def mpy(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "micropython")
    return importlib.import_module("mpy")


def test_a_smaller_module_does_the_same(builder, mpy, tmp_path):
    program = INTRICATE.format(
        names="\n".join(f"n{number} = {number}" for number in range(150)),
        locals="; ".join(f"l{number} = {number} - key" for number in range(30)),
        distances="\n    ".join(
            DISTANT.format(steps="; ".join(["total += n3"] * count)) for count in range(2, 60)
        ),
        long="; ".join(f"total = n{number} + len(str(n{number}))" for number in range(100, 130)),
    )
    printed, made = [], []
    for name in ("before", "after"):
        (tmp_path / "module.py").write_text(program)
        made.append(builder.compiled_module(tmp_path / "module.py"))
        if name == "after":
            made[-1] = mpy.smaller(made[-1])
        (tmp_path / "module.py").unlink()
        (tmp_path / "module.mpy").write_bytes(made[-1])
        (tmp_path / "program.py").write_text("import module\n")
        done = run(tmp_path / "program.py", tmp_path)
        printed.append(done.stdout)
        assert done.returncode == 0, done.stderr
    assert printed[0] == printed[1]
    assert printed[0].count("\n") == 13
    assert len(made[1]) < len(made[0])
    assert mpy.smaller(made[1]) == made[1]


@pytest.mark.parametrize("data", [b"", b"M\x05\x00\x1f", b"M\x06\x1a\x1f", b"no module"])
def test_what_is_no_module_of_bytecode_is_refused(mpy, data):
    with pytest.raises(ValueError, match=r"no \.mpy of bytecode"):
        mpy.smaller(data)
