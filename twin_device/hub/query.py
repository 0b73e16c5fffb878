"""IoT Hub's query language over twin documents.

    SELECT [TOP n] * | attribute [AS name], ... | COUNT() | AVG(x) | SUM(x) | MIN(x) | MAX(x) [AS name], ...
    FROM devices | devices.modules | devices.jobs
    [WHERE condition] [GROUP BY attribute, ...]

Source: IoT Hub, "Query language for device and module twins, jobs, and message routing". A member that is not
there is undefined; a comparison with undefined (!= too), or of values of different types, is undefined; what
is not exactly true selects nothing. null is the exception: it equals only null, differs from all others.
IN is the OR of its comparisons, x NIN [...] is NOT (x IN [...]). A row leaves out what is undefined, and
aggregates of no numbers.
"""

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Document = dict[str, Any]
_Expression = Callable[[Document], Any]

MAX_TEXT = 8192  # characters
# Each level takes some ten frames of Python's stack, which has 1000 for everybody.
_MAX_NESTING = 50
_COLLECTIONS = ("devices", "devices.modules", "devices.jobs")
_AGGREGATES = ("count", "avg", "sum", "min", "max")
# No attribute begins with these; [[from]] does.
_RESERVED = ("select", "from", "where", "group", "and", "or", "not", "in", "nin", "as")
_SPACE = re.compile(r"\s*")
# No alternative looks at characters twice, so that any text is read in linear time.
_TOKEN = re.compile(
    r"(?P<number>0[xX][0-9a-fA-F]+|(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(?![\w$])"
    r"|(?P<string>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
    r"|\[\[(?P<escaped>[^\[\]]+)\]\]"
    r"|(?P<word>(?:[^\W\d]|\$)[\w$]*)"
    r"|(?P<sign>!=|<>|<=|>=|[=<>+\-*/%(),.\[\]])",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_COMPARISONS = ("=", "!=", "<>", "<", ">", "<=", ">=")
_INTEGERS = range(-(2**63), 2**63)


class QueryError(Exception):
    """A query that cannot be understood. position: where, as an offset in the text from 0."""

    def __init__(self, text: str, position: int, message: str) -> None:
        line = text.count("\n", 0, position) + 1
        column = position - (text.rfind("\n", 0, position) + 1) + 1
        excerpt = " ".join(text[position : position + 20].split())
        near = f" near {excerpt!r}" if excerpt else " at its end"
        super().__init__(f"The query is wrong in line {line}, column {column}{near}: {message}.")
        self.position = position
        self.message = message


class _Undefined:
    def __repr__(self) -> str:
        return "undefined"


_UNDEFINED = _Undefined()


@dataclass
class _Path:
    """The value at a path of names and indexes. place: where it stands in the text."""

    parts: list[str | int]
    place: int

    def __call__(self, document: Document) -> Any:
        value: Any = document
        for index, part in enumerate(self.parts):
            if isinstance(part, int):
                if not isinstance(value, list) or part >= len(value):
                    return _UNDEFINED
            elif not isinstance(value, dict):
                return _UNDEFINED
            elif part not in value:
                # Only the names of a document's own members have no case: deviceId, DeviceId.
                found = [name for name in value if name.lower() == part.lower()] if index == 0 else []
                if not found:
                    return _UNDEFINED
                part = found[0]
            value = value[part]
        return value

    def leave_out(self, collection: str) -> None:
        """devices.jobs.jobId is jobId, devices.tags.x is tags.x."""
        words = collection.split(".")
        for length in range(len(words), 0, -1):
            first = [part.lower() if isinstance(part, str) else part for part in self.parts[:length]]
            if first == words[:length] and len(self.parts) > length:
                self.parts = self.parts[length:]
                return

    @property
    def name(self) -> str:
        """What a row calls it: the last name."""
        return next(part for part in reversed(self.parts) if isinstance(part, str))

    def same(self, other: "_Path") -> bool:
        return [str(self.parts[0]).lower(), *self.parts[1:]] == [
            str(other.parts[0]).lower(),
            *other.parts[1:],
        ]


@dataclass
class _Column:
    """A projection. aggregate: "" for the value itself. path: None for COUNT(). name: "" until known."""

    place: int
    aggregate: str
    path: _Path | None
    name: str


@dataclass
class Query:
    """A query that was understood. collection: where it looks. is_raw: False for SELECT * (whole twins)."""

    collection: str = "devices"
    top: int | None = None
    # Empty for SELECT *.
    columns: list[_Column] = field(default_factory=list)
    condition: _Expression | None = None
    groups: list[_Path] = field(default_factory=list)

    @property
    def is_raw(self) -> bool:
        return bool(self.columns)


def parse(text: str) -> Query:
    """Understand a query; QueryError if that is not possible."""
    return _Parser(text).query()


def parse_condition(text: str) -> Query:
    """Understand a condition alone, as jobs have it; "*" and "" are all devices."""
    return _Parser(text).condition_alone()


def run(query: Query, documents: Iterable[Document]) -> list[Document]:
    """The rows, in the documents' order; groups in the order of their first member. Rows of SELECT * are the
    documents themselves."""
    chosen = [one for one in documents if query.condition is None or query.condition(one) is True]
    if not query.columns:
        return chosen[: query.top]
    if not query.groups and not any(column.aggregate for column in query.columns):
        return [_row(query, [one]) for one in chosen[: query.top]]
    groups: dict[Any, list[Document]] = {} if query.groups else {(): []}
    for one in chosen:
        groups.setdefault(tuple(_key(group(one)) for group in query.groups), []).append(one)
    return [_row(query, members) for members in groups.values()][: query.top]


def _row(query: Query, members: list[Document]) -> Document:
    row: Document = {}
    for column in query.columns:
        if column.path is None:
            found: Any = len(members)
        elif column.aggregate:
            found = _aggregated(column.aggregate, [column.path(one) for one in members])
        else:
            found = column.path(members[0])
        if found is not _UNDEFINED:
            row[column.name] = found
    return row


def _aggregated(aggregate: str, values: list[Any]) -> Any:
    numbers = [value for value in values if _is_number(value)]
    if not numbers:
        return _UNDEFINED
    if aggregate in ("min", "max"):
        return min(numbers) if aggregate == "min" else max(numbers)
    return _number(lambda: sum(numbers) / len(numbers) if aggregate == "avg" else sum(numbers))


def _key(value: Any) -> tuple[Any, ...]:
    """The same for the same values: 1 and 1.0, but not 1 and true; members in any order."""
    parts: list[Any] = []
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            names = sorted(one)
            parts.append(("object", tuple(names)))
            rest += [one[name] for name in names]
        elif isinstance(one, list):
            parts.append(("array", len(one)))
            rest += one
        else:
            parts.append((isinstance(one, bool), one))
    return tuple(parts)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        if len(text) > MAX_TEXT:
            raise QueryError(text, MAX_TEXT, f"a query has at most {MAX_TEXT} characters")
        # Kind, value and place of each token; the last one is the end.
        self._tokens: list[tuple[str, str, int]] = []
        self._at = 0
        self._depth = 0
        self._paths: list[_Path] = []
        place = self._after_space(0)
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise QueryError(text, place, "no word, number, string or sign of the language begins here")
            kind = match.lastgroup or ""
            self._tokens.append((kind, match[kind], place))
            place = self._after_space(match.end())
        self._tokens.append(("end", "", len(text)))

    # ------------------------------------------------------------------ tokens

    def _after_space(self, place: int) -> int:
        match = _SPACE.match(self._text, place)
        return match.end() if match else place

    @property
    def _place(self) -> int:
        return self._tokens[self._at][2]

    def _error(self, message: str, place: int | None = None) -> QueryError:
        return QueryError(self._text, self._place if place is None else place, message)

    def _is(self, *wanted: str) -> bool:
        kind, value, _ = self._tokens[self._at]
        return kind in ("word", "sign") and value.lower() in wanted

    def _take(self, *wanted: str) -> str | None:
        """The word or sign, in lower case, if the next token is one of them."""
        if not self._is(*wanted):
            return None
        self._at += 1
        return self._tokens[self._at - 1][1].lower()

    def _take_kind(self, *wanted: str) -> str | None:
        """The text of the next token if it is of one of these kinds."""
        kind, value, _ = self._tokens[self._at]
        if kind not in wanted:
            return None
        self._at += 1
        return value

    def _expect(self, wanted: str) -> None:
        if self._take(wanted) is None:
            raise self._error(f"{wanted.upper()} is expected")

    def _end(self) -> None:
        if self._tokens[self._at][0] != "end":
            raise self._error("the query should end here")

    # ------------------------------------------------------------------ clauses

    def query(self) -> Query:
        query = Query()
        self._expect("select")
        if self._take("top"):
            query.top = self._top()
        if not self._take("*"):
            query.columns = [self._column()]
            while self._take(","):
                query.columns.append(self._column())
        self._expect("from")
        place = self._place
        found = self._name()
        while self._take("."):
            found += "." + self._name()
        query.collection = found.lower()
        if query.collection not in _COLLECTIONS:
            raise self._error(f"a query is FROM {', '.join(_COLLECTIONS)}", place)
        if self._take("where"):
            query.condition = self._or()
        place = self._place
        if self._take("group"):
            self._expect("by")
            query.groups = [self._path()]
            while self._take(","):
                query.groups.append(self._path())
        self._end()
        for path in self._paths:
            path.leave_out(query.collection)
        if query.groups and not query.columns:
            raise self._error("SELECT * does not go with GROUP BY", place)
        self._check(query)
        return query

    def condition_alone(self) -> Query:
        query = Query()
        if self._text.strip() not in ("", "*"):
            query.condition = self._or()
            self._end()
            for path in self._paths:
                path.leave_out(query.collection)
        return query

    def _top(self) -> int:
        place = self._place
        value = self._take_kind("number") or ""
        number = _literal(value) if value.isdigit() else 0
        if not isinstance(number, int) or number < 1:
            raise self._error("TOP is followed by a number from 1 up", place)
        return number

    def _column(self) -> _Column:
        place = self._place
        if self._tokens[self._at + 1 : self._at + 2] and self._tokens[self._at + 1][1] == "(":
            aggregate = self._take(*_AGGREGATES)
            if aggregate is None:
                raise self._error(f"there is only {', '.join(_AGGREGATES).upper()} here")
            self._expect("(")
            path = None if aggregate == "count" else self._path()
            self._expect(")")
        else:
            aggregate, path = "", self._path()
        return _Column(place, aggregate, path, self._name() if self._take("as") else "")

    def _check(self, query: Query) -> None:
        grouped = bool(query.groups) or any(column.aggregate for column in query.columns)
        names: set[str] = set()
        for column in query.columns:
            if query.collection == "devices.jobs":
                raise self._error("devices.jobs has SELECT * only", column.place)
            path = column.path
            alone = path is not None and not column.aggregate
            if grouped and alone and not any(path is not None and path.same(one) for one in query.groups):
                raise self._error("this is neither aggregated nor in GROUP BY", column.place)
            column.name = column.name or column.aggregate or (path.name if path else "")
            if column.name in names:
                raise self._error(f"{column.name!r} is there already: name it with AS", column.place)
            names.add(column.name)

    # ------------------------------------------------------------------ paths

    def _name(self) -> str:
        if self._is("group"):
            # Documented, also for the inner names of a path.
            raise self._error("GROUP is a keyword: as a name it is [[group]]")
        name = self._take_kind("word", "escaped")
        if name is None:
            raise self._error("a name is expected")
        return name

    def _path(self) -> _Path:
        place = self._place
        if self._is(*_RESERVED):
            raise self._error(
                f"an attribute is expected; one of this name is [[{self._tokens[self._at][1]}]]"
            )
        parts: list[str | int] = [self._name()]
        while True:
            if self._take("."):
                parts.append(self._name())
            elif self._take("["):
                parts.append(self._index())
                self._expect("]")
            else:
                break
        path = _Path(parts, place)
        self._paths.append(path)
        return path

    def _index(self) -> str | int:
        place = self._place
        name = self._take_kind("string")
        if name is not None:
            return self._unescaped(name, place)
        number = self._take_kind("number") or ""
        index = _literal(number) if number.isdigit() else None
        if not isinstance(index, int):
            raise self._error("a name in quotes or a number from 0 up is expected", place)
        return index

    # ------------------------------------------------------------------ expressions, from weak to strong

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > _MAX_NESTING:
            raise self._error(f"expressions nest at most {_MAX_NESTING} deep")

    def _or(self) -> _Expression:
        terms = [self._and()]
        while self._take("or"):
            terms.append(self._and())
        return terms[0] if len(terms) == 1 else lambda one: _any([term(one) for term in terms])

    def _and(self) -> _Expression:
        terms = [self._not()]
        while self._take("and"):
            terms.append(self._not())
        return terms[0] if len(terms) == 1 else lambda one: _all([term(one) for term in terms])

    def _not(self) -> _Expression:
        if self._take("not"):
            self._deeper()
            inner = self._not()
            self._depth -= 1
            return lambda one: _negated(inner(one))
        return self._comparison()

    def _comparison(self) -> _Expression:
        left = self._operation(0)
        sign = self._take(*_COMPARISONS)
        if sign:
            right = self._operation(0)
            return lambda one: _compared(sign, left(one), right(one))
        word = self._take("in", "nin")
        if word is None:
            return left
        closing = {"[": "]", "(": ")"}.get(self._take("[", "(") or "")
        if closing is None:
            raise self._error("IN is followed by [ and values")
        members = self._list(closing)

        def found(one: Document) -> Any:
            value = left(one)
            if value is _UNDEFINED:
                return _UNDEFINED
            among = _any([_compared("=", value, member(one)) for member in members])
            return among if word == "in" else _negated(among)

        return found

    def _list(self, closing: str) -> list[_Expression]:
        """What stands between brackets of which the first was read; they are one level deeper."""
        self._deeper()
        members: list[_Expression] = []
        while not self._take(closing):
            if members and not self._take(","):
                raise self._error(f"a comma or {closing} is expected")
            members.append(self._or())
        self._depth -= 1
        return members

    def _operation(self, level: int) -> _Expression:
        """Sums (level 0) of products (level 1)."""
        terms = [("+", self._unary() if level else self._operation(1))]
        while sign := self._take(*("*/%" if level else "+-")):
            terms.append((sign, self._unary() if level else self._operation(1)))
        if len(terms) == 1:
            return terms[0][1]

        def computed(one: Document) -> Any:
            total = terms[0][1](one)
            for sign, value in terms[1:]:
                total = _computed(sign, total, value(one))
            return total

        return computed

    def _unary(self) -> _Expression:
        if self._take("-"):
            self._deeper()
            inner = self._unary()
            self._depth -= 1
            return lambda one: _computed("-", 0, inner(one))
        return self._primary()

    def _primary(self) -> _Expression:
        kind, value, place = self._tokens[self._at]
        following = self._tokens[self._at + 1][1] if kind == "word" else ""
        if kind == "number":
            self._at += 1
            number = _literal(value)
            if number is _UNDEFINED:
                raise self._error("there is no number that large", place)
            return lambda _: number
        if kind == "string":
            self._at += 1
            string = self._unescaped(value, place)
            return lambda _: string
        if self._take("("):
            self._deeper()
            inner = self._or()
            self._depth -= 1
            self._expect(")")
            return inner
        if self._take("["):
            members = self._list("]")
            return lambda one: [member(one) for member in members]
        if following not in (".", "[") and self._is(*_CONSTANTS):
            self._at += 1
            constant = _CONSTANTS[value.lower()]
            return lambda _: constant
        if following == "(" and not self._is(*_RESERVED):
            return self._call()
        if kind not in ("word", "escaped"):
            raise self._error("a value is expected")
        return self._path()

    def _call(self) -> _Expression:
        place = self._place
        function, counts = _FUNCTIONS.get(self._name().lower(), (None, ()))
        if function is None:
            raise self._error("there is no such function", place)
        call = function
        self._expect("(")
        arguments = self._list(")")
        if len(arguments) not in counts:
            raise self._error("it has another number of arguments", place)
        return lambda one: call(*[argument(one) for argument in arguments])

    def _unescaped(self, string: str, place: int) -> str:
        """The value of a string in quotes."""

        def character(match: "re.Match[str]") -> str:
            code = match[1]
            if code == "u":
                raise self._error("\\u is followed by four hexadecimal digits", place + 1 + match.start())
            return chr(int(code[1:], 16)) if len(code) == 5 else _ESCAPED.get(code, code)

        value = _ESCAPE.sub(character, string[1:-1])
        # Two \u of a surrogate pair are one character, as in JSON.
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _literal(text: str) -> Any:
    """The value of a number; undefined if there is none that large."""
    if text[:2] in ("0x", "0X"):
        return _number(lambda: int(text, 16))
    return _number(lambda: int(text) if text.isdigit() and len(text) < 20 else float(text))


def _number(work: Callable[[], Any]) -> Any:
    """The result as a number of 64 bits; undefined where there is none."""
    try:
        found = work()
        if isinstance(found, int) and found in _INTEGERS:
            return found
        found = float(found)
    except (ArithmeticError, TypeError, ValueError):  # TypeError: of a complex number
        return _UNDEFINED
    return found if math.isfinite(found) else _UNDEFINED


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _negated(value: Any) -> Any:
    return (not value) if isinstance(value, bool) else _UNDEFINED


def _any(values: list[Any]) -> Any:
    if any(value is True for value in values):
        return True
    return False if all(value is False for value in values) else _UNDEFINED


def _all(values: list[Any]) -> Any:
    if any(value is False for value in values):
        return False
    return True if all(value is True for value in values) else _UNDEFINED


def _compared(sign: str, left: Any, right: Any) -> Any:
    if left is _UNDEFINED or right is _UNDEFINED:
        return _UNDEFINED
    equal, unequal = sign == "=", sign in ("!=", "<>")
    if left is None or right is None:
        if equal or unequal:
            return (left is right) is equal
        return _UNDEFINED
    alike = (
        (_is_number(left) and _is_number(right))
        or (isinstance(left, str) and isinstance(right, str))
        or (isinstance(left, bool) and isinstance(right, bool))
    )
    if not alike:
        return _UNDEFINED
    if equal or unequal:
        return (left == right) is equal
    if isinstance(left, bool):
        return _UNDEFINED
    return {"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[sign]


def _computed(sign: str, left: Any, right: Any) -> Any:
    if not _is_number(left) or not _is_number(right):
        return _UNDEFINED
    return _number(lambda: _OPERATIONS[sign](left, right))


_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "%": math.fmod,  # has the sign of the dividend
}


def _of_strings(work: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*values: Any) -> Any:
        return work(*values) if all(isinstance(value, str) for value in values) else _UNDEFINED

    return guarded


def _of_numbers(work: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*values: Any) -> Any:
        return _number(lambda: work(*values)) if all(_is_number(value) for value in values) else _UNDEFINED

    return guarded


def _is(*kinds: type) -> Callable[[Any], Any]:
    return lambda value: isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


def _substring(text: Any, *bounds: Any) -> Any:
    """From a start, counted from 0, to the end or of a length."""
    whole = all(_is_number(bound) and bound >= 0 and bound % 1 == 0 for bound in bounds)
    if not isinstance(text, str) or not whole:
        return _UNDEFINED
    start, *length = [int(bound) for bound in bounds]
    return text[start : start + length[0]] if length else text[start:]


def _power(base: float, exponent: float) -> Any:
    # As floats: integers could grow without end.
    return float(base) ** float(exponent)


_CONSTANTS = {"true": True, "false": False, "null": None, "undefined": _UNDEFINED}
# What each does, and with how many arguments.
_FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "is_defined": (lambda value: value is not _UNDEFINED, (1,)),
    "is_null": (lambda value: value is None, (1,)),
    "is_bool": (_is(bool), (1,)),
    "is_number": (_is_number, (1,)),
    "is_string": (_is(str), (1,)),
    "is_object": (_is(dict), (1,)),
    "is_array": (_is(list), (1,)),
    "is_primitive": (lambda value: value is None or isinstance(value, (str, int, float)), (1,)),
    "startswith": (_of_strings(str.startswith), (2,)),
    "starts_with": (_of_strings(str.startswith), (2,)),
    "endswith": (_of_strings(str.endswith), (2,)),
    "ends_with": (_of_strings(str.endswith), (2,)),
    "contains": (_of_strings(lambda text, part: part in text), (2,)),
    "index_of": (_of_strings(str.find), (2,)),
    "length": (_of_strings(len), (1,)),
    "lower": (_of_strings(str.lower), (1,)),
    "upper": (_of_strings(str.upper), (1,)),
    "concat": (_of_strings(lambda *parts: "".join(parts)), tuple(range(2, 33))),
    "substring": (_substring, (2, 3)),
    "abs": (_of_numbers(abs), (1,)),
    "ceiling": (_of_numbers(math.ceil), (1,)),
    "floor": (_of_numbers(math.floor), (1,)),
    "exp": (_of_numbers(math.exp), (1,)),
    "power": (_of_numbers(_power), (2,)),
    "sign": (_of_numbers(lambda value: (value > 0) - (value < 0)), (1,)),
    "sqrt": (_of_numbers(math.sqrt), (1,)),
    "square": (_of_numbers(lambda value: _power(value, 2)), (1,)),
}
